"""Temporary states of a network: evaluation mode, forward hooks, operations in their plain form."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

Hook = Callable[..., Any]


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch to eval mode, and restore the training flag of every module at the end."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def hooked(
    *,
    before: Iterable[tuple[nn.Module, Hook]] = (),
    after: Iterable[tuple[nn.Module, Hook]] = (),
    with_kwargs: bool = False,
    always_call: bool = False,
) -> ExitStack:
    """Register forward hooks and return the context manager that removes all of them; `close()` removes them, too.

    Args:
        before: Modules with the hook that runs before their forward pass, as `nn.Module.register_forward_pre_hook`.
        after: Modules with the hook that runs after it, as `nn.Module.register_forward_hook`.
        with_kwargs: Pass the keyword arguments of the call to the hooks behind the positional ones. Otherwise the hooks
            get the values of all arguments as one tuple, in the order of the call.
        always_call: Run the hooks in `after` even if the forward pass raises.
    """
    with ExitStack() as hooks:
        for part, hook in before:
            wrapped = hook if with_kwargs else _before_all_values(hook)
            hooks.callback(part.register_forward_pre_hook(wrapped, with_kwargs=True).remove)
        for part, hook in after:
            wrapped = hook if with_kwargs else _after_all_values(hook)
            hooks.callback(part.register_forward_hook(wrapped, with_kwargs=True, always_call=always_call).remove)
        return hooks.pop_all()


def _before_all_values(hook: Hook) -> Hook:
    def wrapped(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = hook(part, (*args, *kwargs.values()))
        if values is None:
            return None
        values = values if isinstance(values, tuple) else (values,)
        return values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True))

    return wrapped


def _after_all_values(hook: Hook) -> Hook:
    return lambda part, args, kwargs, output: hook(part, (*args, *kwargs.values()), output)


@contextmanager
def running_paths(module: nn.Module) -> Iterator[list[str]]:
    """Yield the stack of paths of the modules whose code is running, innermost last; its bottom is always ""."""
    paths = [""]
    named = list(module.named_modules())
    with hooked(
        before=[(part, lambda *_, path=path: paths.append(path)) for path, part in named],
        after=[(part, lambda *_: (paths.pop(), None)[1]) for _, part in named],
        always_call=True,
    ):
        yield paths


@contextmanager
def plain_operations(module: nn.Module) -> Iterator[None]:
    """Run attention and LSTM layers as matrix products instead of single fused operations."""
    has_fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with plain_lstm(module):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(has_fast_path)


@contextmanager
def plain_lstm(module: nn.Module) -> Iterator[None]:
    """Run any LSTM layers as matrix products."""
    has_fused = torch._C._get_mkldnn_enabled()
    if any(isinstance(part, nn.LSTM) for part in module.modules()):
        torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(has_fused)
