"""Adapter for networks with several inputs, or with outputs in a dict, tuple or dataclass.

    rows (N, K) ──unpack──> forward(image, mask=...) ──flatten──> Tensor, or tuple of tensors
                            (the user's own)

The network itself is changed, and nothing is put around it: its class becomes a subclass whose `forward` adapts, so
that names of parameters and layers stay what they were. Outputs are flattened in the order in which they are met: the
entries of a mapping by their keys, the fields of a dataclass or named tuple, the elements of a list or tuple by their
place. A name is the path there ("features.0"), "output_0" for an element of the outermost list, "logits" for a single
tensor.
"""

import copy
import dataclasses
import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from compress.data.packing import draw, is_packed, pack, part_sizes, row_width, standard_strides
from compress.errors import ModelError, attempt
from compress.model.artifacts import Signature, TensorSpec

INPUT_NAME, OUTPUT_NAME = "images", "logits"
_WIRING = "compress_wiring"


@dataclass(frozen=True, slots=True)
class Wiring:
    """Inputs of a network's call, and the outputs that are kept.

    Attributes:
        inputs: As declared; () for one image.
        keywords: Those of them that `forward` takes by name; the others go in by their place.
        outputs: Names of the outputs that are kept, in order; () for whatever the network returns, as it is.
        evaluated: Paths of modules that stay in evaluation mode during training; "" is the network itself.
        notes: What a user should know of how it trains.
    """

    inputs: tuple[TensorSpec, ...] = ()
    keywords: frozenset[str] = frozenset()
    outputs: tuple[str, ...] = ()
    evaluated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Adapted(nn.Module):
    """Mixin put before the class of an adapted network."""

    compress_wiring: Wiring
    compress_takes_parts: bool

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the tensors that are returned, as in the ONNX file; () where they are returned as they are."""
        return output_names(self.compress_wiring)

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Take one row for each sample (or the inputs themselves within `real_inputs`) and return the tensors kept."""
        wiring = self.compress_wiring
        parts = values
        if is_packed(wiring.inputs) and not self.compress_takes_parts:
            (rows,) = values
            parts = tuple(unpack_rows(rows, wiring.inputs))
        named = {
            spec.name: part for spec, part in zip(wiring.inputs, parts, strict=False) if spec.name in wiring.keywords
        }
        placed = [part for part, spec in zip(parts, wiring.inputs, strict=False) if spec.name not in wiring.keywords]
        kept: Tensor | tuple[Tensor, ...] = self.keep_outputs(
            super().forward(*(placed if wiring.inputs else parts), **named)
        )
        return kept

    def keep_outputs(self, outputs: Any) -> Any:
        """Return of what the network's own forward returned the tensors that are kept."""
        wiring = self.compress_wiring
        if not wiring.outputs:
            return outputs
        found = dict(flatten_outputs(outputs))
        if missing := [name for name in wiring.outputs if name not in found]:
            mode = "training" if self.training else "evaluation"
            raise ModelError(
                f"The network must return {', '.join(missing)} in {mode} mode, it returns {', '.join(found)}.",
                hint="Let its forward return the same tensors in both modes.",
            )
        kept = [found[name] for name in wiring.outputs]
        return kept[0] if len(kept) == 1 else tuple(kept)

    def train(self, mode: bool = True) -> "_Adapted":
        """Set training mode, but for the modules whose training code is left out."""
        super().train(mode)
        for path in self.compress_wiring.evaluated:
            with suppress(AttributeError):  # a module that was removed
                self.get_submodule(path).training = False
        return self


class _Own(_Adapted):
    """Mixin put before the class of a network that is returned to the user: its own forward."""

    def forward(self, *values: Any, **named: Any) -> Any:
        """Take the inputs as the network's own forward does (or rows of all of them) and return the tensors kept."""
        inputs = self.compress_wiring.inputs
        if len(values) == 1 and not named and _is_row(values[0], inputs):
            return super().forward(*values)
        return self.keep_outputs(super(_Adapted, self).forward(*values, **named))


def with_own_forward(module: nn.Module) -> nn.Module:
    """Return an adapted network that is called as its own class is; any other as it is.

    Args:
        module: As the stages work with it; changed in place.
    """
    if wiring_of(module) is None:
        return module
    base = type(module)

    def forward(self: Any, *values: Any, **named: Any) -> Any:
        return super(own, self).forward(*values, **named)  # type: ignore[arg-type]

    forward.__signature__ = inspect.signature(base.__bases__[1].forward)  # type: ignore[attr-defined]
    parts = {"__module__": base.__module__, "forward": forward}
    own: type[Any] = type(base.__name__, (_Own, *base.__bases__), parts)
    _set_class(module, own)
    return module


