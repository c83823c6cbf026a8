"""A latency target on a device that times complete files: met, resumed, and steady while the device changes speed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import device
import nets
import numpy as np
import pytest
import torch
from fixtures import RecordingProgress, make_saved_model, make_splits

import compress.search.width_latency as latency
import compress.verification.measurement as measurement
from compress.config.schema.prune import PruneConfig
from compress.config.schema.verify import DeployConfig
from compress.cost.fitted_table import FittedTable
from compress.errors import ArtifactError, DeviceFailed
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import build_cost, layer_axes
from compress.search.context import StageContext
from compress.search.device_latency import BETWEEN, FIRST, MORE
from compress.search.export import conditions_of
from compress.stages.prune import PruneStage
from compress.verification.device_command import DeviceCommand, DeviceTimes

DEPLOY = DeployConfig(command=("time", "{model}"), device="toy", variants=40)


class Device:
    """A device in this process.

    Attributes:
        timed: Names of the timed files.
        speed: Function from the number of the call to the slowness of the device.
        fails_at: Number of the call at which the connection drops.
    """

    def __init__(self) -> None:
        self.timed: list[str] = []
        self.speed: Callable[[int], float] = lambda call: 1.0
        self.block = device.BLOCK
        self.fails_at: int | None = None
        self.runtime = ""

    def __call__(self, path: Path, conditions: object, progress: object) -> DeviceTimes:
        if self.fails_at is not None and len(self.timed) >= self.fails_at:
            raise DeviceFailed("Command of the device 'toy' was tried 3 times: exit code 255")
        self.timed.append("variant" if path.name.startswith("variant") else "baseline")
        took = device.milliseconds(path.read_bytes(), self.block) * self.speed(len(self.timed))
        return DeviceTimes((took, took * 1.01, took), self.runtime)

    @property
    def variants(self) -> int:
        return self.timed.count("variant")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(measurement, "time_on_device", found)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("data"), 64)


@pytest.fixture
def ctx(data, tmp_path):
    return StageContext(tmp_path, 0, data, RecordingProgress(), DEPLOY, tmp_path / "tables")


def latency_model(name: str, ctx: StageContext, deploy: DeployConfig = DEPLOY) -> latency.LatencyModel:
    model = make_saved_model(name, ctx.folder)
    groups, _ = find_cuttable(model.module, nets.EXAMPLE)
    levels = {
        name: (*(width for width in range(2, group.width, 2) if width % group.parts == 0), group.width)
        for name, group in groups.items()
    }
    macs = build_cost(model.module, nets.EXAMPLE, groups, "macs").at
    return latency.model_latency(model, layer_axes(model.module, groups), levels, deploy, ctx, macs)


def true_ms(model: latency.LatencyModel, widths: dict[str, int], block: int = device.BLOCK) -> float:
    full = model.axes.sizes({})
    variant = model.writer.write(model.axes.sizes(widths), full)
    return device.milliseconds(variant.SerializeToString(), block)


@pytest.mark.parametrize("name", nets.NAMES)
def test_the_table_predicts_networks_that_were_not_timed(name: str, ctx: StageContext, toy: Device) -> None:
    model, random = latency_model(name, ctx), np.random.default_rng(0)
    assert isinstance(model.table, FittedTable)
    assert model.is_measured_here
    errors = []
    for _ in range(20):
        widths = {name: int(random.choice(levels)) for name, levels in model.levels.items()}
        predicted = model.table.network_ms(model.writer.sites, model.axes.sizes(widths))
        errors.append(abs(predicted / true_ms(model, widths) - 1))
    assert np.median(errors) < 0.01
    assert model.reference_ms == true_ms(model, {})
    assert len(model.variants) == len(model.file.samples) <= DEPLOY.variants


def test_the_baseline_is_timed_before_and_after_every_four_variants(ctx: StageContext, toy: Device) -> None:
    latency_model("residual", ctx)
    first = ["baseline"] * FIRST + (["variant"] * BETWEEN + ["baseline"]) * 3
    assert toy.timed[: len(first)] == first


def test_a_second_time_nothing_is_timed(ctx: StageContext, toy: Device) -> None:
    model = latency_model("chain", ctx)
    before = len(toy.timed)
    again = latency_model("chain", ctx)
    assert len(toy.timed) == before
    assert again.file == model.file
    assert again.table.network_ms(again.writer.sites, {}) == model.table.network_ms(model.writer.sites, {})


def test_a_connection_that_drops_loses_no_variant(ctx: StageContext, toy: Device) -> None:
    toy.fails_at = FIRST + BETWEEN + 1 + 2  # in the middle of the second group of variants
    with pytest.raises(DeviceFailed, match="exit code 255"):
        latency_model("residual", ctx)
    (path,) = ctx.latency_tables.iterdir()
    assert len(json.loads(path.read_text(encoding="utf-8"))["samples"]) == BETWEEN + 2
    toy.fails_at = None
    model = latency_model("residual", ctx)
    assert toy.variants == len(model.file.samples), "each variant is timed once"


def test_a_device_that_slows_down_and_recovers_gives_the_same_table(ctx: StageContext, toy: Device, data, tmp_path):
    steady = latency_model("residual", ctx)
    toy.timed.clear()
    toy.speed = lambda call: 1 + 0.3 * np.sin(call / 12)
    other = StageContext(tmp_path, 0, data, RecordingProgress(), DEPLOY, tmp_path / "others")
    moving = latency_model("residual", other)
    random = np.random.default_rng(1)
    for _ in range(10):
        widths = {name: int(random.choice(levels)) for name, levels in steady.levels.items()}
        assert moving.predict_ratio(widths) == pytest.approx(steady.predict_ratio(widths), rel=0.05)


def test_variants_timed_while_the_device_changed_its_speed_are_timed_again(ctx: StageContext, toy: Device) -> None:
    toy.speed = lambda call: 1.0 if call <= FIRST + 2 else 1.5
    model = latency_model("residual", ctx)
    assert toy.variants == len(model.file.samples) + BETWEEN
    notes = [note for note in ctx.progress.notes if "are timed again" in note]
    assert notes == ["the baseline's latency has changed: the last variants are timed again"]
    assert model.table.error < 0.01


def test_more_variants_are_timed_where_the_table_is_unsure(ctx: StageContext, toy: Device) -> None:
    random = np.random.default_rng(0)
    toy.speed = lambda call: 1 + 0.06 * random.normal()
    model = latency_model("residual", ctx)
    notes = [note for note in ctx.progress.notes if f"{MORE} more are timed" in note]
    assert notes or model.table.noise >= 0.025
    assert len(model.file.samples) <= DEPLOY.variants
    few = latency_model("residual", ctx, DEPLOY.model_copy(update={"variants": 12, "repeats": 5}))
    assert len(few.file.samples) == 12


def test_another_command_device_or_setting_has_a_table_of_its_own(ctx: StageContext, toy: Device) -> None:
    for number, change in enumerate(({}, {"device": "other"}, {"command": ("x", "{model}")}, {"threads": 4})):
        changed = DEPLOY.model_copy(update={"variants": 8, **change})
        latency_model("chain", replace(ctx, deploy=changed), changed)
        assert len(list(ctx.latency_tables.iterdir())) == number + 1


def test_a_device_that_states_another_runtime_is_timed_anew(ctx: StageContext, toy: Device) -> None:
    toy.runtime, few = "toy 1.0", DEPLOY.model_copy(update={"variants": 12})
    model = latency_model("residual", ctx, few)
    assert model.file.runtime == "toy 1.0"
    toy.timed.clear()
    toy.runtime = "toy 2.0"
    latency_model("residual", ctx, few)
    assert toy.timed == [], "a complete table is used without a look at the device"
    more = latency_model("residual", ctx, few.model_copy(update={"variants": 16}))
    (warning,) = ctx.progress.warnings
    assert "states runtime 'toy 2.0', the latency table was made with 'toy 1.0': 12 variants" in warning
    assert more.file.runtime == "toy 2.0"


def test_a_table_of_the_device_is_used_without_it(ctx: StageContext, toy: Device, tmp_path: Path) -> None:
    model = latency_model("chain", ctx)
    given = tmp_path / "toy.json"
    model.file.write(given)
    toy.timed.clear()
    assert latency_model("chain", ctx, DEPLOY.model_copy(update={"table": str(given)})).file == model.file
    assert toy.timed == []
    other = DEPLOY.model_copy(update={"table": str(given), "device": "other"})
    with pytest.raises(ArtifactError, match="machine other here, toy in the table"):
        latency_model("chain", replace(ctx, deploy=other), other)


@pytest.mark.parametrize("asked", [0.5, 0.8])
def test_a_budget_is_met_within_three_per_cent(asked: float, ctx: StageContext, toy: Device) -> None:
    config = PruneConfig(stage="prune", target={"latency": asked}, multiple_of=1, score_images=16, refit_images=16)
    slim, record = PruneStage(config).run(make_saved_model("residual", ctx.folder), ctx)
    assert record.latency is not None
    assert record.latency.measured_ratio == pytest.approx(asked, rel=0.03)
    assert (record.latency.device, record.latency.device_runtime) == ("toy", None)
    assert record.latency.entry_error is not None
    assert all("on the device" in task for task in ctx.progress.tasks if "latency" in task or "variants" in task)
    assert torch.isfinite(slim.module(nets.EXAMPLE)).all()


def test_widths_follow_the_staircase_of_the_device(ctx: StageContext, toy: Device, data, tmp_path: Path) -> None:
    chosen = {}
    for block in (1, 8):
        toy.block = block
        folder = tmp_path / f"block{block}"  # a stage's folder keeps finished parts
        folder.mkdir()
        place = StageContext(folder, 0, data, RecordingProgress(), DEPLOY, folder / "tables")
        config = PruneConfig(stage="prune", target={"latency": 0.75}, multiple_of=1, score_images=16, refit_images=16)
        _, record = PruneStage(config).run(make_saved_model("residual", place.folder), place)
        chosen[block] = {stairs.name: stairs.chosen for stairs in record.latency.stairs}
    assert chosen[1] != chosen[8]
    assert all(width % 8 == 0 for width in chosen[8].values()), chosen


def test_the_conditions_carry_the_command() -> None:
    conditions = conditions_of(DEPLOY)
    assert conditions.device == DeviceCommand(("time", "{model}"), "toy")
