"""What does a reader see first? The `README.md` of a bundle: what it is, how to use it, how to check it."""

from typing import Any

from compress.bundle.check import SAMPLES
from compress.bundle.finished_run import FinishedRun
from compress.verification.quantization_loss import AGREEMENT

_EXIT_CODES = """\
| exit code | meaning |
|---|---|
| 0 | all checks that could be made passed |
| 1 | a check failed |
| 2 | the command line is wrong |
| 4 | no bundle, damaged or unreadable, and the model was not run; or `--json` could not be written |
| 5 | the execution provider, onnxruntime or another package is missing |
"""
_PRECISIONS = {
    "int8": " It is quantised to INT8: weights and activations are rounded to 8 bits, each processor rounds in its own "
    "way, and outputs differ more between machines than those of a float file.",
    "fp16": " It is in half precision (FP16): each processor rounds in its own way, and outputs differ more between "
    "machines than those of a file in single precision.",
}
_OF_FLOAT = ("macs_agree", "weights_agree", "parity", "parity_edges")  # next to a quantised file
_OF_BASELINE = ("baseline_agrees",)
_SHARES = {"slimming": "all stages up to the float file", "quantize": "quantisation"}


def render_readme(run: FinishedRun, model: dict[str, Any], files: list[str]) -> str:
    """Return the text.

    Args:
        run: What is handed over.
        model: Content of `model.json`.
        files: Names of the files with the model and its weights.
    """
    parts = [
        f"# {run.name}",
        _introduction(run, model),
        _figures(run.report, model["measured"]),
        *_rounding(run.report),
        "## Use",
        f"```python\n{example(model)}```",
        f"Needs numpy and onnxruntime. `images` are pixels as they come out of a decoder, "
        f"{_geometry(model['preprocessing'])}; the third line is the rest of the preprocessing. "
        f"The output has one value a class, the largest is the answer; `model.json` has the names of the classes where "
        f"they are known.",
        "## Check",
        "```sh\npython check.py\n```",
        "says whether every file is as it was written, whether the model computes here what it computed there, and "
        "how fast. It needs no more than Python, numpy and onnxruntime, and takes `--provider`, `--threads`, "
        "`--max-latency-ms`, `--public-key` and `--json`.",
        _EXIT_CODES.rstrip(),
        "## Files",
        "\n".join(_file_rows(files)),
        _licence(model["licence"]),
    ]
    return "\n\n".join(parts) + "\n"


def example(model: dict[str, Any]) -> str:
    """Return five lines of Python that classify the samples, run in the folder of the bundle."""
    wanted = model["preprocessing"]
    (source,), (target,) = model["signature"]["inputs"], model["signature"]["outputs"]
    batch = source["shape"][0]
    picked = f"[:{batch}]" if isinstance(batch, int) else ""
    reversed_ = "[..., ::-1]" if wanted["channels"] == "BGR" else ""
    moved = ".transpose(0, 3, 1, 2)" if wanted["layout"] == "NCHW" else ""
    mean, std = list(wanted["mean"]), list(wanted["std"])
    return (
        "import numpy as np, onnxruntime as ort\n"
        f'images = np.load("{SAMPLES}")["images"]{picked}  # uint8 (N, H, W, C)\n'
        f"x = (images{reversed_} * np.float32({wanted['scale']!r}) - np.float32({mean})) / np.float32({std})\n"
        'session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])\n'
        f"print(session.run([{target['name']!r}], {{{source['name']!r}: x{moved}}})[0].argmax(axis=1))\n"
    )


def _introduction(run: FinishedRun, model: dict[str, Any]) -> str:
    (source,) = model["signature"]["inputs"]
    shape = " x ".join(str(size) for size in source["shape"])
    outcome = (
        f"It passed its verification: {count_checks(run.report['verdict']['checks'])}; none failed."
        if run.has_passed
        else f"**It did not pass its verification** ({run.unmet}), and was bundled all the same."
    )
    precision = _PRECISIONS.get(model["precision"], "")
    about = f"An image classifier in ONNX, made smaller by compress.{precision} Input `{source['name']}`: {shape}."
    return f"{about} {outcome}"


def count_checks(checks: list[dict[str, Any]]) -> str:
    """Return how many checks were made on which file.

    Args:
        checks: Of the verdict, as plain values.

    >>> made = ["structure", "parity", "quantized_agreement", "baseline_agrees"]
    >>> count_checks([{"name": name, "status": "pass"} for name in made])
    '2 checks on this file, 1 on the float file that it was quantised from, 1 on the untouched network'
    """
    made = [check["name"] for check in checks if check["status"] != "skipped"]
    float_ones = _OF_FLOAT if any(check["name"] == AGREEMENT for check in checks) else ()
    whole, untouched = (sum(name in names for name in made) for names in (float_ones, _OF_BASELINE))
    own = len(made) - whole - untouched
    said = [f"{own} {'check' if own == 1 else 'checks'} on this file"]
    said += [f"{whole} on the float file that it was quantised from"] if whole else []
    return ", ".join([*said, *([f"{untouched} on the untouched network"] if untouched else [])])


