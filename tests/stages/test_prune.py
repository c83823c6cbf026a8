"""The prune stage reaches its target or says why not, never removes in silence, and leaves its input alone."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nets
import pytest
import torch
from fixtures import RecordingProgress, make_model, make_splits
from pydantic import ValidationError
from torch import nn

import compress.search.evidence as evidence_module
import compress.search.repairs as repairing
from compress.checkpoint.rebuild import apply_edits
from compress.config.schema.prune import PruneConfig
from compress.config.schema.targets import TargetConfig
from compress.cost.macs import count_macs, count_params
from compress.data.batches import evaluation_batches
from compress.errors import BudgetUnreachable, ConfigValueError, UnsupportedLayer
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, Signature, TensorSpec, TorchModel
from compress.model.recipe import MergeBlock, Recipe, RemoveBlock, RemoveChannels
from compress.progress import SilentProgress
from compress.pruning.criteria.base import collect_gradients
from compress.pruning.ranking.elimination import reader_statistics, removal_order
from compress.pruning.ranking.sensitivity import Sensitivity
from compress.pruning.repair import block_reconstruction
from compress.pruning.repair.repairs import _batches
from compress.pruning.tracing.record import OUTPUTS
from compress.pruning.trial import find_cuttable
from compress.search.block_numbers import BlockNumberSearch
from compress.search.block_removal import shorten
from compress.search.context import StageContext
from compress.search.evidence import score_batch
from compress.search.parts import Parts
from compress.search.repairs import apply_repairs
from compress.stages.prune import PruneStage
from compress.training.evaluate import evaluate_loss

SIGNATURE = Signature((TensorSpec("images", ("batch", 3, 16, 16)),), (TensorSpec("logits", ("batch", 4)),))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("data"), calibration=48)


@pytest.fixture
def prune(data, tmp_path):
    """Run the stage on a tiny network, or on an artifact, and return the slim model, the record, what was said."""

    def call(network, **config):
        artifact = make_model(network, tmp_path) if isinstance(network, str) else network
        config.setdefault("target", TargetConfig(macs=0.5))
        config.setdefault("multiple_of", 1)
        listener = RecordingProgress()
        stage = PruneStage(PruneConfig(stage="prune", **config))
        slim, record = stage.run(artifact, StageContext(tmp_path, 0, data, listener))
        return slim, record, listener

    call.folder = tmp_path
    return call


def _hold_replay(slim: TorchModel, name: str) -> None:
    """The recipe gives the structure of the module."""
    replayed = apply_edits(nets.build(name, seed=3), slim.recipe, nets.EXAMPLE)
    replayed.load_state_dict(slim.module.state_dict(), strict=True)
    assert torch.equal(replayed(nets.images()), slim.module(nets.images()))


def test_weights_end_as_they_came_in_memory(prune):
    """The stage works in channels-last memory, where that is fastest; what it gives back others save and export."""
    for blocks in (0, 1):
        slim, _, _ = prune("residual", blocks=blocks)
        assert all(parameter.is_contiguous() for parameter in slim.module.parameters())


@pytest.mark.parametrize("name", nets.NAMES)
def test_target_is_met_on_every_tiny_network(prune, name):
    slim, record, _ = prune(name, target=TargetConfig(macs=0.5))
    before = count_macs(nets.build(name), nets.EXAMPLE)
    left = count_macs(slim.module, nets.EXAMPLE)
    assert left <= 0.5 * before
    assert record.macs_before == before
    assert record.macs_after == left
    assert record.params_after == count_params(slim.module)
    assert record.reached_ratio == left / before
    assert (record.shortfall is None) == (abs(left / before - 0.5) <= 0.0025)
    assert [entry for entry in record.groups if entry.width_after < entry.width_before]
    assert 0 <= record.validation_after <= 1
    _hold_replay(slim, name)


@pytest.mark.parametrize("name", nets.NAMES)
@pytest.mark.parametrize("criterion", ["reconstruction", "taylor"])
@pytest.mark.parametrize("damage", ["scores", "sensitivity"])
def test_target_is_met_whatever_says_which_channels_go_and_how_many(prune, name, criterion, damage):
    target = TargetConfig(macs=0.5)
    slim, record, _ = prune(name, target=target, criterion=criterion, damage=damage, score_images=32)
    assert record.criterion == criterion
    assert record.macs_after == count_macs(slim.module, nets.EXAMPLE) <= 0.5 * record.macs_before
    assert record.reached_ratio > 0.3
    damages = [entry.damage for entry in record.groups]
    assert all(math.isfinite(value) and value >= 0 for value in damages)
    for entry in record.groups:
        if entry.width_after == entry.width_before:
            assert entry.damage == 0
    again, _, _ = prune(name, target=target, criterion=criterion, damage=damage, score_images=32)
    assert again.recipe == slim.recipe
    _hold_replay(slim, name)


def _removed(slim: TorchModel) -> dict[str, tuple[int, ...]]:
    (edit,) = slim.recipe.edits
    assert isinstance(edit, RemoveChannels)
    return dict(edit.removed)


@pytest.mark.parametrize("name", ["chain", "residual", "concat", "linear_head"])
def test_reconstruction_takes_widths_from_scores_and_channels_from_their_readers(prune, data, name):
    by_score, first, _ = prune(name, criterion="taylor", score_images=32, residual="cut")
    by_refit, second, _ = prune(name, criterion="reconstruction", score_images=32, residual="cut")
    assert first.groups == second.groups, "the same widths at the same estimated damage"
    module = nets.build(name)
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    ((_, stats),) = reader_statistics(module, groups, data.calibration.first(32), SilentProgress())
    for group, channels in _removed(by_refit).items():
        order = removal_order(groups[group], stats, groups[group].width - 1)
        assert channels == tuple(sorted(order[: len(channels)].tolist()))
    assert _removed(by_score) != _removed(by_refit)


def test_layers_that_cannot_be_refitted_leave_the_channels_to_the_scores(prune):
    target = TargetConfig(macs=0.2)
    removed = [
        _removed(prune("grouped", criterion=criterion, target=target, score_images=32)[0])
        for criterion in ("taylor", "reconstruction")
    ]
    assert removed[0]["body.0.0"] == removed[1]["body.0.0"], "a grouped convolution reads it"
    assert removed[0] != removed[1]


def test_measured_damage_is_that_of_the_file_it_was_written_to(prune, tmp_path):
    _, record, _ = prune("residual", damage="sensitivity", score_images=32)
    measured = _measured(tmp_path / "sensitivity.json")
    narrowed = [entry for entry in record.groups if entry.width_after < entry.width_before]
    assert narrowed
    for entry in narrowed:
        known = {int(key.rpartition("/")[2]): mean for key, (mean, _) in measured.items() if f"/{entry.name}/" in key}
        wider = [mean for width, mean in known.items() if width >= entry.width_after]
        if entry.width_after in known:
            assert entry.damage == pytest.approx(max(0.0, *wider))
        else:
            assert entry.damage >= 2 * max(wider), "not measured, because a wider one was hopeless"


def _measured(path) -> dict:
    return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if "/" in key}


def test_a_killed_measurement_goes_on_and_gives_the_same_network(prune, monkeypatch, tmp_path):
    config = {"damage": "sensitivity", "score_images": 32}
    expected, _, _ = prune("chain", **config)
    saved = tmp_path / "sensitivity.json"
    whole = _measured(saved)
    saved.unlink()
    shutil.rmtree(tmp_path / "parts")
    calls: list[int] = []
    narrow = Sensitivity._narrowed

    def dies(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return narrow(self, *args)

    monkeypatch.setattr(Sensitivity, "_narrowed", dies)
    with pytest.raises(KeyboardInterrupt):
        prune("chain", **config)
    assert len(_measured(saved)) == 3
    slim, _, _ = prune("chain", **config)
    assert len(calls) == 4 + len(whole) - 3
    assert slim.recipe == expected.recipe


def test_each_number_of_blocks_has_damages_of_its_own(prune, tmp_path):
    target = TargetConfig(macs=0.3)
    _, record, _ = prune("residual", target=target, blocks="auto", damage="sensitivity", score_images=32)
    measured = _measured(tmp_path / "sensitivity.json")
    removed = {key.partition("/")[0] for key in measured}
    assert "" in removed
    assert len(removed) > 1
    assert all(set(key.split("+")) <= {"", "body.1", "body.2"} for key in removed)
    assert len(record.block_trials) >= len(removed)


def test_after_a_refit_reconstruction_is_no_worse_than_chance(prune, data):
    def loss(criterion: str, **config) -> float:
        repair = ("least_squares", "bias_folding", "batch_norm")
        slim, _, _ = prune("chain", criterion=criterion, repair=repair, target=TargetConfig(macs=0.5), **config)
        with torch.no_grad():
            return float((slim.module(images) - wanted).square().mean())

    images = torch.cat([images for images, _ in evaluation_batches(data.validation, 16)])
    with torch.no_grad():
        wanted = nets.build("chain")(images)
    assert loss("reconstruction") <= loss("random")


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "taylor", "random"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_every_criterion_and_allocation_meets_a_params_target(prune, criterion, allocation):
    slim, record, _ = prune("residual", target=TargetConfig(params=0.4), criterion=criterion, allocation=allocation)
    before = count_params(nets.build("residual"))
    assert 0.3 * before < count_params(slim.module) <= 0.4 * before
    assert record.target == {"params": 0.4}
    _hold_replay(slim, "residual")


def test_coarse_widths_are_a_stated_shortfall(prune):
    slim, record, said = prune("chain", target=TargetConfig(macs=0.6), multiple_of=8)
    assert all(entry.width_after % 8 == 0 or entry.width_before == 8 for entry in record.groups)
    text = rf"asked for 0\.6000 of the baseline's macs, reached {record.reached_ratio:.4f}: the widths"
    assert re.match(text, record.shortfall)
    assert any(record.shortfall in note for note in said.notes)
    assert count_macs(slim.module, nets.EXAMPLE) < 0.6 * record.macs_before


def test_limits_hold(prune):
    _, record, _ = prune("residual", target=TargetConfig(macs=0.45), max_removed_ratio=0.5, min_width=7)
    assert all(entry.width_after >= 8 for entry in record.groups)


def test_nothing_to_remove_is_an_error(prune, tmp_path):
    with pytest.raises(BudgetUnreachable, match=r"Target macs 1\.0 must remove something, .* already has 1\.000"):
        prune("chain", target=TargetConfig(macs=1.0))
    slim, _, _ = prune("chain", target=TargetConfig(macs=0.4))
    with pytest.raises(BudgetUnreachable, match=r"Target macs 0\.7 must remove something, .* already has 0\.(3|4)"):
        prune(slim, target=TargetConfig(macs=0.7))


def test_unreachable_target_names_the_best_and_what_limits_it(prune):
    with pytest.raises(BudgetUnreachable) as caught:
        prune("chain", target=TargetConfig(macs=0.05), max_removed_ratio=0.5, multiple_of=8)
    found = re.fullmatch(
        r"Target 0\.050 of the baseline's macs cannot be reached; the best is (0\.\d{3}) of the baseline's macs, "
        r"with 3 channel groups at the widths allowed \(max_removed_ratio 0\.5, min_width 1, multiple_of 8\)\.",
        caught.value.message,
    )
    assert found, caught.value.message
    best = float(found[1]) + 0.001
    _, record, _ = prune("chain", target=TargetConfig(macs=best), max_removed_ratio=0.5, multiple_of=8)
    assert record.reached_ratio == pytest.approx(best, abs=0.002)


def test_unreachable_target_counts_from_the_baseline_after_blocks_are_gone(prune):
    with pytest.raises(BudgetUnreachable, match=r"Target 0\.010 of the baseline's macs .* best is (0\.\d+)") as caught:
        prune("residual", target=TargetConfig(macs=0.01), blocks=1, max_removed_ratio=0.3)
    best = float(re.search(r"best is (0\.\d+)", caught.value.message)[1])
    _, record, _ = prune("residual", target=TargetConfig(macs=best + 0.001), blocks=1, max_removed_ratio=0.3)
    assert record.reached_ratio == pytest.approx(best, abs=0.001)


def test_excluded_layers_keep_their_width(prune):
    slim, record, _ = prune("residual", exclude=("body.1.conv1", "body.2.*1"))
    assert slim.module.body[1].conv1.out_channels == 16
    assert slim.module.body[2].conv1.out_channels == 16
    reasons = {entry.name: entry.reason for entry in record.excluded}
    assert reasons["body.1.conv1"] == reasons["body.2.conv1"] == "excluded by the pipeline file"
    assert [entry.name for entry in record.groups] == ["body.0.0"]


def test_a_pattern_excludes_the_whole_group_of_any_of_its_layers(prune):
    _, record, _ = prune("residual", exclude=("body.2.conv2",))
    assert "body.0.0" not in [entry.name for entry in record.groups]


def test_unknown_pattern_is_an_error_with_the_closest_layer(prune):
    with pytest.raises(ConfigValueError, match=r"'body\.1\.cnv1' names none\.\nHint: did you mean 'body\.1\.conv1'\?"):
        prune("residual", exclude=("body.1.cnv1",))


@pytest.mark.parametrize("criterion", ["taylor", "l1"])
def test_everything_excluded_cannot_reach_a_target(prune, criterion):
    with pytest.raises(BudgetUnreachable, match=r"No prunable channel group is left\.\nHint: Let exclude and "):
        prune("chain", exclude=("*",), criterion=criterion)


def test_group_that_cannot_be_scored_is_named(prune):
    match = r"'bn_scale' needs a batch norm with a scale, group 'fc1' has none\.\nHint: Exclude the group"
    with pytest.raises(UnsupportedLayer, match=match):
        prune("linear_head", criterion="bn_scale")
    _, record, _ = prune("linear_head", criterion="bn_scale", exclude=("fc1",), target=TargetConfig(macs=0.7))
    assert record.reached_ratio <= 0.7


@pytest.mark.parametrize("repair", [(), ("batch_norm",), ("least_squares",), ("bias_folding",)])
def test_blocks_are_removed_and_the_rest_is_cut(prune, repair):
    slim, record, said = prune("residual", target=TargetConfig(macs=0.3), blocks=1, repair=repair)
    (block,) = record.removed_blocks
    assert block in ("body.1", "body.2")
    assert isinstance(slim.module.get_submodule(block), nn.Identity)
    assert [type(edit) for edit in slim.recipe.edits] == [RemoveBlock, RemoveChannels]
    assert count_macs(slim.module, nets.EXAMPLE) <= 0.3 * record.macs_before
    assert any(note.startswith(f"block {block} removed (loss ") for note in said.notes)
    _hold_replay(slim, "residual")


@pytest.mark.parametrize(("losses", "tried"), [([3.0, 2.0], 1), ([3.0, 4.0, 5.0, 2.0], 3)])
def test_between_one_block_and_the_next_a_refit_that_helps_is_enough(data, tmp_path, monkeypatch, losses, tried):
    every = ("least_squares", "bias_folding", "batch_norm")
    network = nets.build("residual")
    figures = ModelMetrics(count_macs(network, nets.EXAMPLE), count_params(network), 0, {}, {})
    baseline = Baseline(figures, tmp_path, tmp_path)
    model = TorchModel(network, FactorySpec("factory", "nets:build"), Recipe(), SIGNATURE, None, (), baseline)
    networks = shorten(model, 16, every, StageContext(tmp_path, 0, data, RecordingProgress()))
    assert next(networks).repairs == ()
    told = iter(losses)
    monkeypatch.setattr(repairing, "image_losses", lambda *_, **__: torch.full((16,), next(told)))
    assert [one.repair for one in next(networks).repairs] == list(every[:tried])


@pytest.mark.parametrize("repair", [("batch_norm",), ("least_squares", "batch_norm")])
def test_removing_blocks_alone_is_enough_and_statistics_are_measured_again(prune, repair):
    slim, record, _ = prune("residual", target=TargetConfig(macs=0.9), blocks=2, repair=repair)
    assert sorted(record.removed_blocks) == ["body.1", "body.2"]
    assert [type(edit) for edit in slim.recipe.edits] == [RemoveBlock, RemoveBlock]
    before = nets.build("residual").body[0][1].running_mean
    kept = {one.repair for one in record.repairs if one.is_kept}  # of the last block
    assert kept or len(record.repairs) == len(repair)
    if "batch_norm" in kept:  # the others change no running mean of the first norm
        assert not torch.equal(slim.module.body[0][1].running_mean, before)
    _hold_replay(slim, "residual")


@pytest.mark.parametrize("target", [0.3, 0.55])
def test_the_number_of_blocks_with_the_least_validation_loss_is_chosen(prune, data, target):
    options = {"target": TargetConfig(macs=target), "criterion": "l1", "residual": "cut"}
    slim, record, said = prune("residual", blocks="auto", **options)
    trials = record.block_trials
    assert [trial.blocks for trial in trials] == list(range(len(trials)))
    assert len(trials) > 1
    least = min(trials, key=lambda trial: trial.loss if trial.loss is not None else float("inf"))
    assert len(record.removed_blocks) == least.blocks
    assert evaluate_loss(slim.module, data.validation) == pytest.approx(least.loss, abs=1e-6)
    assert count_macs(slim.module, nets.EXAMPLE) == record.macs_after <= target * record.macs_before
    for trial in trials:
        same, again, _ = prune("residual", blocks=trial.blocks, **options)
        assert evaluate_loss(same.module, data.validation) == pytest.approx(trial.loss, abs=1e-5)
        assert again.block_trials == ()
    assert sum("blocks removed: validation loss" in note for note in said.notes) == len(trials)
    _hold_replay(slim, "residual")


def test_channels_along_shortcuts_are_cut_as_far_as_the_validation_loss_likes(prune, data):
    target = TargetConfig(macs=0.3)
    slim, record, said = prune("residual", target=target, criterion="l1")
    trials = record.residual_trials
    assert trials[0].factor == 1e4
    assert len(trials) > 1, "a network of which so much must go has other choices"
    loss = evaluate_loss(slim.module, data.validation)
    assert loss == pytest.approx(min(trial.loss for trial in trials), abs=1e-6)
    assert sum("damage along shortcuts" in note for note in said.notes) == len(trials) - 1
    cut, plain, _ = prune("residual", target=target, criterion="l1", residual="cut")
    assert plain.residual_trials == ()
    by_factor = {trial.factor: trial.loss for trial in trials}
    if 1.0 in by_factor:
        assert evaluate_loss(cut.module, data.validation) == pytest.approx(by_factor[1.0], abs=1e-6)
    _hold_replay(slim, "residual")


def test_a_cut_that_was_tried_already_is_not_repaired_again(prune):
    _, record, said = prune("residual", criterion="l1", repair=("least_squares",), residual_factors=(1.0, 1.0, 1.0))
    assert len(record.residual_trials) == 1
    assert sum(note.startswith("least_squares") for note in said.notes) == 1


def test_channels_along_shortcuts_can_be_kept(prune):
    slim, record, _ = prune("residual", criterion="l1", residual="keep")
    assert set(_removed(slim)) <= {"body.1.conv1", "body.2.conv1"}
    assert "body.0.0" in {item.name for item in record.excluded}
    assert record.residual_trials == ()


def test_a_network_without_shortcuts_has_nothing_to_try(prune):
    assert prune("chain", criterion="l1")[1].residual_trials == ()


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        ({6: 0.2, 9: 0.3, 5: 0.25, 7: 0.1, 8: 0.05}, [0, 3, 6, 9, 12, 5, 7, 8]),  # 8 has no untried neighbour
        ({6: 0.2, 5: 0.1, 4: 0.05}, [0, 3, 6, 9, 12, 5, 4]),
        ({6: 0.2}, [0, 3, 6, 9, 12, 5, 7]),
        ({0: 0.1, 1: 0.05, 2: 0.2}, [0, 3, 6, 1, 2]),
        ({9: math.nan, 6: 0.2, 7: math.nan}, [0, 3, 6, 9, 12, 5, 7]),
    ],
)
def test_of_many_blocks_the_numbers_around_the_best_are_tried_too(tmp_path, losses, tried):
    class Counting:
        """A pruner whose networks are numbers of removed blocks."""

        config = PruneConfig(stage="prune", target=TargetConfig(macs=0.5), blocks="auto")
        ctx = SimpleNamespace(progress=RecordingProgress(), parts=Parts(tmp_path, RecordingProgress()))

        def identify(self, shortened, _surveyed):
            return str(len(shortened.removed))

        def prepare(self, shortened, _latency):
            surveyed = SimpleNamespace(targets=SimpleNamespace(latency=None))
            return SimpleNamespace(surveyed=surveyed, count=len(shortened.removed))

        def attempt(self, prepared):
            return SimpleNamespace(count=prepared.count, selection=SimpleNamespace(removed={"conv": (0,)}))

        def loss(self, attempt):
            return losses.get(attempt.count, 0.5 + attempt.count / 100)

    numbers = BlockNumberSearch(Counting())
    best = numbers.run(SimpleNamespace(removed=("block",) * count, blocks=27) for count in range(28))
    assert [trial.blocks for trial in numbers.records] == tried
    assert best.count == min(losses, key=lambda count: (math.isnan(losses[count]), losses[count]))


def test_a_loss_that_is_no_number_is_never_kept(data, tmp_path):
    network = nets.build("chain")
    ctx = StageContext(tmp_path, 0, data, RecordingProgress())
    before = copy.deepcopy(network.state_dict())

    def corrupt(module: nn.Module) -> tuple[str]:
        with torch.no_grad():
            next(module.parameters()).fill_(float("nan"))
        return ("weight",)

    (record,) = apply_repairs(network, [("corrupt", corrupt)], ctx)
    assert not record.is_kept
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert apply_repairs(network, [("nothing", lambda module: ())], ctx) == []


def test_blocks_make_targets_reachable_that_channels_alone_do_not_meet(prune):
    limits = {"max_removed_ratio": 0.1, "criterion": "l1"}
    with pytest.raises(BudgetUnreachable):
        prune("residual", target=TargetConfig(macs=0.6), **limits)
    _, record, _ = prune("residual", target=TargetConfig(macs=0.6), blocks="auto", **limits)
    assert record.removed_blocks
    first = record.block_trials[0]
    assert first.loss is None
    assert first.reason.startswith("Target 0.600 of the baseline's macs cannot be reached")
    with pytest.raises(BudgetUnreachable, match=r"Target 0\.010 of the baseline's macs"):
        prune("residual", target=TargetConfig(macs=0.01), blocks="auto", **limits)
    with pytest.raises(BudgetUnreachable, match=r"the network already has 1\.000(.|\n)*Hint: Lower the target"):
        prune("residual", target=TargetConfig(macs=1.0), blocks="auto", **limits)


@pytest.mark.parametrize(("name", "blocks", "there"), [("residual", 3, 2), ("chain", 1, 0)])
def test_too_many_blocks_are_an_error_before_any_goes(prune, name, blocks, there, monkeypatch):
    monkeypatch.setattr(
        "compress.search.block_removal.block_damage", lambda *_args: pytest.fail("blocks were compared")
    )
    match = rf"blocks must not be more than the residual blocks that can be removed \({there}\), got {blocks}\."
    with pytest.raises(ConfigValueError, match=match):
        prune(name, blocks=blocks)


@pytest.mark.parametrize("name", nets.NAMES)
@pytest.mark.parametrize("repair", [(), ("batch_norm",), ("least_squares",), ("bias_folding",)])
def test_repairs_keep_the_structure_and_give_finite_weights(prune, name, repair):
    slim, record, _ = prune(name, repair=repair, criterion="l1")
    assert record.reached_ratio <= 0.5
    assert all(value.isfinite().all() for value in slim.module.state_dict().values())
    assert not any(part.training for part in slim.module.modules())
    _hold_replay(slim, name)


def test_repairs_are_rolled_back_only_where_they_raise_the_validation_loss(prune, data):
    outcomes = set()
    for name in nets.NAMES:
        slim, record, said = prune(name, criterion="l1", residual="cut")
        tried = record.repairs
        assert {entry.repair for entry in tried} <= {"least_squares", "bias_folding", "batch_norm"}
        assert len(tried) >= 2
        loss = evaluate_loss(prune(name, criterion="l1", residual="cut", repair=())[0].module, data.validation)
        for entry in tried:
            assert entry.loss_before == pytest.approx(loss, abs=1e-6)
            assert entry.is_kept or entry.loss_after >= entry.loss_before
            loss = entry.loss_after if entry.is_kept else loss
            outcomes.add((entry.repair, entry.is_kept))
        assert evaluate_loss(slim.module, data.validation) == pytest.approx(loss, abs=1e-6)
        assert sum("rolled back" in note for note in said.notes) == sum(not entry.is_kept for entry in tried)
    assert {("least_squares", True), ("batch_norm", True)} <= outcomes, "repairs should be seen to be kept"


def test_a_repair_inside_the_noise_is_kept_and_more_are_tried(data, tmp_path, monkeypatch):
    """Losses of the validation images: lower, higher by noise, higher for each image, the same."""
    noise = torch.tensor([0.5, -0.4] * 16)
    told = iter([torch.full((32,), 1.0), torch.full((32,), 0.9), 0.9 + noise, 0.91 + noise, 0.91 + noise])
    monkeypatch.setattr(repairing, "image_losses", lambda *_, **__: next(told))
    ctx = StageContext(tmp_path, 0, data, RecordingProgress())
    repairs = [(name, lambda module: ("changed",)) for name in ("first", "second", "third")]
    records = apply_repairs(nets.build("chain"), repairs, ctx, enough=("second",))
    assert [one.is_kept for one in records] == [True, True, False]
    assert [one.loss_after for one in records] == [pytest.approx(value) for value in (0.9, 0.95, 0.96)]
    assert records[2].loss_before == pytest.approx(0.95)


def test_input_is_left_untouched(prune, tmp_path):
    artifact = make_model("residual", tmp_path, nets.build("residual"))
    artifact.module.head.weight.requires_grad_(False)
    state = copy.deepcopy(artifact.module.state_dict())
    slim, _, _ = prune(artifact, blocks=1, target=TargetConfig(macs=0.3), repair=("least_squares",))
    assert all(torch.equal(value, state[name]) for name, value in artifact.module.state_dict().items())
    assert list(artifact.module.state_dict()) == list(state)
    assert artifact.recipe == Recipe()
    assert not any(part.training or part._forward_hooks for part in artifact.module.modules())
    assert all(parameter.grad is None for parameter in artifact.module.parameters())
    assert not slim.module.head.weight.requires_grad
    assert not {p.data_ptr() for p in slim.module.parameters()} & {p.data_ptr() for p in artifact.module.parameters()}


def test_same_seed_gives_the_same_network_and_a_second_stage_goes_on(prune):
    first, _, _ = prune("residual", target=TargetConfig(macs=0.6))
    again, _, _ = prune("residual", target=TargetConfig(macs=0.6))
    assert first.recipe == again.recipe
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), again.module.parameters(), strict=True))
    second, record, _ = prune(first, target=TargetConfig(macs=0.3))
    assert len(second.recipe.edits) == 2
    assert record.macs_before == count_macs(first.module, nets.EXAMPLE)
    assert record.reached_ratio <= 0.3
    _hold_replay(second, "residual")


class _ZeroPadded(nn.Module):
    """One group that cannot be cut, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 1, 1), nn.Conv2d(12, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.outer(torch.relu(self.inner(x)))
        return self.head((y + nn.functional.pad(x, (0, 0, 0, 0, 4, 4))).mean((2, 3)))


def test_groups_that_cannot_be_cut_are_a_named_warning(prune, tmp_path):
    torch.manual_seed(0)
    _, record, said = prune(make_model("chain", tmp_path, _ZeroPadded().eval()), target=TargetConfig(macs=0.8))
    whole = {entry.name for entry in record.excluded} - {"head"}
    assert whole
    assert "inner" not in whole
    for name in whole:
        assert any(f"'{name}'" in text and "not prunable: " in text for text in said.warnings)
    assert len(said.warnings) == len({entry.reason for entry in record.excluded} - {OUTPUTS})


@pytest.mark.parametrize(("side", "images"), [(32, 64), (64, 64), (128, 16), (224, 8), (1024, 8)])
def test_few_large_images_are_scored_at_once_and_many_small_ones(tmp_path, side, images):
    model = make_model("chain", tmp_path, nets.build("chain"))
    signature = Signature((TensorSpec("images", ("batch", 3, side, side)),), SIGNATURE.outputs)
    assert score_batch(replace(model, signature=signature), 8) == images
    assert score_batch(replace(model, signature=signature), 7) % 7 == 0


def test_settings_that_steer_scores_and_repairs_reach_them(prune, monkeypatch):
    asked = []

    def remembered(module, groups, batches, each, losses):
        asked.append(each)
        return collect_gradients(module, groups, batches, each, losses)

    monkeypatch.setattr(evidence_module, "collect_gradients", remembered)
    passes = []
    monkeypatch.setattr(
        "compress.pruning.repair.repairs._batches", lambda one: passes.append(one.most_images) or _batches(one)
    )
    _, record, _ = prune(
        "residual", criterion="taylor", images_per_gradient=4, refit_images=12, residual_factors=(3.0, 2.0),
        target=TargetConfig(macs=0.3), blocks=1,
    )  # fmt: skip
    assert set(asked) == {4}
    assert set(passes) == {12}
    assert record.residual_trials[0].factor == 3.0


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        ({"criterion": "taylor", "repair": ("scaling", "batch_norm")}, ["repair: scaling was left out"]),
        ({"criterion": "greedy", "repair": ("scaling", "batch_norm")}, []),
        ({"criterion": "taylor"}, []),
        ({"score_images": 4096}, ["score_images: 4096 asked for, the calibration split has "]),
    ],
)
def test_settings_without_effect_are_noted(prune, settings, notes):
    _, _, listener = prune("chain", **settings)
    found = [note for note in listener.notes if note.startswith(("repair:", "score_images:", "refit_images:"))]
    assert [note.startswith(wanted) for note, wanted in zip(found, notes, strict=True)] == [True] * len(notes)


