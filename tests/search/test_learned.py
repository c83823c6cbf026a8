"""`prune` with a method: what goes is learned under the budget, and the cut changes next to nothing."""

import json
import re
import shutil
from dataclasses import replace

import nets
import pytest
import torch
from exported import exported
from fixtures import make_context, make_model, make_splits
from steady import profile_by_macs

import compress.search.hooked_training as hooked
from compress.catalog import METHODS
from compress.checkpoint.rebuild import apply_edits
from compress.config.schema.methods import GsmConfig
from compress.config.schema.prune import PruneConfig
from compress.config.schema.targets import TargetConfig
from compress.config.schema.training import TrainingConfig
from compress.config.schema.verify import DeployConfig
from compress.cost.macs import count_macs, count_params
from compress.errors import AlreadyWithin, BudgetUnreachable, StageError
from compress.model.recipe import RemoveBlock, RemoveChannels
from compress.pruning.methods.gates import Gates
from compress.pruning.methods.grda import Grda
from compress.pruning.methods.gsm import Gsm
from compress.pruning.methods.regrow import Regrow
from compress.search.pruner import Pruner
from compress.stages.prune import PruneStage

TRAINING = TrainingConfig(steps=90, batch_size=16, learning_rate=0.05, momentum=0.5, warmup_ratio=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("data"), calibration=48, bright=True)


@pytest.fixture
def learn(data, tmp_path):
    """Run `prune` with a method on a tiny network; give the slim model, the record and what was said."""

    def call(name, folder="stage", **config):
        artifact, (ctx, listener) = make_model(name, tmp_path), make_context(tmp_path / folder, data)
        settings = {"target": TargetConfig(macs=0.5), "multiple_of": 1, "training": TRAINING} | config
        stage = PruneStage(PruneConfig(stage="prune", **settings))
        slim, record = stage.run(artifact, ctx)
        return slim, record, listener

    return call


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["residual", "depthwise", "linear_head"])
def test_the_budget_is_met_and_the_cut_changes_next_to_nothing(learn, name, method):
    slim, record, said = learn(name, method=method, repair=())
    before = count_macs(nets.build(name), nets.EXAMPLE)
    assert record.macs_after == count_macs(slim.module, nets.EXAMPLE) <= 0.5 * before
    assert record.reached_ratio > 0.3
    learned = record.method
    assert learned.name == method
    assert learned.steps == 90
    assert len(learned.epochs) == learned.chosen_epoch
    assert learned.loss_after_cut == pytest.approx(learned.loss_before_cut, abs=hooked.CUT_JUMP)
    # one threshold for all groups of so short a run leaves kept channels at zero: that is said
    share = learned.metrics.get("kept_zero_ratio", 0.0)
    wording = f"Method 'grda': .* kept channels \\({share:.0%}\\) were at zero when the choice was made"
    assert len(said.warnings) == int(share > 0.1)
    assert all(re.match(wording, text) for text in said.warnings)
    assert any(note.startswith(f"{method}: validation loss") for note in said.notes)
    replayed = apply_edits(nets.build(name, seed=3), slim.recipe, nets.EXAMPLE)
    replayed.load_state_dict(slim.module.state_dict(), strict=True)
    assert torch.equal(replayed(nets.images()), slim.module(nets.images()))
    json.dumps(record.to_dict())


@pytest.mark.parametrize("method", ["grda", "regrow", "tpp"])
def test_a_latency_budget_is_met_by_widths_that_were_timed(data, tmp_path, monkeypatch, method):
    profile_by_macs(monkeypatch)
    artifact, (ctx, listener) = make_model("residual", tmp_path), make_context(tmp_path / "stage", data)
    shutil.copy(exported("residual"), artifact.baseline.onnx_path)
    ctx = replace(ctx, deploy=DeployConfig(batch_size=64), latency_tables=tmp_path / "tables")
    config = PruneConfig(
        stage="prune", target=TargetConfig(latency=0.6), multiple_of=2, method=method, training=TRAINING, repair=()
    )
    slim, record = PruneStage(config).run(artifact, ctx)
    assert record.latency.measured_ratio <= 0.6 * 1.03
    assert count_macs(slim.module, nets.EXAMPLE) == record.macs_after < record.macs_before
    learned = record.method
    assert learned.loss_after_cut == pytest.approx(learned.loss_before_cut, abs=hooked.CUT_JUMP)
    assert not [text for text in listener.warnings if "must change next to nothing" in text]


