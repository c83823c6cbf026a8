"""Criteria for pruning at initialisation: gradient signal preservation (grasp) and connection sensitivity (snip).

`grasp` removes the channels whose removal lowers the gradient norm least; its evidence is the derivative of that norm
by a gate at each channel. `snip` takes the derivative of the loss by a gate, over all images at once.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import InternalError, UnsupportedLayer
from compress.model.modes import eval_mode, hooked
from compress.model.tensors import detach_stored
from compress.pruning.criteria.base import (
    Evidence,
    GradientStats,
    Order,
    WidthsBy,
    cross_entropies,
    gate_sum,
    require_producers,
)
from compress.pruning.criteria.taylor import Taylor
from compress.pruning.groups import ChannelGroup
from compress.tasks.outputs import plain

_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
_OPERATION = re.compile(r"derivative for (?:aten::)?(\w+) is not implemented")
Losses = Callable[[Any, Any], Tensor]


def collect_gradient_flow(
    module: nn.Module,
    groups: Iterable[ChannelGroup],
    batches: Sequence[tuple[Tensor, Any]],
    losses: Losses = cross_entropies,
    temperature: float = 1.0,
) -> GradientStats:
    """Differentiate <g, g(s)> by the gates s of all channels, g being the gradient of the mean loss by all weights.

    g is over all images and held constant; g(s) is the same gradient with factors s, all 1, at the gates. The result is
    half the derivative of the squared gradient norm. The network is in eval mode. Each batch takes the memory of two to
    three training steps.

    Args:
        module: The network; weights, gradients, buffers and training flags are left as they are.
        groups: Groups whose gates are differentiated.
        batches: (images, targets) pairs.
        losses: Loss of each image, (N,), from the network's outputs and the targets.
        temperature: Divisor of the outputs before the loss.

    Returns:
        One entry: gate layer -> (channels,) d<g, g(s)>/ds.

    Raises:
        UnsupportedLayer: An operation has no second derivative; the message names the operation or its module.

    Source: Wang et al. 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR,
        arXiv:2002.07376, with gates in place of single weights.
    """
    layers = sorted({gate.layer for group in groups for gate in group.gates})
    images_in_all = sum(len(images) for images, _ in batches)
    if not layers or not images_in_all:
        return GradientStats(())
    gates = {name: torch.ones(_channels(module.get_submodule(name)), requires_grad=True) for name in layers}
    parameters = [one for one in module.parameters() if one.is_floating_point()]

    def gradient(images: Tensor, targets: Any, create_graph: bool) -> list[Tensor]:
        outputs = plain(module(images), getattr(module, "output_names", ()))
        scaled = outputs / temperature if isinstance(outputs, Tensor) and temperature != 1 else outputs
        loss = losses(scaled, targets).sum() / images_in_all
        found = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(one) if g is None else g for g, one in zip(found, parameters, strict=True)]

    derivatives = {name: torch.zeros(len(gate)) for name, gate in gates.items()}
    try:
        with torch.enable_grad(), eval_mode(module), _trainable(parameters), _gated(module, gates):
            whole = [torch.zeros_like(one) for one in parameters]
            for images, targets in batches:
                for total, part in zip(whole, gradient(images, targets, create_graph=False), strict=True):
                    total += part
            for images, targets in batches:
                parts = gradient(images, targets, create_graph=True)
                product = torch.stack([(a * b).sum() for a, b in zip(whole, parts, strict=True)]).sum()
                _require_second_derivatives(product)
                found = torch.autograd.grad(product, list(gates.values()), allow_unused=True)
                for name, value in zip(gates, found, strict=True):
                    if value is not None:
                        derivatives[name] += value.detach()
    except (RuntimeError, NotImplementedError) as error:
        raise _no_second_derivative(module, batches[0][0], error) from error
    finally:
        detach_stored(module)
    return GradientStats((derivatives,))


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    frozen = [one for one in parameters if not one.requires_grad]
    try:
        for one in frozen:
            one.requires_grad_(True)
        yield
    finally:
        for one in frozen:
            one.requires_grad_(False)


@contextmanager
def _gated(module: nn.Module, gates: dict[str, Tensor]) -> Iterator[None]:
    """Multiply the channels of layers by gates."""

    def gated(gate: Tensor, is_last: bool) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return output * (gate if is_last else gate.reshape(-1, *[1] * (output.ndim - 2)))

        return hook

    layers = [(module.get_submodule(name), gate) for name, gate in gates.items()]
    with hooked(after=[(layer, gated(gate, isinstance(layer, _CHANNELS_LAST))) for layer, gate in layers]):
        yield


def _require_second_derivatives(value: Tensor) -> None:
    """Raise RuntimeError if some function behind `value` can be differentiated only once.

    Such a function is a separate node off every path to the gates: its share would be missing without an error.
    """
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("A function can be differentiated only once, not twice.")
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]


def _channels(layer: nn.Module) -> int:
    for name in ("out_channels", "out_features", "num_features", "num_channels"):
        if isinstance(size := getattr(layer, name, None), int):
            return size
    return int(layer.normalized_shape[-1])  # type: ignore[index,union-attr,arg-type]


def _no_second_derivative(module: nn.Module, images: Tensor, error: Exception) -> UnsupportedLayer | Exception:
    """Return an `UnsupportedLayer` that names the operation; the error itself if it is about something else."""
    text = str(error)
    named = _OPERATION.search(text)
    if named is None and "twice" not in text and "double" not in text and "does not require grad" not in text:
        return error
    place = _smallest_failing(module, images)
    what = f"operation '{named[1].removesuffix('_backward')}'" if named else "an operation"
    where = "" if place is None else f" in '{place}' ({type(module.get_submodule(place)).__name__})"
    return UnsupportedLayer(
        f"Criterion 'grasp' needs second derivatives, {what}{where} has none.",
        hint="Use criterion snip or taylor, which need first derivatives only.",
    )


def _smallest_failing(module: nn.Module, images: Tensor) -> str | None:
    """Return the innermost module through which a gradient cannot be differentiated again."""
    inputs: dict[str, tuple[Any, ...]] = {}

    def keep(name: str) -> Any:
        return lambda _layer, given: inputs.setdefault(name, given) and None

    parts = [(name, part) for name, part in module.named_modules() if name]
    with hooked(before=[(part, keep(name)) for name, part in parts]), torch.no_grad(), eval_mode(module):
        module(images[:1])
    with torch.enable_grad(), eval_mode(module):
        for name, part in reversed(parts):
            given = inputs.get(name)
            if given is None or not given or not isinstance(given[0], Tensor) or not given[0].is_floating_point():
                continue
            start = given[0].detach().requires_grad_(True)
            try:
                output = part(start, *given[1:])
                if not isinstance(output, Tensor) or not output.requires_grad:
                    continue
                (first,) = torch.autograd.grad(output.square().sum(), start, create_graph=True)
                product = first.square().sum()
                _require_second_derivatives(product)
                torch.autograd.grad(product, start, allow_unused=True)
            except (RuntimeError, NotImplementedError):
                return str(name)
    return None


class Grasp:
    """Derivative of the gradient norm by a gate of each channel, signed on an untrained network.

        untrained   signed: a channel whose removal raises the gradient norm is removed first (temperature 200)
        trained     absolute: the channel whose removal changes the gradient norm least is removed first (temperature
                    1); a trained network has hardly any gradient, and raising it means leaving the minimum

    Source: Wang et al. 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR,
        arXiv:2002.07376; for trained networks Lubana and Dick 2021, "A Gradient Flow Framework For Analyzing Network
        Pruning", ICLR. Gates in place of single weights, and widths by a budget, are adaptations.
    """

    name: ClassVar[str] = "grasp"
    evidence: ClassVar[Evidence] = "gradient_flow"
    order: ClassVar[Order] = "scores"
    widths_by: ClassVar[WidthsBy] = "scores"
    comparable: ClassVar[bool] = True
    treats_equals_equally: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        pass

    def scores(self, group: ChannelGroup, stats: GradientStats | None) -> Tensor:
        """Score each channel of `group` by the derivative of <g, g(s)> by its gate.

        The derivatives of all producers of a channel are added before any absolute value is taken.

        Args:
            group: C coupled channels.
            stats: From `collect_gradient_flow`; signed if collected from an untrained network.

        Returns:
            (C,) float32; negative only where `stats.is_signed`.

        Raises:
            UnsupportedLayer: The group has no producer.
        """
        if stats is None:
            raise InternalError("Criterion 'grasp' was called without derivatives of the gradient norm.")
        require_producers(group)
        total = sum((gate_sum(group, entry) for entry in stats.batches), start=torch.zeros(group.width))
        return total if stats.is_signed else total.abs()

    def damages(self, scores: np.ndarray) -> np.ndarray:
        """Return (U + 1,) the gradient norm lost with the n lowest scores; a rise counts as 0.

        First-order changes of the gradient norm add up, so the sum is not squared.
        """
        lost: np.ndarray = np.append(0.0, np.cumsum(np.maximum(np.sort(scores), 0.0)))
        return lost


class Snip(Taylor):
    """|d loss / d gate| of the mean loss of all images: `taylor` with one gradient, made for untrained networks.

    Source: Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR,
        arXiv:1810.02340. Gates of channels in place of single weights, and widths by a budget, are adaptations.
    """

    name: ClassVar[str] = "snip"

    def scores(self, group: ChannelGroup, stats: GradientStats | None) -> Tensor:
        """Score each channel of `group` by the absolute value of the mean derivative over all images.

        Args:
            group: C coupled channels.
            stats: From `collect_gradients`, in entries of equally many images.

        Returns:
            (C,) float32, >= 0.

        Raises:
            UnsupportedLayer: The group has no producer.
        """
        if stats is None:
            raise InternalError("Criterion 'snip' was called without gradients.")
        require_producers(group)
        total = sum((gate_sum(group, batch) for batch in stats.batches), start=torch.zeros(group.width))
        return total.abs() / max(1, len(stats.batches))
