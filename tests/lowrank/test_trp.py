"""Trained rank pruning cuts kernels to the ranks of the budget while training, and the factorisation loses nothing."""

from types import SimpleNamespace

import nets
import pytest
import torch
from fixtures import make_context, make_model, make_splits
from torch import nn

from compress.config.schema.low_rank import LowRankConfig, TrpConfig
from compress.config.schema.targets import RankTargetConfig
from compress.config.schema.training import TrainingConfig
from compress.cost.macs import count_macs
from compress.errors import BudgetUnreachable
from compress.lowrank.factorize import factorize, main_directions, multiply
from compress.lowrank.trp import TrainedRank
from compress.model.recipe import Factorize
from compress.search.hooked_training import CUT_JUMP
from compress.stages.low_rank import LowRankStage

TRAINING = TrainingConfig(steps=40, batch_size=16, learning_rate=0.05)


@pytest.mark.parametrize(("scheme", "ranks"), [("nc", (2,)), ("vh", (2,)), ("tucker2", (2, 2))])
def test_directions_are_the_gradient_of_the_nuclear_norm(scheme, ranks):
    torch.manual_seed(0)
    whole = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    weight = multiply(factorize(whole, scheme, ranks).weights, scheme)
    columns = weight.permute(1, 2, 0, 3).reshape(15, 18)
    unfoldings = {
        "nc": [lambda w: w.flatten(1)],
        "vh": [lambda w: w.permute(1, 2, 0, 3).reshape(15, 18)],
        "tucker2": [lambda w: w.flatten(1), lambda w: w.transpose(0, 1).flatten(1)],
    }[scheme]
    assert torch.linalg.matrix_rank(columns) >= 2

    def norm(w):
        return sum(torch.linalg.svdvals(unfold(w))[:2].sum() for unfold in unfoldings)

    direction = torch.randn_like(weight)
    slope = (norm(weight + 1e-5 * direction) - norm(weight - 1e-5 * direction)) / 2e-5
    got = (main_directions(weight, scheme, ranks) * direction).sum()
    assert float(got) == pytest.approx(float(slope), rel=1e-4)


def test_kernels_are_cut_every_so_many_steps_and_pulled_in_those_alone():
    layer = nn.Conv2d(6, 8, 3, bias=False)
    module = nn.Sequential(layer)
    hooks = TrainedRank(module, lambda: [Factorize("0", "nc", (3,))], interval=4, strength=0.5)

    def rank():
        return int(torch.linalg.matrix_rank(layer.weight.detach().flatten(1), rtol=1e-4))

    for step in range(8):
        if step % 4 == 0:
            assert rank() == 8
        hooks.on_step_begin(step)
        if step % 4 == 0:
            assert rank() == 3
        layer.weight.grad = torch.zeros_like(layer.weight)
        hooks.on_gradients(step)
        pull = layer.weight.grad
        if step % 4 == 0:
            wanted = 0.5 * main_directions(layer.weight, "nc", (3,))
            assert torch.allclose(pull, wanted.float(), atol=1e-6)
            assert float(pull.norm()) == pytest.approx(0.5 * 3**0.5, rel=1e-4)
        else:
            assert not pull.any()
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight), alpha=0.1)
        hooks.on_step_end(step)
    assert rank() == 8  # what comes after the training cuts once


def test_a_kernel_of_the_ranks_asked_for_is_left_as_it_is():
    layer = nn.Conv2d(6, 8, 3, bias=False)
    hooks = TrainedRank(nn.Sequential(layer), lambda: [Factorize("0", "vh", (4,))], 1, 0.0)
    hooks.cut()
    before = layer.weight.detach().clone()
    hooks.cut()
    assert torch.allclose(layer.weight, before, atol=1e-6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("data"), calibration=48, bright=True)


