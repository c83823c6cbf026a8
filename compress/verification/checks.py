"""Checks of an ONNX file besides its gates: one function each, returning a CheckResult."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto

from compress.data.splits import Split
from compress.errors import ArtifactError, attempt, first_line
from compress.model.artifacts import CheckResult, Signature, TensorSpec
from compress.onnx_file.io import (
    default_opset,
    each_node,
    each_tensor,
    external_problems,
    load_onnx,
    read_metadata,
    read_signature,
    reading_graph,
    tensor_problems,
)
from compress.tasks.base import Metric
from compress.tasks.classification import CLASSIFICATION
from compress.verification.parity import ParityResult
from compress.verification.runtimes.base import Runtime
from compress.verification.training_nodes import training_nodes

if TYPE_CHECKING:  # a file alone is verified without torch
    from torch import nn

REPEATABLE = "repeatable"
TOP1 = CLASSIFICATION.main
_NAMED = 6
BASELINE_WITHIN = 0.002  # another runtime may decide otherwise where two classes are as likely


def check_structure(model: ModelProto, path: Path, signature: Signature | None, opset: int | None) -> CheckResult:
    """Check that a file is complete, valid, in inference mode, and has the required opset and signature.

    Args:
        model: Model of the file, read without external data.
        path: The .onnx file.
        signature: Required inputs and outputs; None accepts any.
        opset: Required version of the default operator set; None accepts any.
    """
    problems = external_problems(model, path) or tensor_problems(model) or _invalid(path)
    got_opset = default_opset(model)
    if opset is not None and got_opset != opset:
        problems.append(f"opset must be {opset}, got {got_opset}")
    if signature is not None:
        problems += _signature_problems(signature, read_signature(model))
    problems += [
        f"node '{node.name}' ({node.op_type}) is in training mode" for node in training_nodes(model, path.parent)
    ]
    if problems:
        return CheckResult("structure", "fail", None, None, "", "; ".join(problems))
    batch = [dim for dim in (value.type.tensor_type.shape.dim[:1] for value in model.graph.input[:1]) if dim]
    is_open = any(not axis.HasField("dim_value") for dims in batch for axis in dims)
    detail = (
        f"valid ONNX, IR version {model.ir_version}, opset {got_opset}, {len(model.graph.node)} nodes, batch axis "
        f"{'open' if is_open else 'fixed'}"
    )
    return CheckResult("structure", "pass", None, None, "", detail)


def check_macs(counted: int | str, reference: nn.Module, signature: Signature) -> CheckResult:
    """Check that the graph has the MACs of the torch network, counted by two independent routines.

    Products of constants, which do not depend on the input, may be missing: the exporter may compute them beforehand.

    Args:
        counted: MACs of the graph, or the reason why they could not be counted.
        reference: The torch network.
        signature: Inputs of the torch network.
    """
    from compress.cost.macs import count_products  # torch, only where there is a torch reference
    from compress.model.adapter import example_input

    found = count_products(reference, example_input(signature))
    return _check_count("macs_agree", "MACs", counted, sum(found.macs.values()), found.constant_macs)


def check_weights(counted: int | str, reference: nn.Module, signature: Signature) -> CheckResult:
    """Check that the graph multiplies by as many weights as the torch network, biases and norms left out.

    Args:
        counted: Weights of the graph's layers, or the reason why they could not be counted.
        reference: The torch network.
        signature: Inputs of the torch network.
    """
    from compress.cost.macs import count_products
    from compress.model.adapter import example_input

    found = count_products(reference, example_input(signature))
    total = found.weights + found.constant_weights
    return _check_count("weights_agree", "weights", counted, total, found.constant_weights)


def check_preprocessing(model: ModelProto, split: Split) -> CheckResult:
    """Check preprocessing and class names of a split against the metadata of a file.

    Args:
        model: Model with the metadata; the check is skipped where they hold nothing to compare.
        split: Images that the file is verified on.
    """
    return _compare_preprocessing("preprocessing", model, split)


def check_baseline_preprocessing(model: ModelProto, split: Split) -> list[CheckResult]:
    """Return the check of `check_preprocessing` for the baseline's file, or an empty list where it is skipped.

    Args:
        model: Model of the baseline, which runs on the same images as the file.
        split: Images that both are verified on.
    """
    check = _compare_preprocessing("baseline_preprocessing", model, split)
    return [] if check.status == "skipped" else [check]


def _compare_preprocessing(name: str, model: ModelProto, split: Split) -> CheckResult:
    try:
        noted = read_metadata(model)
    except ArtifactError as error:
        return CheckResult(name, "fail", None, None, "", error.message)
    names, problems = split.source.classes, []
    if noted.preprocessing is not None and _is_prepared(split) and split.preprocessing != noted.preprocessing:
        return CheckResult(name, "skipped", None, None, "", "samples are prepared by code of the user's own")
    if noted.preprocessing is not None:
        given, wanted = asdict(split.preprocessing), asdict(noted.preprocessing)
        problems = [f"{key} must be {value}, got {given[key]}" for key, value in wanted.items() if value != given[key]]
    if noted.classes and names and noted.classes != names:
        problems.append(f"classes must be {', '.join(noted.classes[:6])} ..., got {', '.join(names[:6])} ...")
    if noted.preprocessing is None and not (noted.classes and names):
        return CheckResult(name, "skipped", None, None, "", "the file does not say how images are prepared")
    return CheckResult(name, "fail" if problems else "pass", None, None, "", "; ".join(problems) or "as the file says")


def _is_prepared(split: Split) -> bool:
    """Return whether samples are floating-point, and so were prepared by code of the user's own."""
    return bool(len(split)) and split.read(np.zeros(1, np.int64)).dtype.kind == "f"


