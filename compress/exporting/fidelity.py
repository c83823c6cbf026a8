"""Fidelity of an exported file: the difference of its outputs to torch, and the first layer whose values differ.

torch's exporter loses some settings without a warning (such as AvgPool2d's divisor_override). To find the layer, the
network is exported again with the inputs and outputs of every layer as additional outputs of the graph.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from compress.data.packing import is_packed
from compress.errors import ExportFailed
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.adapter import flatten_outputs, real_inputs, unpack_rows
from compress.model.artifacts import Signature, TensorSpec
from compress.model.modes import eval_mode, hooked

_SILENT = 4


@dataclass(frozen=True)
class _Tap:
    """A tensor that a layer reads or returns.

    Attributes:
        layer: Path of the layer.
        is_input: Whether the layer reads the tensor.
        value: (1, ...) value computed by torch.
    """

    layer: str
    is_input: bool
    value: Tensor


def file_error(path: Path, module: nn.Module, signature: Signature, samples: Tensor) -> float:
    """Return the largest difference between outputs of file and network, relative to the output's largest value.

    Args:
        path: The .onnx file, with an open batch axis.
        module: The network, in eval mode on the CPU.
        signature: Signature of the network.
        samples: (N, ...) prepared images, or (N, K) rows of all inputs.
    """
    with torch.no_grad():
        found = module(samples)
    wanted = found if isinstance(found, tuple) else (found,)
    parts = _parts(samples, signature)
    got = _run(path, dict(zip((spec.name for spec in signature.inputs), parts, strict=True)))
    return max(_error(a, b.numpy()) for a, b in zip(got, wanted, strict=True))


def first_difference(module: nn.Module, signature: Signature, sample: Tensor, tolerance: float, opset: int) -> str:
    """Return a clause on the first layer whose values differ between network and file; "" where none can be found.

    Args:
        module: The network, in eval mode on the CPU.
        signature: Signature of the network.
        sample: One image, (1, ...), or a row of all inputs.
        tolerance: Largest allowed difference of a value, relative to the largest of its tensor.
        opset: Opset of the file.
    """
    parts = _parts(sample, signature)
    with _listening(module) as taps, torch.no_grad(), eval_mode(module), real_inputs(module):
        module(*parts)
        seen = [tap for tap in taps if tap.value.is_floating_point() and tap.value.shape[:1] == (1,)]
        chosen = [place for place, tap in enumerate(taps) if any(tap is other for other in seen)]
    specs = tuple(TensorSpec(f"tap_{place}", ("batch", *tap.value.shape[1:])) for place, tap in enumerate(seen))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "taps.onnx"
        try:
            export_onnx(
                _Tapped(module, chosen),
                Signature(signature.inputs, specs),
                path,
                ExportSettings(opset=opset, dynamic_batch=False, simplify=False),
            )
            got = _run(path, dict(zip((spec.name for spec in signature.inputs), parts, strict=True)))
        except (ExportFailed, RuntimeError, ValueError):
            return ""
    return _describe(module, seen, [_error(a, tap.value.numpy()) for a, tap in zip(got, seen, strict=True)], tolerance)


def _describe(module: nn.Module, taps: list[_Tap], errors: list[float], tolerance: float) -> str:
    """Return a clause on the first tensor that differs."""
    before = ""
    for tap, error in zip(taps, errors, strict=True):
        layer = f"'{tap.layer}' ({module.get_submodule(tap.layer)})" if tap.layer else "the network"
        if error > tolerance and tap.is_input:
            behind = f"behind '{before}' and " if before else ""
            return f"the difference begins {behind}before layer {layer}, which reads values that are off by {error:.2g}"
        if error > tolerance:
            return f"the first layer whose values differ is {layer}, off by {error:.2g}"
        before = tap.layer
    return f"all layers are right, so the difference begins behind the last of them ('{before}')"


class _Tapped(nn.Module):
    """A network that returns the inputs and outputs of its layers."""

    def __init__(self, network: nn.Module, chosen: list[int]) -> None:
        super().__init__()
        self.network, self.chosen = network, chosen

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        with _listening(self.network) as taps, real_inputs(self.network):
            self.network(*values)
        return tuple(taps[place].value for place in self.chosen)


@contextmanager
def _listening(module: nn.Module) -> Iterator[list[_Tap]]:
    """Collect inputs and outputs of the layers without sublayers, in the order of their calls."""
    taps: list[_Tap] = []

    def keep(layer: str, is_input: bool, values: Any) -> None:
        tensors = [value for _, value in flatten_outputs(values)] if _is_plain(values) else []
        taps.extend(_Tap(layer, is_input, value.clone()) for value in tensors)

    layers = [(name, part) for name, part in module.named_modules() if not list(part.children())]
    with hooked(
        before=[(part, lambda _, inputs, name=name: keep(name, True, inputs)) for name, part in layers],
        after=[(part, lambda _, __, output, name=name: keep(name, False, output)) for name, part in layers],
    ):
        yield taps


def _is_plain(values: Any) -> bool:
    if isinstance(values, tuple | list):
        return all(map(_is_plain, values))
    return isinstance(values, Tensor)


def _parts(samples: Tensor, signature: Signature) -> list[Tensor]:
    return list(unpack_rows(samples, signature.inputs)) if is_packed(signature.inputs) else [samples]


def _run(path: Path, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return found


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    a, b = (np.asarray(values, np.float64) for values in (found, wanted))
    scale = float(np.abs(b).max(initial=0.0))
    error = float(np.abs(a - b).max(initial=0.0)) / (scale or 1.0)
    return error if np.isfinite(error) else float("inf")
