"""Tensors that the modules of a network hold: parameters, buffers, plain attributes, and weights that modules share."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module()))  # attributes of every torch module


def own_attributes(part: nn.Module) -> dict[str, Any]:
    """Return the attributes that a module's own code has set, without parameters, buffers and children."""
    return {name: value for name, value in vars(part).items() if name not in _OWN and not name.startswith("compress_")}


def held_tensors(part: nn.Module) -> dict[str, Tensor]:
    """Return the parameters, buffers and plain tensor attributes of one module by name, without its children's."""
    plain = {name: value for name, value in own_attributes(part).items() if isinstance(value, Tensor)}
    known = {**part._parameters, **part._buffers}
    return {**{name: value for name, value in known.items() if value is not None}, **plain}


def weights_digest(module: nn.Module) -> str:
    """Return the digest of names, shapes and values of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, values in module.state_dict().items():
        values = values.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data if values.numel() else b"")
    return digest.hexdigest()


def attribute_names(module: nn.Module) -> dict[int, str]:
    """Return id(tensor) -> its path, such as "neck.scales[0]", for tensors in lists, tuples or mappings on modules."""
    found: dict[int, str] = {}
    for path, part in module.named_modules():
        for name, value in own_attributes(part).items():
            for place, tensor in _inside(value, ".".join(filter(None, (path, name)))):
                found.setdefault(id(tensor), place)
    return found


def detach_stored(module: nn.Module) -> None:
    """Detach the tensors that a forward pass stored on modules (`self.features = y`), in place.

    A tensor inside a graph cannot be deep-copied, and keeps the activations of its pass alive.
    """
    for part in module.modules():
        for name, value in own_attributes(part).items():
            if (detached := _detached(value)) is not value:
                vars(part)[name] = detached


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_leaf else value.detach()
    if type(value) in (list, tuple):
        changed = [_detached(one) for one in value]
        is_same = all(one is other for one, other in zip(changed, value, strict=True))
        return value if is_same else type(value)(changed)
    if type(value) is dict:
        entries = {key: _detached(one) for key, one in value.items()}
        return value if all(entries[key] is one for key, one in value.items()) else entries
    return value


def _inside(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif type(value) in (list, tuple):
        for number, one in enumerate(value):
            yield from _inside(one, f"{place}[{number}]")
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _inside(one, f"{place}[{key!r}]")


def find_shared(module: nn.Module) -> dict[str, str]:
    """Return module path -> name of a parameter of another module that it shares, in definition order.

    A module that is registered under two names is one module, and shares no parameter.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    >>> net[2].weight = net[0].weight
    >>> find_shared(net)
    {'0': '2.weight', '2': '0.weight'}
    """
    places: dict[int, list[tuple[str, str]]] = {}
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((path, name))
    found = {}
    for path, part in module.named_modules():
        for parameter in part.parameters(recurse=False):
            others = [(other, name) for other, name in places[id(parameter)] if other != path]
            if others and path not in found:
                found[path] = ".".join(filter(None, others[0]))
    return found
