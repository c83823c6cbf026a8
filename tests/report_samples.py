"""Made-up, realistic results for the tests of the report: a ResNet-20 cut to half of its MACs."""

import math
import random
from typing import Any

import numpy as np

from compress.model.artifacts import CheckResult, ModelMetrics, Verdict
from compress.report.build import StageRun
from compress.verification.summary import to_png

BASELINE = ModelMetrics(
    40_551_424, 269_722, 1_094_310, {"top1": 0.9173}, {"p50": 1.312, "p90": 1.431, "p95": 1.498, "p99": 2.214}
)
SLIM = ModelMetrics(
    20_447_232, 138_410, 571_208, {"top1": 0.9104}, {"p50": 0.811, "p90": 0.889, "p95": 0.934, "p99": 1.702}
)
ENVIRONMENT = {
    "platform": "Linux 6.1.0 x86_64",
    "python": "CPython 3.11.2",
    "cpu": "Imaginary Processor 9000 @ 2.90GHz",
    "cores": 2,
    "memory_bytes": 16_710_111_232,
    "versions": {"compress": "0.1.0", "torch": "2.15.0", "onnx": "1.23.2", "onnxslim": None},
}
CONFIG = {
    "name": "resnet20_cifar10",
    "seed": 0,
    "stages": [{"stage": "prune", "target": {"macs": 0.5}}, {"stage": "finetune", "epochs": 6, "batch_size": 128}],
}


def check(name: str, status: str, value: float | None, limit: float | None, unit: str, detail: str) -> CheckResult:
    return CheckResult(name, status, value, limit, unit, detail)  # type: ignore[arg-type]


def passing_verdict() -> Verdict:
    return Verdict(
        (
            check("provider", "pass", None, None, "", "CPUExecutionProvider was asked for and is in use."),
            check("parity", "pass", 3.8e-06, 1e-3, "", "Largest absolute difference to torch on 64 real samples."),
            check("max_drop.top1", "pass", 0.0069, 0.01, "share", "Top-1 fell from 91.73 % to 91.04 %."),
            check("min_speedup", "pass", 1.6177, 1.4, "x", "Medians of 200 interleaved calls."),
            check("max_size_mb", "skipped", None, None, "bytes", "No limit was given."),
        ),
        ("provider", "parity"),
        SLIM,
        BASELINE,
        measured(),
    )


def failing_verdict() -> Verdict:
    return Verdict(
        (
            check("parity", "pass", 3.8e-06, 1e-3, "", "Largest absolute difference to torch on 64 real samples."),
            check("max_drop.top1", "fail", 0.0469, 0.01, "share", "Top-1 fell from 91.73 % to 87.04 %."),
        ),
        ("parity",),
        ModelMetrics(SLIM.macs, SLIM.params, SLIM.size_bytes, {"top1": 0.8704}, SLIM.latency_ms),
        BASELINE,
        measured(),
    )