@pytest.mark.parametrize("damage", ["scores", "sensitivity"])
def test_measured_damages_are_recorded_with_their_errors(prune, damage):
    _, record, _ = prune("residual", damage=damage, score_images=16)
    assert record.damage == damage
    cut = [group for group in record.groups if group.width_after < group.width_before]
    assert cut
    for group in cut:
        assert (group.damage_error is None) == (damage == "scores")
    if damage == "sensitivity":
        assert any(group.damage_error > 0 for group in cut)


def test_channels_at_random_have_the_widths_of_the_criterion(prune):
    chosen, record, _ = prune("chain", score_images=32)
    at_random, other, _ = prune("chain", score_images=32, order="random")
    widths = [[(entry.name, entry.width_after) for entry in one.groups] for one in (record, other)]
    assert widths[0] == widths[1]
    assert _removed(chosen) != _removed(at_random)
    again, _, _ = prune("chain", score_images=32, order="random")
    assert again.recipe == at_random.recipe


def test_blocks_are_trained_after_the_other_repairs(prune):
    _, without, _ = prune("residual", repair=["least_squares", "batch_norm"])
    slim, record, _ = prune(
        "residual",
        repair=["least_squares", "batch_norm", "blocks"],
        block_repair={"images": 48, "steps": 40, "batch_size": 8},
    )
    *others, last = record.repairs
    assert others == [*without.repairs]
    assert last.repair == "blocks"
    assert {block.name for block in last.blocks} >= {"body.1", "body.2"}
    assert any(block.is_kept for block in last.blocks)
    assert all(block.error_after <= block.error_before for block in last.blocks)
    assert all(parameter.is_contiguous() for parameter in slim.module.parameters())
    _hold_replay(slim, "residual")


