"""Every criterion meets a budget in MACs and one in milliseconds; orders, errors and factors reach the cut network."""

import copy
from contextlib import ExitStack
from dataclasses import replace

import nets
import numpy as np
import pytest
import torch
from fixtures import RecordingProgress, make_saved_model, make_splits
from steady import profile_by_macs
from torch import nn

from compress.catalog import CRITERIA, WITH_ERRORS, WITHOUT_ERRORS
from compress.config.schema.data import DataConfig, PreprocessingConfig, UnlabelledSource
from compress.config.schema.prune import PruneConfig
from compress.config.schema.targets import TargetConfig
from compress.config.schema.verify import DeployConfig
from compress.cost.macs import count_macs
from compress.data.batches import evaluation_batches
from compress.data.from_config import Splits
from compress.errors import ConfigValueError, DataError
from compress.model.artifacts import TorchModel
from compress.model.stage_records import Repair
from compress.pruning.criteria.greedy_loss import GreedyLoss
from compress.pruning.criteria.magnitude import L1
from compress.pruning.trial import find_cuttable
from compress.search.block_removal import Shortened
from compress.search.channel_orders import ChannelOrders
from compress.search.context import StageContext
from compress.search.evidence import EvidenceCollector
from compress.search.pruner import Pruner
from compress.search.repairs import loss_after
from compress.search.scaling import scaled_reads
from compress.search.scoring import Scoring
from compress.search.survey import survey
from compress.search.teacher import LoadedTeacher
from compress.stages.prune import PruneStage
from compress.training.evaluate import evaluate_loss

BUILT_IN = list(CRITERIA)
LABEL_FREE = ("greedy", "greedy_refit", "lasso", "pfp", "sipp")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("data"))


@pytest.fixture
def ctx(data, tmp_path):
    return StageContext(tmp_path, 0, data, RecordingProgress(), DeployConfig(batch_size=64), tmp_path / "tables")


def _config(**values) -> PruneConfig:
    return PruneConfig(stage="prune", **{"target": TargetConfig(macs=0.5), "multiple_of": 1} | values)


@pytest.mark.parametrize("criterion", BUILT_IN)
def test_a_budget_in_macs_is_met(criterion, ctx, tmp_path) -> None:
    model = make_saved_model("residual", tmp_path)
    slim, record = PruneStage(_config(criterion=criterion, score_images=16)).run(model, ctx)
    assert count_macs(slim.module, nets.EXAMPLE) <= 0.5 * count_macs(model.module, nets.EXAMPLE)
    assert record.criterion == criterion
    by_errors = criterion in ("greedy", "greedy_refit", "lasso", "greedy_loss")
    assert record.damage == ("errors" if by_errors else "scores")
    assert any(group.width_after < group.width_before for group in record.groups)


@pytest.mark.parametrize("criterion", BUILT_IN)
def test_a_budget_in_milliseconds_is_met(criterion, ctx, tmp_path, monkeypatch) -> None:
    profile_by_macs(monkeypatch)
    config = _config(criterion=criterion, score_images=16, target=TargetConfig(latency=0.7), multiple_of=2)
    _, record = PruneStage(config).run(make_saved_model("chain", tmp_path), ctx)
    assert record.reached["latency"] <= 0.7 * 1.03
    assert record.latency is not None


@pytest.mark.parametrize("criterion", LABEL_FREE)
def test_labels_are_not_looked_at(criterion, data, ctx, tmp_path, monkeypatch) -> None:
    """Ranks and damages stay as they are where the gradients of the loss cannot be had."""
    monkeypatch.setattr("compress.search.evidence.collect_gradients", lambda *_args: pytest.fail("labels were used"))
    found = _candidates(_config(criterion=criterion, score_images=16), make_saved_model("residual", tmp_path), ctx)
    assert all(float(one.damages[0]) > 0 for one in found)


def _candidates(config: PruneConfig, model: TorchModel, ctx: StageContext):
    surveyed = survey(model, config, None, ctx)
    return Scoring(Shortened(model, (), (), model.module, 0), surveyed, "key", ctx).candidates()


def test_groups_that_cannot_be_ranked_are_scored_on_the_scale_of_errors(ctx, tmp_path) -> None:
    """A grouped convolution reads the first group of this network: its readers cannot be refitted."""
    model = make_saved_model("grouped", tmp_path)
    found = {one.name: one for one in _candidates(_config(criterion="greedy", score_images=16), model, ctx)}
    unranked = [name for name, one in found.items() if one.order is None]
    assert unranked
    assert len(unranked) < len(found)
    scored = {one.name: one for one in _candidates(_config(criterion="taylor", score_images=16), model, ctx)}
    ratios = [found[name].damages[0] / scored[name].damages[0] for name in found if name not in unranked]
    for name in unranked:
        assert found[name].damages == pytest.approx(scored[name].damages * np.median(ratios))
    assert any("ranked by scores" in note for note in ctx.progress.notes)


