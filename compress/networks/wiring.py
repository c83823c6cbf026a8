"""Inputs, outputs and determinism of a network, from one run on real inputs.

The run is observed operator by operator. A fixed graph cannot draw random numbers, or branch on the values of its
input. Tensors computed from the input are tracked, so that a branch on a constant (a flag in a buffer) is not mistaken
for a branch on the image.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from compress.catalog import closest
from compress.data.packing import is_packed, part_sizes, row_width
from compress.errors import ModelError, NonFinite
from compress.model.adapter import INPUT_NAME, OUTPUT_NAME, adapt, flatten_outputs, wiring_of
from compress.model.artifacts import FactorySpec, Signature, TensorSpec
from compress.model.modes import eval_mode, hooked
from compress.networks.training_mode import TrainingMode, compare_modes
from compress.networks.weights import some
from compress.user_code import raise_as


def wire(module: nn.Module, spec: FactorySpec, example: Tensor) -> nn.Module:
    """Return the same network object, changed to take one array and return a tensor or a tuple of tensors.

    A network that already does so in both modes is not changed. Modules that return other tensors or run other layers
    in training mode stay in evaluation mode (`training_mode.py`).

    Args:
        module: Network in eval mode, on the CPU.
        spec: Inputs of the network, and its kept outputs.
        example: One array of the data: (N, C, H, W) images, or (N, K) rows of all inputs.

    Raises:
        ModelError: The network fails on the example, returns a value that is no tensor, or lacks an output.
    """
    inputs = spec.input_specs()
    _check_example(inputs, example)
    if inputs:
        module = adapt(module, inputs, ())
    outputs = run_network(module, example)
    names = [name for name, _ in flatten_outputs(outputs)]
    kept = _kept(names, spec.outputs)
    mode = compare_modes(module, example, kept or tuple(names))
    if isinstance(outputs, Tensor) and not kept and mode == TrainingMode():
        return module
    return adapt(module, inputs, kept or tuple(names), mode.evaluated, mode.notes)


def signature_of(module: nn.Module, spec: FactorySpec, example: Tensor) -> Signature:
    """Return names, shapes and dtypes of the inputs and outputs of a wired network.

    Args:
        module: Network returned by `wire`.
        spec: Inputs of the network.
        example: As in `wire`, of at least two samples.

    Raises:
        ModelError: The network fails, the first axis of an output is not the batch, or a second run has other outputs.
        NonFinite: An output is NaN or infinite.
    """
    first, again = (_named(module, run_network(module, example)) for _ in range(2))
    for name, value in first.items():
        if value.ndim == 0 or value.shape[0] != len(example):
            raise ModelError(
                f"Output '{name}' must have the batch ({len(example)}) as its first axis, "
                f"got shape {tuple(value.shape)}.",
                hint=f"Name the outputs to keep: model.outputs, out of {', '.join(first)}.",
            )
        if not value.isfinite().all():
            raise NonFinite(f"Output '{name}' of the network must be finite, got NaN or infinity on real inputs.")
    if changing := [name for name in first if not torch.allclose(first[name], again[name], rtol=1e-4, atol=1e-5)]:
        raise ModelError(_why_it_changes(module, example, changing), hint=_CHANGING_HINT)
    inputs = spec.input_specs() or (TensorSpec(INPUT_NAME, ("batch", *example.shape[1:])),)
    taken = {one.name for one in inputs}
    return Signature(
        inputs=inputs,
        outputs=tuple(
            TensorSpec(f"{name}_out" if name in taken else name, ("batch", *value.shape[1:]), _dtype(value))
            for name, value in first.items()
        ),
    )


def notes_on(module: nn.Module, example: Tensor) -> list[str]:
    """Return notes for the user on the execution of a network, a sentence each.

    Args:
        module: Any network that runs on the example.
        example: Input of the network.
    """
    with eval_mode(module):
        seen = observe(module, example)
    wiring = wiring_of(module)
    notes = [] if wiring is None else list(wiring.notes)
    if not seen.decisions:
        return notes
    return [
        *notes,
        f"The network decides by the values of its input, in {some(seen.decisions)}: what such code does for one "
        "image is fixed for all of them in an ONNX file, and export may refuse it.",
    ]


def run_network(module: nn.Module, example: Tensor) -> object:
    """Return the outputs of a network for one array, without gradients.

    Raises:
        ModelError: The network raises; the message shows its error.
    """
    shape = tuple(example.shape)
    what = f"rows of shape {shape}" if example.ndim == 2 else f"images of shape {shape}"
    hint = (
        "Check data.preprocessing (resize, crop, channels, layout) and model.kwargs; where the network takes several "
        "inputs, declare them: model.inputs."
    )
    with raise_as(ModelError, f"The network must run on {what}", hint), torch.no_grad():
        return module(example)


_CHANGING_HINT = (
    "Let the factory return a network that draws nothing in eval mode: F.dropout needs training=self.training."
)


def _why_it_changes(module: nn.Module, example: Tensor, changing: list[str]) -> str:
    seen: Observed = observe(module, example)
    left = [f"'{name}'" for name, part in module.named_modules() if part.training and getattr(part, "p", 0)]
    reasons = [f"random numbers are drawn in {some(seen.random)}"] if seen.random else []
    reasons += [f"dropout stays in training mode in {some(left)}"] if left else []
    why = "; ".join(reasons) or "no random operator was seen, so it keeps a state of its own between runs"
    return f"The network must give the same for the same input, {some(changing)} changes between two runs: {why}."


def _check_example(inputs: tuple[TensorSpec, ...], example: Tensor) -> None:
    """Raise ModelError unless the data fits the inputs that `model.inputs` declares."""
    if not inputs:
        return
    if is_packed(inputs):
        wanted: tuple[int, ...] = (row_width(inputs),)
        what = f"rows of {wanted[0]} numbers, all of {', '.join(spec.name for spec in inputs)} side by side"
    else:
        wanted = part_sizes(inputs[0])
        what = f"the shape that model.inputs declares for '{inputs[0].name}', {wanted}"
    if tuple(example.shape[1:]) != wanted:
        raise ModelError(
            f"Samples must be {what}; the data set gives {tuple(example.shape[1:])}.",
            hint="Check model.inputs and data.preprocessing; several inputs need a data set that gives all of them.",
        )


def _kept(names: list[str], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Check names of outputs and return those to keep."""
    if not names:
        raise ModelError("The network must return at least one tensor, it returns none.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModelError(f"Outputs must have names of their own, {some(twice)} is there twice.")
    for name in wanted:
        if name not in names:
            raise ModelError(
                f"model.outputs must name outputs of the network ({', '.join(names)}), got '{name}'.",
                hint=closest(name, names),
            )
    return () if list(wanted) == names == [OUTPUT_NAME] else wanted


def _named(module: nn.Module, outputs: object) -> dict[str, Tensor]:
    """Return the outputs of a wired network by name."""
    wiring = wiring_of(module)
    if wiring is None or not wiring.outputs:
        return dict(flatten_outputs(outputs))
    values: Iterable[object] = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: value for name, value in zip(wiring.outputs, values, strict=True) if isinstance(value, Tensor)}


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


