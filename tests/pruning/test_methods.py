"""Each training-time method does in a tiny case what a hand can compute."""

import copy
import math

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from handmade import Bare, Chosen, Pair, setting, train
from torch import nn

from compress.allocation.costs import Axis, CoupledCost, Term
from compress.config.schema.methods import CsgdConfig, GatesMethodConfig, GregConfig, GsmConfig, IncRegConfig
from compress.errors import StageError
from compress.pruning.criteria.base import collect_gradients
from compress.pruning.methods.base import DECAYED
from compress.pruning.methods.csgd import Csgd, channel_features, clustering
from compress.pruning.methods.gates import Gates
from compress.pruning.methods.greg import Greg
from compress.pruning.methods.group_tensors import GroupTensors, Shortcuts, rows_of
from compress.pruning.methods.gsm import Gsm
from compress.pruning.methods.increg import IncReg, increments
from compress.pruning.shortcuts import FixedShortcut
from compress.pruning.surgery import cut_copy
from compress.pruning.trial import find_cuttable, masked_copy
from compress.pruning.width_costs import ExpectedCost, build_cost

# what all share


class Padded(nn.Module):
    """A convolution with a norm, and around it a zero-padded shortcut from 2 to 4 channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 4, 1, 2, bias=False)
        self.norm, self.shortcut, self.head = nn.BatchNorm2d(4), FixedShortcut(2, 1, 1, (2, 2)), nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.norm(self.conv(x)) + self.shortcut(x)).mean((2, 3)))


def _given(module):
    """What the shortcut gives to each of its four channels, as a share of what it is given."""
    return module.shortcut.compress_fixed_weight.sum((1, 2, 3)).tolist()


def test_a_shortcut_gives_by_factors_and_forgets_none_of_what_it_gave():
    module = Padded()
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    shortcuts = Shortcuts(groups["conv"])
    shortcuts.give(torch.tensor([1.0, 0.25, 0.0, 1.0]))
    assert _given(module) == [0, 0.25, 0, 0]
    module.shortcut._buffers["compress_fixed_weight"] = module.shortcut.compress_fixed_weight.clone()  # as .to() does
    shortcuts.give(torch.ones(4))
    assert _given(module) == [0, 1, 1, 0]


def test_what_a_shortcut_gives_to_channels_that_go_fades_in_half_of_the_steps_after_the_choice():
    module, rates = Padded(), [0.1] * 80
    method = Gsm(setting(module, Chosen({"conv": (1,)}), rates))
    seen = []
    step_end = method.on_step_end

    def noted(step):
        step_end(step)
        seen.append(_given(module))

    method.on_step_end = noted
    train(module, method, rates)
    assert method.frozen == 40
    assert [one[1] for one in seen[38:43]] == pytest.approx([1, 1, 0.95, 0.9, 0.85])
    assert [one[1] for one in seen[59:]] == [0] * 21
    assert all((one[0], one[2], one[3]) == (0, 1, 0) for one in seen)


def test_csgd_leaves_channels_whole_that_a_shortcut_gives_to():
    groups, _ = find_cuttable(Padded(), nets.EXAMPLE)
    assert "the shortcut 'shortcut' gives each of them" in Csgd.unfit(groups["conv"])
    assert "'shortcut' reads it" in Csgd.unfit(groups["stem"])


@pytest.mark.parametrize("method_class", [Gsm, Gates])  # against penalties alone the loss holds a little
def test_a_layer_that_no_norm_follows_falls_silent_too(method_class):
    module, gone = Bare(), {"conv": (2,)}
    one = setting(module, Chosen(gone), [0.1] * 200)
    assert [member.layer for member in one.groups["conv"].bare] == ["conv", "depthwise"]
    method = method_class(one)
    train(module, method, [0.1] * 200)
    before = module(nets.images(8))
    method.finish()
    after = cut_copy(module, gone, nets.EXAMPLE)(nets.images(8))
    assert torch.allclose(before, after, atol=1e-3)


def test_no_layer_is_bare_where_norms_follow():
    groups, _ = find_cuttable(Pair(), nets.EXAMPLE)
    assert groups["conv"].bare == ()


@pytest.mark.parametrize("name", nets.NAMES)
def test_derivatives_by_gates_follow_from_the_gradients_of_the_parameters(name):
    module, images, labels = nets.build(name), nets.images(8), torch.arange(8) % 4
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    (wanted,) = collect_gradients(module, groups.values(), [(images, labels)]).batches
    F.cross_entropy(module(images), labels).backward()
    assert groups
    for group in groups.values():
        expected = torch.zeros(group.width)
        for gate in group.gates:
            expected.index_add_(0, gate.channels, wanted[gate.layer][gate.slots])
        assert torch.allclose(GroupTensors(group).derivatives(), expected, rtol=1e-3, atol=1e-6)
        assert expected.abs().max() > 1e-5


def test_a_decay_sized_for_the_run_brings_a_parameter_to_e_to_the_minus_8():
    rates = 0.1 * 0.5 * (1 + np.cos(np.linspace(0, math.pi, 400)))
    one = setting(Pair(), Chosen({}), rates, momentum=0.9)
    decay = one.sized_decay(100)
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], 0.1, 0.9, weight_decay=decay)
    for rate in rates[100:]:
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert math.log(float(parameter.detach().abs())) == pytest.approx(-DECAYED, abs=2.0)


def test_too_few_steps_for_momentum_to_forget_are_refused_with_the_number_that_would_do():
    # sqrt(0.5)^n = e^-8 after 23.08 steps
    assert setting(Pair(), Chosen({}), [0.1] * 48).sized_decay(24) > 0
    match = "at momentum 0.5 that takes 24 steps, and of 46 steps the choice leaves 23"
    with pytest.raises(StageError, match=match) as caught:
        setting(Pair(), Chosen({}), [0.1] * 46).sized_decay(23)
    assert caught.value.hint == "Train for at least 48 steps."
    with pytest.raises(StageError, match="of 30 steps none is left after it"):
        setting(Pair(), Chosen({}), [0.1] * 30).sized_decay(30)


def test_a_given_decay_that_is_too_weak_is_refused_with_the_number_of_steps_that_would_do():
    # the first choice is at step 20: 80 steps * 0.1 * 0.3 / (1 - 0.5) = 4.8, and 8 are needed
    with pytest.raises(StageError, match=r"gsm.passive_decay 0.3 brings them to e\^-4.8 in 100 steps") as caught:
        Gsm(setting(Pair(), Chosen({}), [0.1] * 100), GsmConfig(passive_decay=0.3))
    assert caught.value.hint is not None
    assert "at least 167 steps" in caught.value.hint
    Gsm(setting(Pair(), Chosen({}), [0.1] * 200), GsmConfig(passive_decay=0.3))


def test_gsm_runs_with_the_numbers_of_the_paper():
    # rate 5e-3, decay 1e-4, momentum 0.98: 320,000 steps at that rate from the first choice on
    options = GsmConfig(momentum=0.98, passive_decay=1e-4, interval=1)
    with pytest.raises(StageError, match=r"gsm\.passive_decay 0\.0001 brings them to e\^-8 in 320000 steps"):
        Gsm(setting(Pair(), Chosen({}), np.full(320_000, 5e-3), momentum=0.98), options)
    method = Gsm(setting(Pair(), Chosen({}), np.full(320_002, 5e-3), momentum=0.98), options)
    assert (method.first, method.interval) == (1, 1)
    assert set(method.decays) == {1e-4}
    with pytest.raises(StageError, match=r"at momentum 0\.98 that takes 792 steps"):
        Gsm(setting(Pair(), Chosen({}), np.full(1000, 5.0), momentum=0.98), options)


def test_gsm_at_the_momentum_of_the_paper_decays_as_sized():
    module, rates = Pair(), [0.01] * 1700
    method = Gsm(setting(module, Chosen({"conv": (0,)}), rates, momentum=0.98), GsmConfig(momentum=0.98))
    assert method.decays[-1] == pytest.approx(8 * 0.02 / (0.01 * 850))
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], 0.01, 0.98)
    for decay in method.decays[method.frozen :]:
        parameter.grad = parameter.detach() * decay
        optimizer.step()
    assert math.log(float(parameter.detach().abs())) < -6


# gsm


def test_gsm_lets_passive_channels_decay_by_formula_and_trains_the_others(monkeypatch):
    module = Pair()
    rates, chosen = [0.1] * 100, Chosen({"conv": (0,)})
    method = Gsm(setting(module, chosen, rates, momentum=0.0), GsmConfig(interval=10))
    # nothing goes for 10 steps, then to e^-2 in 40 while the choice is open, then to e^-8 in 50
    assert method.decays[10:] == pytest.approx([2 / (0.1 * 40)] * 40 + [8 / (0.1 * 50)] * 50)
    at_choice = {}
    monkeypatch.setattr(
        method,
        "on_step_begin",
        lambda step: at_choice.update(copy.deepcopy(module.state_dict())) if step == 10 else None,
    )
    train(module, method, rates, momentum=0.0)
    left = (1 - 0.1 * 0.5) ** 40 * (1 - 0.1 * 1.6) ** 50
    for after, name in ((module.norm.weight, "norm.weight"), (module.norm.bias, "norm.bias")):
        assert after[0].item() == pytest.approx(left * at_choice[name][0].item(), rel=1e-3, abs=1e-9)
        assert not torch.allclose(after[1], at_choice[name][1])
    assert torch.equal(module.conv.weight[0], at_choice["conv.weight"][0])  # its own decay is the optimiser's: 0 here
    assert not torch.allclose(module.conv.weight[1], at_choice["conv.weight"][1])
    assert [is_final for *_, is_final in chosen.calls] == [False] * 4 + [True]
    assert method.metrics()["left_ratio"] < 1e-4


def test_gsm_scores_are_a_moving_average_of_absolute_derivatives():
    module = Pair()
    method = Gsm(setting(module, Chosen({}), [0.1] * 100))
    expected = torch.zeros(2)
    for step in range(3):
        images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        module.zero_grad()
        F.cross_entropy(module(images), torch.arange(8) % 4).backward()
        norm = module.norm
        now = (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach().abs()
        expected = 0.9 * expected + 0.1 * now
        method.on_gradients(step)
    assert torch.allclose(method.scores["conv"], expected, rtol=1e-4)


def test_gsm_counts_channels_that_come_back():
    module, rates = Pair(), [0.1] * 100
    method = Gsm(setting(module, Chosen({"conv": (0,)}, {"conv": (1,)}), rates), GsmConfig(interval=25))
    train(module, method, rates)
    assert method.removed == {"conv": (1,)}
    assert method.metrics()["reactivated"] == 1


# greg


def test_greg_1_raises_the_penalty_of_what_goes_up_to_its_ceiling():
    module, rates = Pair(), [0.1] * 100
    options = GregConfig(variant=1, interval=5, ceiling=0.8, picked_at=0.1, full_at=0.5)
    method = Greg(setting(module, Chosen({"conv": (0,)}), rates), options)
    seen = []
    method.on_step_end = lambda step: seen.append(method.penalties["conv"].tolist())
    train(module, method, rates)
    assert method.increase == pytest.approx(0.8 / 8)
    assert seen[9] == [0, 0]
    assert seen[10] == pytest.approx([0.1, 0])
    assert seen[14] == pytest.approx([0.1, 0])
    assert seen[15] == pytest.approx([0.2, 0])
    assert seen[99] == pytest.approx([0.8, 0])
    assert module.norm.weight[0].item() < 0.5 * 1e-3
    assert float(module.conv.weight[0].detach().norm()) < 1e-3  # the penalty is on the filters too


def test_greg_2_lets_all_penalties_grow_first_and_then_frees_what_stays():
    module, rates = Pair(), [0.1] * 100
    options = GregConfig(variant=2, interval=5, picked_at=0.4, full_at=0.7)
    chosen = Chosen({"conv": (0,)})
    method = Greg(setting(module, chosen, rates), options)
    seen = []
    method.on_step_end = lambda step: seen.append(method.penalties["conv"].tolist())
    train(module, method, rates)
    assert seen[39] == pytest.approx([0.01, 0.01])
    assert seen[40][1] == pytest.approx(-1e-4)
    assert seen[40][0] == pytest.approx(0.01 + 1 / 6)
    assert seen[99] == pytest.approx([1, -1e-4])
    assert [is_final for *_, is_final in chosen.calls] == [True]


def test_greg_refuses_a_run_too_short_for_its_penalty():
    with pytest.raises(StageError, match=r"a penalty that grows to 0\.001 brings them to"):
        Greg(setting(Pair(), Chosen({}), [0.01] * 200), GregConfig(ceiling=0.001))


@pytest.mark.parametrize("method_class", [Greg, IncReg])
def test_a_ceiling_is_that_of_the_paper_unless_the_run_is_too_short_for_it(method_class):
    def begun(rate):
        module = Pair()
        return module, method_class(setting(module, Chosen({"conv": (0,)}), [rate] * 200))

    assert begun(0.5)[1].ceiling == 1.0
    module, method = begun(0.01)
    assert method.ceiling > 1.0
    train(module, method, [0.01] * 200)
    assert method.metrics()["left_ratio"] < 0.1


# increg


def test_increments_fall_from_the_most_to_zero_where_the_budget_draws_the_line():
    for count, going in ((40, 10), (7, 3), (100, 90)):
        values = increments(count, going, 2.0)
        assert float(values[0]) == 2.0
        assert float(values[going]) == pytest.approx(0, abs=1e-6)
        assert bool((values[:-1] >= values[1:]).all())
        assert float(values.min()) >= -2.0
    assert increments(3, 0, 2.0).tolist() == [-2, -2, -2]


def test_increg_raises_penalties_of_weak_channels_and_lowers_them_when_they_climb():
    module, rates = nets.build("chain"), [0.1] * 120
    one = setting(module, Chosen({"body.0.0": (0, 1)}), rates)
    method = IncReg(one, IncRegConfig(interval=10, ceiling=5.0))
    method.scores["body.0.0"] = torch.arange(8.0)
    method._choose(is_final=False)
    method._change()
    penalties = method.penalties["body.0.0"]
    assert float(penalties[0]) == pytest.approx(method.most)  # first of what goes
    assert 0 < float(penalties[1]) < method.most
    assert penalties[2:].tolist() == [0] * 6  # never below 0
    method.setting.choose.answers = [{"body.0.0": (1, 2)}]
    method._choose(is_final=False)
    method._change()
    assert float(penalties[0]) < method.most
    assert float(penalties[1]) > float(penalties[2]) > 0


def test_increg_ranks_all_channels_of_all_groups_together():
    module, rates = nets.build("chain"), [0.1] * 120
    chosen = Chosen({})
    method = IncReg(setting(module, chosen, rates), IncRegConfig())
    for number, scores in enumerate(method.scores.values()):
        scores.copy_(torch.arange(float(len(scores))) + 100 * number)
    method._choose(is_final=False)
    ranks = torch.cat(list(method.ranks.values()))
    assert ranks.tolist() == list(range(1, len(ranks) + 1))
    assert torch.equal(torch.cat(list(chosen.calls[0][0].values())), ranks)


def test_increg_asks_for_a_channel_at_the_ceiling_first_and_keeps_its_penalty():
    module, rates = nets.build("chain"), [0.1] * 120
    chosen = Chosen({"body.0.0": (3,)})
    method = IncReg(setting(module, chosen, rates), IncRegConfig(ceiling=1.0))
    for scores in method.scores.values():
        scores.copy_(1 + torch.arange(float(len(scores))))
    method.penalties["body.0.0"][3] = 1.0
    method._choose(is_final=False)
    asked = chosen.calls[0][0]["body.0.0"]
    assert float(asked[3]) == 0
    assert bool((asked[[0, 1, 2, 4]] > 0).all())
    method._change()
    assert float(method.penalties["body.0.0"][3]) == 1.0
    method._choose(is_final=True)
    assert method.penalties["body.0.0"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


# csgd


def test_csgd_gives_a_cluster_its_mean_gradient_and_a_pull_to_its_mean():
    module = Pair()
    method = Csgd(setting(module, Chosen({"conv": (1,)}), [0.1] * 100), CsgdConfig(pull=4.0))
    method.on_step_begin(0)
    assert method.clusters is not None
    assert method.clusters["conv"].tolist() == [0, 0]
    assert method.removed == {"conv": (1,)}
    module(torch.randn(8, 3, 16, 16)).square().sum().backward()
    before = module.norm.weight.grad.clone()
    method.on_gradients(0)
    # the mean gradient, and 4 * (0.5 - 1.25), 4 * (2 - 1.25)
    wanted = before.mean() + torch.tensor([-3.0, 3.0])
    assert torch.allclose(module.norm.weight.grad, wanted, rtol=1e-5)


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "concat", "linear_head"])
def test_csgd_merges_equal_channels_without_a_change(name):
    module = nets.build(name)
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    (group_name, group), *_ = groups.items()
    clusters = torch.arange(group.width)
    clusters[-1] = 0  # the last channel becomes like the first
    with torch.no_grad():
        for rows in GroupTensors(group).every():
            values = rows.values
            values[rows.channels == group.width - 1] = values[rows.channels == 0]
            rows.set_values(values)
        for norm in group.norms:
            for buffer in (norm.module.running_mean, norm.module.running_var):
                buffer[norm.slots[norm.channels == group.width - 1]] = buffer[norm.slots[norm.channels == 0]]
    expected = module(nets.images())
    method = Csgd(setting(module, Chosen({}), [0.1] * 100))
    method.clusters = {name: torch.arange(one.width) for name, one in groups.items()} | {group_name: clusters}
    method.finish()
    assert method.removed == {group_name: (group.width - 1,)}
    slim = cut_copy(module, method.removed, nets.EXAMPLE)
    assert torch.allclose(slim(nets.images()), expected, atol=1e-5)
    assert not torch.allclose(
        cut_copy(nets.build(name), method.removed, nets.EXAMPLE)(nets.images()), expected, atol=1e-3
    )


def test_csgd_draws_channels_together_while_training():
    module, rates = nets.build("chain"), [0.05] * 120
    method = Csgd(setting(module, Chosen({"body.1.0": tuple(range(8))}), rates))
    train(module, method, rates)
    before = module(nets.images())
    method.finish()
    assert method.metrics()["left_ratio"] < 0.01
    slim = cut_copy(module, method.removed, nets.EXAMPLE)
    assert len(method.removed["body.1.0"]) == 8
    assert torch.allclose(slim(nets.images()), before, atol=0.01 * before.abs().max().item())


def test_clusters_are_as_many_as_asked_and_none_is_empty():
    features = np.repeat(np.eye(3), 4, 0)
    for count in range(1, 13):
        found = clustering(features, count, seed=0)
        assert sorted(set(found.labels.tolist())) == list(range(count))
        if count >= 3:
            assert found.distortion == pytest.approx(0, abs=1e-12)
    assert clustering(features, 1, 0).distortion == pytest.approx(1)
    assert clustering(np.ones((5, 2)), 3, 0).distortion == 0


def test_channel_features_do_not_depend_on_the_size_of_a_filter_before_its_norm():
    module = nets.build("chain")
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    before = channel_features(groups["body.1.0"])
    with torch.no_grad():
        module.body[1][0].weight.mul_(3)
    assert np.allclose(channel_features(groups["body.1.0"]), before, atol=1e-6)
    assert np.allclose(np.linalg.norm(before, axis=1), 1)


# gates


def test_expected_cost_is_the_cost_where_chances_are_certain():
    module = nets.build("residual")
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    cost = build_cost(module, nets.EXAMPLE, groups, "macs")
    expected = ExpectedCost(cost, 1.0, ["body.1", "body.2"])
    widths = {name: 3 + number for number, name in enumerate(groups)}
    chances = {name: torch.tensor(float(width)) for name, width in widths.items()}
    here = torch.ones(1)
    assert float(expected(chances, {"body.1": here, "body.2": here})) == pytest.approx(cost.at(widths))
    inside = [term for term in cost.terms if term.layer.startswith("body.1.")]
    removed = {name: groups[name].width - width for name, width in widths.items()}
    block = sum(term.factor * term.out.at(removed) * term.inp.at(removed) for term in inside)
    assert block > 0
    without = expected(chances, {"body.1": 0 * here, "body.2": here})
    assert float(without) == pytest.approx(cost.at(widths) - block)


def test_the_price_of_a_channel_falls_with_the_width_of_its_neighbour():
    cost = ExpectedCost(CoupledCost((Term(2.0, Axis(8, {"a": 1}), Axis(4, {"b": 1})),), 0.0, {"a": 8, "b": 4}), 64.0)
    a, b = torch.tensor(6.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    cost({"a": a, "b": b}, {}).backward()
    assert float(a.grad) == pytest.approx(2 * 3 / 64)
    assert float(b.grad) == pytest.approx(2 * 6 / 64)


def test_gates_pass_the_gradient_of_their_chance():
    module = Pair()
    method = Gates(setting(module, Chosen({}), [0.1] * 100))
    module.train()
    torch.manual_seed(0)
    images = torch.randn(8, 3, 16, 16)
    module(images).sum().backward()
    torch.manual_seed(0)
    torch.randn(8, 3, 16, 16)
    noise = torch.rand(8, 2).clamp(1e-6, 1 - 1e-6)
    chance = torch.sigmoid(method.channels["conv"].detach() + noise.log() - (1 - noise).log())
    normed = F.batch_norm(module.conv(images), None, None, module.norm.weight, module.norm.bias, training=True)
    is_open = (chance > 0.5).float()
    passed = (normed * is_open[:, :, None, None] > 0).float() * normed  # derivative of the sum of relu by the gate
    wanted = (passed.mean((2, 3)) * module.head.weight.sum(0) * chance * (1 - chance)).sum(0)
    assert torch.allclose(method.channels["conv"].grad, wanted.detach(), rtol=1e-3, atol=1e-7)


def test_gates_close_what_the_budget_does_not_pay_for_and_then_stand():
    module, rates = nets.build("chain"), [0.02] * 150
    chosen = Chosen({"body.1.0": (0, 1, 2)})
    method = Gates(setting(module, chosen, rates, kept=0.3), GatesMethodConfig())
    train(module, method, rates[: method.frozen])
    assert method.gates.expected_cost().item() < 0.6  # on the way to 0.3, from 0.99
    train(module, method, rates)
    assert method.removed == {"body.1.0": (0, 1, 2)}
    assert [is_final for *_, is_final in chosen.calls] == [True]
    before = module(nets.images())
    method.finish()
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    assert torch.allclose(masked_copy(module, method.removed, groups)(nets.images()), before, atol=1e-6)
    assert not torch.allclose(module(nets.images()), before, atol=1e-3)  # the gates are off


def test_the_multiplier_of_the_budget_is_never_negative():
    """Dual ascent: below the budget a cost has no price, and no reward either."""
    module = Pair()
    method = Gates(setting(module, Chosen({}), [0.1] * 100), GatesMethodConfig(multiplier_rate=2.0))
    gate, costs = method.channels["conv"], iter([0.4, 0.1, 0.6, 0.75, 0.5, 0.25])
    method.gates.expected_cost = lambda: torch.tensor(next(costs)) + 0 * gate.sum()
    found = []
    for step in range(6):
        method.on_gradients(step)
        found.append(method.multiplier)
    assert found == pytest.approx([0.0, 0.0, 0.2, 0.7, 0.7, 0.2])
    assert method.metrics()["multiplier"] == found[-1]


def test_gates_are_pushed_to_close_only_above_the_budget():
    module = Pair()
    for kept, is_pushed in ((0.3, True), (1.0, False)):
        method = Gates(setting(module, Chosen({}), [0.1] * 100, kept=kept))
        before = method.channels["conv"].detach().clone()
        method.channels["conv"].grad = torch.zeros_like(before)
        method.on_gradients(0)
        after = method.channels["conv"].detach()
        assert bool((after < before).all()) == is_pushed
        assert torch.equal(after, before) != is_pushed
        method.finish()


def test_a_block_whose_gate_is_closed_passes_on_what_it_is_given():
    module, rates = nets.build("residual"), [0.02] * 150
    method = Gates(setting(module, Chosen({}), rates, blocks={"body.1": "body.1.bn2"}))
    with torch.no_grad():
        method.blocks["body.1"].fill_(-1.0)
    method.on_step_begin(method.frozen)
    assert method.closed == ("body.1",)
    got = module(nets.images())
    method.finish()
    module.body[1] = nn.Identity()
    assert torch.allclose(got, module(nets.images()), atol=1e-6)


def test_gates_are_drawn_anew_for_each_image_and_all_open_when_measured():
    module = nets.build("chain")
    expected = module(nets.images())
    method = Gates(setting(module, Chosen({}), [0.1] * 100))
    assert torch.equal(module(nets.images()), expected)
    with torch.no_grad():
        method.channels["body.0.0"].zero_()
    module.train()
    module(nets.images(64))
    drawn = method.gates.drawn["body.0.0"].detach()
    assert drawn.shape == (64, 8)
    assert 0.35 < float(drawn.mean()) < 0.65
    assert not torch.equal(drawn[0], drawn[1])


def test_rows_of_a_transposed_convolution_lie_on_its_second_axis():
    layer = nn.ConvTranspose2d(3, 5, 2)
    module = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(5, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    groups, _ = find_cuttable(module, torch.zeros(1, 3, 8, 8))
    (member,) = [m for m in groups["0"].members if m.layer == "0"]
    rows = {rows.parameter.ndim: rows for rows in rows_of(member)}
    assert rows[4].values.shape == (5, 3, 2, 2)
    assert torch.equal(rows[4].values, layer.weight.detach().transpose(0, 1))
    assert rows[1].values.shape == (5,)
