"""A latency target is measured in place, met within its tolerance or refused, and nothing is timed twice."""

import json
import re
import shutil
from dataclasses import replace

import nets
import numpy as np
import onnx
import pytest
import steady
import torch
from exported import SIGNATURE, exported
from fixtures import RecordingProgress, make_saved_model, make_splits
from steady import profile_by_macs
from torch import nn

import compress.search.rank_latency as rank_latency
import compress.search.width_latency as latency
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.pipeline import QuantizeConfig
from compress.config.schema.prune import PruneConfig
from compress.config.schema.targets import RankTargetConfig, TargetConfig
from compress.config.schema.verify import DeployConfig
from compress.cost.macs import count_macs, count_params, layer_macs
from compress.cost.variants import VariantWriter, site_of
from compress.errors import (
    ArtifactError,
    BudgetUnreachable,
    ConfigValueError,
    ModelError,
    NoSuchPlace,
    RuntimeUnavailable,
    StageError,
)
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.lowrank.layers import find_layers
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, TorchModel
from compress.model.recipe import Recipe
from compress.onnx_file.counting import rows_of
from compress.onnx_file.io import is_quantized, load_onnx
from compress.progress import SilentProgress
from compress.pruning.ranking.selection import Selection
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import build_cost, layer_axes
from compress.search.context import StageContext
from compress.search.deployed_files import variant_copies
from compress.search.latency_loop import meet_latency
from compress.search.rank_inputs import measure_spectra
from compress.search.survey import Targets
from compress.stages.low_rank import LowRankStage
from compress.stages.prune import PruneStage
from compress.storage.digest import add_digest
from compress.verification import profiling
from compress.verification.measurement import PairLatency

INT8 = QuantizeConfig(stage="quantize")
DEPLOY = DeployConfig(batch_size=64)  # one call of networks this small is mostly overhead, which no cut changes


def replace_config(**changes) -> DeployConfig:
    return DEPLOY.model_copy(update=changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("data"), 64)


@pytest.fixture
def ctx(data, tmp_path):
    return StageContext(tmp_path, 0, data, RecordingProgress(), DEPLOY, tmp_path / "tables")


def _latency_model(name: str, ctx, deploy: DeployConfig | None = None, levels=(8, 16)):
    model = make_saved_model(name, ctx.folder)
    groups, _ = find_cuttable(model.module, nets.EXAMPLE)
    chosen = {name: (*(w for w in levels if w < group.width), group.width) for name, group in groups.items()}
    macs = build_cost(model.module, nets.EXAMPLE, groups, "macs").at
    axes = layer_axes(model.module, groups)
    return latency.model_latency(model, axes, chosen, deploy or DEPLOY, ctx, macs)


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "concat", "linear_head"])
def test_the_table_of_a_network_covers_all_its_widths(name, ctx):
    model = _latency_model(name, ctx)
    for group, widths in model.levels.items():
        for width in widths:
            assert model.predict_ratio({group: width}) > 0
    assert model.reference_ms > 0
    full = {group: len(widths) - 1 for group, widths in model.levels.items()}
    assert model.cost.at(full) / model.reference_ms == pytest.approx(model.predict_ratio({}))
    assert model.is_measured_here


@pytest.fixture
def int8_ctx(data, tmp_path):
    deploy = replace_config(precision="int8", repeats=4)
    return StageContext(tmp_path, 0, data, RecordingProgress(), deploy, tmp_path / "tables", quantize=INT8)


@pytest.mark.parametrize("name", nets.NAMES)
def test_variants_in_int8_are_timed_by_site(name, int8_ctx, monkeypatch):
    seen = []
    original = profiling._profile_together

    def watched(paths, reference, *others):
        seen.extend([reference, *paths])
        assert all(is_quantized(onnx.load(path)) for path in seen[-2:])
        yield from original(paths, reference, *others)

    monkeypatch.setattr(profiling, "_profile_together", watched)
    model = _latency_model(name, int8_ctx)
    assert len(seen) == 2 * len(model.file.samples)
    assert model.file.conditions.precision == "int8, weights int8 per channel, activations uint8"
    sites = set(range(len(model.writer.sites)))
    assert all(sites <= set(sample.site_ms) for sample in model.file.samples), "every layer has its own time"
    assert 0 < model.time_pair({group: widths[0] for group, widths in model.levels.items()}).ratio < 3


