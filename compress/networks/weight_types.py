"""Types of stored weights: converted to those of the network where that is sound, refused by name where it is not.

float16, bfloat16 -> float32   exact, noted
float64 -> float32             rounded, warned about
integers -> buffers            only where no value changes
anything else                  refused: integers as parameters, complex numbers, 8-bit floats, meta tensors
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import ArtifactError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_COUNTER = "num_batches_tracked"  # averaged by some tools; never read outside of training
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was done to weights of one type.

    Attributes:
        text: A sentence for the user.
        is_exact: Whether every value is the same as before.
    """

    text: str
    is_exact: bool


def convert_weights(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], buffers: Collection[str], source: str
) -> tuple[dict[str, Tensor], list[Conversion]]:
    """Return weights in the types that a network has, and what was converted.

    Args:
        state: Name -> tensor, of the names and shapes of `expected`.
        expected: What the network has.
        buffers: Names of those that are no parameters.
        source: Where the weights are from, at the beginning of a sentence.

    Raises:
        ArtifactError: A tensor has a type that cannot stand for the network's; names it.
    """
    refused = {name: why for name, value in state.items() if (why := _unfit(name, value, expected[name], buffers))}
    if refused:
        shown = ", ".join(f"{name} {why}" for name, why in list(refused.items())[:_SHOWN])
        more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise ArtifactError(
            f"{source} must hold weights of the network's types, got {shown}{more}.",
            hint="Save the network's own state_dict() in floating point; weights of few bits need their scales.",
        )
    found = {name: value.to(expected[name].dtype) for name, value in state.items()}
    return found, _conversions(state, found, source)


def _unfit(name: str, value: Tensor, wanted: Tensor, buffers: Collection[str]) -> str:
    """Return what is wrong with a tensor, "" where nothing is."""
    said = f"{_name(value.dtype)} instead of {_name(wanted.dtype)}"
    if value.is_meta:
        return "on the meta device, without values"
    if value.dtype == wanted.dtype and value.dtype in (*_FLOATS, *_WHOLE, torch.complex64, torch.complex128):
        return ""
    if value.dtype in _FLOATS and wanted.dtype in _FLOATS:
        beyond = value.isfinite() & ~value.to(wanted.dtype).isfinite()
        return f"{said} with values beyond its range" if bool(beyond.any()) else ""
    if value.dtype not in (*_FLOATS, *_WHOLE) or name not in buffers:
        return said
    is_same = bool((value.to(wanted.dtype).to(value.dtype) == value).all())
    return "" if is_same or name.endswith(_COUNTER) else said


def _conversions(before: Mapping[str, Tensor], after: Mapping[str, Tensor], source: str) -> list[Conversion]:
    pairs: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for name, value in before.items():
        if value.dtype != after[name].dtype and not name.endswith(_COUNTER):
            pairs.setdefault((value.dtype, after[name].dtype), []).append(name)
    return [_conversion(before, after, names, source) for names in pairs.values()]


def _conversion(before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: list[str], source: str) -> Conversion:
    lost = max(_relative_change(before[name], after[name]) for name in names)
    old, new = _name(before[names[0]].dtype), _name(after[names[0]].dtype)
    done = (
        f"{source}: {len(names)} tensor{'' if len(names) == 1 else 's'} ({names[0]}{' ...' if len(names) > 1 else ''})"
    )
    if lost == 0:
        return Conversion(f"{done} converted from {old} to {new}; every value is the same.", True)
    return Conversion(
        f"{done} rounded from {old} to {new}, by up to {lost:.1g} of the largest value of a tensor.", False
    )


def _relative_change(before: Tensor, after: Tensor) -> float:
    """Return the largest change of a value over the largest value."""
    if before.numel() == 0:
        return 0.0
    wide = before.to(torch.float64)
    change = (wide - after.to(torch.float64)).abs().max()
    return float(change / wide.abs().max()) if bool(change > 0) else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