@pytest.mark.parametrize("criterion", ["greedy", "greedy_loss", "lasso", "pfp", "reconstruction"])
def test_an_interrupted_run_finds_what_it_had(criterion, ctx, tmp_path, monkeypatch) -> None:
    model, config = (
        make_saved_model("residual", tmp_path),
        _config(criterion=criterion, score_images=16),
    )
    first = _candidates(config, model, ctx)
    for name in ("collect_gradients", "collect_contributions"):
        monkeypatch.setattr(f"compress.search.evidence.{name}", lambda *_args: pytest.fail("made twice"))
    monkeypatch.setattr(GreedyLoss, "rank_by_loss", lambda *_args: pytest.fail("made twice"))
    again = _candidates(config, model, replace(ctx))
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.damages, other.damages)
        for kind in ("order", "scales"):
            assert (getattr(one, kind) is None) == (getattr(other, kind) is None)
            assert getattr(one, kind) is None or np.array_equal(getattr(one, kind), getattr(other, kind))


def test_scores_and_reader_statistics_take_one_pass(ctx, tmp_path, monkeypatch) -> None:
    """The loop that computes gradients collects statistics along the way; orders and scores are those of two loops."""
    model = make_saved_model("residual", tmp_path)
    config = _config(criterion="reconstruction", score_images=16)
    found = _candidates(config, model, replace(ctx, folder=tmp_path / "one"))
    assert "score channels" in ctx.progress.tasks
    assert "what layers read" not in ctx.progress.tasks
    assert not any(part._forward_hooks for part in model.module.modules())
    monkeypatch.setattr(ChannelOrders, "shared_pass", lambda *_args: None)
    wanted = _candidates(config, model, replace(ctx, folder=tmp_path / "two"))
    assert "what layers read" in ctx.progress.tasks
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one.order, other.order)
        assert np.array_equal(one.scores, other.scores)


@pytest.mark.parametrize(
    ("criterion", "settings"),
    [("taylor", {}), ("l1", {}), ("greedy", {}), ("taylor", {"damage": "sensitivity", "repair": ()})],
)
def test_no_statistics_are_collected_for_nothing(criterion, settings, ctx, tmp_path) -> None:
    model = make_saved_model("residual", tmp_path)
    config = _config(criterion=criterion, score_images=16, **settings)
    surveyed = survey(model, config, None, ctx)
    scoring = Scoring(Shortened(model, (), [], model.module, 0), surveyed, "key", ctx)
    if criterion == "greedy":  # its order needs readers, and no scores: an own pass
        scoring.candidates()
        assert "what layers read" in ctx.progress.tasks
        assert "score channels" not in ctx.progress.tasks
    assert scoring.orders.shared_pass(scoring.criterion) is None


def test_statistics_of_a_network_with_new_norms_take_their_own_pass(ctx, tmp_path) -> None:
    """Gradients are those of a copy with measured statistics then, and readers are those of the network itself."""
    model = make_saved_model("residual", tmp_path)
    for part in model.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    _candidates(_config(criterion="reconstruction", score_images=16), model, ctx)
    assert {"score channels", "what layers read"} <= set(ctx.progress.tasks)


@pytest.mark.parametrize(
    ("records", "loss"),
    [([(3.0, 2.0, True)], 2.0), ([(3.0, 4.0, False)], 3.0), ([(3.0, 2.0, True), (2.0, 5.0, False)], 2.0)],
)
def test_the_loss_behind_repairs_is_that_of_the_last_one_kept(records, loss) -> None:
    repairs = [Repair(repair="", loss_before=was, loss_after=now, is_kept=kept) for was, now, kept in records]
    assert loss_after(repairs) == loss


def test_the_loss_of_an_attempt_is_the_one_that_its_repairs_measured(ctx, tmp_path) -> None:
    model = make_saved_model("residual", tmp_path)
    pruner = Pruner(_config(criterion="reconstruction", score_images=16), ctx)
    attempt = pruner.attempt(pruner.prepare(Shortened(model, (), [], model.module, 0)))
    assert attempt.repairs
    assert pruner.loss(attempt) == evaluate_loss(attempt.model.module, ctx.data.validation)


