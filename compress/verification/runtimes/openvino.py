"""Runtime openvino: files in OpenVINO, with the precision of the file.

OpenVINO computes float32 files in bfloat16 or float16 where the processor is faster in it, unless the precision is set.
A bound call, which is timed, is compiled for the shapes of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compress.catalog import closest, missing_package
from compress.errors import ArtifactError, ModelError, NoSuchPlace, RuntimeUnavailable, first_line, translated
from compress.formats.files import find_format
from compress.model.artifacts import Signature
from compress.onnx_file.io import is_half, load_onnx, read_signature, require_external
from compress.verification.runtimes.base import Arrays, Runtime, check_inputs

_DEVICES = ("CPU", "GPU", "NPU")


class OpenVino(Runtime):
    """An ONNX file in OpenVINO.

    Args:
        path: The .onnx file; external data lies beside it.
        provider: Device of OpenVINO, such as "CPU".
        threads: Threads of the CPU.
    """

    name: ClassVar[str] = "openvino"
    reads_onnx: ClassVar[bool] = True

    def __init__(self, path: Path, provider: str = "CPU", threads: int = 1) -> None:
        super().__init__(provider)
        self.path, self.threads = path, threads
        self._core: Any = None
        self._precision = "f32"
        self._compiled: Any = None
        self._request: Any = None

    @classmethod
    def from_file(cls, path: Path, *, provider: str, threads: int) -> OpenVino:
        """Return the runtime of an ONNX file, not opened yet."""
        return cls(path, provider, threads)

    @property
    def provider_in_use(self) -> str:
        """The device that computes."""
        return self.provider if self._compiled is None else ",".join(self._compiled.get_property("EXECUTION_DEVICES"))

    @property
    def precision(self) -> str | None:
        """Precision of floating-point operators, as OpenVINO states it: "f32" or "f16"."""
        if self._compiled is None:
            return None
        stated = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        return str(stated.get_type_name() if hasattr(stated, "get_type_name") else stated)

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Return a call compiled for the shapes of these inputs."""
        check_inputs(self.signature, inputs)
        model = self._read()
        places = self._places(model)
        with self._refusals():
            model.reshape({model.inputs[places[name]]: list(array.shape) for name, array in inputs.items()})
            request = self._compile(model).create_infer_request()
            for name, array in inputs.items():
                request.get_input_tensor(places[name]).data[...] = array
            request.infer()
        call: Callable[[], object] = request.infer
        return call

    def _open(self) -> Signature:
        openvino = _package()
        model = load_onnx(self.path)
        require_external(model, self.path)
        signature = read_signature(model)
        self._core = openvino.Core()
        self._require_device()
        self._precision = "f16" if is_half(model) else "f32"
        with translated(lambda error: ArtifactError(f"OpenVINO cannot open '{self.path}': {first_line(error)}")):
            self._compiled = self._compile(self._read())
        self._request = self._compiled.create_infer_request()
        return signature

    def _require_device(self) -> None:
        present = list(self._core.available_devices)
        if self.provider in present:
            return
        asked = f"Runtime '{self.name}': {self.provider} was asked for, but OpenVINO finds {', '.join(present)} only."
        if self.provider.partition(".")[0] in _DEVICES:
            raise RuntimeUnavailable(asked)
        raise NoSuchPlace(asked, hint=closest(self.provider, present) or "Set provider: CPU.")

    def _read(self) -> Any:
        written = find_format(self.path, self.name)
        return self._core.read_model(self.path if written is None else written / f"{self.path.stem}.xml")

    def _compile(self, model: Any) -> Any:
        threads = {"INFERENCE_NUM_THREADS": self.threads} if self.provider == "CPU" else {}
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": self._precision, **threads}
        return self._core.compile_model(model, self.provider, settings)

    def _places(self, model: Any) -> dict[str, int]:
        """Return name -> position of each input; names that OpenVINO has changed keep the order of the file."""
        named = {name: place for place, one in enumerate(model.inputs) for name in one.get_names()}
        return {spec.name: named.get(spec.name, place) for place, spec in enumerate(self.signature.inputs)}

    def _run(self, inputs: Arrays) -> Arrays:
        places = self._places(self._compiled)
        with self._refusals():
            found = self._request.infer({places[name]: array for name, array in inputs.items()})
        outputs = [found[place] for place in range(len(self._compiled.outputs))]
        return {spec.name: value for spec, value in zip(self.signature.outputs, outputs, strict=True)}

    def _refusals(self) -> Any:
        """Return the context manager that turns errors of OpenVINO into a ModelError."""
        return translated(
            lambda error: ModelError(f"'{self.path}' must run on its input, OpenVINO says: {first_line(error)}")
        )

    def _close(self) -> None:
        self._request = self._compiled = self._core = None


def _package() -> Any:
    """Return the package openvino.

    Raises:
        PackageMissing: It is not installed.
    """
    try:
        import openvino  # a second, and an extra
    except ImportError as error:
        raise missing_package(["openvino"], "Runtime 'openvino'") from error
    return openvino
