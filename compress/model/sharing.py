"""Parameters that several modules of a network share (tied weights)."""

from torch import nn


def find_shared(module: nn.Module) -> dict[str, str]:
    """Return module path -> the parameter of another module that is one of its own, in definition order.

    A module that is registered under two names is one module, and shares nothing.

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
