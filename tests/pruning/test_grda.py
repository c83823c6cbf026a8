"""grda: what a threshold does to an accumulator, by its formula, and when it stops."""

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from handmade import Bare, Chosen, Pair, setting, train
from torch import nn

from compress.config.schema.methods import GrdaConfig
from compress.errors import StageError
from compress.pruning.methods.grda import Grda
from compress.pruning.methods.soft_threshold import reader_norms, threshold_growth
from compress.pruning.trial import find_cuttable


class Lowest:
    """Lets a number of channels of each group go, the lowest scores first."""

    def __init__(self, counts):
        self.counts, self.final = counts, []

    def __call__(self, scores, damages=None, closed=(), is_final=False):
        removed = {
            name: tuple(sorted(scores[name].argsort(stable=True)[:count].tolist()))
            for name, count in self.counts.items()
        }
        if is_final:
            self.final.append(removed)
        return removed


def test_the_threshold_after_t_steps_is_the_sum_of_its_formula():
    rates = [0.1, 0.2, 0.05, *[0.1] * 17]
    one = setting(Pair(), Chosen({"conv": (0,)}), rates)
    method = Grda(one, GrdaConfig(mu=0.6, c=5.0, reached_at=0.5, until=0.9))
    for step in range(20):
        by_hand = 5.0 * sum(rates[t - 1] ** 1.1 * (t**0.6 - (t - 1) ** 0.6) for t in range(1, step + 2))
        assert method.threshold(step) == pytest.approx(by_hand)
    # at one rate the sum is c * rate^(1/2 + mu) * t^mu
    assert threshold_growth(np.full(9, 0.04), 0.51).sum() == pytest.approx(0.04**1.01 * 9**0.51)


def test_scales_are_a_soft_threshold_of_an_accumulator_without_momentum_and_decay():
    module, rates = Pair(), [0.1] * 24
    choose = Lowest({"conv": 1})
    levels = {"conv": (1, 2)}
    method = Grda(setting(module, choose, rates, weight_decay=0.3, levels=levels), GrdaConfig(interval=20, mu=0.6))
    (group,) = method.groups.values()
    readers = module.head.weight.detach().norm(dim=0)
    readers = readers / readers.square().mean().sqrt()
    assert torch.allclose(group.readers, readers)
    weakest = int((torch.tensor([0.5, 2.0]) * readers).argmin())
    assert group.protected.tolist() == [channel != weakest for channel in range(2)]
    # so that the weakest is at 0 after half of the steps: c = |gamma| * readers / sum
    gamma = module.norm.weight.detach().clone()
    growth = threshold_growth(np.asarray(rates), 0.6)
    assert method.c == pytest.approx(float(gamma[weakest] * readers[weakest]) / growth[:12].sum(), rel=1e-5)
    accumulated = {"weight": gamma, "bias": module.norm.bias.detach().clone()}
    gradients = method.on_gradients

    def taken_down(step):
        for name in accumulated:
            accumulated[name] -= 0.1 * getattr(module.norm, name).grad
        gradients(step)

    method.on_gradients = taken_down
    train(module, method, rates[:4], momentum=0.9, weight_decay=0.3)
    threshold = method.c * growth[:4].sum()
    left = max(0.0, float(1 - threshold / (accumulated["weight"][weakest].abs() * readers[weakest])))
    assert 0 < left < 1
    for name, values in accumulated.items():
        wanted = values.clone()
        wanted[weakest] *= left
        assert torch.allclose(getattr(module.norm, name), wanted, rtol=1e-5), name


