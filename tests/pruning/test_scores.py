"""The scores are what their formulas say: gate derivatives, folded filters, batch-norm scales, seeded numbers."""

import copy

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import InternalError, NonFinite, UnsupportedLayer
from compress.pruning.criteria.base import collect_gradients
from compress.pruning.criteria.magnitude import L1, L2, BnScale, Random
from compress.pruning.criteria.taylor import Taylor
from compress.pruning.ranking.selection import score_groups
from compress.pruning.trial import find_cuttable

IMAGES, LABELS = nets.images(8), torch.arange(8) % 4


def _groups(module: nn.Module):
    return find_cuttable(module, nets.EXAMPLE)[0]


def _taylor(module: nn.Module, batches=((IMAGES, LABELS),)):
    groups = _groups(module)
    return score_groups(groups, Taylor(), collect_gradients(module, groups.values(), batches))


def _gated_loss(module: nn.Module, group, channel: int, factor: float) -> float:
    """Return the loss with one channel multiplied by `factor` at every gate of its group; float64."""
    handles = []
    for gate in group.gates:

        def scale(_layer, _inputs, output: Tensor, slots=gate.slots[gate.channels == channel]) -> Tensor:
            factors = torch.ones(output.shape[1], dtype=output.dtype)
            factors[slots] = factor
            return output * factors.reshape(1, -1, *[1] * (output.ndim - 2))

        handles.append(module.get_submodule(gate.layer).register_forward_hook(scale))
    with torch.no_grad():
        loss = float(F.cross_entropy(module(IMAGES.double()), LABELS))
    for handle in handles:
        handle.remove()
    return loss


