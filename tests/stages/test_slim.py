"""Slim meets its target by channels, blocks and ranks, keeps the least loss, and goes on after a kill."""

import copy
import json
from dataclasses import replace

import nets
import numpy as np
import pytest
import steady
import torch
from fixtures import Killed, RecordingProgress, make_saved_model, make_splits
from steady import profile_by_macs

import compress.search.rank_latency as rank_latency
import compress.stages.slim as slim_module
from compress.checkpoint.rebuild import apply_edits
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.prune import PruneConfig, SlimConfig
from compress.config.schema.targets import RankTargetConfig, TargetConfig
from compress.config.schema.training import DistillationConfig, TrainingConfig
from compress.config.schema.verify import DeployConfig
from compress.cost.macs import count_macs, count_params
from compress.errors import BudgetUnreachable, UnsupportedLayer
from compress.model.artifacts import TorchModel
from compress.model.recipe import Factorize, MergeBlock, RemoveBlock, RemoveChannels
from compress.pruning.ranking.sensitivity import SavedRises, Sensitivity
from compress.search.context import StageContext
from compress.search.teacher import BaselineTeacher
from compress.stages.low_rank import LowRankStage
from compress.stages.prune import PruneStage
from compress.stages.slim import SlimStage
from compress.training.evaluate import evaluate_loss

DEPLOY = DeployConfig(batch_size=64)
BETWEEN = TrainingConfig(steps=2, batch_size=16, learning_rate=0.01)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(data, tmp_path):
    """Run the stage on a tiny network, or on a model, in a folder that may be there already."""

    def call(network, folder: str = "stage", progress: RecordingProgress | None = None, deploy=None, **config):
        model = make_saved_model(network, tmp_path / "baseline") if isinstance(network, str) else network
        config = {"target": TargetConfig(macs=0.5), "multiple_of": 1, "moves": ("channels",)} | config
        (tmp_path / folder).mkdir(exist_ok=True)
        ctx = StageContext(tmp_path / folder, 0, data, progress or RecordingProgress(), deploy, tmp_path / "tables")
        ctx = replace(ctx, teacher=BaselineTeacher(model))
        slim, record = SlimStage(SlimConfig(stage="slim", **config)).run(model, ctx)
        return slim, record.to_dict()

    return call


def _hold_replay(slim: TorchModel, name: str) -> None:
    """The recipe gives the structure of the module."""
    replayed = apply_edits(nets.build(name, seed=3), slim.recipe, nets.EXAMPLE)
    replayed.load_state_dict(slim.module.state_dict(), strict=True)
    assert torch.equal(replayed(nets.images()), slim.module(nets.images()))


def _same(one: TorchModel, other: TorchModel) -> bool:
    states = one.module.state_dict(), other.module.state_dict()
    return one.recipe == other.recipe and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


MOVES = [("channels",), ("channels", "blocks"), ("channels", "ranks"), ("channels", "blocks", "ranks")]
ALLOWED = {"channels": RemoveChannels, "blocks": RemoveBlock, "ranks": Factorize}


@pytest.mark.parametrize("name", nets.NAMES)
@pytest.mark.parametrize("moves", MOVES, ids=lambda moves: "+".join(moves))
def test_target_is_met_by_what_may_be_done_with_the_least_loss_of_what_was_tried(run, data, name, moves):
    slim, record = run(name, moves=moves, damage="scores", score_images=16)
    before = nets.build(name)
    assert record["macs_before"] == count_macs(before, nets.EXAMPLE)
    assert record["macs_after"] == count_macs(slim.module, nets.EXAMPLE) <= 0.5 * record["macs_before"]
    assert record["params_before"] == count_params(before)
    assert record["params_after"] == count_params(slim.module)
    assert record["target"] == {"macs": 0.5}
    assert record["moves"] == list(moves)
    assert 0 <= record["validation_top1_after"] <= 1
    assert {type(edit) for edit in slim.recipe.edits} <= {ALLOWED[move] for move in moves}
    (step,) = record["steps"]
    trials = step["trials"]
    assert [trial["share"] for trial in trials] == [0.0, *((1 / 3, 2 / 3, 1.0) if "ranks" in moves else ())]
    least = min(trials, key=lambda trial: float("inf") if trial["loss"] is None else trial["loss"])
    assert evaluate_loss(slim.module, data.validation) == pytest.approx(least["loss"], abs=1e-6)
    assert all((trial["loss"] is None) == (trial["reason"] is not None) for trial in trials)
    assert (step["low_rank"] is not None) == (least["share"] > 0)
    assert (step["prune"] is not None) == (least["share"] < 1)
    assert step["training"] is None
    assert json.loads(json.dumps(record)) == record
    assert not any(part.training for part in slim.module.modules())
    _hold_replay(slim, name)


