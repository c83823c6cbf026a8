"""Whole networks teach how much damages count; blocks and widths are chosen together, within every budget."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nets
import pytest
import steady
import torch
from exported import exported
from fixtures import RecordingProgress, make_context, make_model, make_splits
from steady import profile_by_macs

import compress.search.finalists as finalists_module
from compress.checkpoint.rebuild import apply_edits
from compress.config.schema.prune import PruneConfig, SlimConfig
from compress.config.schema.targets import TargetConfig
from compress.config.schema.verify import DeployConfig
from compress.cost.macs import count_macs, count_params
from compress.data.from_config import Splits
from compress.errors import BudgetUnreachable
from compress.model.artifacts import Baseline, ModelMetrics, TorchModel
from compress.model.recipe import RemoveBlock
from compress.pruning.blocks import find_removable_blocks
from compress.pruning.trial import find_cuttable
from compress.search.block_removal import places_in_whole, without_blocks
from compress.search.context import StageContext
from compress.search.parts import Part, Parts
from compress.search.survey import Targets
from compress.search.whole_networks import WholeNetworkSearch
from compress.stages.prune import PruneStage
from compress.stages.slim import SlimStage
from compress.training.evaluate import evaluate_loss

BLOCKS = {"body.1": "body.1()", "body.2": "body.2()"}
Pruned = tuple[TorchModel, dict[str, Any], RecordingProgress]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return make_splits(tmp_path_factory.mktemp("data"), calibration=48, bright=True)


def _config(config: Mapping[str, Any]) -> PruneConfig:
    usual = {"target": TargetConfig(macs=0.5), "multiple_of": 4, "score_images": 16, "whole_networks": 6}
    return PruneConfig(stage="prune", **usual | dict(config))


@pytest.fixture
def prune(data: Splits, tmp_path: Path) -> Callable[..., Pruned]:
    def call(name: str, folder: str = "stage", **config: Any) -> Pruned:
        (tmp_path / folder).mkdir(exist_ok=True)
        ctx, listener = make_context(tmp_path / folder, data)
        slim, record = PruneStage(_config(config)).run(make_model(name, tmp_path), ctx)
        return slim, record, listener

    return call


def _hold_replay(slim: TorchModel, name: str) -> None:
    replayed = apply_edits(nets.build(name, seed=3), slim.recipe, nets.EXAMPLE)
    replayed.load_state_dict(slim.module.state_dict(), strict=True)
    assert torch.equal(replayed(nets.images()), slim.module(nets.images()))


@pytest.mark.parametrize(
    ("target", "count"),
    [({"macs": 0.5}, 12), ({"macs": 0.1}, 6), ({"params": 0.3, "macs": 0.6}, 6)],
    ids=lambda value: str(value),
)
def test_blocks_and_widths_are_chosen_within_the_budgets(
    prune: Callable[..., Pruned], data: Splits, target: dict[str, float], count: int
) -> None:
    slim, record, listener = prune(
        "residual", target=TargetConfig(**target), blocks="joint", whole_networks=count, residual_factors=(100.0, 1.0)
    )
    before = nets.build("residual")
    assert count_macs(slim.module, nets.EXAMPLE) <= target["macs"] * count_macs(before, nets.EXAMPLE)
    assert count_params(slim.module) <= target.get("params", 1.0) * count_params(before)
    _hold_replay(slim, "residual")
    assert [edit.block for edit in slim.recipe.edits if isinstance(edit, RemoveBlock)] == [*record.removed_blocks]
    networks = record.whole_networks
    assert networks.count == count
    assert 2 <= len(networks.tried) <= count
    assert len({str(one) for one in networks.tried}) == len(networks.tried)
    assert sum("network " in note and "validation loss" in note for note in listener.notes) == len(networks.tried)
    assert {one.blocks for one in networks.tried} > {0} or target["macs"] == 0.1
    finalists = record.block_trials
    assert finalists == networks.finalists
    least = min(one.loss for one in finalists if one.loss is not None)
    assert evaluate_loss(slim.module, data.validation) == pytest.approx(least, abs=1e-5)
    assert networks.fit.factors.keys() >= set(BLOCKS.values())
    dumped = record.to_dict()
    assert json.loads(json.dumps(dumped)) == dumped


def test_the_best_networks_of_the_first_rounds_are_finished(prune: Callable[..., Pruned]) -> None:
    _, record, _ = prune("residual", blocks="joint", whole_networks=10)
    networks = record.whole_networks
    best = sorted(networks.tried, key=lambda one: one.loss)[: finalists_module.FINALISTS]
    expected = [one.blocks for one in best]
    if expected[0]:
        expected[-1] = expected[0]  # the usual estimates, without the blocks of the best
    assert [one.blocks for one in networks.finalists] == expected
    assert any(one.source.startswith("blocks x") for one in networks.tried)
    learned = [one for one in networks.tried if one.source in ("learned", "near the best")]
    assert learned
    assert all(one.predicted_loss is not None for one in learned)


@pytest.mark.parametrize("blocks", [0, 1, "auto"])
def test_widths_alone_are_learned_with_any_number_of_blocks(prune: Callable[..., Pruned], blocks: Any) -> None:
    slim, record, listener = prune("residual", blocks=blocks, target=TargetConfig(macs=0.4))
    assert record.macs_after <= 0.4 * record.macs_before
    assert record.whole_networks.block_damages == {}
    assert record.residual_trials == ()
    fit = record.whole_networks.fit
    assert fit is None or not set(BLOCKS.values()) & fit.factors.keys()
    if blocks != "auto":
        assert len(record.removed_blocks) == blocks
        assert record.block_trials == ()
    else:
        assert record.block_trials
    assert not any("residual block can be removed" in note for note in listener.notes)
    _hold_replay(slim, "residual")


def test_what_is_learned_is_no_worse_than_the_first_of_the_usual_choices(
    prune: Callable[..., Pruned], data: Splits
) -> None:
    usual, _, _ = prune("residual", "usual", whole_networks=None)
    learned, record, _ = prune("residual", "learned", whole_networks=10)
    assert len(record.whole_networks.tried) > 3
    losses = [evaluate_loss(one.module, data.validation) for one in (learned, usual)]
    assert losses[0] <= losses[1] * 1.05


def test_a_network_without_removable_blocks_is_narrowed_and_that_is_said(prune: Callable[..., Pruned]) -> None:
    slim, record, listener = prune("chain", blocks="joint")
    assert record.removed_blocks == ()
    assert record.macs_after <= 0.5 * record.macs_before
    assert "no residual block can be removed: widths alone are chosen" in listener.notes
    _hold_replay(slim, "chain")


def test_nothing_learned_is_noted(prune: Callable[..., Pruned], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WholeNetworkSearch, "learn", lambda _: None)
    _, record, listener = prune("chain", blocks=0, whole_networks=4)
    assert record.whole_networks.fit is None
    assert any(note.startswith("whole_networks: no factors of damages were learned from ") for note in listener.notes)


def test_budgets_that_cannot_be_kept_name_blocks_and_widths(prune: Callable[..., Pruned]) -> None:
    text = r"Target 0\.001 of the baseline's macs .* with 3 channel groups and 2 residual blocks at the widths allowed"
    with pytest.raises(BudgetUnreachable, match=text):
        prune("residual", blocks="joint", target=TargetConfig(macs=0.001))
    with pytest.raises(BudgetUnreachable, match=r"Target macs 1\.0 must remove something"):
        prune("residual", blocks="joint", target=TargetConfig(macs=1.0))


def test_excluded_layers_may_lie_in_blocks_that_go(prune: Callable[..., Pruned]) -> None:
    slim, record, _ = prune("residual", blocks="joint", exclude=("body.1.conv1",), target=TargetConfig(macs=0.12))
    assert record.macs_after <= 0.12 * record.macs_before
    assert "body.1.conv1" not in [group.name for group in record.groups]
    assert record.removed_blocks
    _hold_replay(slim, "residual")


@pytest.mark.parametrize("residual", ["keep", "cut"])
@pytest.mark.parametrize("unit", ["macs", "params", "weights"])
def test_a_removed_block_costs_nothing(tmp_path: Path, unit: str, residual: str) -> None:
    """At any widths, with any set of blocks, the cost is that of the network cut so; of weights it is no less."""
    model = make_model("residual", tmp_path)
    every, _ = find_cuttable(model.module, nets.EXAMPLE)
    groups = {name: group for name, group in every.items() if residual == "cut" or not group.is_summed}
    levels = dict.fromkeys(groups, (4, 16))
    targets = Targets(TargetConfig(macs=0.5), model.baseline.metrics, model.module, nets.EXAMPLE, groups, 0)
    table = targets._table(unit, levels, BLOCKS)
    for removed in ((), ("body.1",), ("body.2",), ("body.1", "body.2")):
        short = without_blocks(model, removed)
        found, _ = find_cuttable(short.module, nets.EXAMPLE)
        left = {name: groups[before] for name, (before, _) in places_in_whole(found, every).items() if before in groups}
        there = {name: group for name, group in found.items() if name in left}
        other = Targets(TargetConfig(macs=0.5), model.baseline.metrics, short.module, nets.EXAMPLE, there, 0)
        for width in (4, 16):
            choice = {name: levels[name].index(width if name in there else 16) for name in groups}
            choice |= {decision: int(block not in removed) for block, decision in BLOCKS.items()}
            real = other.cost(unit).at(dict.fromkeys(there, width))
            if unit != "weights":
                assert table.at(choice) == pytest.approx(real)
            else:
                assert table.at(choice) >= real


@pytest.fixture
def timed(data: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the stage where networks take as long as their MACs say."""
    profile_by_macs(monkeypatch)

    def call(folder: str = "stage", **config: Any) -> Any:
        path, module = tmp_path / "baseline.onnx", nets.build("residual")
        shutil.copy(exported("residual"), path)
        figures = ModelMetrics(count_macs(module, nets.EXAMPLE), count_params(module), path.stat().st_size, {}, {})
        model = make_model("residual", tmp_path)
        model = TorchModel(
            model.module, model.factory, model.recipe, model.signature, None, (), Baseline(figures, path, path)
        )
        (tmp_path / folder).mkdir(exist_ok=True)
        listener = RecordingProgress()
        deploy = DeployConfig(batch_size=64)
        ctx = StageContext(tmp_path / folder, 0, data, listener, deploy, tmp_path / "tables")
        return *PruneStage(_config(config)).run(model, ctx), listener

    return call


