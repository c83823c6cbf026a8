"""README of a bundle, from `templates/README.md.j2`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compress.bundle.check import SAMPLES
from compress.bundle.finished_run import FinishedRun
from compress.report.formats import describe_speedup
from compress.report.model import Check, Report
from compress.verification.quantization_loss import AGREEMENT

DECODER = "decode.py"
_PRECISIONS = {
    "int8": " It is quantised to INT8: weights and activations are rounded to 8 bits. Each processor rounds in its own "
    "way, so outputs differ more between machines than those of a float file.",
    "fp16": " It is in half precision (FP16). Each processor rounds in its own way, so outputs differ more between "
    "machines than those of a file in single precision.",
}
_KINDS = {
    "classification": "An image classifier",
    "detection": "An object detector",
    "segmentation": "A segmentation network",
    "regression": "A regression network",
}
_READING = {
    "segmentation": "The output has one value per class and pixel, (N, classes, height, width); the largest is the "
    "prediction. `model.json` has the names of the classes where they are known.",
    "regression": "The output has one number per target, (N, targets).",
}
_OF_FLOAT = ("macs_agree", "weights_agree", "parity", "parity_edges")  # checks of the float file of a quantised one
_OF_BASELINE = ("baseline_agrees",)
_PARTS = {"slimming": "all stages up to the float file", "quantize": "quantisation"}
_ENVIRONMENT = Environment(  # Markdown: nothing to escape
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)


def render_readme(run: FinishedRun, model: dict[str, Any], files: Sequence[str]) -> str:
    """Return the text of `README.md`.

    Args:
        run: Run to bundle.
        model: Content of `model.json`.
        files: Names of the files with the model and its weights.
    """
    return _ENVIRONMENT.get_template("README.md.j2").render(
        name=run.name,
        introduction=_introduce(run, model),
        rows=_list_rows(run.report),
        conditions=_describe_conditions(run.report, model["measured"]),
        quantization=_describe_quantization(run.report),
        example=example(model) if run.is_classifier else _example_of_detector(model, run),
        geometry=_geometry(model["preprocessing"]) + _describe_letterbox(run.data.evaluation),
        reading=_describe_reading(run),
        decoder=DECODER if run.decoder else None,
        is_classifier=run.is_classifier,
        files=files,
        formats={kind: [file.name for file in found] for kind, found in run.format_files.items()},
        samples=SAMPLES,
        licence=model["licence"],
    )


def example(model: dict[str, Any]) -> str:
    """Return five lines of Python that classify the samples, run in the folder of the bundle."""
    (target,) = model["signature"]["outputs"]
    opened, call = _example_parts(model)
    return f"{opened}print(session.run([{target['name']!r}], {call})[0].argmax(axis=1))\n"


def _example_of_detector(model: dict[str, Any], run: FinishedRun) -> str:
    """Return lines of Python that find the objects in the samples, run in the folder of the bundle."""
    opened, call = _example_parts(model)
    names = [target["name"] for target in model["signature"]["outputs"]]
    outputs = f"outputs = dict(zip({names!r}, session.run({names!r}, {call})))\n"
    if run.decoder is None:
        return f"{opened}{outputs}print({{name: values.shape for name, values in outputs.items()}})\n"
    further = "".join(f", {name}={value!r}" for name, value in run.decoder_arguments.items())
    return (
        f"from {Path(DECODER).stem} import {run.decoder}\n{opened}{outputs}"
        f"for found in {run.decoder}(outputs, images.shape[1:3]{further}):\n"
        '    print(found["labels"][:3], found["scores"][:3], found["boxes"][:3])\n'
    )


def _example_parts(model: dict[str, Any]) -> tuple[str, str]:
    """Return the lines that read samples and open a session, and the inputs of its call."""
    wanted = model["preprocessing"]
    (source,) = model["signature"]["inputs"]
    batch = source["shape"][0]
    picked = f"[:{batch}]" if isinstance(batch, int) else ""
    reversed_ = "[..., ::-1]" if wanted["channels"] == "BGR" else ""
    moved = ".transpose(0, 3, 1, 2)" if wanted["layout"] == "NCHW" else ""
    mean, std = list(wanted["mean"]), list(wanted["std"])
    lines = (
        "import numpy as np, onnxruntime as ort\n"
        f'images = np.load("{SAMPLES}")["images"]{picked}  # uint8 (N, H, W, C)\n'
        f"x = (images{reversed_} * np.float32({wanted['scale']!r}) - np.float32({mean})) / np.float32({std})\n"
        'session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])\n'
    )
    return lines, f"{{{source['name']!r}: x{moved}}}"


def _describe_reading(run: FinishedRun) -> str:
    """Return a sentence on the meaning of the outputs."""
    if run.is_classifier:
        return (
            "The output has one value per class, the largest is the prediction; `model.json` has the names of the "
            "classes where they are known."
        )
    if run.task in _READING:
        return _READING[run.task]
    if run.decoder:
        return f"`{DECODER}` makes boxes [x0, y0, x1, y1] in pixels of `images` of the outputs; it needs numpy alone."
    return "The outputs are decoded by your `task.postprocess`, which this bundle does not contain."


def _describe_letterbox(source: Any) -> str:
    size = getattr(source, "letterbox", None)
    return "" if size is None else f", fitted into {size[0]} x {size[1]} keeping proportions, with borders of grey 114"


def _introduce(run: FinishedRun, model: dict[str, Any]) -> str:
    (source,) = model["signature"]["inputs"]
    shape = " x ".join(str(size) for size in source["shape"])
    outcome = (
        f"It passed its verification: {count_checks(run.report.verdict.checks)}; none failed."
        if run.has_passed
        else f"**It did not pass its verification** ({run.unmet}), and was bundled all the same."
    )
    precision = _PRECISIONS.get(model["precision"], "")
    about = f"{_KINDS[run.task]} in ONNX, made smaller by compress.{precision} Input `{source['name']}`: {shape}."
    return f"{about} {outcome}"


def count_checks(checks: Sequence[Check]) -> str:
    """Return the numbers of checks by the file that they were made on.

    >>> made = ["structure", "parity", "quantized_agreement", "baseline_agrees"]
    >>> count_checks([Check(name=name, status="pass") for name in made])
    '2 checks on this file, 1 on the float file that it was quantised from, 1 on the baseline'
    """
    made = [check.name for check in checks if check.status != "skipped"]
    float_ones = _OF_FLOAT if any(check.name == AGREEMENT for check in checks) else ()
    whole, baseline = (sum(name in names for name in made) for names in (float_ones, _OF_BASELINE))
    own = len(made) - whole - baseline
    counted = [f"{own} {'check' if own == 1 else 'checks'} on this file"]
    counted += [f"{whole} on the float file that it was quantised from"] if whole else []
    counted += [f"{baseline} on the baseline"] if baseline else []
    return ", ".join(counted)


def _list_rows(report: Report) -> list[tuple[str, str, str]]:
    """Return label, baseline and this model for each cost and metric; [] where either network was not measured."""
    before, after = report.baseline, report.slim
    if before is None or after is None:
        return []
    rows = [
        ("MACs", f"{before.macs or 0:,}", f"{after.macs or 0:,}"),
        ("params", f"{before.params or 0:,}", f"{after.params or 0:,}"),
        ("file (MB)", f"{(before.size_bytes or 0) / 1e6:.2f}", f"{(after.size_bytes or 0) / 1e6:.2f}"),
    ]
    for name, old in before.quality.items():
        new, estimate = after.quality.get(name), report.details.quality.slim.get(name)
        if old is not None and new is not None:
            low, high = (None, None) if estimate is None else (estimate.low, estimate.high)
            interval = "" if low is None or high is None else f" ({low:.4f} to {high:.4f})"
            rows.append((name, f"{old:.4f}", f"{new:.4f}{interval}"))
    for name in ("p50", "p95"):
        latency = report.latency(name)
        if latency.before is not None and latency.after is not None:
            rows.append((f"latency {name} (ms)", f"{latency.before:.3f}", f"{latency.after:.3f}"))
    return rows


def _describe_conditions(report: Report, measured: dict[str, Any]) -> str:
    """Return the conditions of the latency, the speed-up, and the baseline's ratio to itself where it was measured."""
    place = f"{measured['machine']}, {measured['runtime']}, {measured['provider']}"
    batch = f"threads: {measured['threads']}, batch size: {measured['batch_size']}"
    text = f"In brackets: 95 % intervals. Latency was measured on {place}, {batch}."
    ratio = report.details.latency.ratio
    if ratio is None or ratio.control is None:
        return text
    speedup, interval = describe_speedup(ratio)
    itself = " to ".join(f"{end:.3f}" for end in (ratio.control.low, ratio.control.high) if end is not None)
    return (
        f"{text} Speed-up: {speedup} ({interval}); the baseline against itself in the same run: "
        f"{ratio.control.value:.3f} ({itself})."
    )


def _describe_quantization(report: Report) -> str:
    """Return the effect of quantisation; "" for a float file, or where it was not measured."""
    agreeing = next((check.value for check in report.verdict.checks if check.name == AGREEMENT), None)
    sentences = []
    if agreeing is not None:
        sentences.append(
            f"It gives {100 * agreeing:.2f} % of the evaluation images the class that the float file gives."
        )
    effects = [
        (share.stage or "", share.points, share.quality.before, share.quality.after) for share in report.details.shares
    ]
    if any(stage == "quantize" for stage, *_ in effects):
        parts = [
            f"{_PARTS.get(stage, stage)} {points:+.2f} percentage points, "
            f"from {100 * before:.2f} % to {100 * after:.2f} %"
            for stage, points, before, after in effects
            if points is not None and before is not None and after is not None
        ]
        sentences.append(f"Effect of each part on {report.details.quality.metric.label}: {'; '.join(parts)}.")
    return " ".join(sentences)


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