def measured() -> dict[str, Any]:
    """What verify measures: 200 calls of each network with the tail of a shared machine."""
    generator = random.Random(4)

    def calls(median: float) -> list[float]:
        tail = [median * generator.uniform(1.5, 6) if generator.random() < 0.015 else 0.0 for _ in range(200)]
        return [round(median * generator.lognormvariate(0, 0.05) + extra, 4) for extra in tail]

    return {
        "latency": {
            "baseline_ms": calls(1.312),
            "slim_ms": calls(0.811),
            "runtime": "onnxruntime 1.31.1",
            "provider": "CPUExecutionProvider",
            "threads": 1,
            "batch_size": 1,
            "warmup": 10,
            "ratio": {"value": 0.618, "low": 0.612, "high": 0.624, "error": 0.004},
        },
        "quality": _quality(),
        "robustness": _robustness(),
        "parity": {
            "samples": 64,
            "max_abs": 3.8e-06,
            "mean_abs": 4.1e-07,
            "quantiles": {"p50": 3.2e-07, "p99": 1.9e-06},
            "top1_agreement": 1.0,
        },
        "runtime": runtime(),
        "providers": {
            "asked": "CUDAExecutionProvider",
            "nodes": {"CUDAExecutionProvider": 58, "CPUExecutionProvider": 3},
            "fell_back": ["Shape /flatten/Shape", "Gather /flatten/Gather", "Cast /flatten/Cast"],
        },
        "evaluation": {"images": 10_000},
        "shares": [
            {"stage": "slimming", "top1_before": 0.9173, "top1_after": 0.9112, "points": -0.61},
            {"stage": "quantize", "top1_before": 0.9112, "top1_after": 0.9104, "points": -0.08},
        ],
        "also": [
            {"label": "CPU.2", "status": "pass", "p50_ms": 0.7, "shipping_p50_ms": 0.8, "max_abs": 1e-6},
            {"label": "TPU", "status": "skipped", "reason": "no TPU here"},
        ],
    }


def runtime() -> dict[str, Any]:
    """What verify measures besides the time of a call."""
    speeds = {1: (762.0, 1233.4), 8: (911.2, 1580.0), 32: (955.9, 1671.3), 128: (960.0, 1702.8)}
    return {
        "cold_start_ms": {"slim": 21.4, "baseline": 33.9},
        "peak_memory_bytes": {"slim": 41_200_000, "baseline": 44_900_000},
        "throughput": [{"batch_size": batch, "slim": b, "baseline": a} for batch, (a, b) in speeds.items()],
        "energy_joules": {"slim": 0.0071, "baseline": 0.0119},
    }


def prune_record() -> dict[str, Any]:
    widths = {1: (16, [8, 8, 8]), 2: (32, [16, 16, 24]), 3: (64, [40, 32, 16])}
    return {
        "target": {"macs": 0.5},
        "asked_ratio": 0.5,
        "reached_ratio": 0.5042,
        "criterion": "taylor",
        "groups": [
            {"name": f"layer{layer}.{block}.conv1", "width_before": full, "width_after": left}
            for layer, (full, lefts) in widths.items()
            for block, left in enumerate(lefts)
        ],
        "removed_blocks": ["layer1.1"],
        "excluded": [
            {"name": "conv1", "reason": "its channels run through a zero-padded shortcut that cannot be cut"},
            {"name": "layer2.0.conv2", "reason": "its channels run through a zero-padded shortcut that cannot be cut"},
        ],
        "macs_before": 40_551_424,
        "macs_after": 20_447_232,
        "params_before": 269_722,
        "params_after": 138_410,
        "validation_top1_before": 0.921,
        "validation_top1_after": 0.571,
        "shortfall": "0.500 of the MACs was asked for; 0.504 is the nearest that multiples of 8 reach.",
    }


def finetune_record() -> dict[str, Any]:
    top1 = [0.868, 0.884, 0.893, 0.901, 0.912, 0.9115]
    return {
        "epochs": [
            {
                "epoch": number,
                "loss": 0.71 * math.exp(-0.22 * number) + 0.21,
                "validation_top1": value,
                "learning_rate": 0.02 * 0.5 * (1 + math.cos(math.pi * number / 6)),
                "images_per_second": 281.4,
            }
            for number, value in enumerate(top1, start=1)
        ],
        "chosen_epoch": 5,
        "peak_learning_rate": 0.02,
        "batch_size": 128,
        "steps": 2106,
    }


def low_rank_record() -> dict[str, Any]:
    return {
        "layers": [
            {
                "layer": f"layer3.{block}.conv2",
                "scheme": scheme,
                "ranks": ranks,
                "relative_error": 0.118 + 0.01 * block,
                "macs_before": 2_359_296,
                "macs_after": 1_310_720,
            }
            for block, (scheme, ranks) in enumerate([("vh", [24]), ("tucker2", [32, 24]), ("nc", [16])])
        ],
        "dense": [
            {"layer": "conv1", "reason": "no scheme is cheaper"},
            {"layer": "fc", "reason": "no scheme is cheaper"},
        ],
        "macs_before": 23_592_960,
        "macs_after": 20_447_232,
    }


