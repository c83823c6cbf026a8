"""Runtime torch_eager: a torch module, the reference that other runtimes are compared with."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import nn

from compress.data.packing import standard_strides
from compress.errors import ModelError, RuntimeUnavailable
from compress.model.adapter import real_inputs
from compress.model.artifacts import Signature
from compress.model.modes import eval_mode
from compress.verification.runtimes.base import Arrays, Runtime

CPU = "CPU"


class TorchEager(Runtime):
    """A torch network on the CPU, in eval mode; its training flags are restored.

    Args:
        module: Network that returns one tensor, or a tuple with one tensor for each output of the signature.
        signature: Names of inputs (in the order of `forward`) and outputs.
        provider: Only "CPU".
    """

    name: ClassVar[str] = "torch_eager"

    def __init__(self, module: nn.Module, signature: Signature, provider: str = CPU) -> None:
        super().__init__(provider)
        self.module = module
        self._given = signature

    @property
    def provider_in_use(self) -> str:
        """Always "CPU"."""
        return CPU

    def _open(self) -> Signature:
        if self.provider != CPU:
            raise RuntimeUnavailable(f"Runtime '{self.name}': {self.provider} was asked for, but it offers {CPU} only.")
        return self._given

    def _run(self, inputs: Arrays) -> Arrays:
        arrays = (np.ascontiguousarray(inputs[spec.name]) for spec in self.signature.inputs)
        tensors = [standard_strides(torch.from_numpy(array)) for array in arrays]
        try:
            with torch.no_grad(), eval_mode(self.module), real_inputs(self.module):
                outputs = self.module(*tensors)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ModelError(f"The torch network must run on its input, it says: {error}") from error
        values = outputs if isinstance(outputs, tuple | list) else (outputs,)
        names = [spec.name for spec in self.signature.outputs]
        if len(values) != len(names) or not all(isinstance(value, torch.Tensor) for value in values):
            raise ModelError(f"The torch network must return {len(names)} tensors ({', '.join(names)}).")
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}

    def _close(self) -> None:
        """Do nothing: a torch network holds no resources of a runtime."""