def test_channels_alone_are_what_prune_does_and_ranks_alone_what_low_rank_does(run, data, tmp_path):
    model = make_saved_model("residual", tmp_path / "baseline")
    ctx = StageContext(tmp_path, 0, data, RecordingProgress())
    pruning = PruneConfig(stage="prune", target=TargetConfig(macs=0.5), multiple_of=1)
    given = {"target": RankTargetConfig(macs=0.5), "multiple_of": 1, "allocation": "shared_error"}
    ranking = LowRankConfig(stage="low_rank", **given)
    pruned, _ = PruneStage(pruning).run(model, ctx)
    ranked, _ = LowRankStage(ranking).run(model, ctx)
    _, record = run(model, moves=("channels", "ranks"))
    losses = {trial["share"]: trial["loss"] for trial in record["steps"][0]["trials"]}
    assert losses[0.0] == pytest.approx(evaluate_loss(pruned.module, data.validation), abs=1e-6)
    assert losses[1.0] == pytest.approx(evaluate_loss(ranked.module, data.validation), abs=1e-6)
    assert len(set(losses.values())) == 4, "each share is another network"
    alone, _ = run(model, folder="alone", moves=("channels",))
    assert _same(alone, pruned)
    shorter, by_slim = run(model, folder="blocks", moves=("channels", "blocks"))
    expected, by_prune = PruneStage(pruning.model_copy(update={"blocks": "auto"})).run(model, ctx)
    assert _same(shorter, expected)
    assert by_slim["steps"][0]["prune"]["block_trials"] == by_prune.to_dict()["block_trials"]


def test_blocks_are_merged_where_merges_are_permitted(run):
    slim, record = run("residual", moves=("channels", "blocks", "merges"), target=TargetConfig(macs=0.4))
    (step,) = record["steps"]
    edits = [edit.block for edit in slim.recipe.edits if isinstance(edit, RemoveBlock | MergeBlock)]
    assert sorted(edits) == sorted(step["prune"]["removed_blocks"] + step["prune"]["merged_blocks"])
    assert record["macs_after"] == count_macs(slim.module, nets.EXAMPLE) <= 0.4 * record["macs_before"]
    _hold_replay(slim, "residual")
    with pytest.raises(ValueError, match="moves must hold blocks where they hold merges"):
        SlimConfig(stage="slim", target=TargetConfig(macs=0.4), moves=("channels", "merges"))


def test_blocks_are_taken_out_once_for_all_shares(run):
    listener = RecordingProgress()
    run("residual", progress=listener, moves=("channels", "blocks", "ranks"), target=TargetConfig(macs=0.3))
    removed = [note.split()[1] for note in listener.notes if note.startswith("block ")]
    assert removed
    assert len(removed) == len(set(removed))


def test_with_ranks_as_many_blocks_go_as_without_them(run, monkeypatch):
    asked = []
    cut = PruneStage.run

    def watched(stage, model, ctx, networks):
        slim, record = cut(stage, model, ctx, networks)
        asked.append((stage.config.blocks, stage.config.target.macs, len(record.removed_blocks)))
        return slim, record

    monkeypatch.setattr(PruneStage, "run", watched)
    run("residual", moves=("channels", "blocks", "ranks"), target=TargetConfig(macs=0.3))
    removed = asked[0][2]
    assert removed > 0, "the case is worth nothing without blocks"
    assert asked[0][:2] == ("auto", 0.3)
    assert asked[1:] == [
        (removed, pytest.approx(0.3 ** (2 / 3)), removed),
        (removed, pytest.approx(0.3 ** (1 / 3)), removed),
    ]


