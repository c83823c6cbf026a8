"""What does a reader see first? The `README.md` of a bundle: what it is, how to use it, how to check it."""

from typing import Any

from compress.handoff.check import SAMPLES
from compress.handoff.finished import FinishedRun

_EXIT_CODES = """\
| exit code | meaning |
|---|---|
| 0 | all checks that could be made passed |
| 1 | a check failed |
| 2 | the command line is wrong |
| 4 | no bundle, damaged or unreadable; nothing was run |
| 5 | the execution provider, onnxruntime or another package is missing |
"""


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
    verdict = run.report["verdict"]
    made = sum(check["status"] != "skipped" for check in verdict["checks"])
    outcome = (
        f"It passed its verification: {made} checks on this file, none failed."
        if run.has_passed
        else f"**It did not pass its verification** ({', '.join(run.failed) or 'a required check was not made'}), and "
        "was bundled all the same."
    )
    return f"An image classifier in ONNX, made smaller by compress. Input `{source['name']}`: {shape}. {outcome}"


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
    where = f"{measured['machine']}, {measured['provider']}"
    how = f"threads: {measured['threads']}, batch: {measured['batch_size']}"
    return "\n".join(table) + f"\n\nIn brackets are 95 % intervals. Latency was measured on {where}, {how}."


def _interval(report: dict[str, Any], name: str) -> str:
    """Return " (0.91 to 0.93)" where a 95 % interval is known."""
    estimate = ((report["details"].get("quality") or {}).get("slim") or {}).get(name) or {}
    low, high = estimate.get("low"), estimate.get("high")
    return "" if low is None or high is None else f" ({low:.4f} to {high:.4f})"


def _geometry(preprocessing: dict[str, Any]) -> str:
    said = []
    if preprocessing["resize"] is not None:
        said.append(f"resized to {preprocessing['resize']} pixels at the shorter side")
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