def test_the_momentum_of_gsm_takes_the_place_of_that_of_training(learn, monkeypatch):
    settings, fit = [], hooked.fit
    monkeypatch.setattr(hooked, "fit", lambda *args, **rest: settings.append(args[2]) or fit(*args, **rest))
    decays, begun = [], Gsm.__init__

    def noted(self, setting, options=None):
        begun(self, setting, options)
        decays.append((setting.momentum, self.decays[-1], float(setting.rates[45:].sum())))

    monkeypatch.setattr(Gsm, "__init__", noted)
    learn("chain", method="gsm", gsm=GsmConfig(momentum=0.7))
    assert [one.momentum for one in settings] == [0.7]
    ((momentum, decay, rates),) = decays
    assert momentum == 0.7
    assert decay == pytest.approx(8 * (1 - 0.7) / rates)  # alpha * decay * T / (1 - momentum) = 8
    with pytest.raises(StageError, match=r"at momentum 0\.98 that takes 792 steps, and of 90 steps the choice leaves"):
        learn("chain", "another", method="gsm", gsm=GsmConfig(momentum=0.98))


def test_the_network_is_trained_while_the_method_decides(learn):
    slim, record, _ = learn("chain", method="gsm")
    assert record.method.validation_before < record.method.quality_before_cut == 1.0
    assert record.validation_after == 1.0
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in slim.module.modules())


def test_a_cut_that_changes_more_is_warned_about_with_its_cause(learn, monkeypatch):
    monkeypatch.setattr(Gsm, "on_gradients", lambda self, step: self.observe(step))  # nothing decays
    monkeypatch.setattr(hooked, "CUT_JUMP", -1.0)
    _, record, said = learn("chain", method="gsm")
    (warning,) = [text for text in said.warnings if "must change next to nothing" in text]
    assert "The removed channels had" in warning
    assert "more steps after the final choice would help" in warning
    assert f"{record.method.loss_after_cut - record.method.loss_before_cut:.3f}" in warning


@pytest.mark.parametrize(("is_worse", "count"), [(True, 1), (False, 0)])
def test_training_that_made_the_network_worse_is_warned_about_with_both_figures(learn, monkeypatch, is_worse, count):
    asked = []

    def compare(before, after, task):
        asked.append([task.aggregate(facts)["top1"] for facts in (before, after)])
        return is_worse

    monkeypatch.setattr(hooked, "is_quality_worse", compare)
    _, record, said = learn("chain", method="regrow")
    learned = record.method
    assert asked == [[learned.validation_before, learned.quality_before_cut]]
    found = [text for text in said.warnings if "by itself, before the cut" in text]
    assert len(found) == count
    for text in found:
        assert f"top-1 {learned.validation_before:.2%} -> {learned.quality_before_cut:.2%}" in text


def test_a_block_whose_gate_closed_is_removed(learn, monkeypatch):
    draw = Gates.on_step_begin

    def closed(self, step):
        if step == self.frozen:
            with torch.no_grad():
                self.blocks["body.1"].fill_(1.0)
                self.blocks["body.2"].fill_(-1.0)
        draw(self, step)

    monkeypatch.setattr(Gates, "on_step_begin", closed)
    slim, record, _ = learn("residual", method="gates", blocks="auto", target=TargetConfig(params=0.4))
    assert record.removed_blocks == ("body.2",)
    assert isinstance(slim.recipe.edits[0], RemoveBlock)
    assert isinstance(slim.recipe.edits[1], RemoveChannels)
    assert record.params_after == count_params(slim.module) <= 0.4 * record.params_before
    learned = record.method
    assert learned.loss_after_cut == pytest.approx(learned.loss_before_cut, abs=1e-4)
    assert learned.metrics["blocks_closed_ratio"] == 0.5


