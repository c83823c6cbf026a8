"""regrow: when channels come back, which, and with what."""

import copy
import math

import nets
import pytest
import torch
from handmade import Chosen, Pair, setting, train

from compress.config.schema.methods import RegrowConfig
from compress.errors import StageError
from compress.pruning.methods.group_tensors import folded_filters
from compress.pruning.methods.regrow import Regrow, leverage, units_by_leverage
from compress.pruning.surgery import cut_copy
from compress.pruning.trial import find_cuttable


def test_the_share_that_comes_back_falls_as_a_cosine_to_the_final_choice():
    method = Regrow(setting(Pair(), Chosen({}), [0.1] * 200), RegrowConfig(ratio=0.4))
    assert (method.frozen, method.interval) == (150, 5)
    assert method.share(0) == 0.4
    assert method.share(50) == pytest.approx(0.3)  # 0.4 * (1 + cos(pi / 3)) / 2
    assert method.share(75) == pytest.approx(0.2)
    assert method.share(150) == method.share(180) == pytest.approx(0, abs=1e-15)


def test_each_choice_masks_all_but_the_regrown_share_and_the_last_one_all():
    module, rates = nets.build("chain"), [0.02] * 80
    chosen = Chosen({"body.1.0": tuple(range(8))})
    method = Regrow(setting(module, chosen, rates), RegrowConfig(ratio=0.5, interval=20))
    masked = {}
    method_end = method.on_step_end

    def seen(step):
        method_end(step)
        scales = module.body[1][1].weight.detach()
        masked[step] = [channel for channel in range(16) if scales[channel] == 0 == module.body[1][1].bias[channel]]

    method.on_step_end = seen
    train(module, method, rates)
    assert masked[19] == []
    for step, wanted in ((20, 0.5 * (1 + math.cos(math.pi / 3)) / 2), (40, 0.5 * (1 + math.cos(math.pi * 2 / 3)) / 2)):
        assert len(masked[step]) == 8 - round(16 * wanted)
        assert masked[step] == masked[step + 19]
    assert len(masked[60]) == 8
    assert masked[60] == masked[79] == list(method.removed["body.1.0"])
    assert [is_final for *_, is_final in chosen.calls] == [False, False, True]
    before = module(nets.images())
    assert torch.allclose(cut_copy(module, method.removed, nets.EXAMPLE)(nets.images()), before, atol=1e-5)


def test_what_comes_back_has_its_rows_columns_and_norm_again_and_no_momentum():
    module, rates = nets.build("chain"), [0.02] * 80
    one = setting(module, Chosen({"body.0.0": (0, 1, 2, 3)}, {}, {"body.0.0": (0,)}), rates)
    method = Regrow(one, RegrowConfig(ratio=0.0, interval=20))
    states, optimizers = {}, []
    begin = method.on_optimizer
    method.on_optimizer = lambda optimizer: (begin(optimizer), optimizers.append(optimizer))
    gradients, end = method.on_gradients, method.on_step_end

    def before(step):
        states[step, "before"] = copy.deepcopy(module.state_dict())
        gradients(step)
        states[step, "changed"] = copy.deepcopy(module.state_dict())
        state = optimizers[0].state
        weights = (module.body[0][0].weight, module.body[0][1].weight, module.body[1][0].weight)
        states[step, "momentum"] = [
            state[weight]["momentum_buffer"].clone() if weight in state else None for weight in weights
        ]

    def after(step):
        end(step)
        if step == 20:
            with torch.no_grad():  # what is masked is corrupted in all ways
                module.body[0][0].weight[method.goes("body.0.0")] += 1
                module.body[1][0].weight[:, method.goes("body.0.0")] += 1
                module.body[0][1].running_var[method.goes("body.0.0")] += 1

    method.on_gradients, method.on_step_end = before, after
    train(module, method, rates, momentum=0.9)
    at_mask, back = states[20, "before"], states[40, "changed"]
    gone = [channel for channel in range(8) if states[39, "changed"]["body.0.1.weight"][channel] == 0]
    assert len(gone) == 4
    for name in ("body.0.0.weight", "body.0.1.weight", "body.0.1.bias", "body.0.1.running_var"):
        assert torch.equal(back[name][gone], at_mask[name][gone]), name
    assert torch.equal(back["body.1.0.weight"][:, gone], at_mask["body.1.0.weight"][:, gone])
    kept = [channel for channel in range(8) if channel not in gone]
    assert not torch.equal(back["body.0.0.weight"][kept], at_mask["body.0.0.weight"][kept])
    for number, momentum in enumerate(states[40, "momentum"]):
        rows = momentum.transpose(0, 1) if number == 2 else momentum
        assert rows[gone].abs().max() == 0
        assert rows[kept].abs().max() > 0
    assert method.metrics()["returned_channels"] == 4
    assert 0.75 <= method.metrics()["returned_kept_ratio"] <= 1


def test_masked_channels_keep_their_scores():
    module, rates = Pair(), [0.05] * 80
    method = Regrow(setting(module, Chosen({"conv": (0,)}), rates), RegrowConfig(interval=20, ratio=0.0))
    seen = []
    method.on_step_end, end = lambda step: (end(step), seen.append(method.scores["conv"].clone())), method.on_step_end
    train(module, method, rates)
    (gone,) = method.removed["conv"]
    assert seen[20][gone] == seen[50][gone] > 0
    assert seen[20][1 - gone] != seen[50][1 - gone]


def test_leverage_is_the_squared_row_norms_of_the_top_singular_vectors():
    filters = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    left, _, _ = torch.linalg.svd(filters.double(), full_matrices=False)
    for kept in (1, 3, 6):
        assert torch.allclose(leverage(filters, kept), left[:, :kept].square().sum(1).float(), atol=1e-6)
    assert torch.equal(leverage(filters[:, :5], 3), filters[:, :5].abs().sum(1))  # L1 where filters are short


@pytest.mark.parametrize("name", nets.NAMES)
def test_units_go_by_leverage_in_whole(name):
    groups, _ = find_cuttable(nets.build(name), nets.EXAMPLE)
    for group in groups.values():
        going = units_by_leverage(group, 2 * group.parts)
        scores = leverage(folded_filters(group), group.width - 2 * group.parts).reshape(group.parts, -1).sum(0)
        assert set(going) == set(scores.argsort()[:2].tolist())
        assert units_by_leverage(group, 0) == []


def test_a_run_without_a_choice_before_the_final_one_is_refused():
    def begun(steps, **options):
        return Regrow(setting(Pair(), Chosen({}), [0.1] * steps), RegrowConfig(**options))

    with pytest.raises(StageError, match="got a first after 30 steps and a final one after 30 of 40") as caught:
        begun(40, interval=30)
    assert caught.value.hint == "Train for at least 42 steps, or lower regrow.interval."
    begun(42, interval=30)
    with pytest.raises(StageError, match="of 2 steps none is left"):
        begun(2)
    for bad in ({"ratio": 1.0}, {"until": 0.0}, {"interval": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RegrowConfig(**bad)


def test_all_processes_draw_the_same_channels():
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the loop seeds each process by its own rank
        module, rates = nets.build("chain"), [0.02] * 80
        method = Regrow(setting(module, Chosen({"body.1.0": tuple(range(8))}), rates), RegrowConfig(ratio=0.4))
        (group,) = [group for name, group in method.setting.groups.items() if name == "body.1.0"]
        method._step = 10
        drawn.append(method._without_regrown(group, list(range(8)), 1))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 8 - round(16 * method.share(10))