def as_users_own(module: nn.Module, example: Tensor) -> nn.Module:
    """Return an adapted network as one of the user's own class again, if that runs in training mode.

    Modules that stay in evaluation mode (`Wiring.evaluated`) were not followed in training mode, so that a cut may have
    broken what only training runs. Whether it has is tried on a copy. If so, the network keeps its protection
    (`with_own_forward`). A network of its own class can be pickled, as trainers of other libraries do.

    Args:
        module: As the stages work with it; changed in place.
        example: One array of the data, (1, ...).
    """
    wiring = wiring_of(module)
    if wiring is None:
        return module
    base = type(module).__bases__[-1]
    if getattr(sys.modules.get(base.__module__), base.__qualname__, None) is not base:  # such as a traced graph's
        return with_own_forward(module)
    trial = _of_class(copy.deepcopy(module), base).train()
    two = torch.cat([example, example])[:2]
    parts = tuple(unpack_rows(two, wiring.inputs)) if is_packed(wiring.inputs) else (two,)
    named = {spec.name: part for spec, part in zip(wiring.inputs, parts, strict=False) if spec.name in wiring.keywords}
    placed = (
        parts
        if not wiring.inputs
        else [part for spec, part in zip(wiring.inputs, parts, strict=True) if spec.name not in wiring.keywords]
    )
    runs = attempt(lambda: _runs(trial, placed, named), lambda error: False)
    return _of_class(module, base) if runs else with_own_forward(module)


def _runs(module: nn.Module, placed: Sequence[Tensor], named: Mapping[str, Tensor]) -> bool:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module(*placed, **named)
    return True


