"""Interface of runtimes: outputs of a network from arrays, with inputs checked.

    with OnnxRuntime(path) as runtime:          _open
        runtime.run({"image": images})          check names, shapes, dtypes -> _run -> check outputs, copy
                                                _close

A runtime implements `_open`, `_run` and `_close`; everything else is shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import ClassVar, TypeVar

import numpy as np

from compress.errors import ArtifactError, InternalError, ModelError, NoSuchPlace, RuntimeUnavailable
from compress.model.artifacts import Signature, TensorSpec

Arrays = dict[str, np.ndarray]
R = TypeVar("R", bound="Opened")


class Opened(ABC):
    """A network that is open inside a `with` block.

    Attributes:
        name: Name in `catalog.RUNTIMES`.
    """

    name: ClassVar[str]
    _signature: Signature | None = None

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Return the reason why this runtime cannot be used on this machine, None where it can."""
        return None

    @property
    def signature(self) -> Signature:
        """Inputs and outputs of the open network."""
        if self._signature is None:
            raise InternalError(f"Runtime '{self.name}' must be opened in a `with` block before it is used.")
        return self._signature

    def __enter__(self: R) -> R:
        reason = self.unavailable_reason()
        if reason is not None:
            raise RuntimeUnavailable(f"Runtime '{self.name}' is not available: {reason}.")
        self._signature = self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._signature = None

    @abstractmethod
    def _open(self) -> Signature:
        """Take the resources and return inputs and outputs; raises ArtifactError or RuntimeUnavailable."""

    @abstractmethod
    def _close(self) -> None:
        """Release the resources."""


class Runtime(Opened):
    """A network, ready to run inside a `with` block.

    Attributes:
        name: Name in `catalog.RUNTIMES`.
        reads_onnx: True if `from_file` works.
        provider: Requested execution provider.
        start_ms: Time until the runtime was ready to compute; None if not measured.
        owner: Owner of the network, named first in errors of its predictions ("Baseline 'a.onnx'"); "" for none.
    """

    reads_onnx: ClassVar[bool] = False

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.start_ms: float | None = None
        self.owner = ""

    @classmethod
    def from_file(cls, path: Path, *, provider: str, threads: int) -> Runtime:
        """Return the runtime of an ONNX file, not opened yet.

        Args:
            path: The .onnx file.
            provider: Execution provider that must be the one in use.
            threads: Threads inside one operator.

        Raises:
            NoSuchPlace: This runtime cannot read ONNX files.
        """
        raise NoSuchPlace(
            f"Runtime '{cls.name}' must read ONNX files to verify one; it cannot.", hint="Use runtime: onnxruntime."
        )

    def require(self) -> None:
        """Check that files can be run here; by opening the file, unless that takes a conversion.

        Raises:
            RuntimeUnavailable: A package or the provider is missing.
            NoSuchPlace: No machine has this provider.
        """
        with self:
            pass

    @property
    @abstractmethod
    def provider_in_use(self) -> str:
        """The execution provider that computes; equal to `provider` once the runtime is open."""

    @property
    def precision(self) -> str | None:
        """Precision that floating-point operators are computed in; None where the runtime computes as the file says."""
        return None

    @property
    def io_binding(self) -> bool:
        """True if inputs and outputs of a `bind` call stay on the device, so that no copy is timed."""
        return False

    def placements(self, inputs: Mapping[str, np.ndarray]) -> dict[str, tuple[str, ...]] | None:
        """Return provider -> its nodes ("Conv conv1"), found by one call; None where the runtime does not report them.

        Raises:
            ModelError: A name, shape or dtype does not fit, or the network fails on this input.
        """
        return None

    def check_work(self, images: int) -> None:
        """Raise an error before work on more images than this runtime can compute in acceptable time.

        Raises:
            ConfigValueError: The runtime would take too long.
        """
        return

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Compute all outputs.

        Args:
            inputs: Name -> array, one for each input of the signature; an open axis takes any size from 1.

        Returns:
            Name -> array, in the order of the signature; the arrays are copies.

        Raises:
            ModelError: A name, shape or dtype does not fit, or the network fails on this input.
        """
        check_inputs(self.signature, inputs)
        outputs = self._run(dict(inputs))
        missing = [spec.name for spec in self.signature.outputs if spec.name not in outputs]
        if missing:
            raise ModelError(f"Runtime '{self.name}' must yield the outputs {', '.join(missing)}, they are missing.")
        return {spec.name: np.array(outputs[spec.name]) for spec in self.signature.outputs}

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Check `inputs` once and return a call that computes with no checks or copies; for measuring time.

        The call returns when everything is computed; its return value has no meaning.

        Raises:
            ModelError: A name, shape or dtype does not fit.
        """
        check_inputs(self.signature, inputs)
        fixed = dict(inputs)
        return lambda: self._run(fixed)

    @abstractmethod
    def _run(self, inputs: Arrays) -> Arrays:
        """Compute all outputs by name; `inputs` fit the signature. Raises ModelError when the network fails."""


def require_single_images(name: str, path: Path, signature: Signature) -> None:
    """Check the inputs of a file for a runtime that computes one image at a time, in float32.

    Args:
        name: Name of the runtime.
        path: The .onnx file.
        signature: Signature of the file.

    Raises:
        ArtifactError: An input is not float32, or has a fixed batch of more than one image.
    """
    for spec in signature.inputs:
        is_one_image = len(spec.shape) > 1 and (isinstance(spec.shape[0], str) or spec.shape[0] == 1)
        if spec.dtype != "float32" or not is_one_image:
            shape = ", ".join(str(size) for size in spec.shape)
            raise ArtifactError(
                f"Runtime '{name}' must have float32 inputs with an open batch axis, or one of size 1; input "
                f"'{spec.name}' of '{path}' is {spec.dtype} ({shape})."
            )


def check_inputs(signature: Signature, inputs: Mapping[str, np.ndarray]) -> None:
    """Raise ModelError where a name, shape or dtype of the inputs does not fit."""
    wanted = {spec.name: spec for spec in signature.inputs}
    if set(inputs) != set(wanted):
        raise ModelError(f"Inputs must be named {', '.join(wanted)}, got {', '.join(inputs) or 'none'}.")
    for name, spec in wanted.items():
        _check_array(spec, inputs[name])


def _check_array(spec: TensorSpec, array: np.ndarray) -> None:
    if str(array.dtype) != spec.dtype:
        raise ModelError(f"Input '{spec.name}' must be {spec.dtype}, got {array.dtype}.")
    fits = array.ndim == len(spec.shape) and all(
        size >= 1 if isinstance(want, str) else size == want for want, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in spec.shape)
        raise ModelError(f"Input '{spec.name}' must have shape ({wanted}), got {array.shape}.")