def test_the_threshold_stops_once_the_zeros_are_enough():
    module, rates, choose = nets.build("chain"), [0.05] * 40, Lowest({"body.0.0": 3, "body.1.0": 4})
    levels = {"body.0.0": (4, 8), "body.1.0": (8, 16), "body.2.0": (8, 16)}
    method = Grda(setting(module, choose, rates, levels=levels), GrdaConfig(interval=1))
    asked = []
    choose_within = method.budget.choose
    method.budget.choose = lambda *args, **flags: asked.append(flags) or choose_within(*args, **flags)
    train(module, method, rates)
    (final,) = choose.final
    assert method.removed == final
    assert method.choice.stopped is not None
    assert method.choice.stopped < method.last
    assert len(asked) == method.choice.stopped + 2  # once a step, and the final one
    assert method.threshold(39) == method.threshold(method.choice.stopped) == method.thresholds[method.choice.stopped]
    scales = module.body[0][1].weight.detach()
    assert scales[list(final["body.0.0"])].tolist() == [0, 0, 0]
    figures = method.metrics()
    assert figures["zero_ratio"] == 1
    assert figures["left_ratio"] == 0
    assert "All removed channels are at zero, 100.0% of them were" in method.cause()


def test_a_group_never_loses_more_than_it_may():
    module, rates = nets.build("chain"), [0.05] * 40
    levels = {name: (width - 2, width) for name, width in {"body.0.0": 8, "body.1.0": 16, "body.2.0": 16}.items()}
    method = Grda(setting(module, Lowest({"body.0.0": 2}), rates, levels=levels), GrdaConfig(c=1e3, interval=35))
    train(module, method, rates)
    assert [int((layer[1].weight == 0).sum()) for layer in module.body] == [2, 0, 0]  # four have come back
    assert method.metrics()["returned_channels"] == 4
    assert method.metrics()["kept_at_zero"] == 0


def test_what_is_kept_at_zero_comes_back_with_the_factor_of_the_others():
    module, rates = nets.build("chain"), [0.05] * 40
    choose, levels = Lowest({"body.1.0": 4}), {"body.0.0": (2, 8), "body.1.0": (2, 16), "body.2.0": (16,)}
    method = Grda(setting(module, choose, rates, levels=levels), GrdaConfig(interval=1))
    begun, factors = method._choose, {}

    def noted(step, importance, present):
        before = method.choice.removed
        begun(step, importance, present)
        if method.choice.removed is not None and before is None:
            factors.update({name: values.clone() for name, values in present.items()})

    method._choose = noted
    train(module, method, rates)
    group, present = method.groups["body.0.0"], factors["body.0.0"]
    back = present == 0
    assert back.any()
    alive = present[~back & ~group.protected]
    mean = alive.mean() if len(alive) else present[~back].mean()
    scales, accumulated = module.body[0][1].weight.detach(), group.values[0]
    own = group.factors(group.importance(), method.threshold(39))[back]
    assert torch.allclose(scales[back], accumulated[back] * torch.maximum(own, mean))
    assert scales[back].abs().min() > 0


def test_without_zeros_enough_the_choice_is_made_by_what_is_left_and_the_rest_is_brought_to_zero():
    module, rates, choose = nets.build("chain"), [0.05] * 40, Lowest({"body.1.0": 4})
    method = Grda(setting(module, choose, rates), GrdaConfig(interval=5, until=0.6))
    method.thresholds = method.thresholds * 1e-6
    train(module, method, rates)
    assert method.choice.stopped == 24
    figures = method.metrics()
    assert figures["zero_ratio"] == 0
    assert figures["left_ratio"] == 0
    assert "All removed channels are at zero, 0.0% of them were when the choice was made" in method.cause()
    with torch.no_grad():
        module.body[1][1].weight[list(method.removed["body.1.0"])] = 0.1
    assert "brought 0.0% of the removed channels to zero; the others" in method.cause()  # a reason only where it holds
    assert "Removed channels have" in method.cause()


