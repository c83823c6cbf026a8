"""Interface of runtimes: outputs of a network from arrays, with inputs checked.

    with OnnxRuntime(path) as runtime:          _open
        runtime.run({"image": images})          check names, shapes, dtypes -> _run -> check outputs, copy
                                                _close

A runtime fills in `_open`, `_run` and `_close`; everything else is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import ClassVar, TypeVar

import numpy as np

from compress.errors import InternalError, ModelError, NoSuchPlace, RuntimeUnavailable
from compress.model.artifacts import Signature, TensorSpec

Arrays = dict[str, np.ndarray]
R = TypeVar("R", bound="Runtime")


class Runtime(ABC):
    """A network, ready to run inside a `with` block.

    Attributes:
        name: As in `catalog.RUNTIMES`.
        reads_onnx: Whether `from_file` works.
        provider: Execution provider asked for.
        start_ms: Until the open runtime could compute; None where that was not measured.
        owner: Whose network it is, said first in errors of its predictions ("Baseline 'a.onnx'"); "" for nobody's.
    """

    name: ClassVar[str]
    reads_onnx: ClassVar[bool] = False

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.start_ms: float | None = None
        self.owner = ""
        self._signature: Signature | None = None

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

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Return why this runtime cannot be used on this machine at all, None when it can."""
        return None

    @property
    @abstractmethod
    def provider_in_use(self) -> str:
        """The execution provider that computes; equal to `provider` once the runtime is open."""

    @property
    def io_binding(self) -> bool:
        """Whether what `bind` is given, and what its calls give, lies on the device, so that no copy is timed."""
        return False

    def placements(self, inputs: Mapping[str, np.ndarray]) -> dict[str, tuple[str, ...]] | None:
        """Return provider -> the nodes it computes ("Conv conv1"), found by one call; None where nobody can tell.

        Raises:
            ModelError: A name, shape or dtype does not fit, or the network fails on this input.
        """
        return None

    def check_work(self, images: int) -> None:
        """Refuse, before it begins, work on so many images that it would take this runtime far too long.

        Raises:
            ConfigValueError: The runtime is made for less.
        """
        return

    @property
    def signature(self) -> Signature:
        """Inputs and outputs of the open network."""
        if self._signature is None:
            raise InternalError(f"Runtime '{self.name}' must be opened in a `with` block before it is used.")
        return self._signature

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Compute all outputs.

        Args:
            inputs: Name -> array, one for each input of the signature; an open axis takes any size from 1.

        Returns:
            Name -> array, in the order of the signature; the arrays are the caller's own.

        Raises:
            ModelError: A name, shape or dtype does not fit, or the network fails on this input.
        """
        self._check_inputs(inputs)
        outputs = self._run(dict(inputs))
        self._check_outputs(outputs)
        return {spec.name: np.array(outputs[spec.name]) for spec in self.signature.outputs}

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Check `inputs` once and return a call that computes with no checks or copies; for measuring time.

        The call returns when everything is computed; what it returns is of no use.

        Raises:
            ModelError: A name, shape or dtype does not fit.
        """
        self._check_inputs(inputs)
        fixed = dict(inputs)
        return lambda: self._run(fixed)

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
    def _run(self, inputs: Arrays) -> Arrays:
        """Compute all outputs by name; `inputs` fit the signature. Raises ModelError when the network fails."""

    @abstractmethod
    def _close(self) -> None:
        """Give the resources back."""

    def _check_inputs(self, inputs: Mapping[str, np.ndarray]) -> None:
        wanted = {spec.name: spec for spec in self.signature.inputs}
        if set(inputs) != set(wanted):
            raise ModelError(f"Inputs must be named {', '.join(wanted)}, got {', '.join(inputs) or 'none'}.")
        for name, spec in wanted.items():
            _check_array(spec, inputs[name])

    def _check_outputs(self, outputs: Arrays) -> None:
        missing = [spec.name for spec in self.signature.outputs if spec.name not in outputs]
        if missing:
            raise ModelError(f"Runtime '{self.name}' must yield the outputs {', '.join(missing)}, they are missing.")


def _check_array(spec: TensorSpec, array: np.ndarray) -> None:
    if str(array.dtype) != spec.dtype:
        raise ModelError(f"Input '{spec.name}' must be {spec.dtype}, got {array.dtype}.")
    fits = array.ndim == len(spec.shape) and all(
        size >= 1 if isinstance(want, str) else size == want for want, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in spec.shape)
        raise ModelError(f"Input '{spec.name}' must have shape ({wanted}), got {array.shape}.")
