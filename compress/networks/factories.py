"""Calls of the user's factory. Only the name in `model.factory` is ever imported."""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.errors import ModelError
from compress.model.artifacts import FactorySpec
from compress.networks.weights import some
from compress.user_code import raise_as

Factory = Callable[..., Any]


def call_factory(make: Factory, spec: FactorySpec, seed: int = 0) -> nn.Module:
    """Call `make` with the keyword arguments of `spec` and return its network in eval mode.

    Args:
        make: Callable that builds the network.
        spec: Specification with the keyword arguments.
        seed: Seed of torch, NumPy and `random` during the call, in [0, 2^63); their states are restored afterwards.

    Raises:
        ModelError: The factory raises, or returns no usable network; the message states the remedy.
    """
    with _seeded(seed):
        called = f"Factory '{spec.reference}' must build the network with {_call_text(make, spec.kwargs)}"
        with raise_as(ModelError, called):
            module = make(**spec.kwargs)
    if isinstance(module, nn.DataParallel):
        module = module.module
    require_kind(module, f"Factory '{spec.reference}' must return")
    return module.eval().cpu()  # type: ignore[no-any-return]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    plain, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(arrays)


def require_kind(module: Any, must: str) -> None:
    """Check that a value is a usable network.

    Args:
        module: Value to check.
        must: Beginning of the message, such as "Factory 'build' must return".

    Raises:
        ModelError: The value is no usable network; the message states the remedy.
    """
    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise ModelError(
            f"{must} a network of Python code, got a scripted one ({type(module).__name__}).",
            hint="Let it return the module before torch.jit.script or trace. The scripted file can be the weights.",
        )
    if isinstance(module, torch.export.ExportedProgram):
        raise ModelError(
            f"{must} a torch.nn.Module, got an exported program.",
            hint="Let it return the module before torch.export. The .pt2 file can be given as weights.",
        )
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise ModelError(f"{must} a network, got the class {module.__name__} itself.")
    if not isinstance(module, nn.Module):
        raise ModelError(f"{must} a torch.nn.Module, got {type(module).__name__}.")
    if rounded := [
        f"{name or 'the network itself'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if _is_rounded(part)
    ]:
        raise ModelError(
            f"{must} a network in float32, got a quantised one: {some(rounded)}.",
            hint="Give the float network; a `quantize` stage after export rounds the file to INT8.",
        )
    if lazy := [name for name, value in module.named_parameters() if isinstance(value, nn.UninitializedParameter)]:
        raise ModelError(
            f"{must} a network whose parameters have shapes, these have none: {some(lazy)}.",
            hint="Let it run the network once, or replace lazy layers.",
        )
    if empty := [name for name, value in module.state_dict().items() if getattr(value, "is_meta", False)]:
        raise ModelError(
            f"{must} a network whose tensors hold values, these are on the meta device: {some(empty)}.",
            hint="Let it build the network on the CPU.",
        )


def _is_rounded(part: nn.Module) -> bool:
    place = type(part).__module__
    packed = place.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized"))
    return packed or any(value.is_quantized for value in part.buffers(recurse=False))


def _call_text(make: Factory, kwargs: Mapping[str, Any]) -> str:
    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no arguments"
    try:
        return f"{given} (it takes {inspect.signature(make)})"
    except (TypeError, ValueError):
        return given