def test_kept_channels_at_zero_at_the_choice_are_warned_about_with_figures_and_a_remedy():
    rates, counts = [0.05] * 40, {"body.1.0": 4}

    def trained(**options):
        levels = {"body.0.0": (2, 8), "body.1.0": (2, 16), "body.2.0": (2, 16)}
        module = nets.build("chain")
        method = Grda(setting(module, Lowest(counts), rates, levels=levels), GrdaConfig(**options))
        train(module, method, rates)
        return method

    huge = trained(c=1e9)
    assert (huge.choice.kept, huge.choice.kept_zero) == (
        36,
        30,
    )  # of 40 channels less 4
    (warning,) = huge.warnings()
    assert "30 of 36 kept channels (83%) were at zero when the choice was made" in warning
    assert "Leave grda.c out, or lower it towards" in warning
    fitting = trained().c
    assert f"towards {fitting:.3g}." in warning
    assert huge.metrics()["kept_zero_ratio"] == pytest.approx(30 / 36)
    again = Grda(huge.setting, GrdaConfig(c=1e9))
    again.load_state_dict(huge.state_dict())
    assert again.warnings() == [warning]
    own = trained()
    own.choice.kept, own.choice.kept_zero = 100, 10
    assert own.warnings() == []
    own.choice.kept_zero = 11
    assert "Longer training, a smaller grda.interval" in own.warnings()[0]


def test_filters_that_no_norm_follows_have_a_threshold_of_their_own():
    module, rates = Bare(), [0.02] * 40
    method = Grda(setting(module, Lowest({"conv": 2}), rates, levels={"conv": (1, 4)}))
    (group,) = method.groups.values()
    squares = module.conv.weight.detach().flatten(1).square().sum(1)
    squares = squares + module.depthwise.weight.detach().flatten(1).square().sum(1)
    assert torch.allclose(group.importance(), (squares / 2).sqrt() * group.readers)
    train(module, method, rates)
    gone = list(method.removed["conv"])
    for layer in (module.conv, module.depthwise):
        assert layer.weight[gone].abs().max() == 0
        assert layer.bias[gone].abs().max() == 0


def test_the_norm_of_readers_does_not_depend_on_the_size_of_their_weights():
    module = nets.build("concat")
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    before = {name: reader_norms(module, group) for name, group in groups.items()}
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.mul_(7)
    for name, group in groups.items():
        assert torch.allclose(reader_norms(module, group), before[name], rtol=1e-5)
        assert before[name].square().mean() == pytest.approx(1)


def test_what_cannot_come_to_an_end_is_refused():
    def begun(rates, **options):
        torch.manual_seed(0)  # the hint for one network need not hold for another
        return Grda(setting(Pair(), Chosen({"conv": (0,)}), rates), GrdaConfig(**options))

    with pytest.raises(StageError, match="of 1 steps none is left"):
        begun([0.1])
    with pytest.raises(StageError, match="of 18 steps it has 9") as caught:
        begun([0.1] * 18)
    assert "at least 20 steps" in caught.value.hint
    begun([0.1] * 20)
    with pytest.raises(StageError, match="of 24 steps it has 8"):
        begun([0.0] * 4 + [0.1] * 20)
    with pytest.raises(StageError, match="of 40 steps it leaves 1"):
        begun([0.1] * 40, until=0.975)
    with pytest.raises(StageError, match=r"got grda\.interval 36 and a last choice after 36 of 40 steps"):
        begun([0.1] * 40, interval=36)
    begun([0.1] * 40, interval=35)
    with pytest.raises(StageError, match=r"grda\.c 0\.001 brings it to .* in 36 steps") as caught:
        begun([0.1] * 40, c=0.001)
    needed = float(caught.value.hint.split("Set grda.c to ")[1].split()[0])
    begun([0.1] * 40, c=needed * 1.01)
    with pytest.raises(ValueError, match="reached_at must be below until"):
        GrdaConfig(reached_at=0.9)
    for bad in ({"mu": 0.5}, {"mu": 1.0}, {"c": 0.0}, {"until": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GrdaConfig(**bad)


def test_gradients_of_scales_are_left_to_no_one_else():
    module = Pair()
    method = Grda(setting(module, Chosen({"conv": (0,)}), [0.1] * 40))
    F.cross_entropy(module.train()(torch.randn(8, 3, 16, 16)), torch.arange(8) % 4).backward()
    assert module.norm.weight.grad.abs().max() > 0
    method.on_gradients(0)
    assert module.norm.weight.grad.abs().max() == module.norm.bias.grad.abs().max() == 0
    assert module.conv.weight.grad.abs().max() > 0
