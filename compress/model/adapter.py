"""Adapter for networks with several inputs, or with outputs in a dict, tuple or dataclass.

    rows (N, K) ──unpack──> forward(image, mask=...) ──flatten──> Tensor, or tuple of tensors
                            (the user's own)

The network is changed in place, without a wrapper: its class becomes a subclass whose `forward` adapts, so that names
of parameters and layers stay the same. Outputs are flattened in order: entries of a mapping by key, fields of a
dataclass or named tuple by name, elements of a list or tuple by index. The name of an output is its path
("features.0"), "output_0" for an element of the outermost list, "logits" for a single tensor.
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
    """Inputs of a network's call, and its kept outputs.

    Attributes:
        inputs: Declared inputs; () for one image.
        keywords: Names of the inputs that `forward` takes as keyword arguments; the others are positional.
        outputs: Names of the kept outputs, in order; () to return the network's own outputs unchanged.
        evaluated: Paths of modules that stay in evaluation mode during training; "" is the network itself.
        notes: Notes for the user on training.
    """

    inputs: tuple[TensorSpec, ...] = ()
    keywords: frozenset[str] = frozenset()
    outputs: tuple[str, ...] = ()
    evaluated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Adapted(nn.Module):
    """Mixin before the class of an adapted network, whose `forward` unpacks inputs and flattens outputs."""

    compress_wiring: Wiring
    compress_takes_parts: bool

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the returned tensors, as in the ONNX file; () if outputs are unchanged."""
        return output_names(self.compress_wiring)

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the kept outputs for (N, K) rows of all inputs, or for separate inputs within `real_inputs`."""
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
        """Return the kept tensors among the outputs of the network's own forward."""
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
        """Set training mode, except for modules that stay in evaluation mode during training."""
        super().train(mode)
        for path in self.compress_wiring.evaluated:
            with suppress(AttributeError):  # the module was removed
                self.get_submodule(path).training = False
        return self


class _Own(_Adapted):
    """Mixin before the class of a network for the user, which has the arguments of the network's own forward."""

    def forward(self, *values: Any, **named: Any) -> Any:
        """Return the kept outputs for the arguments of the network's own forward, or for rows of all inputs."""
        inputs = self.compress_wiring.inputs
        if len(values) == 1 and not named and _is_row(values[0], inputs):
            return super().forward(*values)
        return self.keep_outputs(super(_Adapted, self).forward(*values, **named))


def with_own_forward(module: nn.Module) -> nn.Module:
    """Return an adapted network with the call arguments of its own class; any other network unchanged.

    Args:
        module: Network as the stages use it; changed in place.
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
    """Return an adapted network with the user's own class restored, if that class runs in training mode.

    Modules that stay in evaluation mode (`Wiring.evaluated`) were not traced in training mode, so pruning may have
    broken their training code. A copy is tried. If it fails, the modules stay in evaluation mode
    (`with_own_forward`). A network of the user's own class can be pickled, as trainers of other libraries do.

    Args:
        module: Network as the stages use it; changed in place.
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

    A wrapper module would change the names of parameters. A second object with shared modules would break references of
    the network to itself, such as a bound method among its attributes.
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
    """Return the same network object with a new class, from one array to tensors.

    Args:
        module: Any network.
        inputs: Declared inputs; () for one image.
        outputs: Names of the kept outputs; () to return the network's own outputs unchanged.
        evaluated: Paths of modules that stay in evaluation mode during training.
        notes: Notes for the user on training.

    Raises:
        ModelError: `forward` does not take these inputs.
    """
    if (earlier := wiring_of(module)) is not None:
        module.__dict__[_WIRING] = replace(earlier, outputs=outputs, evaluated=evaluated, notes=notes)
        return module
    plain = module
    if isinstance(module, torch.fx.GraphModule):  # its copies would not keep the new class
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
    """Return the names of the kept outputs, with a suffix if an input has the same name."""
    taken = {spec.name for spec in wiring.inputs} or {INPUT_NAME}
    return tuple(f"{name}_out" if name in taken else name for name in wiring.outputs)


def wiring_of(module: nn.Module) -> Wiring | None:
    """Return the inputs and outputs of an adapted network; None for any other network."""
    return getattr(module, _WIRING, None)


@contextmanager
def real_inputs(module: nn.Module) -> Iterator[None]:
    """Let an adapted network take separate inputs, as its ONNX file does; no effect on other networks."""
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
    """Yield name and tensor of each of a network's outputs; None is skipped.

    Raises:
        ModelError: An output is no tensor; the message names it.

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
    """Return a network input of zeros, in the shape of the first input, or as rows of all inputs."""
    if is_packed(signature.inputs):
        return torch.zeros([batch, row_width(signature.inputs)])
    sizes = [size if isinstance(size, int) else 1 for size in signature.inputs[0].shape]
    return torch.zeros([batch, *sizes[1:]])


def sample_shape(module: nn.Module, example: Tensor) -> tuple[int, ...]:
    """Return the shape of a network's input without the batch axis: its only input, or a row of all inputs."""
    wiring = wiring_of(module)
    if wiring is not None and len(wiring.inputs) == 1:
        return part_sizes(wiring.inputs[0])
    return tuple(example.shape[1:])


def random_inputs(module: nn.Module, example: Tensor, batch: int, seed: int) -> Tensor:
    """Return random inputs for a network.

    Args:
        module: The network.
        example: One input of the network, (1, ...).
        batch: Number of samples.
        seed: Seed of the random values.
    """
    wiring = wiring_of(module)
    if wiring is not None and is_packed(wiring.inputs):
        generator = np.random.default_rng(seed)
        drawn = {part.name: draw(part, (batch, *part_sizes(part)), generator) for part in wiring.inputs}
        return torch.from_numpy(pack(drawn, wiring.inputs))
    return torch.randn((batch, *example.shape[1:]), generator=torch.Generator().manual_seed(seed))


def _keywords(base: type[nn.Module], inputs: Sequence[TensorSpec]) -> frozenset[str]:
    """Return the names of inputs that `forward` has as parameters; raise ModelError if it cannot take all inputs."""
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
    """Return a plain module class that has only the forward of a traced graph."""
    return type(base.__name__, (nn.Module,), {"forward": base.forward})
