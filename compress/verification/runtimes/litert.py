"""Runtime litert: files in LiteRT, formerly TensorFlow Lite, converted by litert-torch, in float32 on the CPU.

LiteRT computes one image at a time here: the converted file has a batch of 1.

    model.onnx  --litert-torch-->  model.tflite  --> Interpreter with XNNPACK
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from compress.catalog import missing_package, require_packages
from compress.errors import ArtifactError, ModelError, NoSuchPlace, first_line, translated
from compress.formats.files import find_format
from compress.formats.litert import PACKAGE, convert_to_litert
from compress.model.artifacts import Signature
from compress.onnx_file.io import load_onnx, read_signature, require_external
from compress.verification.runtimes.base import Arrays, Runtime, check_inputs, require_single_images

CPU = "CPU"
_SIGNATURE = "serving_default"


class LiteRt(Runtime):
    """An ONNX file in LiteRT.

    Args:
        path: The .onnx file; external data lies beside it.
        provider: Only "CPU".
        threads: Threads of the CPU.
    """

    name: ClassVar[str] = "litert"
    reads_onnx: ClassVar[bool] = True

    def __init__(self, path: Path, provider: str = CPU, threads: int = 1) -> None:
        super().__init__(provider)
        self.path, self.threads = path, threads
        self._interpreter: Any = None
        self._runner: Any = None

    @classmethod
    def from_file(cls, path: Path, *, provider: str, threads: int) -> LiteRt:
        """Return the runtime of an ONNX file, not opened yet."""
        return cls(path, provider, threads)

    @property
    def provider_in_use(self) -> str:
        """Always "CPU"."""
        return CPU

    @property
    def precision(self) -> str | None:
        """Always "f32"; None before the file is open."""
        return None if self._interpreter is None else "f32"

    def require(self) -> None:
        """Check the provider and the packages of runtime and converter."""
        self._require_runtime()
        require_packages([PACKAGE], f"Runtime '{self.name}'")

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Return a call that computes the images one after the other; it copies inputs and outputs."""
        check_inputs(self.signature, inputs)
        images = [self._image(inputs, place) for place in range(len(next(iter(inputs.values()))))]
        runner = self._runner
        return lambda: [runner(**image) for image in images]

    def _open(self) -> Signature:
        self._require_runtime()
        model = load_onnx(self.path)
        require_external(model, self.path)
        signature = read_signature(model)
        require_single_images(self.name, self.path, signature)
        written = find_format(self.path, self.name)
        with TemporaryDirectory(prefix="compress-litert-") as folder:
            file = Path(folder if written is None else written) / f"{self.path.stem}.tflite"
            if written is None:
                convert_to_litert(self.path, Path(folder))
            with translated(lambda error: ArtifactError(f"LiteRT cannot open '{file}': {first_line(error)}")):
                self._interpreter = _interpreter(file.read_bytes(), self.threads)
                self._interpreter.allocate_tensors()
                self._runner = self._interpreter.get_signature_runner(_SIGNATURE)
        return signature

    def _require_runtime(self) -> None:
        if self.provider != CPU:
            raise NoSuchPlace(
                f"Runtime '{self.name}': {self.provider} was asked for, but it offers {CPU} only.",
                hint=f"Set provider: {CPU}.",
            )
        require_packages(["ai_edge_litert"], f"Runtime '{self.name}'")

    def _argument_names(self) -> list[str]:
        return [f"args_{place}" for place in range(len(self.signature.inputs))]

    def _image(self, inputs: Mapping[str, np.ndarray], place: int) -> dict[str, np.ndarray]:
        arrays = [np.ascontiguousarray(inputs[spec.name][place : place + 1]) for spec in self.signature.inputs]
        return dict(zip(self._argument_names(), arrays, strict=True))

    def _run(self, inputs: Arrays) -> Arrays:
        count = len(next(iter(inputs.values())))
        with translated(
            lambda error: ModelError(f"'{self.path}' must run on its input, LiteRT says: {first_line(error)}")
        ):
            rows = [self._runner(**self._image(inputs, place)) for place in range(count)]
        names = [(spec.name, f"output_{place}") for place, spec in enumerate(self.signature.outputs)]
        return {name: np.concatenate([row[key] for row in rows]) for name, key in names}

    def _close(self) -> None:
        self._runner = self._interpreter = None


def _interpreter(content: bytes, threads: int) -> Any:
    """Return the interpreter of a file's content.

    Raises:
        PackageMissing: The package ai-edge-litert is not installed.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter  # an extra
    except ImportError as error:
        raise missing_package(["ai_edge_litert"], "Runtime 'litert'") from error
    return Interpreter(model_content=content, num_threads=threads)
