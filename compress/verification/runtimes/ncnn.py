"""Runtime ncnn: files in ncnn, converted by pnnx, with weights and activations in float32.

ncnn computes one image at a time. It stores float32 weights as float16, unless the conversion sets that off.

    model.onnx  --pnnx-->  model.ncnn.param  model.ncnn.bin  --> ncnn.Net
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from compress.catalog import RUNTIME_PACKAGES, require_packages
from compress.errors import ArtifactError, ModelError, NoSuchPlace, RuntimeUnavailable, translated
from compress.formats.files import find_format
from compress.formats.ncnn import NcnnFiles, convert_to_ncnn
from compress.model.artifacts import Signature, TensorSpec
from compress.onnx_file.io import load_onnx, read_signature, require_external
from compress.verification.runtimes.base import Arrays, Runtime, check_inputs, require_single_images

CPU, VULKAN = "CPU", "Vulkan"
_HALF = (
    "use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage", "use_bf16_packed",
)  # fmt: skip


class Ncnn(Runtime):
    """An ONNX file in ncnn.

    Args:
        path: The .onnx file; external data lies beside it.
        provider: "CPU" or "Vulkan".
        threads: Threads of the CPU.
    """

    name: ClassVar[str] = "ncnn"
    reads_onnx: ClassVar[bool] = True

    def __init__(self, path: Path, provider: str = CPU, threads: int = 1) -> None:
        super().__init__(provider)
        self.path, self.threads = path, threads
        self._nets: dict[tuple[tuple[int, ...], ...], Any] = {}

    @classmethod
    def from_file(cls, path: Path, *, provider: str, threads: int) -> Ncnn:
        """Return the runtime of an ONNX file, not opened yet."""
        return cls(path, provider, threads)

    @property
    def provider_in_use(self) -> str:
        """The device that computes."""
        return self.provider

    @property
    def precision(self) -> str | None:
        """Always "f32"; None before the file is open."""
        return None if self._signature is None else "f32"

    def require(self) -> None:
        """Check the provider and the packages of runtime and converter."""
        require_packages(RUNTIME_PACKAGES[self.name], f"Runtime '{self.name}'")
        self._require_device()

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Return a call that computes the images one after the other."""
        check_inputs(self.signature, inputs)
        net, images = self._net(inputs), self._images(inputs)
        return lambda: [self._compute(net, image) for image in images]

    def _open(self) -> Signature:
        is_converted = find_format(self.path, self.name) is not None
        require_packages(["ncnn"] if is_converted else RUNTIME_PACKAGES[self.name], f"Runtime '{self.name}'")
        self._require_device()
        model = load_onnx(self.path)
        require_external(model, self.path)
        signature = read_signature(model)
        require_single_images(self.name, self.path, signature)
        sizes = [spec.shape[1:] for spec in signature.inputs]
        if all(isinstance(size, int) for shape in sizes for size in shape):
            self._load(tuple(tuple(int(size) for size in shape) for shape in sizes))
        return signature

    def _require_device(self) -> None:
        if self.provider == CPU:
            return
        asked = f"Runtime '{self.name}': {self.provider} was asked for, but "
        if self.provider == VULKAN:
            import ncnn

            if ncnn.get_gpu_count():
                return
            raise RuntimeUnavailable(f"{asked}ncnn finds no GPU with Vulkan on this machine.")
        raise NoSuchPlace(f"{asked}it offers {CPU} and {VULKAN} only.", hint=f"Set provider: {CPU}.")

    def _load(self, sizes: tuple[tuple[int, ...], ...]) -> Any:
        """Convert the file for inputs of these sizes, without the batch, and return the network."""
        import ncnn

        written = find_format(self.path, self.name)
        with TemporaryDirectory(prefix="compress-ncnn-") as folder:
            if written is None:
                files = convert_to_ncnn(self.path, Path(folder), sizes)
            else:
                files = NcnnFiles.of(self.path, written)
            net = ncnn.Net()
            net.opt.num_threads = self.threads
            net.opt.use_vulkan_compute = self.provider == VULKAN
            for name in _HALF:
                if hasattr(net.opt, name):
                    setattr(net.opt, name, False)
            if net.load_param(str(files.param)) or net.load_model(str(files.weights)):
                unknown = files.find_foreign_layers()
                reason = f"it has no layer {', '.join(unknown)}" if unknown else "it cannot read the converted file"
                raise ArtifactError(f"ncnn cannot open '{self.path}': {reason}.")
        self._nets[sizes] = net
        return net

    def _net(self, inputs: Mapping[str, np.ndarray]) -> Any:
        sizes = tuple(inputs[spec.name].shape[1:] for spec in self.signature.inputs)
        return self._nets.get(sizes) or self._load(sizes)

    def _images(self, inputs: Mapping[str, np.ndarray]) -> list[list[Any]]:
        """Return ncnn's arrays of each image."""
        import ncnn

        arrays = [np.ascontiguousarray(inputs[spec.name]) for spec in self.signature.inputs]
        return [[ncnn.Mat(array[place]).clone() for array in arrays] for place in range(len(arrays[0]))]

    def _compute(self, net: Any, image: list[Any]) -> list[Any]:
        """Return ncnn's output arrays of one image."""
        outputs = []
        with net.create_extractor() as extractor:
            for place, array in enumerate(image):
                extractor.input(f"in{place}", array)
            for place in range(len(self.signature.outputs)):
                code, found = extractor.extract(f"out{place}")
                if code:
                    raise ModelError(f"'{self.path}' must run on its input, ncnn ends with code {code}.")
                outputs.append(found)
        return outputs

    def _run(self, inputs: Arrays) -> Arrays:
        net = self._net(inputs)
        rows: list[list[np.ndarray]] = [[] for _ in self.signature.outputs]
        with translated(lambda error: ModelError(f"'{self.path}' must run on its input, ncnn says: {error}")):
            for image in self._images(inputs):
                for row, found in zip(rows, self._compute(net, image), strict=True):
                    row.append(np.array(found))
        named = zip(self.signature.outputs, rows, strict=True)
        return {spec.name: np.stack([_shaped(one, spec) for one in row]) for spec, row in named}

    def _close(self) -> None:
        self._nets = {}


def _shaped(values: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Return the output of one image in the shape of the signature: ncnn leaves out axes of size 1."""
    sizes = spec.shape[1:]
    if all(isinstance(size, int) for size in sizes):
        return values.reshape([int(size) for size in sizes])
    return values