@pytest.mark.parametrize("target", [{"latency": 0.4}, {"latency_ms": 0.5, "size_mb": 0.03}], ids=str)
def test_a_budget_in_milliseconds_is_met_and_timed(
    timed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, target: dict[str, float]
) -> None:
    monkeypatch.setattr(finalists_module, "FINALISTS", 1)
    seen: list[Any] = []
    budgets = Targets.budgets
    monkeypatch.setattr(Targets, "budgets", lambda self, *args: seen.append((self, args)) or budgets(self, *args))
    if "latency_ms" in target:
        target = target | {"latency_ms": target["latency_ms"] * steady._total_ms(exported("residual"))}
    slim, record, _ = timed(blocks="joint", target=TargetConfig(**target))
    name = next(iter(target))
    assert record.reached[name] <= target[name] * 1.03
    assert record.reached.get("size_mb", 0.0) <= target.get("size_mb", math.inf)
    assert record.latency.rounds, "the final choice is timed as a whole"
    assert record.whole_networks.correction == pytest.approx(1.0, abs=0.05)
    _hold_replay(slim, "residual")
    _hold_time_of_blocks(*next(one for one in seen if len(one[1]) == 2))


def _hold_time_of_blocks(targets: Targets, args: Any) -> None:
    """Without its blocks the network takes as long as its MACs say, with them as long as ever."""
    levels, blocks = args
    assert blocks == BLOCKS
    assert targets.latency is not None
    cost = targets.latency.switched_cost(blocks)
    full = {name: len(widths) - 1 for name, widths in levels.items()}
    whole, bare = (cost.at(full | dict.fromkeys(BLOCKS.values(), kept)) for kept in (1, 0))
    assert whole == pytest.approx(targets.latency.cost.at(full))
    macs = [
        count_macs(without_blocks(make_model("residual", Path()), gone).module, nets.EXAMPLE)
        for gone in ((), tuple(BLOCKS))
    ]
    assert bare / whole == pytest.approx(macs[1] / macs[0], abs=0.05)