def test_factors_of_the_ranking_are_multiplied_into_the_readers(ctx, tmp_path, monkeypatch) -> None:
    """The cut network with factors equals the whole one whose reads are multiplied by them, 0 for what goes."""
    model = make_saved_model("concat", tmp_path)
    config = _config(criterion="greedy", score_images=16, repair=("scaling",), residual="cut")
    monkeypatch.setattr("compress.search.repairs.is_loss_higher", lambda *_args: False)  # kept, whatever it does
    monkeypatch.setattr("compress.search.repairs.fold_means", lambda *_args: ())
    slim, record = PruneStage(config).run(model, ctx)
    assert [one.repair for one in record.repairs] == ["scaling"]
    assert record.repairs[0].is_kept
    groups, _ = find_cuttable(model.module, nets.EXAMPLE)
    whole = copy.deepcopy(model.module)
    ranked = {one.name: one for one in _candidates(config, model, ctx)}
    widths = {one.name: one.width_after for one in record.groups}
    images = nets.images(4)
    groups_of_copy, _ = find_cuttable(whole, nets.EXAMPLE)
    with ExitStack() as stack, torch.no_grad():
        for name, one in ranked.items():
            scales = one.unit_scales(widths[name])
            assert scales is not None
            factors = torch.from_numpy(scales).repeat(groups[name].parts)
            stack.enter_context(scaled_reads(whole, groups_of_copy[name], factors))
        wanted = whole(images)
        assert float((slim.module(images) - wanted).abs().max()) <= 1e-4
    assert any(not np.allclose(ranked[name].unit_scales(width), 1) for name, width in widths.items())


def test_means_are_folded_with_the_factors(ctx, tmp_path, monkeypatch) -> None:
    """After the repair the mean of what a reader gives is that of the whole network."""
    model = make_saved_model("chain", tmp_path)
    config = _config(criterion="greedy", score_images=16, repair=("scaling",))
    monkeypatch.setattr("compress.search.repairs.is_loss_higher", lambda *_args: False)
    slim, _ = PruneStage(config).run(model, ctx)
    images = torch.cat([batch for batch, _ in evaluation_batches(ctx.data.calibration, 8, "nothing")])
    with torch.no_grad():
        assert torch.allclose(slim.module(images).mean(0), model.module(images).mean(0), atol=1e-4)


