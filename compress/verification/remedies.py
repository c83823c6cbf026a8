"""Next steps of the user after a check that did not pass, by kind of check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from compress.model.artifacts import CheckResult

_QUALITY = (
    "remove less (a larger target), fine-tune for more epochs, or learn from the baseline (finetune.distillation)"
)
_SPEED = "lower target.latency of prune or slim, add a quantize stage, or deploy with more threads"
_SIZE = "lower target.size_mb or target.params, or add a quantize stage"
_HARDER = "vary training images more (finetune.augmentation), or remove less (a larger target)"
_LIKENESS = "learn from the baseline (finetune.distillation), or remove less (a larger target)"
_CALIBRATION = (
    "set finetune.label_smoothing, learn from the baseline (finetune.distillation), or divide the logits by a "
    "temperature fitted on validation images"
)
_REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("max_rise.calibration_error", "max.calibration_error"), _CALIBRATION),
    (("max.churn", "max.softmax_distance", "max_rise.distance", "max.distance", "max_drop.agreement"), _LIKENESS),
    (("max_drop.noise", "max_drop.corruptions", "max_drop.shifted", "max_drop.worst_distribution"), _HARDER),
    (("min.noise", "min.corruptions", "min.shifted", "max_drop_on.", "max_rise.excess_error"), _HARDER),
    (("max_drop.", "max_rise.", "min.", "max."), _QUALITY),
    (("max_ratio.size", "max_size_mb"), _SIZE),
    (("max_ratio.macs", "max_macs"), "lower target.macs of prune or slim"),
    (("max_ratio.params", "max_params"), "lower target.params of prune or slim"),
    (("max_ratio.memory", "max_memory_mb"), "lower target.macs or resize the images: activations take most memory"),
    (("max_ratio.cold_start", "max_cold_start_ms"), _SIZE),
    (("min_images_per_second",), f"{_SPEED}, or raise resources.batch_sizes"),
    (("max_ratio.", "min_speedup", "max_latency_ms", "max_quantile_ms."), _SPEED),
    (("max_fallback_nodes",), "choose a provider or an opset that has these operators; the detail names the nodes"),
    (("parity", "parity_edges"), "set gates.parity to the smallest limit that passes, if so much difference is right"),
    (("quantized_agreement",), "quantize with more images, another method, or exclude the first and last layers"),
    (("preprocessing", "baseline_preprocessing"), "prepare images as the file says: change data.preprocessing"),
    (("baseline_agrees",), "run the pipeline again: the images or the baseline's file have changed since"),
    (("repeatable",), "remove what draws random numbers from the network, such as noise or dropout by hand"),
    (("batch_independent",), "export a file whose outputs do not depend on the other images of a batch"),
    (("structure",), "export the network again: python -m onnx.bin.checker FILE.onnx says what is wrong with the file"),
    (("provider",), "install the build of onnxruntime with this provider, or name another one"),
    (("denormals",), "set weights below 1e-38 to 0 before the export"),
    (("also.",), "remove the place from verify.also, or accept its difference with a larger gates.parity"),
)
_NO_BASELINE = "name the baseline's file with --against"
_UNDECIDED = "evaluate on more images, or decide by the measured value alone (judge_by: estimate)"
_UNDECIDED_SPEED = (
    "raise verify.repeats and stop other work on the machine, or decide by the measured value alone "
    "(judge_by: estimate)"
)
_SPEED_GATES = ("min_speedup", "max_latency_ms")


def with_remedies(checks: Iterable[CheckResult], required: Iterable[str]) -> tuple[CheckResult, ...]:
    """Return checks, with a next step in each check that did not pass; a next step that is already set is kept.

    Args:
        checks: Outcome of each check.
        required: Names of the checks that must not be skipped.
    """
    names = set(required)
    return tuple(replace(check, remedy=check.remedy or _remedy(check, names)) for check in checks)


def _remedy(check: CheckResult, required: set[str]) -> str:
    if check.status == "inconclusive":
        return _UNDECIDED_SPEED if check.name in _SPEED_GATES else _UNDECIDED
    if check.status == "skipped" and check.name in required:
        return _NO_BASELINE if check.detail.startswith("no baseline") else ""
    if check.status != "fail":
        return ""
    return next((text for names, text in _REMEDIES if any(_is_named(check.name, name) for name in names)), "")


def _is_named(check: str, name: str) -> bool:
    """Return whether a check has the given name, or belongs to a kind with a name that ends in a dot."""
    return check.startswith(name) if name.endswith(".") else check == name