def test_gates_close_blocks_by_themselves_where_the_budget_is_small(learn):
    _, record, said = learn("residual", method="gates", blocks="auto", target=TargetConfig(params=0.4))
    assert record.removed_blocks
    assert record.params_after <= 0.4 * record.params_before
    assert any("residual block" in note for note in said.notes)


def test_gates_leave_blocks_alone_unless_asked(learn):
    _, record, _ = learn("residual", method="gates")
    assert record.removed_blocks == ()
    assert record.method.metrics["blocks_closed_ratio"] == 0.0


@pytest.mark.parametrize(("method_class", "step"), [(Gsm, 60), (Grda, 23), (Regrow, 44)])
def test_a_stage_that_was_killed_goes_on_and_ends_the_same(learn, monkeypatch, method_class, step):
    method = method_class.name
    whole, record, _ = learn("chain", "whole", method=method)
    gradients, last = method_class.on_gradients, step

    def dying(self, step):
        if step == last:
            raise SystemExit("killed")
        gradients(self, step)

    monkeypatch.setattr(method_class, "on_gradients", dying)
    with pytest.raises(SystemExit):
        learn("chain", "killed", method=method)
    monkeypatch.setattr(method_class, "on_gradients", gradients)
    again, repeated, said = learn("chain", "killed", method=method)
    assert any(note.startswith("Training goes on after") for note in said.notes)
    assert again.recipe == whole.recipe
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name]), name
    assert repeated.method.metrics == record.method.metrics


def test_a_kill_after_the_training_does_not_train_again(learn, monkeypatch):
    whole, record, _ = learn("chain", "whole", method="gsm")
    cut = Pruner.cut
    monkeypatch.setattr(Pruner, "cut", lambda *_: (_ for _ in ()).throw(SystemExit("killed")))
    with pytest.raises(SystemExit):
        learn("chain", "killed", method="gsm")
    monkeypatch.setattr(Pruner, "cut", cut)
    monkeypatch.setattr(Gsm, "on_step_begin", lambda *_: pytest.fail("it was trained again"))
    again, repeated, _ = learn("chain", "killed", method="gsm")
    assert again.recipe == whole.recipe
    assert all(torch.equal(v, again.module.state_dict()[k]) for k, v in whole.module.state_dict().items())
    losses = [[epoch.loss for epoch in one.method.epochs] for one in (record, repeated)]
    assert losses[0] == losses[1]


def test_what_cannot_come_to_an_end_is_refused_before_the_training(learn, monkeypatch):
    monkeypatch.setattr("compress.search.hooked_training.fit", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(BudgetUnreachable, match="cannot be reached"):
        learn("chain", method="gsm", target=TargetConfig(macs=0.01))
    with pytest.raises(AlreadyWithin, match=r"Target macs 1\.0 must remove something"):
        learn("chain", method="gsm", target=TargetConfig(macs=1.0))
    short = TRAINING.model_copy(update={"steps": 30})
    with pytest.raises(StageError, match=r"at momentum 0\.5 that takes 24 steps, and of 30 steps the choice leaves 15"):
        learn("chain", method="gsm", training=short)
    with pytest.raises(StageError, match=r"gsm\.passive_decay 0\.001 brings them to"):
        learn("chain", method="gsm", gsm=GsmConfig(passive_decay=0.001))


def test_groups_that_a_method_cannot_cut_stay_whole_and_are_named(learn):
    _, record, said = learn("grouped", method="csgd", target=TargetConfig(macs=0.9))
    reasons = {entry.name: entry.reason for entry in record.excluded}
    assert "a grouped convolution computes or reads it" in reasons.values()
    assert any("a grouped convolution" in warning for warning in said.warnings)
