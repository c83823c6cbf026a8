"""Contract suite of runtimes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from compress.data.packing import draw
from compress.errors import CompressError, ModelError, RuntimeUnavailable
from compress.model.artifacts import Signature
from compress.testing.checks import hold
from compress.verification.runtimes.base import Runtime
from compress.verification.runtimes.torch_eager import TorchEager


@dataclass(frozen=True)
class RuntimeCase:
    """Torch network and its ONNX file for the tests of a runtime.

    Attributes:
        name: Name in the titles of tests.
        module: The torch network.
        signature: Inputs and outputs of the network, with an open batch axis.
        onnx_path: Exported ONNX file.
    """

    name: str
    module: nn.Module
    signature: Signature
    onnx_path: Path


class RuntimeContract:
    """Contract of every runtime. A subclass sets `runtime_class` and offers a fixture `case`.

    Attributes:
        runtime_class: The runtime under test.
        provider: Execution provider that is available on the machine.
        unavailable_provider: Execution provider that is not available.
        tolerance: Largest difference to torch eager, absolute and relative.
    """

    runtime_class: ClassVar[type[Runtime]]
    provider: ClassVar[str] = "CPUExecutionProvider"
    unavailable_provider: ClassVar[str] = "NoSuchExecutionProvider"
    tolerance: ClassVar[float] = 1e-4

    def open(self, case: RuntimeCase, provider: str | None = None) -> AbstractContextManager[Runtime]:
        """Return the runtime of a case, not opened yet; override it for a runtime that reads no ONNX files."""
        return self.runtime_class.from_file(case.onnx_path, provider=provider or self.provider, threads=1)

    def test_signature_is_the_networks(self, case: RuntimeCase) -> None:
        """Names, shapes and dtypes are those of the network."""
        with self.open(case) as runtime:
            hold(runtime.signature == case.signature, f"signature is {runtime.signature}")

    def test_output_names_equal_the_signatures(self, case: RuntimeCase) -> None:
        """`run` returns exactly the outputs of the signature, in its order, for a batch of 1 and of 3."""
        with self.open(case) as runtime:
            for batch in (1, 3):
                outputs = runtime.run(_inputs(case.signature, batch))
                wanted = {spec.name: (batch, *spec.shape[1:]) for spec in case.signature.outputs}
                hold({name: array.shape for name, array in outputs.items()} == wanted, f"outputs at batch {batch}")

    def test_agrees_with_torch_eager(self, case: RuntimeCase) -> None:
        """Outputs equal those of the torch network on the same input."""
        inputs = _inputs(case.signature, 3)
        with self.open(case) as runtime, TorchEager(case.module, case.signature) as reference:
            got, wanted = runtime.run(inputs), reference.run(inputs)
        for name, values in wanted.items():
            close = np.allclose(got[name], values, rtol=self.tolerance, atol=self.tolerance)
            hold(close, f"output '{name}' differs by {np.abs(got[name] - values).max():.2g}")

    def test_each_image_is_computed_on_its_own(self, case: RuntimeCase) -> None:
        """An image has the same output alone and in a batch."""
        inputs = _inputs(case.signature, 3)
        with self.open(case) as runtime:
            together = runtime.run(inputs)
            alone = runtime.run({name: array[1:2] for name, array in inputs.items()})
        for name, values in alone.items():
            hold(np.allclose(together[name][1:2], values, rtol=self.tolerance, atol=self.tolerance), f"output '{name}'")

    def test_outputs_are_the_callers_own(self, case: RuntimeCase) -> None:
        """A second run does not change the output arrays of the first."""
        with self.open(case) as runtime:
            first = runtime.run(_inputs(case.signature, 1, seed=0))
            kept = {name: array.copy() for name, array in first.items()}
            runtime.run(_inputs(case.signature, 1, seed=1))
        for name, array in kept.items():
            hold(np.array_equal(first[name], array) and first[name].flags.writeable, f"output '{name}' changed")

    def test_rejects_wrong_input_name(self, case: RuntimeCase) -> None:
        """An input that the network does not have is named in the error."""
        spec = case.signature.inputs[0]
        inputs = {"no_such_input": _inputs(case.signature, 1)[spec.name]}
        self._expect(case, inputs, f"Inputs must be named {spec.name}")

    def test_rejects_wrong_shape(self, case: RuntimeCase) -> None:
        """A wrong rank, a wrong size and an empty batch are refused."""
        spec = case.signature.inputs[0]
        array = _inputs(case.signature, 2)[spec.name]
        for wrong in (array[0], array[..., :-1], array[:0]):
            self._expect(case, {spec.name: np.ascontiguousarray(wrong)}, f"Input '{spec.name}' must have shape")

    def test_rejects_wrong_dtype(self, case: RuntimeCase) -> None:
        """float64 inputs are refused instead of converted to float32."""
        spec = case.signature.inputs[0]
        array = _inputs(case.signature, 1)[spec.name].astype(np.float64)
        self._expect(case, {spec.name: array}, f"Input '{spec.name}' must be {spec.dtype}")

    def test_provider_in_use_is_the_one_asked_for(self, case: RuntimeCase) -> None:
        """An open runtime computes on the requested provider."""
        with self.open(case) as runtime:
            hold(runtime.provider_in_use == runtime.provider == self.provider, f"{runtime.provider_in_use} in use")

    def test_nodes_are_placed_where_the_runtime_computes(self, case: RuntimeCase) -> None:
        """A runtime that reports the providers of its nodes has at least one node on the requested provider."""
        with self.open(case) as runtime:
            placements = runtime.placements(_inputs(case.signature, 1))
        hold(placements is None or bool(placements.get(self.provider)), f"nodes are placed as {placements}")

    def test_a_bound_call_can_be_made_again_and_again(self, case: RuntimeCase) -> None:
        """The timed call computes each time, and the runtime remains usable afterwards."""
        inputs = _inputs(case.signature, 2)
        with self.open(case) as runtime:
            call, before = runtime.bind(inputs), runtime.run(inputs)
            for _ in range(3):
                call()
            after = runtime.run(inputs)
        for name, values in before.items():
            hold(np.array_equal(values, after[name]), f"output '{name}' changed")

    def test_absent_provider_is_unavailable(self, case: RuntimeCase) -> None:
        """An unavailable provider causes an error that names it, and no fallback to another provider."""
        try:
            with self.open(case, self.unavailable_provider):
                pass
        except RuntimeUnavailable as error:
            hold(self.unavailable_provider in str(error), f"message is '{error}'")
        else:
            raise AssertionError("The runtime opened on a provider that is not there.")

    def _expect(self, case: RuntimeCase, inputs: dict[str, np.ndarray], wording: str) -> None:
        with self.open(case) as runtime:
            for call in (runtime.run, runtime.bind):
                try:
                    call(inputs)
                except CompressError as error:
                    hold(isinstance(error, ModelError) and wording in str(error), f"error is {error!r}")
                else:
                    raise AssertionError(f"The runtime must refuse the input with '{wording}'.")


def _inputs(signature: Signature, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        spec.name: draw(spec, [size if isinstance(size, int) else batch for size in spec.shape], generator)
        for spec in signature.inputs
    }