def check_baseline(recorded: float, measured: float, images: int, metric: Metric = TOP1) -> CheckResult:
    """Check that the baseline's metric agrees with the recorded one; otherwise the images or the file have changed.

    Args:
        recorded: Primary metric when the baseline was made.
        measured: Primary metric now.
        images: Number of images that it is measured on.
        metric: Primary metric of the task.
    """
    limit = max(BASELINE_WITHIN, 1.5 / images)
    if not metric.is_share:
        limit *= max(abs(recorded), abs(measured))
    apart = abs(measured - recorded)
    detail = f"{metric.words} {metric.show(recorded)} when it was made, {metric.show(measured)} now"
    unit = "share" if metric.is_share else ""
    return CheckResult("baseline_agrees", "pass" if apart <= limit else "fail", apart, limit, unit, detail)


def check_denormals(path: Path) -> CheckResult:
    """Check that no constant is a denormal number, with which a CPU computes many times more slowly.

    A CPU widens half precision to float32, in which the smallest half-precision numbers are normal ones.
    """
    denormal, constants = 0, 0
    with reading_graph(path):
        floats = list(_floats(load_onnx(path, weights=True)))
    for values in floats:
        tiny = np.finfo(values.dtype if values.dtype == np.float64 else np.float32).tiny
        sizes = np.abs(values.astype(np.promote_types(values.dtype, np.float32), copy=False))
        constants += 1
        denormal += int(((sizes != 0) & (sizes < tiny)).sum())
    detail = (
        f"{denormal:,} weights are denormal numbers, which make a CPU slow"
        if denormal
        else f"none among {constants:,} floating-point constants"
    )
    return CheckResult("denormals", "fail" if denormal else "pass", float(denormal), 0.0, "weights", detail)