@pytest.mark.parametrize("name", nets.NAMES)
def test_taylor_equals_finite_differences_of_the_loss_by_the_gate(name):
    module = nets.build(name)
    scores, groups = _taylor(module), _groups(module)
    exact = copy.deepcopy(module).double()
    step = 1e-5
    for group in groups.values():
        for channel in (0, group.width // 2, group.width - 1):
            rise = _gated_loss(exact, group, channel, 1 + step) - _gated_loss(exact, group, channel, 1 - step)
            assert float(scores[group.name][channel]) == pytest.approx(abs(rise) / (2 * step), rel=1e-3, abs=1e-6)


def test_gate_derivative_equals_those_of_batch_norm_and_of_the_reader():
    module = nets.build("chain")
    derivatives = collect_gradients(module, _groups(module).values(), [(IMAGES, LABELS)]).batches[0]
    F.cross_entropy(module(IMAGES), LABELS).backward()
    for norm, reader in ((module.body[0][1], module.body[1][0]), (module.body[1][1], module.body[2][0])):
        name = {part: name for name, part in module.named_modules()}[norm]
        by_norm = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
        by_reader = (reader.weight * reader.weight.grad).sum((0, 2, 3))
        assert torch.allclose(derivatives[name], by_norm, rtol=1e-4, atol=1e-6)
        assert torch.allclose(derivatives[name], by_reader, rtol=1e-4, atol=1e-6)
        assert derivatives[name].abs().max() > 1e-3


def test_taylor_is_invariant_to_rescaling_between_layers_and_magnitude_is_not():
    module = nets.build("chain")
    rescaled = copy.deepcopy(module)
    with torch.no_grad():
        rescaled.body[0][1].weight.mul_(10)
        rescaled.body[0][1].bias.mul_(10)
        rescaled.body[1][0].weight.div_(10)
    assert torch.allclose(module(IMAGES), rescaled(IMAGES), atol=1e-5)
    before, after = _taylor(module), _taylor(rescaled)
    for name, scores in before.items():
        assert torch.allclose(scores, after[name], rtol=1e-3, atol=1e-6)
    sizes = [score_groups(_groups(net), L1(), None)["body.0.0"] for net in (module, rescaled)]
    assert torch.allclose(sizes[1], 10 * sizes[0])


def test_taylor_is_the_mean_over_batches_of_absolute_values():
    module = nets.build("residual")
    halves = [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]
    both, first, second = (_taylor(module, batches) for batches in (halves, halves[:1], halves[1:]))
    for name, scores in both.items():
        assert torch.allclose(scores, (first[name] + second[name]) / 2, rtol=1e-5)


def test_taylor_adds_the_producers_of_a_residual_sum_before_the_absolute_value():
    module = nets.build("residual")
    groups = _groups(module)
    stats = collect_gradients(module, groups.values(), [(IMAGES, LABELS)])
    signed = sum(stats.batches[0][name] for name in ("body.0.1", "body.1.bn2", "body.2.bn2"))
    assert torch.allclose(Taylor().scores(groups["body.0.0"], stats), signed.abs())


def test_taylor_scores_frozen_networks_alike():
    module = nets.build("residual")
    frozen = nets.build("residual").requires_grad_(False)
    for name, scores in _taylor(module).items():
        assert torch.equal(scores, _taylor(frozen)[name])


def test_taylor_of_a_channel_that_nothing_reads_is_zero():
    module = nets.build("chain")
    with torch.no_grad():
        module.body[1][0].weight[:, 3] = 0
    scores = _taylor(module)["body.0.0"]
    assert float(scores[3]) == 0
    assert int((scores == 0).sum()) == 1


class _InPlace(nn.Module):
    """Every activation overwrites what the gate let through."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace))
        self.conv, self.relu = nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(inplace)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(self.body(x))).mean((2, 3)))


def test_activations_in_place_do_not_change_scores():
    outside, inside = _InPlace(False).eval(), _InPlace(True).eval()
    inside.load_state_dict(outside.state_dict())
    expected = _taylor(outside)
    assert set(expected) == {"body.0", "conv"}
    for name, scores in _taylor(inside).items():
        assert torch.equal(scores, expected[name])
        assert scores.max() > 0


class _ChannelsLast(nn.Module):
    """Linear layers over the last axis of an image, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.wide, self.narrow, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.narrow(F.gelu(self.wide(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return self.head((x + y).mean((2, 3)))


def test_taylor_scores_linear_layers_over_the_last_axis():
    torch.manual_seed(0)
    module = _ChannelsLast().eval()
    scores = _taylor(module)["wide"]
    assert scores.shape == (12,)
    exact = copy.deepcopy(module).double()
    rise = _last_axis_loss(exact, 5, 1 + 1e-5) - _last_axis_loss(exact, 5, 1 - 1e-5)
    assert float(scores[5]) == pytest.approx(abs(rise) / 2e-5, rel=1e-3, abs=1e-6)
    assert float(scores[5]) > 1e-4


def _last_axis_loss(module: nn.Module, channel: int, factor: float) -> float:
    factors = torch.ones(12, dtype=torch.float64)
    factors[channel] = factor
    handle = module.wide.register_forward_hook(lambda _layer, _inputs, output: output * factors)
    with torch.no_grad():
        loss = float(F.cross_entropy(module(IMAGES.double()), LABELS))
    handle.remove()
    return loss


def test_taylor_without_gradients_is_our_bug():
    group = _groups(nets.build("chain"))["body.0.0"]
    with pytest.raises(InternalError, match="without gradients"):
        Taylor().scores(group, None)


@pytest.mark.parametrize(("criterion", "order"), [(L1(), 1), (L2(), 2)])
def test_magnitude_is_that_of_the_filter_with_the_batch_norm_folded_in(criterion, order):
    module = nets.build("chain")
    conv, norm = module.body[1][0], module.body[1][1]
    folded = conv.weight * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    expected = torch.linalg.vector_norm(folded.flatten(1), ord=order, dim=1)
    assert torch.allclose(criterion.scores(_groups(module)["body.1.0"], None), expected, rtol=1e-5)


@pytest.mark.parametrize("criterion", [L1(), L2()])
def test_magnitude_does_not_change_with_the_scale_that_batch_norm_divides_out(criterion):
    module = nets.build("chain")
    rescaled = copy.deepcopy(module)
    conv, norm, _ = rescaled.body[1]
    with torch.no_grad():
        conv.weight.mul_(7)
        norm.running_mean.mul_(7)
        norm.running_var.copy_((norm.running_var + norm.eps) * 49 - norm.eps)
    assert torch.allclose(module(IMAGES), rescaled(IMAGES), atol=1e-4)
    before, after = (criterion.scores(_groups(net)["body.1.0"], None) for net in (module, rescaled))
    assert torch.allclose(before, after, rtol=1e-4)


def test_magnitude_of_a_residual_group_covers_every_producer():
    module = nets.build("residual")
    alone = L1().scores(_groups(module)["body.0.0"], None)
    with torch.no_grad():
        module.body[2].conv2.weight[5].mul_(3)
    grown = L1().scores(_groups(module)["body.0.0"], None)
    assert grown[5] > alone[5]
    assert torch.equal(grown[:5], alone[:5])


def test_magnitude_of_a_layer_without_batch_norm_is_its_own():
    module = nets.build("linear_head")
    expected = module.fc1.weight.abs().sum(1)
    assert torch.allclose(L1().scores(_groups(module)["fc1"], None), expected, rtol=1e-5)


def test_bn_scale_is_the_sum_of_absolute_scales():
    module = nets.build("residual")
    with torch.no_grad():
        module.body[1].bn2.weight[2] = -4.0
    scales = [module.body[0][1], module.body[1].bn2, module.body[2].bn2]
    expected = sum(norm.weight.abs() for norm in scales)
    scores = BnScale().scores(_groups(module)["body.0.0"], None)
    assert torch.allclose(scores, expected)
    assert scores[2] > 4


def test_bn_scale_needs_a_batch_norm_with_a_scale():
    with pytest.raises(UnsupportedLayer, match="needs a batch norm with a scale, group 'fc1' has none"):
        BnScale().scores(_groups(nets.build("linear_head"))["fc1"], None)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with pytest.raises(UnsupportedLayer, match="group '0' has none"):
        BnScale().scores(_groups(plain)["0"], None)


def test_random_depends_on_seed_and_group_alone():
    groups = _groups(nets.build("chain"))
    first = Random(seed=3).scores(groups["body.1.0"], None)
    assert torch.equal(first, Random(seed=3).scores(_groups(nets.build("chain", seed=9))["body.1.0"], None))
    assert not torch.equal(first, Random(seed=4).scores(groups["body.1.0"], None))
    assert not torch.equal(first, Random(seed=3).scores(groups["body.2.0"], None))
    assert bool(((first >= 0) & (first < 1)).all())


def test_scores_that_are_not_finite_name_the_group():
    module = nets.build("chain")
    groups = _groups(module)
    with torch.no_grad():
        module.body[1][0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinite, match=r"criterion 'l1' gives NaN or infinity in group 'body\.1\.0'"):
        score_groups(groups, L1(), None)


def test_no_groups_have_no_gradients():
    module = nets.build("chain")
    stats = collect_gradients(module, [], [(IMAGES, LABELS)])
    assert stats.batches == ()