def _rounding(report: dict[str, Any]) -> list[str]:
    """Return a paragraph on what quantisation did, none where it did nothing or that was not measured."""
    said = []
    agreeing = next((one["value"] for one in report["verdict"]["checks"] if one["name"] == AGREEMENT), None)
    if agreeing is not None:
        said.append(f"It gives {100 * agreeing:.2f} % of the evaluation images the class that the float file gives.")
    shares = report["details"].get("shares") or []
    if any(share["stage"] == "quantize" for share in shares):
        parts = [
            f"{_SHARES.get(share['stage'], share['stage'])} {share['points']:+.2f} points, from "
            f"{100 * share['top1_before']:.2f} % to {100 * share['top1_after']:.2f} %"
            for share in shares
        ]
        said.append(f"What each part did to top-1: {'; '.join(parts)}.")
    return [" ".join(said)] if said else []


def _figures(report: dict[str, Any], measured: dict[str, Any]) -> str:
    before, after = report["baseline"], report["slim"]
    if before is None or after is None:
        return "Figures were not measured."
    rows = [
        ("MACs", f"{before['macs']:,}", f"{after['macs']:,}"),
        ("params", f"{before['params']:,}", f"{after['params']:,}"),
        ("file (MB)", f"{before['size_bytes'] / 1e6:.2f}", f"{after['size_bytes'] / 1e6:.2f}"),
    ]
    for name, old in before["quality"].items():
        if name in after["quality"]:
            rows.append((name, f"{old:.4f}", f"{after['quality'][name]:.4f}{_interval(report, name)}"))
    for name in ("p50", "p95"):
        if name in before["latency_ms"] and name in after["latency_ms"]:
            old, new = before["latency_ms"][name], after["latency_ms"][name]
            rows.append((f"latency {name} (ms)", f"{old:.3f}", f"{new:.3f}"))
    table = ["| | untouched network | this one |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    where = f"{measured['machine']}, {measured['runtime']}, {measured['provider']}"
    how = f"threads: {measured['threads']}, batch: {measured['batch_size']}"
    text = f"In brackets are 95 % intervals. Latency was measured on {where}, {how}.{_speedup(report)}"
    return "\n".join(table) + f"\n\n{text}"


def _speedup(report: dict[str, Any]) -> str:
    """Return the sentence about the speed-up and the baseline's ratio to itself; "" where they were not measured."""
    ratio = (report["details"].get("latency") or {}).get("ratio") or {}
    control = ratio.get("control")
    if not control:
        return ""
    speedup = f"{1 / ratio['value']:.2f} ({1 / ratio['high']:.2f} to {1 / ratio['low']:.2f})"
    itself = f"{control['value']:.3f} ({control['low']:.3f} to {control['high']:.3f})"
    return f" Speed-up: {speedup}; the baseline against itself in the same run: {itself}."


def _interval(report: dict[str, Any], name: str) -> str:
    """Return " (0.91 to 0.93)" where a 95 % interval is known."""
    estimate = ((report["details"].get("quality") or {}).get("slim") or {}).get(name) or {}
    low, high = estimate.get("low"), estimate.get("high")
    return "" if low is None or high is None else f" ({low:.4f} to {high:.4f})"


def _geometry(preprocessing: dict[str, Any]) -> str:
    said = []
    resize = preprocessing["resize"]
    if isinstance(resize, int):
        said.append(f"resized to {resize} pixels at the shorter side")
    elif resize is not None:
        said.append(f"resized to {' x '.join(map(str, resize))} (height x width), not keeping proportions")
    if preprocessing["crop"] is not None:
        said.append(f"cropped in the middle to {' x '.join(map(str, preprocessing['crop']))}")
    said.append("with one channel" if preprocessing["channels"] == "L" else "in the order red, green, blue")
    return ", ".join(said)


def _file_rows(files: list[str]) -> list[str]:
    about = {
        "model.json": "inputs, outputs, preprocessing, classes, figures, verdict, and what the model was made of",
        SAMPLES: "`images` to evaluate on, the `inputs` they become, their `labels`, and the outputs `expected`",
        "check.py": "the check, one file to read before it is run",
        "manifest.json": "sha256 and size of every other file; `manifest.sig`, where it is there, signs it",
    }
    rows = [("model.onnx" if name == "model.onnx" else name, "the model" if name == "model.onnx" else "its weights")
            for name in files]  # fmt: skip
    return [
        "| file | what is in it |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in (*rows, *about.items())),
    ]


def _licence(licence: dict[str, str | None]) -> str:
    data = licence["data"] or "not stated"
    named = f" ({licence['data_name']})" if licence["data_name"] else ""
    return f"Licence of the model: {licence['model'] or 'not stated'}. Of the data{named}: {data}."