def sample_stages() -> list[StageRun]:
    load = {"macs": BASELINE.macs, "params": BASELINE.params, "size_bytes": 1_094_310, "top1": 0.9173, "layers": 20}
    export = {
        "opset": 18,
        "size_bytes": 571_208,
        "nodes_before": 84,
        "nodes_after": 61,
        "simplified": True,
        "files": ["model.onnx"],
    }
    return [
        StageRun("load", "unchanged", 0.31, load),
        StageRun("prune", "ran", 41.2, prune_record()),
        StageRun("finetune", "ran", 1043.7, finetune_record()),
        StageRun("low_rank", "ran", 3.9, low_rank_record()),
        StageRun("export", "ran", 6.4, export),
        StageRun("verify", "ran", 12.8, {}),
    ]


def _estimate(value: float, half: float | None = None, detail: str = "") -> dict[str, Any]:
    low, high = (None, None) if half is None else (value - half, value + half)
    return {"value": value, "low": low, "high": high, "detail": detail}


def _quality() -> dict[str, Any]:
    classes = [f"class <{number}>" for number in range(12)]
    return {
        "classes": classes,
        "images_by_class": [1000] * 11 + [0],
        "slim": {
            "top1": _estimate(0.9104, 0.0056),
            "top5": _estimate(0.9969, 0.001),
            "worst_class": _estimate(0.81, 0.02, "class 3 ('class <3>'), 810 of 1,000 images"),
            "calibration_error": _estimate(0.031),
        },
        "slim_by_class": [0.9 - 0.009 * number for number in range(11)] + [None],
        "baseline": {"top1": _estimate(0.9173, 0.0054)},
        "baseline_by_class": [0.92] * 11 + [None],
        "changes": {
            "drop.top1": _estimate(0.0069, 0.0031, "312 images lost, 243 won; exact McNemar test p = 0.0039"),
            "churn": _estimate(0.0812, 0.005),
            "softmax_distance": _estimate(0.0731),
        },
        "worst_images": worst_images(),
    }


def worst_images(classes: int = 2, images: int = 4, side: int = 32) -> list[dict[str, Any]]:
    """Made-up pictures of the last classes that have images."""
    random = np.random.default_rng(5)
    return [
        {
            "class": 10 - place,
            "label": 10 - place,
            "predicted": number,
            "index": 97 * number + place,
            "image": to_png(random.integers(0, 256, (side, side, 3), dtype=np.uint8)),
        }
        for place in range(classes)
        for number in range(images)
    ]


def _robustness() -> dict[str, Any]:
    def standing(name: str, kind: str, top1: float, drop: float) -> dict[str, Any]:
        changes = {"drop.top1": _estimate(drop, 0.01), "churn": _estimate(0.1), "softmax_distance": _estimate(0.09)}
        return {"name": name, "kind": kind, "top1": top1, "baseline_top1": top1 + drop, "changes": changes}

    levels = [0.1, 0.2, 0.3]
    return {
        "wanted": {"images": 1000, "noise": "uniform", "noise_levels": levels, "seed": 0},
        "distributions": [
            standing("nominal", "nominal", 0.91, 0.007),
            *(standing(f"uniform noise {level:g}", "noise", 0.91 - level, 0.02 + level / 10) for level in levels),
            standing("jpeg 3", "corruption", 0.78, 0.031),
            standing("brightness 3", "corruption", 0.90, -0.002),
            standing("fog 1", "corruption", 0.89, 0.004),
            standing("fog 5", "corruption", 0.71, 0.012),
            standing("night shots", "shifted", 0.803, 0.015),
        ],
    }
