"""Derivatives of the gradient norm equal finite differences; networks without second derivatives are refused."""

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.errors import UnsupportedLayer
from compress.pruning.criteria.base import GradientStats, collect_gradients
from compress.pruning.criteria.gradient_flow import Grasp, Snip, collect_gradient_flow
from compress.pruning.trial import find_cuttable

IMAGES, LABELS = nets.images(8), torch.arange(8) % 4


def _gradient(module: nn.Module, temperature: float, gates: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the gradient of the mean loss by all weights, with gates at layers, as one row."""
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _m, _i, out, g=gate: out * g[:, None, None])
        for name, gate in gates.items()
    ]
    loss = F.cross_entropy(module(IMAGES.double()) / temperature, LABELS)
    found = torch.autograd.grad(loss, list(module.parameters()))
    for handle in handles:
        handle.remove()
    return torch.cat([one.flatten() for one in found])


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_derivative_is_that_of_finite_differences(temperature) -> None:
    module = nets.build("residual").double()
    groups, _ = find_cuttable(module, nets.EXAMPLE.double())
    batches = [(IMAGES[:4].double(), LABELS[:4]), (IMAGES[4:].double(), LABELS[4:])]
    (found,) = collect_gradient_flow(module, groups.values(), batches, temperature=temperature).batches
    whole, step = _gradient(module, temperature, {}), 1e-5
    for name in ("body.1.bn1", "body.2.bn2"):
        for channel in (0, 5):
            gate = torch.ones(16, dtype=torch.float64)
            gate[channel] = 1 + step
            above = _gradient(module, temperature, {name: gate})
            gate[channel] = 1 - step
            below = _gradient(module, temperature, {name: gate})
            wanted = float(whole @ (above - below)) / (2 * step)
            assert float(found[name][channel]) == pytest.approx(wanted, rel=1e-3, abs=1e-7)


def test_half_of_it_is_the_derivative_of_the_squared_norm() -> None:
    module = nets.build("chain").double()
    groups, _ = find_cuttable(module, nets.EXAMPLE.double())
    (found,) = collect_gradient_flow(module, groups.values(), [(IMAGES.double(), LABELS)]).batches
    name, step = "body.0.1", 1e-5
    gate = torch.ones(8, dtype=torch.float64)
    gate[3] = 1 + step
    above = _gradient(module, 1.0, {name: gate}).square().sum()
    gate[3] = 1 - step
    below = _gradient(module, 1.0, {name: gate}).square().sum()
    assert float(found[name][3]) == pytest.approx(float(above - below) / (2 * step) / 2, rel=1e-3)


def test_scores_add_up_producers_before_any_absolute_value() -> None:
    module = nets.build("residual")
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    stream = next(group for group in groups.values() if len(group.gates) > 1)
    entry = {gate.layer: torch.full((16,), value) for gate, value in zip(stream.gates, (1.0, -3.0, 0.5), strict=True)}
    signed = Grasp().scores(stream, GradientStats((entry,), is_signed=True))
    assert signed.tolist() == [-1.5] * 16
    assert Grasp().scores(stream, GradientStats((entry,))).tolist() == [1.5] * 16
    assert Snip().scores(stream, GradientStats((entry, entry))).tolist() == [1.5] * 16


def test_what_raises_the_gradient_norm_costs_nothing() -> None:
    assert Grasp().damages(np.array([0.5, -2.0, 1.0])).tolist() == [0.0, 0.0, 0.5, 1.5]


def test_snip_is_the_derivative_of_the_loss_of_all_images() -> None:
    module = nets.build("chain")
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    whole = collect_gradients(module, groups.values(), [(IMAGES, LABELS)])
    pieces = collect_gradients(module, groups.values(), [(IMAGES, LABELS)], images_each=2)
    for group in groups.values():
        wanted = torch.zeros(group.width)
        for gate in group.gates:
            wanted[gate.channels] += whole.batches[0][gate.layer][gate.slots]
        assert torch.allclose(Snip().scores(group, pieces), wanted.abs(), atol=1e-6)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class _Square(nn.Module):
    def forward(self, x):
        return _Once.apply(x)


def test_an_operation_without_second_derivative_is_named() -> None:
    module = nets.build("chain")
    module.body[1].append(_Square())
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    with pytest.raises(
        UnsupportedLayer, match=r"second derivatives, an operation in 'body\.1\.3' \(_Square\)"
    ) as caught:
        collect_gradient_flow(module, groups.values(), [(IMAGES, LABELS)])
    assert "snip" in str(caught.value.hint)


class _Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_an_operation_of_torch_without_second_derivative_is_named() -> None:
    module = nets.build("chain")
    module.body[1].append(_Attention())
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    with pytest.raises(
        UnsupportedLayer, match=r"operation '\w*dot_product\w*' in 'body\.1\.3' \(_Attention\) has none"
    ):
        collect_gradient_flow(module, groups.values(), [(IMAGES, LABELS)])


def test_no_groups_and_no_images_give_nothing() -> None:
    module = nets.build("chain")
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    assert collect_gradient_flow(module, [], [(IMAGES, LABELS)]).batches == ()
    assert collect_gradient_flow(module, groups.values(), []).batches == ()


def test_an_error_of_the_network_itself_is_its_own() -> None:
    module = nets.build("chain")
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    with pytest.raises(RuntimeError, match="channels"):
        collect_gradient_flow(module, groups.values(), [(IMAGES[:, :2], LABELS)])
