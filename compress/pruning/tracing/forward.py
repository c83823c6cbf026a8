"""Trace of a network's channels: one forward pass, observed operation by operation."""

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import UntraceableModel
from compress.model.modes import eval_mode, hooked, plain_lstm, running_paths
from compress.pruning.tracing.record import OUTPUTS, Trace
from compress.pruning.tracing.rules import find_rule
from compress.pruning.tracing.watch import Watch
from compress.user_code import is_interrupt


def trace(module: nn.Module, example: Tensor) -> Trace:
    """Observe one forward pass in eval mode; the network is left unchanged.

    Args:
        module: Any network on the CPU.
        example: One input, (1, ...).

    Raises:
        UntraceableModel: The forward pass fails.
    """
    try:
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            eval_mode(module),
            plain_lstm(module),
            running_paths(module) as paths,
        ):
            warnings.simplefilter("ignore")
            watch = Watch(module, find_rule, paths)
            after = [(part, partial(watch.note_output, name)) for name, part in module.named_modules()]
            with hooked(after=after, always_call=True), watch:
                outputs = module(example)
    except BaseException as error:  # the user's forward pass raises whatever it raises
        if is_interrupt(error):
            raise
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise UntraceableModel(
            f"The network's channels must be traced on one input of shape {tuple(example.shape)}; its forward pass "
            f"gave {type(error).__name__}: {first}"
        ) from error
    watch.freeze_odd_layers()
    for output in tree_leaves(outputs):
        if isinstance(output, Tensor):
            watch.facts.freeze(watch.labels.of(output), OUTPUTS)
    return watch.trace
