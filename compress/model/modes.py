"""Modes of networks: evaluation mode, and forms of operations that can be watched."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch to eval mode and give every part its own training flag back at the end."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def plain_operations(module: nn.Module) -> Iterator[None]:
    """Let attention and LSTM layers be carried out as matrix products instead of one operation that hides them."""
    has_fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with plain_lstm(module):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(has_fast_path)


@contextmanager
def plain_lstm(module: nn.Module) -> Iterator[None]:
    """Let LSTM layers, if there are any, be carried out as matrix products."""
    has_fused = torch._C._get_mkldnn_enabled()
    if any(isinstance(part, nn.LSTM) for part in module.modules()):
        torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(has_fused)
