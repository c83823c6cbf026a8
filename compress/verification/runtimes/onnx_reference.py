"""Runtime onnx_reference: the evaluator of the package onnx, by the letter of the standard, on the CPU.

It shares no code with ONNX Runtime and rewrites nothing, which makes it an independent second opinion. It is slow: 10^7
to some 10^9 multiply-accumulates a second, where ONNX Runtime does some 10^10.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compress.errors import ConfigValueError, ModelError, NoSuchPlace, first_line, translated
from compress.model.artifacts import Signature
from compress.onnx_file.counting import count_onnx
from compress.onnx_file.io import default_opset, is_quantized, load_onnx, read_signature, require_external
from compress.verification.runtimes.base import Arrays, Runtime

CPU = "CPU"
_QUANTIZED_OPSET = 19  # the evaluator has no older DequantizeLinear; newer ones compute the same values
LARGEST_WORK = 20_000_000_000  # MACs x images: half a minute for wide convolutions, some minutes for depthwise ones


class OnnxReference(Runtime):
    """An ONNX file in the evaluator of the package onnx.

    Args:
        path: The .onnx file; external data lies beside it.
        provider: Only "CPU".
        largest_work: Largest MACs x images of one task.
    """

    name: ClassVar[str] = "onnx_reference"
    reads_onnx: ClassVar[bool] = True

    def __init__(self, path: Path, provider: str = CPU, largest_work: int = LARGEST_WORK) -> None:
        super().__init__(provider)
        self.path, self.largest_work = path, largest_work
        self._evaluator: Any = None
        self._macs = 0

    @classmethod
    def from_file(cls, path: Path, *, provider: str, threads: int) -> OnnxReference:
        """Return the runtime of an ONNX file, not opened yet; `threads` are NumPy's own."""
        return cls(path, provider)

    @property
    def provider_in_use(self) -> str:
        """Always "CPU"."""
        return CPU

    def check_work(self, images: int) -> None:
        """Raise ConfigValueError where MACs x images exceed `largest_work`."""
        work = self._macs * images
        if work > self.largest_work:
            counted = f"{self._macs:,} MACs x {images:,} image{'' if images == 1 else 's'}"
            raise ConfigValueError(
                f"Runtime '{self.name}' must have at most {self.largest_work:,} MACs x images to compute, got {work:,} "
                f"({counted}).",
                hint="It is for tiny networks and few images; use runtime: onnxruntime.",
            )

    def _open(self) -> Signature:
        if self.provider != CPU:
            raise NoSuchPlace(
                f"Runtime '{self.name}': {self.provider} was asked for, but it offers {CPU} only.",
                hint=f"Set provider: {CPU}.",
            )
        model = load_onnx(self.path)
        require_external(model, self.path)
        signature = read_signature(model)
        self._evaluator = _evaluator(self.path)
        self._macs = count_onnx(self.path).macs
        return signature

    def _run(self, inputs: Arrays) -> Arrays:
        self.check_work(len(next(iter(inputs.values()))))
        names = [spec.name for spec in self.signature.outputs]
        with (
            translated(
                lambda error: ModelError(
                    f"'{self.path}' must run on its input, the ONNX reference evaluator says: {first_line(error)}"
                )
            ),
            warnings.catch_warnings(),
            np.errstate(all="ignore"),  # overflow is visible in the outputs
        ):
            warnings.simplefilter("ignore")
            outputs = self._evaluator.run(names, inputs)
        return dict(zip(names, outputs, strict=True))

    def _close(self) -> None:
        self._evaluator = None


def _evaluator(path: Path) -> Any:
    """Return the evaluator of a complete file.

    Raises:
        ModelError: The evaluator does not know an operator.
    """
    from onnx import version_converter
    from onnx.reference import ReferenceEvaluator  # its operators are a quarter of a second to import

    model = load_onnx(path, weights=True)
    with translated(
        lambda error: ModelError(
            f"Runtime 'onnx_reference' must know every operator of '{path}', it does not: {first_line(error)}",
            hint="It knows the operators of the ONNX standard only, none of a runtime's own.",
        )
    ):
        if is_quantized(model) and (default_opset(model) or 0) < _QUANTIZED_OPSET:
            model = version_converter.convert_version(model, _QUANTIZED_OPSET)
        return ReferenceEvaluator(model)