@pytest.mark.parametrize("losses", [(0.4, 0.3, 0.2, 0.1), (0.4, 0.1, 0.2, 0.3), (float("nan"), 0.5, 0.3, 0.6)])
def test_the_least_loss_wins_and_a_loss_that_is_no_number_never_does(run, monkeypatch, losses):
    told = iter(losses)
    monkeypatch.setattr(slim_module, "evaluate_loss", lambda *_, **__: next(told))
    slim, record = run("residual", moves=("channels", "ranks"))
    (step,) = record["steps"]
    share = step["trials"][int(np.nanargmin(losses))]["share"]
    kinds = [type(edit) for edit in slim.recipe.edits]
    assert kinds[:1] == [RemoveChannels if share < 1 else Factorize]
    assert (Factorize in kinds) == (share > 0)
    assert step["prune"] is None or step["prune"]["target"]["macs"] == pytest.approx(0.5 ** (1 - share))


@pytest.mark.parametrize("target", [{"params": 0.4}, {"macs": 0.6, "params": 0.5}, {"size_mb": 0.02}])
def test_other_targets_are_met_too(run, target):
    slim, record = run("residual", target=TargetConfig(**target))
    reached = record["steps"][0]["prune"]["reached"]
    assert all(reached[name] <= value for name, value in target.items())
    assert record["params_after"] < record["params_before"]
    if "params" in target:
        assert count_params(slim.module) <= target["params"] * record["params_before"]
        slim, _ = run("residual", target=TargetConfig(params=0.4), moves=("channels", "ranks"), folder="ranks")
        assert count_params(slim.module) <= 0.4 * record["params_before"]