@dataclass(slots=True)
class Observed:
    """Operators seen in a run, each as "layer (Class): operator", in the order of the run.

    Attributes:
        random: Operators that drew random numbers.
        decisions: Operators that turned a value that depends on the input into a Python number or a tensor's shape.
    """

    random: list[str] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)


def observe(module: nn.Module, *inputs: Tensor) -> Observed:
    """Run a network once without gradients, and return the observed operators; the random state is restored.

    Args:
        module: Any network; its training flags are unchanged.
        inputs: Arguments of the network.

    Raises:
        Any error of the network.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _watch(module) as watch:
        watch.follow(inputs)
        with watch:
            module(*inputs)
    return watch.seen


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Observed()
        self.place = [""]
        self._from_input: Any = WeakIdKeyDictionary()

    def follow(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._from_input[value] = True

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        depends = any(value in self._from_input for value in given)
        name = operator.overloadpacket.__name__.strip("_")
        if torch.Tag.nondeterministic_seeded in operator.tags:
            _add(self.seen.random, f"{self.place[-1]}: {name}")
        if depends and {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operator.tags):
            _add(self.seen.decisions, f"{self.place[-1]}: {name}")
        result = operator(*args, **(kwargs or {}))
        if depends:
            self.follow(tree_leaves(result))
        return result


@contextmanager
def _watch(module: nn.Module) -> Iterator[_Watch]:
    """Yield a dispatch mode that knows the running layer."""
    watch = _Watch()
    places = {
        part: f"'{name}' ({type(part).__name__})" if name else f"the network itself ({type(part).__name__})"
        for name, part in module.named_modules()
    }
    with hooked(
        before=[(part, lambda *_, place=place: watch.place.append(place)) for part, place in places.items()],
        after=[(part, lambda *_: (watch.place.pop(), None)[1]) for part in places],
        always_call=True,
    ):
        yield watch


def _add(found: list[str], entry: str) -> None:
    if entry not in found:
        found.append(entry)