def test_layers_that_stay_float_stay_float_in_the_variants(int8_ctx):
    ctx = replace(int8_ctx, quantize=INT8.model_copy(update={"exclude": ("head", "no_such_layer")}))
    source = load_onnx(exported("chain"), weights=True)
    writer = VariantWriter(source)
    quantised = variant_copies(source, writer, ctx)(writer.write({}, {}))
    whole = {node.output[0] for node in quantised.graph.node if node.op_type == "DequantizeLinear"}
    layers = [node for node in quantised.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    (left,) = [node for node in layers if node.input[1] not in whole]
    assert site_of(left.name) == len(writer.sites) - 1, "the head is the last layer"


def test_int8_and_float_have_tables_of_their_own(int8_ctx, ctx):
    _latency_model("chain", int8_ctx)
    _latency_model("chain", ctx)
    assert len(list(ctx.latency_tables.iterdir())) == 2


def test_what_was_timed_before_a_kill_is_not_timed_again(ctx, monkeypatch):
    timed = []
    original = profiling._profile_together

    def watched(paths, *others):
        timed.extend(paths)
        if len(timed) > profiling.TOGETHER:
            raise KeyboardInterrupt
        yield from original(paths, *others)

    monkeypatch.setattr(profiling, "_profile_together", watched)
    with pytest.raises(KeyboardInterrupt):
        _latency_model("chain", ctx)
    (path,) = ctx.latency_tables.iterdir()
    assert len(json.loads(path.read_text(encoding="utf-8"))["samples"]) == profiling.TOGETHER

    timed.clear()
    monkeypatch.setattr(profiling, "_profile_together", lambda paths, *o: timed.extend(paths) or original(paths, *o))
    model = _latency_model("chain", ctx)
    total = len(json.loads(path.read_text(encoding="utf-8"))["samples"])
    assert len(timed) == total - profiling.TOGETHER

    timed.clear()
    again = _latency_model("chain", ctx)
    assert timed == []
    assert again.table == model.table, "a table from a file is the table that was measured"


def test_who_asks_for_more_repeats_gets_a_table_of_its_own(ctx, monkeypatch):
    timed = []
    original = profiling._profile_together

    def watched(paths, reference, inputs, conditions, *others):
        timed.append(conditions.repeats)
        yield from original(paths, reference, inputs, conditions, *others)

    monkeypatch.setattr(profiling, "_profile_together", watched)
    few, some = (_latency_model("chain", ctx, replace_config(repeats=repeats)) for repeats in (4, 8))
    assert timed == [4] * len(few.file.samples) + [8] * len(some.file.samples)
    assert _latency_model("chain", ctx, replace_config(repeats=4)).file == few.file
    assert len(timed) == len(few.file.samples) + len(some.file.samples), "the first is still there"
    assert len(list(ctx.latency_tables.iterdir())) == 2


def test_a_table_given_is_used_and_one_of_another_machine_is_refused(ctx, tmp_path):
    _latency_model("chain", ctx)
    (path,) = ctx.latency_tables.iterdir()
    given = tmp_path / "device.json"
    shutil.copy(path, given)
    deploy = replace_config(table=str(given))
    assert _latency_model("chain", ctx, deploy).is_measured_here

    values = json.loads(given.read_text(encoding="utf-8"))
    values["conditions"] |= {"machine": "a telephone", "threads": 4}
    given.write_text(json.dumps(add_digest(values)), encoding="utf-8")
    with pytest.raises(
        ArtifactError, match=r"machine .* here, a telephone in the table; threads 1 here, 4 in"
    ) as caught:
        _latency_model("chain", ctx, deploy)
    assert "--accept-foreign-table" in caught.value.hint
    accepted = _latency_model("chain", ctx, replace_config(table=str(given), accept_foreign_table=True))
    assert not accepted.is_measured_here

    with pytest.raises(ArtifactError, match="must be of this network, it is of another one"):
        _latency_model("residual", ctx, deploy)
    with pytest.raises(ArtifactError, match=r"must hold the \d+ variants this pipeline asks for, \d+ are missing"):
        _latency_model("chain", ctx, replace_config(table=str(given), accept_foreign_table=True), levels=(4, 8))


def test_a_provider_that_is_not_there_is_refused(ctx):
    deploy = DeployConfig(provider="NoSuchExecutionProvider")
    with pytest.raises(RuntimeUnavailable, match="provider must be one of"):
        _latency_model("chain", ctx, deploy)


def test_a_runtime_that_reads_no_files_is_refused(ctx):
    with pytest.raises(NoSuchPlace, match=r"'torch_eager' must read ONNX files"):
        _latency_model("chain", ctx, DeployConfig(runtime="torch_eager"))


def test_a_file_that_cannot_be_narrowed_as_the_network_is_refused(ctx):
    model = make_saved_model("chain", ctx.folder)
    shutil.copy(exported("residual"), model.baseline.onnx_path)
    groups, _ = find_cuttable(model.module, nets.EXAMPLE)
    levels = {name: (4, group.width) for name, group in groups.items()}
    macs = build_cost(model.module, nets.EXAMPLE, groups, "macs").at
    with pytest.raises(ModelError, match="must be narrowed as the network is, to be timed"):
        latency.model_latency(model, layer_axes(model.module, groups), levels, DeployConfig(), ctx, macs)


def test_every_level_of_every_group_is_planned():
    levels = {"a": (8, 16), "b": tuple(range(8, 65, 8)), "c": (16, 32, 48)}
    plan = latency.plan_variants(levels, has_pairs=True)
    assert plan[0] == {name: widths[-1] for name, widths in levels.items()}
    assert plan[1] == {name: widths[0] for name, widths in levels.items()}
    for name, widths in levels.items():
        assert {variant[name] for variant in plan[2:]} == set(widths)
    assert plan == latency.plan_variants(dict(reversed(levels.items())), has_pairs=True)
    assert len(plan) > len(latency.plan_variants(levels, has_pairs=False))


def test_sums_of_widths_are_planned_from_narrow_to_wide():
    """Widths drawn one by one add up to much the same behind a concatenation, whatever they are."""
    levels = {f"group{number}": tuple(range(8, 65, 8)) for number in range(30)}

    def shares(plan):
        return np.array([sum(widths.values()) / (64 * 30) for widths in plan[2:]])

    alone, together = (shares(latency.plan_variants(levels, True, has_sums=flag)) for flag in (False, True))
    assert np.ptp(alone) < 0.25
    assert np.ptp(together) > 0.6
    assert max(np.diff(np.sort(together))) < 0.15
    for name, widths in levels.items():
        assert {variant[name] for variant in latency.plan_variants(levels, True, has_sums=True)[2:]} == set(widths)


class _Model:
    """A latency model whose predictions are `bias` times what is measured."""

    reference_ms = 2.0

    def __init__(self, bias: float) -> None:
        self.bias = bias

    def predict_ratio(self, widths):
        return widths["a"] / 100 * self.bias

    def time_pair(self, widths):
        return PairLatency(widths["a"] / 100, self.reference_ms)


def _meet(bias: float, asked: float = 0.5, steps: int = 1):
    model = _Model(bias)

    def select(correction: float) -> Selection:
        limit = asked * correction
        fitting = [w for w in range(10, 101, steps) if model.predict_ratio({"a": w}) <= limit]
        if not fitting:
            raise BudgetUnreachable("nothing fits", best=model.predict_ratio({"a": 10}) * model.reference_ms)
        return Selection({"a": max(fitting)}, {"a": (0,)}, True)

    listener = RecordingProgress()
    return *meet_latency(select, model, asked, listener), listener


@pytest.mark.parametrize("bias", [0.7, 0.95, 1.0, 1.05, 1.4])
def test_a_table_that_is_off_is_corrected_by_whole_networks(bias):
    selection, timed, said = _meet(bias)
    assert selection.widths["a"] / 100 == pytest.approx(0.5, rel=0.03)
    assert timed[-1].ratio == selection.widths["a"] / 100
    assert sum(note.startswith("round ") for note in said.notes) == len(timed)


def test_widths_too_coarse_give_the_nearest_below():
    selection, timed, _ = _meet(0.8, steps=30)  # widths 10, 40, 70, 100
    assert selection.widths == {"a": 40}
    assert [choice.widths["a"] for choice in timed] == [40, 70], "the next wider one was tried, and is too slow"


def test_a_network_that_is_never_fast_enough_is_refused_with_the_fastest_there_is():
    with pytest.raises(BudgetUnreachable, match=r"fastest choice found takes 0\.100 of it, measured"):
        _meet(0.3, asked=0.05)
    with pytest.raises(BudgetUnreachable, match="nothing fits"):
        _meet(1.0, asked=0.05)


class _Disturbed(_Model):
    """A latency model whose measurements are those listed, each a multiple of the true one; then all are true."""

    def __init__(self, disturbed: tuple[float, ...], bias: float = 1.0) -> None:
        super().__init__(bias)
        self.disturbed = list(disturbed)
        self.measured: list[int] = []

    def time_pair(self, widths):
        self.measured.append(widths["a"])
        true = super().time_pair(widths)
        return replace(true, ratio=true.ratio * (self.disturbed.pop(0) if self.disturbed else 1.0))


def _timed_once(model: _Disturbed, width: int) -> tuple[float, list[str]]:
    """Offer one choice only, so that one round is timed."""
    listener = RecordingProgress()
    selection = Selection({"a": width}, {"a": (0,)}, True)
    _, timed = meet_latency(lambda correction: selection, model, 1.0, listener)
    assert [choice.widths for choice in timed] == [{"a": width}]
    return timed[0].ratio, [note for note in listener.notes if "measured again" in note]


@pytest.mark.parametrize("factor", [0.93, 1.0, 1.07])
def test_a_measurement_near_what_is_expected_is_taken_as_it_is(factor):
    model = _Disturbed((factor,))
    ratio, notes = _timed_once(model, 50)
    assert ratio == pytest.approx(0.5 * factor)
    assert (model.measured, notes) == ([50], [])


@pytest.mark.parametrize(
    ("factors", "median"),
    [
        ((2.0,), 1.0),
        ((0.5,), 1.0),
        ((1.09, 1.5), 1.09),
        ((0.91, 0.5, 0.8), 0.8),
        ((1.3, 1.3, 1.2), 1.3),
        ((3.0, 1.2), 1.2),
    ],
)
def test_a_measurement_far_from_what_is_expected_is_repeated_and_the_median_counts(factors, median):
    model = _Disturbed(factors)
    ratio, notes = _timed_once(model, 50)
    assert ratio == pytest.approx(0.5 * median)
    assert model.measured == [50, 50, 50]
    assert notes == [f"measured {0.5 * factors[0]:.3f} where 0.500 was expected: measured again"]


def test_one_disturbed_measurement_does_not_lead_the_choice_astray():
    disturbed, calm = _Disturbed((1.6,)), _Disturbed(())

    def meet(model):
        def select(correction: float) -> Selection:
            return Selection({"a": max(w for w in range(10, 101) if w <= 50 * correction)}, {"a": (0,)}, True)

        return meet_latency(select, model, 0.5, RecordingProgress())

    assert meet(disturbed) == meet(calm)
    assert disturbed.measured == [50, 50, 50]
    assert calm.measured == [50]


def test_what_is_expected_follows_the_network_that_was_timed_before():
    """A table that is off is off for the next choice too; only the first comes as a surprise."""
    model = _Disturbed((), bias=0.7)

    def select(correction: float) -> Selection:
        fitting = [w for w in range(10, 101) if model.predict_ratio({"a": w}) <= 0.5 * correction]
        return Selection({"a": max(fitting)}, {"a": (0,)}, True)

    listener = RecordingProgress()
    selection, timed = meet_latency(select, model, 0.5, listener)
    assert len(timed) > 1
    assert model.measured == [timed[0].widths["a"]] * 3 + [choice.widths["a"] for choice in timed[1:]]
    (note,) = [note for note in listener.notes if "measured again" in note]
    assert note.endswith(f"where {timed[0].predicted:.3f} was expected: measured again")
    assert selection.widths["a"] / 100 == pytest.approx(0.5, rel=0.03)


class _Moving(_Model):
    """A latency model on a machine of changing speed: (slowness of the choice, of the baseline) in each measurement."""

    def __init__(self, *slowness: tuple[float, float]) -> None:
        super().__init__(1.0)
        self.slowness, self.calls = slowness, 0

    def time_pair(self, widths):
        here, reference = self.slowness[min(self.calls, len(self.slowness) - 1)]
        self.calls += 1
        return PairLatency(widths["a"] / 100 * here / reference, self.reference_ms * reference)


def _meet_once(model, width: int = 50):
    listener = RecordingProgress()
    _, timed = meet_latency(lambda correction: Selection({"a": width}, {"a": (0,)}, True), model, width / 100, listener)
    return timed[-1], listener


@pytest.mark.parametrize("slowness", [1.0, 1.09, 1 / 1.09])
def test_a_baseline_that_takes_what_it_took_is_timed_once(slowness):
    model = _Moving((slowness, slowness))
    choice, said = _meet_once(model)
    assert (model.calls, said.warnings) == (1, [])
    assert choice.ratio == pytest.approx(0.5)
    assert choice.reference_ms == pytest.approx(2.0 * slowness)


@pytest.mark.parametrize("slowness", [1.15, 2.0, 0.5, 1 / 1.15])
def test_a_machine_of_another_speed_than_the_table_is_noticed_and_the_choice_timed_again(slowness):
    model = _Moving((slowness, slowness))
    choice, said = _meet_once(model)
    assert model.calls == 3
    assert choice.ratio == pytest.approx(0.5), "both are slower, their ratio is what it was"
    assert choice.reference_ms == pytest.approx(2.0 * slowness)
    (warning,) = said.warnings
    assert f"takes {2 * slowness:.3g} ms, it took 2 ms when the latency table was made" in warning


def test_a_speed_that_changes_in_the_middle_of_a_measurement_does_not_decide():
    """Once 0.27 and once 0.209 of the baseline were taken for 0.5: the baseline was slow, its choice was not."""
    model = _Moving((1.0, 1 / 0.54), (1.0, 1.0))
    choice, said = _meet_once(model)
    assert choice.ratio == pytest.approx(0.5)
    assert model.calls == 3
    assert said.warnings == [], "the machine is as fast as it was"


def test_a_change_of_speed_that_leaves_the_ratio_as_expected_is_noticed_too():
    model = _Moving((1.3, 1.3), (1.0, 1.0))
    choice, said = _meet_once(model)
    assert (model.calls, choice.reference_ms) == (3, 2.0)
    assert any("baseline takes 2.6 ms where it took 2 ms: measured again" in note for note in said.notes)


def test_a_machine_that_stays_slow_is_measured_again_only_once():
    model = _Moving((1.5, 1.5))

    def select(correction: float) -> Selection:
        return Selection({"a": 60 if correction == 1 else 50}, {"a": (0,)}, True)

    listener = RecordingProgress()
    _, timed = meet_latency(select, model, 0.5, listener)
    assert [choice.widths["a"] for choice in timed] == [60, 50]
    assert model.calls == 4
    assert len(listener.warnings) == 1


@pytest.mark.parametrize("target", [{"latency": 0.7}, {"latency": 0.95, "macs": 0.5}, {"size_mb": 0.02}])
def test_prune_meets_its_targets(ctx, tmp_path, target, monkeypatch):
    profile_by_macs(monkeypatch)
    model = make_saved_model("residual", tmp_path)
    config = PruneConfig(stage="prune", target=TargetConfig(**target), multiple_of=2, score_images=16)
    slim, record = PruneStage(config).run(model, ctx)
    assert record.target == target
    assert set(record.asked) == set(record.reached) == set(target)
    assert count_macs(slim.module, nets.EXAMPLE) == record.macs_after < record.macs_before
    if "macs" in target:
        assert record.reached["macs"] <= 0.5
    if "size_mb" in target:
        assert record.reached["size_mb"] <= 0.02
        assert record.latency is None
    else:
        within = [tried.measured for tried in record.latency.rounds if tried.measured <= target["latency"] * 1.03]
        assert record.latency.measured_ratio == max(within)
        assert record.reached["latency"] == pytest.approx(target["latency"], rel=0.03) or "macs" in target
        assert record.latency.predicted_ratio == pytest.approx(record.latency.measured_ratio, rel=0.02)


@pytest.mark.parametrize("asked", [0.75, 0.5])
def test_a_concat_network_meets_its_target_as_predicted(ctx, tmp_path, monkeypatch, asked):
    """Layers behind a concatenation of three branches: what the budget says is what the table says is what is timed."""
    profile_by_macs(monkeypatch)
    path = tmp_path / "baseline.onnx"
    module = _Branches().eval()
    export_onnx(module, SIGNATURE, path, ExportSettings(opset=18))
    figures = ModelMetrics(count_macs(module, nets.EXAMPLE), count_params(module), path.stat().st_size, {}, {})
    spec = FactorySpec("factory", "nets:build", {"name": "branches"})
    model = TorchModel(module, spec, Recipe(), SIGNATURE, None, (), Baseline(figures, path, tmp_path))  # type: ignore[arg-type]
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    levels = {name: tuple(range(4, group.width + 1, 4)) for name, group in groups.items()}
    macs = build_cost(module, nets.EXAMPLE, groups, "macs").at
    timed = latency.model_latency(model, layer_axes(module, groups), levels, DEPLOY, ctx, macs)
    assert len(timed.cost.sized) == 2, "the depthwise layer and the one that reads the concatenation"
    random = np.random.default_rng(0)
    for _ in range(10):
        widths = {name: int(random.choice(allowed)) for name, allowed in levels.items()}
        choice = {name: levels[name].index(width) for name, width in widths.items()}
        predicted = timed.predict_ratio(widths)
        assert timed.cost.at(choice) / timed.reference_ms == pytest.approx(predicted)
        assert predicted == pytest.approx(timed.time_pair(widths).ratio, rel=0.03)
    config = PruneConfig(stage="prune", target=TargetConfig(latency=asked), multiple_of=4, score_images=16)
    _, record = PruneStage(config).run(model, ctx)
    assert record.reached["latency"] == pytest.approx(asked, rel=0.03)
    assert record.latency.rounds[0].predicted <= asked


class _Branches(nn.Module):
    """Three branches, concatenated; a depthwise layer passes them on, another reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.small = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(3, 24, 3, 1, 1), nn.Conv2d(3, 16, 1)
        self.each, self.join = nn.Conv2d(56, 56, 3, 1, 1, groups=56), nn.Conv2d(56, 32, 3, 1, 1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = torch.relu(torch.cat([self.left(x), self.right(x), self.small(x)], 1))
        return self.head(torch.relu(self.join(torch.relu(self.each(x)))).mean((2, 3)))


def test_a_table_serves_fewer_blocks_too(ctx, tmp_path, monkeypatch):
    profile_by_macs(monkeypatch)
    asked = []
    profile = latency.profile_models
    monkeypatch.setattr(latency, "profile_models", lambda *args: asked.append(args) or profile(*args))
    config = PruneConfig(stage="prune", target=TargetConfig(latency=0.5), multiple_of=2, score_images=16, blocks="auto")
    _, record = PruneStage(config).run(make_saved_model("residual", tmp_path), ctx)
    assert len(record.block_trials) > 1
    assert len(asked) < len(record.block_trials), "the table without blocks is needed only where new operators meet"
    assert record.reached["latency"] <= 0.5 * 1.03


def test_blocks_that_are_tried_share_a_table_even_after_a_target_was_missed(ctx, tmp_path, monkeypatch):
    profile_by_macs(monkeypatch)
    asked = []
    profile = latency.profile_models
    monkeypatch.setattr(latency, "profile_models", lambda *args: asked.append(args) or profile(*args))
    limits = {"multiple_of": 2, "score_images": 16, "max_removed_ratio": 0.1, "blocks": "auto"}
    config = PruneConfig(stage="prune", target=TargetConfig(latency=0.75), **limits)
    _, record = PruneStage(config).run(make_saved_model("residual", tmp_path), ctx)
    assert record.block_trials[0].loss is None, "channels alone do not meet it"
    assert len(asked) < len(record.block_trials)


def test_a_network_timed_as_a_whole_takes_time(ctx):
    model = _latency_model("chain", ctx)
    found = model.time_pair({"body.0.0": 8})
    assert 0 < found.ratio < 10
    assert found.reference_ms > 0


def test_a_latency_in_milliseconds_is_a_share_of_the_baseline(ctx, tmp_path):
    model = _latency_model("residual", ctx)
    target = TargetConfig(latency_ms=model.reference_ms / 2, latency=0.8)
    targets = Targets(target, None, None, None, {}, 0, model)  # type: ignore[arg-type]
    assert targets.latency_ratio == pytest.approx(0.5), "of two the stricter one holds"
    table = replace(model.table, offset_ms=99.0)
    slow = replace(model, table=table, reference_ms=100.0)
    targets = Targets(TargetConfig(latency=0.5), None, None, None, {}, 0, slow)  # type: ignore[arg-type]
    with pytest.raises(BudgetUnreachable, match=r"what no channel group changes alone takes 0\.99\d of the baseline"):
        targets.budgets(model.levels)


def _low_rank(model: TorchModel, ctx: StageContext, **config):
    return LowRankStage(LowRankConfig(stage="low_rank", multiple_of=1, **config)).run(model, ctx)


def test_ranks_meet_a_latency_target(ctx, tmp_path, monkeypatch):
    profile_by_macs(monkeypatch)
    model = make_saved_model("residual", tmp_path)
    slim, record = _low_rank(model, ctx, target=RankTargetConfig(latency=0.7))
    timing = record.latency
    assert timing.measured_ratio <= 0.7 * 1.03
    assert timing.predicted_ratio == pytest.approx(timing.measured_ratio, rel=0.05)
    assert record.layers
    assert {entry.layer for entry in record.layers} == {edit.layer for edit in slim.recipe.edits}
    assert count_macs(slim.module, nets.EXAMPLE) == record.macs_after < record.macs_before
    listed = {entry.layer for entry in record.layers} | {entry.layer for entry in record.dense}
    assert listed == set(layer_macs(model.module, nets.EXAMPLE))


def test_a_factorisation_that_is_slower_than_its_layer_is_never_chosen(ctx, tmp_path, monkeypatch):
    profile_by_macs(monkeypatch)
    true = steady._node_ms
    slow = "body.1.conv1"

    def with_one_slow(path):
        names, ms = true(path)
        layers = [row.name for row in rows_of(onnx.load(path))]
        return names, np.array(
            [m * (50 if name.startswith(f"{slow}.") else 1) for m, name in zip(ms, layers, strict=True)]
        )

    monkeypatch.setattr(steady, "_node_ms", with_one_slow)
    _, record = _low_rank(make_saved_model("residual", tmp_path), ctx, target=RankTargetConfig(latency=0.75))
    assert slow not in {entry.layer for entry in record.layers}
    assert slow in {entry.layer for entry in record.dense}


def test_ranks_cannot_meet_every_latency(ctx, tmp_path, monkeypatch):
    profile_by_macs(monkeypatch)
    model = make_saved_model("residual", tmp_path)
    with pytest.raises(
        BudgetUnreachable, match=r"Target 0\.010 of the baseline's latency cannot be reached; the best is"
    ):
        _low_rank(model, ctx, target=RankTargetConfig(latency=0.01))
    with pytest.raises(StageError, match="there is nothing to factorise"):
        _low_rank(model, ctx, target=RankTargetConfig(latency=1.0))
    with pytest.raises(BudgetUnreachable, match="none of 0 does at any rank"):
        rank_latency.rank_latency(model, [], {}, 1, DEPLOY, ctx)
    foreign = replace(ctx, deploy=replace_config(table="device.json", accept_foreign_table=True))
    with pytest.raises(ConfigValueError, match="must measure on this machine"):
        _low_rank(model, foreign, target=RankTargetConfig(latency=0.7))


def test_a_target_in_milliseconds_that_cannot_be_met_says_milliseconds(ctx, tmp_path, monkeypatch):
    profile_by_macs(monkeypatch)
    text = r"Target 1e-05 ms \(0\.\d{3} of the baseline's latency\) cannot be reached.* \S+ ms \(0\.\d{3} of"
    with pytest.raises(BudgetUnreachable, match=text):
        _low_rank(make_saved_model("residual", tmp_path), ctx, target=RankTargetConfig(latency_ms=1e-5))
    config = PruneConfig(stage="prune", target=TargetConfig(latency_ms=1e-5), criterion="l1", multiple_of=1)
    with pytest.raises(BudgetUnreachable, match=text):
        PruneStage(config).run(make_saved_model("residual", tmp_path), ctx)


def test_a_choice_that_is_timed_too_slow_says_milliseconds_where_they_were_asked_for():
    def select(_correction: float) -> Selection:
        return Selection({"a": 100}, {"a": (0,)}, True)

    with pytest.raises(BudgetUnreachable) as caught:
        meet_latency(select, _Disturbed(()), 0.5, RecordingProgress(), in_ms=True)
    text = r"Target \S+ ms \(0\.500 of the baseline's latency\) .* takes \S+ ms \(1\.000 of it\), measured\."
    assert re.fullmatch(text, caught.value.message)


def test_factorisations_that_were_timed_before_a_kill_are_not_timed_again(ctx, tmp_path, monkeypatch):
    model, timed = make_saved_model("chain", tmp_path), []
    config = LowRankConfig(stage="low_rank", relative_error=0.5)
    spectra = measure_spectra(model.module, find_layers(model.module, nets.EXAMPLE)[0], {}, config, SilentProgress())
    original = profiling._profile_together

    def watched(paths, *others):
        if len(timed) == 3:
            raise KeyboardInterrupt
        timed.extend(paths)
        yield from original(paths, *others)

    monkeypatch.setattr(profiling, "_profile_together", watched)
    with pytest.raises(KeyboardInterrupt):
        rank_latency.rank_latency(model, spectra, {}, 1, DEPLOY, ctx)
    assert len(list(ctx.latency_tables.iterdir())) == 3
    timed.append(None)  # from now on nothing dies
    found = rank_latency.rank_latency(model, spectra, {}, 1, DEPLOY, ctx)
    count = len(timed)
    assert 4 < count <= 1 + rank_latency.ERRORS + 1
    assert rank_latency.rank_latency(model, spectra, {}, 1, DEPLOY, ctx).option_ms.keys() == found.option_ms.keys()
    assert len(timed) == count


def test_ranks_are_timed_for_real(ctx, tmp_path):
    model = make_saved_model("chain", tmp_path)
    config = LowRankConfig(stage="low_rank", relative_error=0.5)
    spectra = measure_spectra(model.module, find_layers(model.module, nets.EXAMPLE)[0], {}, config, SilentProgress())
    timed = rank_latency.rank_latency(model, spectra, {}, 1, DEPLOY, ctx)
    assert timed.reference_ms > 0
    assert timed.fixed_ms > 0
    for layer, found in timed.options.items():
        assert found[-1].scheme is None
        assert (timed.option_ms[layer][:-1] < timed.option_ms[layer][-1]).all()
