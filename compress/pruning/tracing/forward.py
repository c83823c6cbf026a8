"""Tracing of a network: one forward pass, watched operation by operation."""

import warnings

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import UntraceableModel
from compress.model.modes import eval_mode, plain_lstm
from compress.pruning.tracing.record import (
    OUTPUTS,
    Trace,
)
from compress.pruning.tracing.rules import find_rule
from compress.pruning.tracing.watch import Watch
from compress.user_code import is_interrupt


def trace(module: nn.Module, example: Tensor) -> Trace:
    """Watch one forward pass in eval mode; the network is left as it is.

    Args:
        module: Any network on the CPU.
        example: One input, (1, ...).

    Raises:
        UntraceableModel: The forward pass fails.
    """
    watch = Watch(module, find_rule)
    try:
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            eval_mode(module),
            plain_lstm(module),
            watch.places(),
            watch,
        ):
            warnings.simplefilter("ignore")
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
            watch.freeze(watch.labels_of(output), OUTPUTS)
    return watch.trace