def _floats(model: ModelProto) -> Iterator[np.ndarray]:
    """Yield the values of each constant in float16, float32 or float64."""
    kinds = (onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
    for tensor in each_tensor(model):
        if tensor.data_type in kinds:
            yield onnx.numpy_helper.to_array(tensor)
    for node in each_node(model):
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.type == AttributeProto.FLOAT:
                    yield np.array([attribute.f], np.float32)
                elif attribute.type == AttributeProto.FLOATS:
                    yield np.array(attribute.floats, np.float32)


def _check_count(name: str, unit: str, counted: int | str, expected: int, foldable: int) -> CheckResult:
    """Check a count of the graph against torch's; up to `foldable` of it may be missing in the graph."""
    from compress.cost.macs import counts_agree

    if isinstance(counted, str):
        return CheckResult(name, "fail", None, float(expected), unit, counted)
    detail = f"ONNX graph {counted:,}, torch {expected:,}"
    if foldable and counted != expected:
        detail += f", {foldable:,} of them in products of constants"
    status = "pass" if counts_agree(counted, expected, foldable) else "fail"
    return CheckResult(name, status, float(counted), float(expected), unit, detail)  # type: ignore[arg-type]


def check_provider(runtime: Runtime, placements: Mapping[str, tuple[str, ...]] | None = None) -> CheckResult:
    """Check that an open runtime computes on the requested provider; the detail lists nodes that fell back to others.

    Args:
        runtime: Open runtime of the file.
        placements: Provider -> the nodes it computes; None where they are not known.
    """
    got = runtime.provider_in_use
    status = "pass" if got == runtime.provider else "fail"
    detail = f"{got} in use, {runtime.provider} asked for"
    if runtime.precision is not None:
        detail += f", computes in {runtime.precision}"
    if placements is not None:
        total, elsewhere = sum(map(len, placements.values())), list_fell_back(runtime.provider, placements)
        detail += f"; {len(elsewhere)} of its {total} nodes fell back" if elsewhere else f", for all {total} nodes"
        detail += f": {', '.join(elsewhere[:_NAMED])}{' ...' if len(elsewhere) > _NAMED else ''}" if elsewhere else ""
    return CheckResult("provider", status, None, None, "", detail)  # type: ignore[arg-type]


def list_fell_back(asked: str, placements: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the nodes that other providers than the requested one compute.

    >>> list_fell_back("GPU", {"GPU": ("Conv a",), "CPU": ("Shape b", "Gather c")})
    ['Shape b', 'Gather c']
    """
    return [node for provider, nodes in placements.items() if provider != asked for node in nodes]


def check_parity(result: ParityResult, asked: int, limit: float) -> CheckResult:
    """Check the largest difference to torch; the detail states the smallest limit that would have passed."""
    images = f"{result.samples} images" if result.samples >= asked else f"all {result.samples} images ({asked} asked)"
    detail = (
        f"{images}, mean difference {result.mean_abs:.2g}{say_agreement(result)}; "
        f"the smallest limit that passes is {result.smallest_tolerance:g}"
    )
    status = "pass" if result.max_abs <= limit else "fail"
    return CheckResult("parity", status, result.max_abs, limit, "", detail)  # type: ignore[arg-type]


def say_agreement(result: ParityResult) -> str:
    """Return the top-1 agreement as a part of a sentence; "" where outputs are not (N, K)."""
    return "" if math.isnan(result.top1_agreement) else f", top-1 agrees on {result.top1_agreement:.2%}"


def check_edges(differences: Mapping[str, float], limit: float) -> CheckResult:
    """Check the largest difference to torch on unusual inputs.

    Args:
        differences: Description of the input -> the largest absolute difference.
        limit: Largest difference that passes, as in `check_parity`.
    """
    largest = max(differences.values())
    detail = ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
    return CheckResult("parity_edges", "pass" if largest <= limit else "fail", largest, limit, "", detail)


def check_evaluation(images: int, value: float, metric: Metric = TOP1) -> CheckResult:
    """Record the primary metric and the number of images it was measured on; fails without images."""
    status = "pass" if images > 0 else "fail"
    detail = f"{metric.words} {metric.show(value)} on {images:,} images"
    return CheckResult("evaluation", status, float(images), None, "images", detail)  # type: ignore[arg-type]


def check_repeatable(first: np.ndarray, again: np.ndarray, limit: float) -> CheckResult:
    """Check that the same images give the same outputs each time.

    Args:
        first: (N, M) outputs.
        again: (N, M) outputs of the same images, computed once more.
        limit: Largest absolute difference of an output.
    """
    difference = float(np.abs(first.astype(np.float64) - again).max())
    is_same = difference <= limit
    images = f"{len(first)} image{'' if len(first) == 1 else 's'} computed twice"
    detail = images if is_same else f"the file gives other outputs for the same images ({images})"
    return CheckResult(REPEATABLE, "pass" if is_same else "fail", difference, limit, "", detail)


def _invalid(path: Path) -> list[str]:
    def problems() -> list[str]:
        onnx.checker.check_model(path, full_check=True)
        return []

    return attempt(problems, lambda error: [f"ONNX's checker says: {first_line(error)}"])


def _signature_problems(wanted: Signature, got: Signature) -> list[str]:
    pairs = (("inputs", wanted.inputs, got.inputs), ("outputs", wanted.outputs, got.outputs))
    return [f"{kind} must be {_describe(want)}, got {_describe(have)}" for kind, want, have in pairs if want != have]


def _describe(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{s.name} {s.dtype} ({', '.join(map(str, s.shape))})" for s in specs) or "none"