def test_the_input_is_left_untouched(run, tmp_path):
    model = make_saved_model("residual", tmp_path / "baseline")
    before = copy.deepcopy(model.module.state_dict())
    run(model, moves=("channels", "blocks", "ranks"), steps=2, between=BETWEEN)
    assert list(model.module.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert model.recipe.edits == ()
    assert not any(part.training or part._forward_hooks for part in model.module.modules())


@pytest.mark.parametrize("moves", MOVES, ids=lambda moves: "+".join(moves))
def test_two_steps_go_through_a_larger_network_that_was_trained(run, monkeypatch, moves):
    made = []
    slim_once = SlimStage._slim

    def watched(stage, model, progress_made, is_last, ctx):
        found = slim_once(stage, model, progress_made, is_last, ctx)
        made.append((progress_made, is_last, model, found[0]))
        return found

    monkeypatch.setattr(SlimStage, "_slim", watched)
    slim, record = run("residual", moves=moves, target=TargetConfig(macs=0.36), steps=2, between=BETWEEN)
    baseline = record["macs_before"]
    first, last = record["steps"]
    assert [(progress_made, is_last) for progress_made, is_last, *_ in made] == [(0.5, False), (1.0, True)]
    assert 0.36 * baseline < count_macs(made[0][3].module, nets.EXAMPLE) <= 0.6 * baseline
    assert first["prune"]["target"]["macs"] == pytest.approx(0.6)
    assert record["macs_after"] == count_macs(slim.module, nets.EXAMPLE) <= 0.36 * baseline
    assert first["training"]["steps"] == BETWEEN.steps
    assert last["training"] is None
    assert [trial["share"] for trial in first["trials"]] == [0.0], "ranks are chosen at the end"
    assert len(last["trials"]) == (4 if "ranks" in moves else 1)
    cut, trained = made[0][3], made[1][2]
    assert trained.recipe == cut.recipe
    assert not _same(trained, cut), "it was trained in between"
    assert slim.recipe.edits[: len(cut.recipe.edits)] == cut.recipe.edits
    _hold_replay(slim, "residual")


def test_more_steps_come_nearer_in_equal_ratios(run):
    slim, record = run("residual", target=TargetConfig(macs=0.343), steps=3, between=BETWEEN)
    asked = [step["prune"]["target"]["macs"] for step in record["steps"]]
    assert asked == pytest.approx([0.7, 0.49, 0.343])
    assert count_macs(slim.module, nets.EXAMPLE) <= 0.343 * record["macs_before"]
    assert [step["training"] is None for step in record["steps"]] == [False, False, True]


def _watch(monkeypatch, dies_in: str | None = None) -> list[str]:
    """Record what a run does step by step, and end it before one of them."""
    done: list[str] = []
    slim_once, train = SlimStage._slim, slim_module.train

    def at(what: str) -> None:
        if what == dies_in:
            raise Killed
        done.append(what)

    def slim_watched(stage, model, progress_made, is_last, ctx):
        at(f"slim {progress_made}")
        return slim_once(stage, model, progress_made, is_last, ctx)

    def train_watched(model, config, ctx, state_file, **options):
        at(f"train {state_file}")
        return train(model, config, ctx, state_file, **options)

    monkeypatch.setattr(SlimStage, "_slim", slim_watched)
    monkeypatch.setattr(slim_module, "train", train_watched)
    return done


ALL = ["slim 0.5", "train step1.pt", "slim 1.0"]


@pytest.mark.parametrize("moves", [("channels",), ("channels", "blocks", "ranks")], ids=len)
@pytest.mark.parametrize("dies_in", ALL)
def test_a_run_that_was_killed_does_nothing_twice_and_ends_like_an_undisturbed_one(run, monkeypatch, dies_in, moves):
    config = {"moves": moves, "target": TargetConfig(macs=0.36), "steps": 2, "between": BETWEEN}
    with monkeypatch.context() as patch:
        done = _watch(patch)
        expected, record = run("residual", folder="undisturbed", **config)
        assert done == ALL
    with monkeypatch.context() as patch:
        done = _watch(patch, dies_in)
        with pytest.raises(Killed):
            run("residual", **config)
        assert done == ALL[: ALL.index(dies_in)]
    with monkeypatch.context() as patch:
        done = _watch(patch)
        slim, again = run("residual", **config)
        assert done == ALL[ALL.index(dies_in) :]
    assert _same(slim, expected)
    for one in (record, again):
        for epoch in one["steps"][0]["training"]["epochs"]:
            del epoch["images_per_second"]
    assert again == record
    assert slim.baseline.metrics == expected.baseline.metrics
    _hold_replay(slim, "residual")


def test_a_kill_within_the_training_goes_on_after_the_last_epoch(run, monkeypatch):
    between = TrainingConfig(epochs=3, batch_size=16, learning_rate=0.01)
    config = {"target": TargetConfig(macs=0.36), "steps": 2, "between": between}
    expected, _ = run("chain", folder="undisturbed", **config)
    with pytest.raises(Killed):
        run("chain", progress=RecordingProgress("epoch 3 of 3"), **config)
    listener = RecordingProgress()
    done = _watch(monkeypatch)
    slim, record = run("chain", progress=listener, **config)
    assert done == ALL[1:]
    assert "Training goes on after epoch 2 of 3." in listener.notes
    assert [epoch["epoch"] for epoch in record["steps"][0]["training"]["epochs"]] == [1, 2, 3]
    assert _same(slim, expected)


@pytest.mark.parametrize("step", ["step1", "step1_trained"])
def test_a_kill_while_a_step_is_written_leaves_nothing_that_counts(run, tmp_path, monkeypatch, step):
    config = {"target": TargetConfig(macs=0.36), "steps": 2, "between": BETWEEN}
    expected, _ = run("chain", folder="undisturbed", **config)
    save = slim_module.save_torch_model

    def dies(model, folder):
        save(model, folder)
        if folder.name == f"{step}.part":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(slim_module, "save_torch_model", dies)
        with pytest.raises(Killed):
            run("chain", **config)
    assert not (tmp_path / "stage" / step).exists()
    assert (tmp_path / "stage" / f"{step}.part").is_dir()
    slim, _ = run("chain", **config)
    assert _same(slim, expected)
    assert list((tmp_path / "stage").glob("*.part")) == []


def test_distillation_between_steps_learns_from_the_baseline(run):
    plain, _ = run("residual", steps=2, between=BETWEEN)
    for number, features in enumerate((0.0, 1.0)):
        between = BETWEEN.model_copy(update={"distillation": DistillationConfig(features=features)})
        slim, _ = run("residual", folder=f"taught{number}", steps=2, between=between)
        assert not _same(slim, plain)
        plain = slim


@pytest.mark.parametrize("moves", MOVES, ids=lambda moves: "+".join(moves))
def test_a_target_out_of_reach_is_an_error(run, moves):
    with pytest.raises(BudgetUnreachable, match=r"Target 0\.000 of the baseline's macs"):
        run("residual", moves=moves, target=TargetConfig(macs=0.0001))
    with pytest.raises(BudgetUnreachable, match=r"of the baseline's macs cannot be reached"):
        run("residual", moves=moves, target=TargetConfig(macs=0.0001), steps=2, between=BETWEEN, folder="steps")


def test_ranks_may_meet_what_channels_alone_do_not(run):
    limits = {"target": TargetConfig(macs=0.6), "max_removed_ratio": 0.1}
    with pytest.raises(BudgetUnreachable, match=r"Target 0\.600 of the baseline's macs cannot be reached"):
        run("residual", **limits)
    slim, record = run("residual", moves=("channels", "ranks"), folder="ranks", **limits)
    trials = record["steps"][0]["trials"]
    assert trials[0]["loss"] is None
    assert trials[0]["reason"].startswith("Target 0.600 of the baseline's macs cannot be reached")
    assert any(isinstance(edit, Factorize) for edit in slim.recipe.edits)
    assert record["macs_after"] <= 0.6 * record["macs_before"]


def test_a_layer_that_a_criterion_cannot_score_is_named(run):
    with pytest.raises(UnsupportedLayer, match="'bn_scale' needs a batch norm with a scale, group 'fc1' has none"):
        run("linear_head", criterion="bn_scale")


def test_steps_that_are_met_already_are_passed_over(run, tmp_path, data):
    model = make_saved_model("residual", tmp_path / "baseline")
    config = PruneConfig(stage="prune", target=TargetConfig(macs=0.6), multiple_of=1)
    pruned, _ = PruneStage(config).run(model, StageContext(tmp_path, 0, data, RecordingProgress()))
    slim, record = run(pruned, target=TargetConfig(macs=0.5), steps=2, between=BETWEEN)
    assert count_macs(slim.module, nets.EXAMPLE) <= 0.5 * model.baseline.metrics.macs
    assert record["macs_before"] == count_macs(pruned.module, nets.EXAMPLE)


def test_widths_too_coarse_for_a_step_do_not_stop_the_next(run):
    config = {"target": TargetConfig(macs=0.4), "multiple_of": 8}
    run("chain", folder="at once", **config)
    slim, record = run("chain", steps=8, between=BETWEEN, **config)
    assert count_macs(slim.module, nets.EXAMPLE) <= 0.4 * record["macs_before"]


def test_each_step_measures_the_network_it_has(run, monkeypatch, tmp_path):
    """What was measured of the network before the first step says nothing of the one that was trained since."""
    networks, differing = [], []
    rises = Sensitivity.rises

    def watched(self, group, candidates, stats):
        found = rises(self, group, candidates, stats)
        fresh = tmp_path / f"{len(differing)}.json"
        saved = SavedRises(fresh, self.saved.key)
        anew = Sensitivity(self.module, self.losses_of, self.guess, self.reestimate, nets.EXAMPLE, saved, self.progress)
        differing.append(found != rises(anew, group, candidates, stats))
        networks.append(self.module)
        return found

    monkeypatch.setattr(Sensitivity, "rises", watched)
    run("residual", steps=2, between=BETWEEN, damage="sensitivity", target=TargetConfig(macs=0.5), multiple_of=4)
    assert len({id(network) for network in networks}) == 2
    assert not any(differing)


@pytest.fixture
def timed_by_macs(monkeypatch):
    """A machine without noise, on which few factorisations are timed: each costs an export."""
    profile_by_macs(monkeypatch)
    monkeypatch.setattr(rank_latency, "ERRORS", 2)


def _reference_ms(model: TorchModel) -> float:
    return steady._total_ms(model.baseline.onnx_path)


@pytest.mark.usefixtures("timed_by_macs")
@pytest.mark.parametrize("moves", [("channels",), ("channels", "blocks")], ids=len)
@pytest.mark.parametrize("unit", ["latency", "latency_ms"])
def test_latency_is_met_as_it_is_measured(run, tmp_path, moves, unit):
    model = make_saved_model("residual", tmp_path / "baseline")
    target = TargetConfig(**{unit: 0.6 * (_reference_ms(model) if unit == "latency_ms" else 1)})
    slim, record = run(model, deploy=DEPLOY, target=target, moves=moves, multiple_of=2, score_images=16)
    (step,) = record["steps"]
    assert step["prune"]["target"] == target.given()
    assert step["prune"]["latency"]["measured_ratio"] <= 0.6 * 1.03
    assert step["prune"]["latency"]["reference_ms"] == pytest.approx(_reference_ms(model))
    assert count_macs(slim.module, nets.EXAMPLE) == record["macs_after"] < record["macs_before"]
    _hold_replay(slim, "residual")


@pytest.mark.usefixtures("timed_by_macs")
def test_milliseconds_become_shares_for_channels_that_go_part_of_the_way_to_ranks(run, data, monkeypatch, tmp_path):
    model, asked, measured = make_saved_model("residual", tmp_path / "baseline"), [], []
    for stage in (PruneStage, LowRankStage):

        def watched(self, artifact, ctx, *networks, original=stage.run):
            slim, record = original(self, artifact, ctx, *networks)
            asked.append((type(self), self.config.target.given()))
            measured.append(record.latency.measured_ratio)
            return slim, record

        monkeypatch.setattr(stage, "run", watched)
    target = TargetConfig(latency_ms=0.6 * _reference_ms(model))
    moves = ("channels", "ranks")
    slim, record = run(model, deploy=DEPLOY, target=target, moves=moves, multiple_of=1, score_images=16)
    whole = (PruneStage, target.given()), (LowRankStage, target.given())
    assert asked == [
        whole[0],
        (PruneStage, {"latency": pytest.approx(0.6 ** (2 / 3), rel=1e-6)}),
        whole[1],
        (PruneStage, {"latency": pytest.approx(0.6 ** (1 / 3), rel=1e-6)}),
        whole[1],
        whole[1],
    ]
    for (_, wanted), ratio in zip(asked, measured, strict=True):
        assert ratio <= 1.03 * wanted.get("latency", 0.6)
    (step,) = record["steps"]
    losses = [trial["loss"] for trial in step["trials"]]
    assert evaluate_loss(slim.module, data.validation) == pytest.approx(min(losses), abs=1e-6)
    assert (step["low_rank"] or step["prune"])["latency"]["measured_ratio"] <= 0.6 * 1.03
    _hold_replay(slim, "residual")


@pytest.mark.usefixtures("timed_by_macs")
def test_milliseconds_that_channels_alone_do_not_meet_are_left_to_ranks_alone(run, tmp_path):
    model = make_saved_model("residual", tmp_path / "baseline")
    target = TargetConfig(latency_ms=0.7 * _reference_ms(model))
    limits = {"moves": ("channels", "ranks"), "multiple_of": 2, "score_images": 16, "max_removed_ratio": 0.1}
    slim, record = run(model, deploy=DEPLOY, target=target, **limits)
    losses = [trial["loss"] for trial in record["steps"][0]["trials"]]
    assert [loss is None for loss in losses] == [True, True, True, False]
    assert {type(edit) for edit in slim.recipe.edits} == {Factorize}
    reasons = [trial["reason"] for trial in record["steps"][0]["trials"]]
    assert reasons[1] == reasons[2] == "The baseline's milliseconds are not known: channels alone led nowhere."


@pytest.mark.usefixtures("timed_by_macs")
def test_two_steps_meet_a_share_of_the_latency(run):
    config = {"target": TargetConfig(latency=0.5), "steps": 2, "between": BETWEEN, "multiple_of": 2}
    _, record = run("residual", deploy=DEPLOY, score_images=16, **config)
    first, last = record["steps"]
    assert first["prune"]["latency"]["measured_ratio"] == pytest.approx(0.5**0.5, rel=0.03)
    assert last["prune"]["latency"]["measured_ratio"] <= 0.5 * 1.03


@pytest.mark.usefixtures("timed_by_macs")
def test_profile_times_the_network_and_chooses_nothing(data, tmp_path):
    model = make_saved_model("residual", tmp_path / "baseline")
    config = SlimConfig(stage="slim", target=TargetConfig(latency=0.5), multiple_of=4, steps=2, between=BETWEEN)
    ctx = StageContext(tmp_path, 0, data, RecordingProgress(), DEPLOY, tmp_path / "tables")
    table = SlimStage(config).profile(model, ctx)
    prune = PruneConfig(stage="prune", target=TargetConfig(latency=0.5), multiple_of=4, blocks="auto")
    assert table == PruneStage(prune).profile(model, replace(ctx, latency_tables=tmp_path / "other"))
    assert model.recipe.edits == ()