@pytest.fixture
def run(data, tmp_path):
    """Run the stage on a tiny network; give what went in, the slim model, the record and what was said."""

    def call(name, folder="stage", **config):
        artifact, (ctx, said) = make_model(name, tmp_path), make_context(tmp_path / folder, data)
        settings = {"target": RankTargetConfig(macs=0.6), "multiple_of": 1} | config
        slim, record = LowRankStage(LowRankConfig(stage="low_rank", **settings)).run(artifact, ctx)
        return SimpleNamespace(artifact=artifact, slim=slim, record=record, notes=said.notes, warnings=said.warnings)

    return call


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_the_target_is_met_and_the_factorisation_changes_next_to_nothing(run, name):
    done = run(name, method="trp", training=TRAINING)
    before = count_macs(nets.build(name), nets.EXAMPLE)
    assert done.record.macs_after == count_macs(done.slim.module, nets.EXAMPLE) <= 0.6 * before
    learned = done.record.method
    assert learned.name == "trp"
    assert learned.steps == 40
    assert learned.quality_before_cut > learned.validation_before
    assert learned.loss_after_cut < learned.loss_before_cut + CUT_JUMP
    weights = nets.build(name).state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in done.artifact.module.state_dict().items())


def test_kernels_that_were_cut_while_training_lose_less_than_those_that_were_only_trained(run, monkeypatch):
    def lost(done):
        return max(layer.relative_error for layer in done.record.layers)

    trained = run("chain", method="trp", training=TRAINING)
    monkeypatch.setattr(TrainedRank, "cut", lambda self: None)
    monkeypatch.setattr(TrainedRank, "on_gradients", lambda self, step: None)
    only_trained = run("chain", "without", method="trp", training=TRAINING)
    assert 0 < lost(trained) < 0.3 * lost(only_trained)
    rise, rise_without = (
        done.record.method.loss_after_cut - done.record.method.loss_before_cut for done in (trained, only_trained)
    )
    assert rise < 0.3 * rise_without


def test_a_shared_error_is_kept_once(run):
    """Kernels are cut by the error asked for once, not once more after the last step."""
    done = run("chain", method="trp", training=TRAINING, target=None, relative_error=0.3)
    errors = [layer.relative_error for layer in done.record.layers]
    assert errors
    assert max(errors) < 0.3
    assert done.record.shared_relative_error == 0.3


def test_a_rise_of_the_loss_is_explained(run, monkeypatch):
    monkeypatch.setattr("compress.search.hooked_training.CUT_JUMP", -1.0)
    done = run("chain", method="trp", training=TRAINING)
    (warning,) = [text for text in done.warnings if "must change next to nothing" in text]
    worst = max(done.record.layers, key=lambda layer: layer.relative_error)
    assert f"up to {worst.relative_error:.1%} away from their rank ('{worst.layer}')" in warning


def test_a_stage_that_was_killed_goes_on_and_ends_the_same(run, monkeypatch):
    whole = run("chain", "whole", method="trp", training=TRAINING)
    gradients = TrainedRank.on_gradients

    def dying(self, step):
        if step == 27:
            raise SystemExit("killed")
        gradients(self, step)

    settings = TRAINING.model_copy(update={"save_minutes": 0.0})
    monkeypatch.setattr(TrainedRank, "on_gradients", dying)
    with pytest.raises(SystemExit):
        run("chain", "killed", method="trp", training=settings)
    monkeypatch.setattr(TrainedRank, "on_gradients", gradients)
    again = run("chain", "killed", method="trp", training=settings)
    assert any("goes on after step 27 of 40" in note for note in again.notes)
    assert again.slim.recipe == whole.slim.recipe
    for name, value in whole.slim.module.state_dict().items():
        assert torch.equal(value, again.slim.module.state_dict()[name]), name


def test_a_target_out_of_reach_is_refused_before_the_training(run, monkeypatch):
    monkeypatch.setattr("compress.search.hooked_training.fit", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(BudgetUnreachable):
        run("chain", method="trp", training=TRAINING, target=RankTargetConfig(macs=0.01))


def test_settings_of_the_method_reach_it(run, monkeypatch):
    seen = []
    monkeypatch.setattr(TrainedRank, "on_step_begin", lambda self, step: seen.append((self.interval, self.strength)))
    run("chain", method="trp", training=TRAINING, trp=TrpConfig(interval=7, strength=0.25))
    assert set(seen) == {(7, 0.25)}
    assert len(seen) == 40