def test_the_search_goes_on_after_every_part(
    prune: Callable[..., Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    stop_after: list[int] = []
    add = Parts.add

    def counting(parts: Parts, key: Mapping[str, Any], part: Part) -> Part:
        kept = add(parts, key, part)
        made.append(str(key))
        if len(made) in stop_after:
            raise KeyboardInterrupt
        return kept

    monkeypatch.setattr(Parts, "add", counting)
    undisturbed, record, _ = prune("residual", "undisturbed", blocks="joint")
    whole = list(made)
    assert len(whole) == len(set(whole)), "no part is made twice"
    kinds = {
        kind
        for kind in ("joint intact", "joint block damages", "joint network", "without")
        if f"'{kind}'" in str(whole)
    }
    assert len(kinds) == 4
    for stop in (len(whole) // 3, len(whole) - 3):
        made.clear()
        stop_after[:] = [stop]
        with pytest.raises(KeyboardInterrupt):
            prune("residual", f"stopped{stop}", blocks="joint")
        stop_after.clear()
        slim, again, _ = prune("residual", f"stopped{stop}", blocks="joint")
        assert made == whole
        assert again == record
        states = slim.module.state_dict(), undisturbed.module.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_slim_learns_damages_too(data: Splits, tmp_path: Path) -> None:
    ctx, _ = make_context(tmp_path, data)
    config = SlimConfig(
        stage="slim",
        target=TargetConfig(macs=0.5),
        multiple_of=4,
        score_images=16,
        whole_networks=4,
        moves=("channels",),
    )
    slim, record = SlimStage(config).run(make_model("residual", tmp_path), ctx)
    assert record.macs_after <= 0.5 * record.macs_before
    assert record.steps[0].prune.whole_networks.tried
    _hold_replay(slim, "residual")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"blocks": "joint", "allocation": "uniform", "whole_networks": None}, "must be global where blocks is joint"),
        ({"allocation": "uniform"}, "must be global where whole_networks is given"),
        ({"whole_networks": 3}, "greater than or equal to 4"),
        (
            {"blocks": "joint", "method": "gates", "training": {"epochs": 1}, "whole_networks": None},
            "must not be joint",
        ),
        ({"method": "gates", "training": {"epochs": 1}}, "whole_networks must be left out where a method"),
        ({"blocks": "both"}, "a whole number of at least 0, auto or joint"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(config)


def test_blocks_are_found_as_ever() -> None:
    assert find_removable_blocks(nets.build("residual"), nets.EXAMPLE) == tuple(BLOCKS)