def test_a_killed_block_repair_goes_on_with_the_next_block(prune, monkeypatch):
    settings = {
        "repair": ["least_squares", "blocks"], "block_repair": {"images": 32, "steps": 10, "batch_size": 8}
    }  # fmt: skip
    whole, record, _ = prune("residual", **settings)
    trained = []
    train = block_reconstruction._train

    def fail_at_second(block, given):
        if trained:
            raise KeyboardInterrupt
        trained.append(block.name)
        return train(block, given)

    for parts in Path(prune.folder).glob("parts/*"):
        parts.unlink()
    monkeypatch.setattr(block_reconstruction, "_train", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        prune("residual", **settings)
    again = []
    monkeypatch.setattr(
        block_reconstruction, "_train", lambda block, given: again.append(block.name) or train(block, given)
    )
    resumed, resumed_record, _ = prune("residual", **settings)
    assert trained[0] not in again
    assert resumed_record.repairs == record.repairs
    state = resumed.module.state_dict()
    assert all(torch.equal(values, state[key]) for key, values in whole.module.state_dict().items())


def test_settings_of_blocks_without_the_repair_are_refused():
    with pytest.raises(ValidationError, match="block_repair must be left out unless repair holds blocks"):
        PruneConfig(stage="prune", target=TargetConfig(macs=0.5), block_repair={"steps": 3})


def test_blocks_alone_stands_for_all_repairs():
    config = PruneConfig(stage="prune", target=TargetConfig(macs=0.5), repair="blocks")
    assert config.repair == ("scaling", "least_squares", "bias_folding", "batch_norm", "blocks")
    assert PruneConfig(stage="prune", target=TargetConfig(macs=0.5), repair=["blocks"]).repair == ("blocks",)


@pytest.mark.parametrize("blocks", [1, 2, "auto"])
def test_blocks_are_merged_within_the_budget(prune, blocks):
    slim, record, listener = prune("residual", merge=True, blocks=blocks, target=TargetConfig(macs=0.45))
    assert record.macs_after == count_macs(slim.module, nets.EXAMPLE) <= 0.45 * record.macs_before
    taken = [*record.removed_blocks, *record.merged_blocks]
    if blocks != "auto":
        assert len(taken) == blocks
    edits = [edit for edit in slim.recipe.edits if isinstance(edit, RemoveBlock | MergeBlock)]
    assert sorted(edit.block for edit in edits) == sorted(taken)
    assert [edit.block for edit in edits if isinstance(edit, MergeBlock)] == [*record.merged_blocks]
    assert any("merged into one convolution" in text or "removed (loss" in text for text in listener.notes)
    _hold_replay(slim, "residual")


@pytest.mark.parametrize("name", ["chain", "depthwise"])
def test_blocks_that_cannot_be_removed_are_merged(prune, name):
    slim, record, _ = prune(name, merge=True, blocks=1, target=TargetConfig(macs=0.4), residual="cut")
    assert len(record.merged_blocks) == 1
    assert record.removed_blocks == ()
    _hold_replay(slim, name)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"merge": True}, "blocks must be auto or a number of blocks where merge is true, got 0"),
        ({"merge": True, "blocks": "joint"}, "where merge is true, got joint"),
    ],
)
def test_merge_without_a_number_of_blocks_is_refused(settings, match):
    with pytest.raises(ValidationError, match=match):
        PruneConfig(stage="prune", target=TargetConfig(macs=0.5), **settings)
