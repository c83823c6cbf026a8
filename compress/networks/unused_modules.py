"""Removal of the modules that no output of a network reads.

Examples are heads that `model.outputs` omits, auxiliary heads that run in training only, and layers that are never
called. The kept outputs do not depend on their parameters. Each module is tried: its output is replaced by NaN and by
noise. It counts as unread only if the kept outputs stay the same to the bit. A module without weights replaces it,
since the network's code still calls it.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from compress.errors import UnsupportedLayer, attempt
from compress.model.modes import eval_mode, hooked
from compress.model.recipe import RemoveUnread

_SEED = 20261129


class Unread(nn.Module):
    """Stand-in for a module that no output reads, which returns its first argument."""

    def forward(self, *values: Any, **named: Any) -> Any:
        """Return the first argument."""
        return values[0] if values else next(iter(named.values()), None)


class UnreadShape(nn.Module):
    """Stand-in for a module that no output reads, which returns zeros in the shapes of its outputs.

    Args:
        outputs: Outputs of the module for some batch.
        more: Outputs of the module for a batch with one more sample.
    """

    def __init__(self, outputs: Any, more: Any) -> None:
        super().__init__()
        self._outputs = tree_map(
            lambda one, other: _Zeros(one, other) if isinstance(one, Tensor) else one, outputs, more
        )

    def forward(self, *values: Any, **named: Any) -> Any:
        """Return zeros for the number of samples in the input."""
        like = next(one for one in tree_leaves((values, named)) if isinstance(one, Tensor))
        return tree_map(lambda one: one.like(like) if isinstance(one, _Zeros) else one, self._outputs)


class _Zeros:
    """Shape and dtype of one output; an axis that grows with the batch is the batch axis (-1)."""

    def __init__(self, value: Tensor, more: Tensor) -> None:
        self.sizes = tuple(-1 if a + 1 == b else a for a, b in zip(value.shape, more.shape, strict=True))
        self.dtype = value.dtype

    def like(self, value: Tensor) -> Tensor:
        return value.new_zeros([value.shape[0] if size == -1 else size for size in self.sizes], dtype=self.dtype)


def find_unread(module: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Return the paths of the outermost modules with parameters that no output reads, in definition order.

    Args:
        module: Network in eval mode, on the CPU, that returns the kept outputs; unchanged.
        example: One array of the data.
    """
    reached = _reached(module, example)
    found: list[str] = []
    for path, part in module.named_modules():
        names = [f"{path}.{name}" for name, _ in part.named_parameters()]
        inside = any(path.startswith(f"{other}.") for other in found)
        if path and names and not inside and reached.isdisjoint(names) and _is_unread(module, path, example):
            found.append(path)
    return tuple(found)


def remove_unread(module: nn.Module, edit: RemoveUnread, example: Tensor) -> nn.Module:
    """Return a copy of `module` without modules that no output reads.

    Args:
        module: The network; unchanged.
        edit: Edit with the paths of the modules; modules already replaced by stand-ins are skipped.
        example: Input of the network.

    Raises:
        UnsupportedLayer: A module does not exist, or the network fails or changes its outputs without it.
    """
    slim = copy.deepcopy(module)
    batches = example, torch.cat([example, example[:1]])
    wanted = [_outputs(slim, batch) for batch in batches]
    for path in edit.modules:
        try:
            old = slim.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedLayer(f"The network has no module '{path}' to remove.") from error
        if isinstance(old, Unread | UnreadShape):
            continue
        if not _replace(slim, path, old, batches, wanted):
            raise UnsupportedLayer(f"The network does not give the same outputs without '{path}'.")
    return slim


def removable(module: nn.Module, paths: Iterable[str], example: Tensor) -> tuple[str, ...]:
    """Return the modules without which the network runs and has the same outputs."""
    found: tuple[str, ...] = ()
    for path in paths:
        try:
            module = remove_unread(module, RemoveUnread((path,)), example)
        except UnsupportedLayer:
            continue
        found += (path,)
    return found


def _replace(
    slim: nn.Module, path: str, old: nn.Module, batches: Sequence[Tensor], wanted: Sequence[list[Tensor]]
) -> bool:
    """Replace a module by a stand-in, in place; return whether a stand-in fits."""
    seen: list[Any] = []
    with hooked(after=[(old, lambda _part, _inputs, output: seen.append(output))]):
        for batch in batches:
            _outputs(slim, batch)
    stands_in: list[nn.Module] = [Unread(), *([UnreadShape(seen[0], seen[-1])] if seen else [])]
    parent_path, _, name = path.rpartition(".")
    parent = slim.get_submodule(parent_path)
    for one in stands_in:
        setattr(parent, name, one.train(old.training))
        # the user's code receives other shapes than before, and may raise any error
        if attempt(lambda: _all_same(slim, batches, wanted), lambda _: False):
            return True
    setattr(parent, name, old)
    return False


def _all_same(module: nn.Module, batches: Sequence[Tensor], wanted: Sequence[list[Tensor]]) -> bool:
    got = [_outputs(module, batch) for batch in batches]
    return all(_same(a, b) for many in zip(got, wanted, strict=True) for a, b in zip(*many, strict=True))


def _reached(module: nn.Module, example: Tensor) -> set[str]:
    """Return the names of the parameters that the outputs depend on, from the autograd graph."""
    tried = copy.deepcopy(module)
    floating = {value: name for name, value in tried.named_parameters() if value.is_floating_point()}
    for value in floating:
        value.requires_grad_(True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), eval_mode(tried):
        outputs = [one for one in tree_leaves(tried(example)) if isinstance(one, Tensor)]
    names = {name for name, value in tried.named_parameters() if value not in floating}
    waiting = [one.grad_fn for one in outputs if one.grad_fn is not None]
    known: set[Any] = set(waiting)
    while waiting:
        node: Any = waiting.pop()
        if isinstance(variable := getattr(node, "variable", None), Tensor) and variable in floating:
            names.add(floating[variable])  # type: ignore[index]
        for following, _ in node.next_functions:
            if following is not None and following not in known:
                known.add(following)
                waiting.append(following)
    return names


def _is_unread(module: nn.Module, path: str, example: Tensor) -> bool:
    """Return whether the outputs stay the same to the bit, whatever a module returns."""
    wanted = _outputs(module, example)
    generator = torch.Generator().manual_seed(_SEED)
    replacements: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda one: torch.full_like(one, float("nan")),
        lambda one: torch.randn(one.shape, generator=generator).to(one) * 100,
        lambda one: -torch.rand(one.shape, generator=generator).to(one) * 100,
    )
    for corrupt in replacements:
        with hooked(after=[(module.get_submodule(path), _replaced(corrupt))]):
            # the user's code may check the values, and raise any error
            same = attempt(lambda: _all_same(module, [example], [wanted]), lambda _: False)
        if not same:
            return False
    return True


def _replaced(corrupt: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Return a hook that changes the floating-point tensors a module returns."""

    def change(value: Any) -> Any:
        return corrupt(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return lambda _part, _inputs, output: tree_map(change, output)


@torch.no_grad()
def _outputs(module: nn.Module, example: Tensor) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]), eval_mode(module):
        return [one.clone() for one in tree_leaves(module(example)) if isinstance(one, Tensor)]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