def _of_class(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """Change the class of an adapted network back to the user's, in place."""
    for name in (_WIRING, "compress_takes_parts"):
        module.__dict__.pop(name, None)
    _set_class(module, base)
    return module


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a network in place, as torch's own parametrizations do.

    A module around it would change the names of its parameters. A second object that shares its parts would not be the
    one that the network may refer to itself, such as by a bound method among its attributes.
    """
    module.__class__ = kind


def _is_row(value: Any, inputs: Sequence[TensorSpec]) -> bool:
    is_one = len(inputs) == 1 and len(inputs[0].shape) == 2
    return is_packed(inputs) and not is_one and tuple(value.shape[1:]) == (row_width(inputs),)


def adapt(
    module: nn.Module,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[str, ...],
    evaluated: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> nn.Module:
    """Return the network with one array in and tensors out; the same object, with a class of its own.

    Args:
        module: Any network.
        inputs: As declared; () for one image.
        outputs: Which outputs are kept; () for whatever the network returns, as it is.
        evaluated: Modules that stay in evaluation mode during training.
        notes: What a user should know of how it trains.

    Raises:
        ModelError: `forward` does not take these inputs.
    """
    if (earlier := wiring_of(module)) is not None:
        module.__dict__[_WIRING] = replace(earlier, outputs=outputs, evaluated=evaluated, notes=notes)
        return module
    plain = module
    if isinstance(module, torch.fx.GraphModule):  # its copies are made by its own rules, which know no other class
        plain = nn.Module()
        plain.__dict__.update(module.__dict__)
    base = type(module)
    own = type(
        base.__name__, (_Adapted, base if plain is module else _plain_class(base)), {"__module__": base.__module__}
    )
    _set_class(plain, own)
    plain.__dict__[_WIRING] = Wiring(inputs, _keywords(base, inputs), outputs, evaluated, notes)
    plain.__dict__["compress_takes_parts"] = False
    return plain


def output_names(wiring: Wiring) -> tuple[str, ...]:
    """Return the names of the outputs that are kept, none of which is that of an input."""
    taken = {spec.name for spec in wiring.inputs} or {INPUT_NAME}
    return tuple(f"{name}_out" if name in taken else name for name in wiring.outputs)


def wiring_of(module: nn.Module) -> Wiring | None:
    """Return how an adapted network is called, None for one that was left as it is."""
    return getattr(module, _WIRING, None)


@contextmanager
def real_inputs(module: nn.Module) -> Iterator[None]:
    """Let an adapted network take its inputs one by one, as its ONNX file does; nothing happens to any other."""
    if wiring_of(module) is None:
        yield
        return
    adapted = cast(_Adapted, module)
    before, adapted.compress_takes_parts = adapted.compress_takes_parts, True
    try:
        yield
    finally:
        adapted.compress_takes_parts = before


def unpack_rows(rows: Tensor, inputs: Sequence[TensorSpec]) -> Iterator[Tensor]:
    """Yield each input of (N, K) float32 rows, in its shape and dtype.

    Raises:
        ModelError: The rows are not as wide as the inputs together.
    """
    if rows.ndim != 2 or rows.shape[1] != row_width(inputs):
        names = ", ".join(spec.name for spec in inputs)
        raise ModelError(
            f"The network takes {names}: it must be given rows of {row_width(inputs)} numbers, "
            f"got {tuple(rows.shape)}.",
            hint="Give a data set of your own that has all inputs.",
        )
    start = 0
    for spec in inputs:
        sizes = part_sizes(spec)
        end = start + math.prod(sizes)
        yield standard_strides(rows[:, start:end].reshape(-1, *sizes)).to(getattr(torch, spec.dtype))
        start = end


def flatten_outputs(outputs: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of everything in a network's outputs; None is left out.

    Raises:
        ModelError: Something in them is no tensor; says where.

    >>> [name for name, _ in flatten_outputs({"out": torch.ones(1), "more": [torch.ones(1), torch.ones(1)]})]
    ['out', 'more.0', 'more.1']
    """
    if isinstance(outputs, Tensor):
        yield path or OUTPUT_NAME, outputs
        return
    for key, value in _entries(outputs, path):
        if value is not None:
            yield from flatten_outputs(value, f"{path}.{key}" if path else key)


def _entries(outputs: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(outputs, Mapping):
        return [(str(key), value) for key, value in outputs.items()]
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return [(field.name, getattr(outputs, field.name)) for field in dataclasses.fields(outputs)]
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return list(zip(outputs._fields, outputs, strict=True))
    if isinstance(outputs, list | tuple):
        return [(str(place) if path else f"output_{place}", value) for place, value in enumerate(outputs)]
    where = f"output '{path}'" if path else "its output"
    raise ModelError(
        f"The network must return tensors, in any nesting of dict, list, tuple and dataclass; {where} is of type "
        f"{type(outputs).__name__}.",
        hint="Let the factory return a network that gives tensors only, such as logits before any postprocessing.",
    )


def example_input(signature: Signature, batch: int = 1) -> Tensor:
    """Return what the network is called with, of zeros: the first input's shape, or a row of all inputs."""
    if is_packed(signature.inputs):
        return torch.zeros([batch, row_width(signature.inputs)])
    sizes = [size if isinstance(size, int) else 1 for size in signature.inputs[0].shape]
    return torch.zeros([batch, *sizes[1:]])


def sample_shape(module: nn.Module, example: Tensor) -> tuple[int, ...]:
    """Return the shape of what a network is called with, without the batch: that of its only input, or of a row."""
    wiring = wiring_of(module)
    if wiring is not None and len(wiring.inputs) == 1:
        return part_sizes(wiring.inputs[0])
    return tuple(example.shape[1:])


def random_inputs(module: nn.Module, example: Tensor, batch: int, seed: int) -> Tensor:
    """Return random values that a network can be called with.

    Args:
        module: The network.
        example: One input of it, (1, ...).
        batch: How many.
        seed: Decides them.
    """
    wiring = wiring_of(module)
    if wiring is not None and is_packed(wiring.inputs):
        generator = np.random.default_rng(seed)
        drawn = {part.name: draw(part, (batch, *part_sizes(part)), generator) for part in wiring.inputs}
        return torch.from_numpy(pack(drawn, wiring.inputs))
    return torch.randn((batch, *example.shape[1:]), generator=torch.Generator().manual_seed(seed))


def _keywords(base: type[nn.Module], inputs: Sequence[TensorSpec]) -> frozenset[str]:
    """Return the inputs that `forward` has a parameter for, by name; raises ModelError when they cannot be given."""
    if not inputs:
        return frozenset()
    takes = inspect.signature(base.forward)
    by_name = {
        name for name, one in takes.parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }
    chosen = frozenset(spec.name for spec in inputs if spec.name in by_name)
    placed = [spec.name for spec in inputs if spec.name not in chosen]
    try:
        takes.bind(None, *placed, **dict.fromkeys(chosen))
    except TypeError as error:
        raise ModelError(
            f"model.inputs ({', '.join(spec.name for spec in inputs)}) must fit forward{takes}: {error}.",
            hint="Name the inputs as forward's parameters are named, or give them in their order.",
        ) from error
    return chosen


def _plain_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return a module class with the forward of a traced graph, and nothing else of it."""
    return type(base.__name__, (nn.Module,), {"forward": base.forward})