def test_scaled_reads_leave_the_network_as_it_was() -> None:
    module = nets.build("linear_head") if "linear_head" in nets.NAMES else nets.build("chain")
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    before, images = copy.deepcopy(module.state_dict()), nets.images(2)
    whole = module(images)
    for group in groups.values():
        with scaled_reads(module, group, torch.zeros(group.width)):
            assert not torch.allclose(module(images), whole)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_greedy_loss_by_brute_force_on_a_small_group(data, tmp_path) -> None:
    """With subsets of all candidates each step adds the channel with which the loss is least."""
    module = nets.build("chain")
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    group, split = groups["body.0.0"], data.calibration.first(16)

    def loss_of(factors: torch.Tensor) -> float:
        with scaled_reads(module, group, factors):
            return evaluate_loss(module, split)

    criterion = GreedyLoss(seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pruning.criteria.greedy_loss._MISSED", 1e-9)
        ranking = criterion.rank_by_loss(group, loss_of, 7)
    kept: list[int] = []
    for _ in range(7):
        losses = {}
        for unit in set(range(8)) - set(kept):
            mask = torch.zeros(8)
            mask[[*kept, unit]] = 8 / (len(kept) + 1)
            losses[unit] = loss_of(mask)
        kept.append(min(losses, key=lambda unit: losses[unit]))
        removed = 8 - len(kept)
        rise = losses[kept[-1]] - loss_of(torch.ones(8))
        assert ranking.errors[removed] >= rise - 1e-6
        assert ranking.scales[removed].sum() == pytest.approx(8)
    assert ranking.order[::-1][:7].tolist() == kept
    assert (np.diff(ranking.errors) >= 0).all()
    other = GreedyLoss(seed=1).rank_by_loss(group, loss_of, 7)
    assert other.order.tolist() == GreedyLoss(seed=1).rank_by_loss(group, loss_of, 7).order.tolist()


def test_the_names_of_criteria_without_errors_are_those_whose_order_is_by_scores() -> None:
    by_scores = {name for name in BUILT_IN if CRITERIA.get(name).order == "scores"}
    assert by_scores == WITHOUT_ERRORS
    assert set(WITH_ERRORS) == set(BUILT_IN) - by_scores


def test_errors_of_a_plug_in_that_has_none_are_refused(ctx, tmp_path, monkeypatch) -> None:
    class Own(L1):
        name = "own"

    monkeypatch.setitem(CRITERIA._entries, "own", Own)
    with pytest.raises(ConfigValueError, match="damage must be scores or sensitivity with criterion 'own'"):
        PruneStage(_config(criterion="own", damage="errors")).run(make_saved_model("chain", tmp_path), ctx)


@pytest.fixture
def unlabelled(tmp_path):
    path = tmp_path / "pictures.npz"
    np.savez(path, x=np.random.default_rng(0).integers(0, 256, (96, 16, 16, 3), np.uint8))
    source = UnlabelledSource(unlabelled=str(path))
    preprocessing = PreprocessingConfig(mean=(0.5,), std=(0.25,))
    return Splits(
        DataConfig(train=source, evaluation=source, calibration=32, validation=16, preprocessing=preprocessing)
    )


@pytest.mark.parametrize("criterion", ["taylor", "snip", "grasp"])
def test_gradients_without_labels_are_refused_at_the_baseline(criterion, ctx, unlabelled, tmp_path) -> None:
    unlabelled.teacher = LoadedTeacher(nets.build("residual"))
    with pytest.raises(DataError, match=f"Criterion '{criterion}' needs gradients of a loss"):
        PruneStage(_config(criterion=criterion)).run(
            make_saved_model("residual", tmp_path), replace(ctx, data=unlabelled)
        )


@pytest.mark.parametrize("name", ["residual", "grouped"])
@pytest.mark.parametrize("criterion", ["reconstruction", "greedy"])
def test_without_labels_widths_come_from_errors_of_readers(criterion, name, ctx, unlabelled, tmp_path) -> None:
    """The gradients of the distance to the baseline are rounding noise at the baseline."""
    unlabelled.teacher = LoadedTeacher(nets.build(name))
    model, config = make_saved_model(name, tmp_path), _config(criterion=criterion, score_images=16)
    found = _candidates(config, model, replace(ctx, data=unlabelled))
    assert min(one.damages[0] for one in found) > 1e-4
    _, record = PruneStage(config).run(model, replace(ctx, data=unlabelled, folder=tmp_path / "run"))
    assert record.macs_after <= 0.5 * record.macs_before
    assert record.damage == "errors"


def test_reconstruction_with_errors_needs_no_labels(ctx, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("compress.search.evidence.collect_gradients", lambda *_args: pytest.fail("labels were used"))
    config = _config(criterion="reconstruction", damage="errors", score_images=16)
    found = _candidates(config, make_saved_model("residual", tmp_path), ctx)
    for one in found:
        assert one.damages[-1] == 0.0
        assert (np.diff(one.damages) <= 0).all()


@pytest.mark.parametrize("criterion", ["greedy", "pfp", "taylor"])
def test_one_bound_for_all_groups_meets_the_budget(criterion, ctx, tmp_path) -> None:
    model = make_saved_model("residual", tmp_path)
    config = _config(criterion=criterion, score_images=16, allocation="shared_error")
    slim, record = PruneStage(config).run(model, ctx)
    assert count_macs(slim.module, nets.EXAMPLE) <= 0.5 * record.macs_before


def test_gradient_flow_is_signed_on_an_untrained_network_only(ctx, tmp_path, monkeypatch) -> None:
    seen = []
    real = EvidenceCollector.collect

    def spy(self, criterion, shared=None):
        seen.append(real(self, criterion, shared))
        return seen[-1]

    monkeypatch.setattr(EvidenceCollector, "collect", spy)
    config = _config(criterion="grasp", score_images=16)
    _candidates(config, make_saved_model("chain", tmp_path), ctx)
    monkeypatch.setattr(EvidenceCollector, "is_trained", lambda *_args: True)
    _candidates(
        config,
        make_saved_model("chain", tmp_path),
        StageContext(tmp_path / "other", 0, ctx.data, RecordingProgress()),
    )
    assert [one.is_signed for one in seen] == [True, False]


def test_batch_norms_that_saw_no_image_are_measured_on_a_copy(ctx, tmp_path) -> None:
    module = nets.build("chain")
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    model = make_saved_model("chain", tmp_path, module)
    config = _config(criterion="snip", score_images=16)
    surveyed = survey(model, config, None, ctx)
    scoring = Scoring(Shortened(model, (), (), model.module, 0), surveyed, "key", ctx)
    measured = scoring.evidence.with_statistics(module)
    assert measured is not module
    assert not module.body[0][1].running_mean.any()
    assert bool(measured.body[0][1].running_mean.any())
    assert scoring.evidence.with_statistics(measured) is measured


def test_the_loss_of_the_stage_follows_the_factors(ctx, tmp_path) -> None:
    model, config = (
        make_saved_model("chain", tmp_path),
        _config(criterion="greedy_loss", score_images=16),
    )
    surveyed = survey(model, config, None, ctx)
    scoring = Scoring(Shortened(model, (), (), model.module, 0), surveyed, "key", ctx)
    group = surveyed.groups["body.0.0"]
    loss_of, split = scoring.orders.loss_with(group), ctx.data.calibration.first(16)
    factors = torch.linspace(0, 2, group.width)
    with scaled_reads(model.module, group, factors):
        wanted = evaluate_loss(model.module, split)
    assert loss_of(factors) == wanted
    assert loss_of(torch.ones(group.width)) == evaluate_loss(model.module, split) != wanted
