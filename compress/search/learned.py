"""Learned choice of channels and blocks: a method's hooks in the training loop, and a choice within the budget.

    network -> survey -> training, with the method's hooks -> channels chosen by the method -> their removal, by `prune`

The method requests a choice many times; the last one is final, and is timed if the target is a latency.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.allocation.widths import Candidates
from compress.catalog import METHODS
from compress.checkpoint.rebuild import example_input
from compress.config.schema.prune import PruneConfig
from compress.errors import NONE_LEFT_HINT, WITHIN_HINT, AlreadyWithin, BudgetUnreachable, InternalError
from compress.model.artifacts import TorchModel
from compress.model.stage_records import MethodRecord
from compress.pruning.blocks import closing_layers
from compress.pruning.groups import NORMS, ChannelGroup
from compress.pruning.methods.base import Method, Removed, Setting, WarningMethod
from compress.pruning.ranking.selection import Selection, find_candidates
from compress.pruning.repair.lockstep import following_norms
from compress.pruning.width_costs import ExpectedCost
from compress.search.block_removal import places_in_whole, without_blocks
from compress.search.context import StageContext
from compress.search.hooked_training import hooked_settings, train_with_hooks
from compress.search.latency_loop import TimedChoice
from compress.search.survey import Survey, survey
from compress.training.distributed import from_rank_0
from compress.training.hooks import OptimizerHooks
from compress.training.settings import FitSettings, learning_rate, plan_steps

STATE_FILE = "method.pt"


@dataclass(frozen=True)
class Learned:
    """A trained network, and the channels and blocks to remove from it.

    Attributes:
        surveyed: The trained network without the removed blocks, and its prunable groups.
        candidates: Its groups, with the scores that the choice is based on.
        selection: The channels to remove.
        timed: Choices that were timed as complete networks, in order.
        removed_blocks: Module paths of the removed blocks.
        record: Record of the method and its training.
    """

    surveyed: Survey
    candidates: list[Candidates]
    selection: Selection
    timed: list[TimedChoice]
    removed_blocks: tuple[str, ...]
    record: MethodRecord


def learn(model: TorchModel, config: PruneConfig, ctx: StageContext) -> Learned:
    """Train a copy of a network while a method chooses the channels to remove.

    Args:
        model: The network, not modified.
        config: Settings of the prune stage, with a method and its training.
        ctx: Splits, folder and listener of the stage; the state of the training is kept in the folder.

    Raises:
        StageError: The run is too short for removed channels to decay.
        As `compress.search.survey.survey`, `Survey.choose_timed` and `compress.training.loop.fit`.
    """
    training = config.method_training
    if config.method is None or training is None:
        raise InternalError("A pipeline with a method but no training passed validation.")
    method_class = METHODS.get(config.method)
    surveyed = survey(model, config, None, ctx, method_class.unfit)
    if not surveyed.groups:
        raise BudgetUnreachable("No prunable channel group is left.", hint=NONE_LEFT_HINT)
    module, chooser = copy.deepcopy(model.module), _Chooser(surveyed, ctx)
    setting = _setting(surveyed, module, chooser, hooked_settings(training, ctx, module), ctx)
    _require_work(chooser, surveyed)
    method: Method = method_class(setting, config.method_settings)
    hooks, state = _Hooks(method, chooser), ctx.folder / STATE_FILE
    record = train_with_hooks(config.method, module, model, training, hooks, state, ctx)
    method.finish()
    for text in method.warnings() if isinstance(method, WarningMethod) else ():
        ctx.progress.warn(f"Method '{config.method}': {text}")
    record = replace(record, metrics=method.metrics(), cause=method.cause())
    return chooser.result(replace(model, module=module), method, record)


def _require_work(chooser: "_Chooser", surveyed: Survey) -> None:
    """Check before the training that the budget can be met, and that something must be removed for it.

    Raises:
        BudgetUnreachable: The budget cannot be met.
        AlreadyWithin: Nothing must be removed.
    """
    if not chooser({name: torch.ones(group.width) for name, group in surveyed.groups.items()}):
        asked = ", ".join(f"{name} {value}" for name, value in surveyed.config.target.given().items())
        raise AlreadyWithin(
            f"Target {asked} must remove something, but the network is within it as it is.", hint=WITHIN_HINT
        )


class _Hooks:
    """A method's hooks, with the final choice as a part of their state."""

    def __init__(self, method: Method, chooser: "_Chooser") -> None:
        self._method, self._chooser = method, chooser
        self.on_step_begin, self.on_gradients = method.on_step_begin, method.on_gradients
        self.on_step_end, self.parameters = method.on_step_end, method.parameters
        if isinstance(method, OptimizerHooks):
            self.on_optimizer = method.on_optimizer

    def state_dict(self) -> dict[str, Any]:
        return {"method": self._method.state_dict(), "choice": self._chooser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._method.load_state_dict(state["method"])
        self._chooser.load_state_dict(state["choice"])


class _Chooser:
    """Chooser of the channels to remove while a network trains; see `compress.pruning.methods.base.Choose`.

    Of several ranks, rank 0 chooses, and times complete networks if the target is a latency; the others wait for it.

    Args:
        surveyed: The network before the training, and its prunable groups.
        ctx: Splits, folder and listener of the stage.
    """

    def __init__(self, surveyed: Survey, ctx: StageContext) -> None:
        self._surveyed, self._ctx = surveyed, ctx
        self._shorter: dict[tuple[str, ...], Survey] = {(): surveyed}
        self._final: dict[str, Any] | None = None

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        damages: Mapping[str, np.ndarray] | None = None,
        closed: Sequence[str] = (),
        is_final: bool = False,
    ) -> Removed:
        return _as_removed(from_rank_0(lambda: self._choose(scores, damages, closed, is_final)))

    def _choose(
        self,
        scores: Mapping[str, Tensor],
        damages: Mapping[str, np.ndarray] | None,
        closed: Sequence[str],
        is_final: bool,
    ) -> Removed:
        surveyed = self._without(closed)
        places = places_in_whole(surveyed.groups, self._surveyed.groups)
        candidates = _candidates(surveyed, places, scores, damages)
        if is_final:
            selection, timed = surveyed.choose_timed(candidates, self._ctx.progress)
            self._final = {
                "scores": {name: values.clone() for name, values in scores.items()},
                "damages": None if damages is None else {name: row.tolist() for name, row in damages.items()},
                "is_optimal": selection.is_optimal,
                "timed": [asdict(choice) for choice in timed],
            }
        else:
            selection = surveyed.choose(candidates, 1.0)
        return {
            places[name][0]: tuple(sorted(places[name][1][list(channels)].tolist()))
            for name, channels in selection.removed.items()
        }

    def result(self, model: TorchModel, method: Method, record: MethodRecord) -> Learned:
        """Return the final choice of the method, for the trained network."""
        final = self._final
        if final is None:
            raise InternalError(f"Method '{record.name}' ended without a choice.")
        surveyed = replace(self._without(method.closed), model=without_blocks(model, method.closed))
        places = places_in_whole(surveyed.groups, self._surveyed.groups)
        damages = final["damages"] and {name: np.asarray(row) for name, row in final["damages"].items()}
        candidates = _candidates(surveyed, places, final["scores"], damages)
        removed: Removed = {}
        for name, (before, channels) in places.items():
            goes = torch.isin(channels, torch.tensor(method.removed.get(before, ()), dtype=torch.int64))
            if goes.any():
                removed[name] = tuple(goes.nonzero().flatten().tolist())
        widths = {name: group.width - len(removed.get(name, ())) for name, group in surveyed.groups.items()}
        selection = Selection(widths, removed, final["is_optimal"])
        timed = [TimedChoice(**choice) for choice in final["timed"]]
        return Learned(surveyed, candidates, selection, timed, method.closed, record)

    def state_dict(self) -> dict[str, Any]:
        return {"final": self._final}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._final = state["final"]

    def _without(self, closed: Sequence[str]) -> Survey:
        """Return the network without some blocks, and its prunable groups."""
        if tuple(closed) not in self._shorter:
            whole = self._surveyed
            among = frozenset(member.layer for group in whole.groups.values() for member in group.producers)
            model, latency = without_blocks(whole.model, closed), whole.targets.latency
            self._shorter[tuple(closed)] = survey(model, whole.config, latency, self._ctx, among=among)
        return self._shorter[tuple(closed)]


def _as_removed(values: Mapping[str, Sequence[int]]) -> Removed:
    return {name: tuple(channels) for name, channels in values.items()}


def _candidates(
    surveyed: Survey,
    places: Mapping[str, tuple[str, Tensor]],
    scores: Mapping[str, Tensor],
    damages: Mapping[str, np.ndarray] | None,
) -> list[Candidates]:
    """Return the groups with scores, and perhaps damages, taken from the groups of the complete network."""
    here = {name: scores[before][channels] for name, (before, channels) in places.items()}
    candidates = find_candidates(surveyed.groups, here, surveyed.levels, comparable=True)
    if damages is None:
        return candidates
    return [replace(one, measured=damages[places[one.name][0]]) for one in candidates]


def _setting(
    surveyed: Survey, module: nn.Module, chooser: _Chooser, settings: FitSettings, ctx: StageContext
) -> Setting:
    """Return the setting of a method; `module`, a copy of the surveyed network, is trained."""
    _, steps = plan_steps(ctx.data.train, settings)
    unit, kept = from_rank_0(lambda: _unit_and_kept(surveyed))
    blocks = _branches(surveyed.model) if surveyed.config.blocks == "auto" else {}
    whole = float(getattr(surveyed.model.baseline.metrics, unit))
    return Setting(
        module=module,
        groups={name: _of(module, group) for name, group in surveyed.groups.items()},
        choose=chooser,
        levels=surveyed.levels,
        rates=np.asarray([learning_rate(settings, step, steps) for step in range(steps)]),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        seed=ctx.seed,
        cost=ExpectedCost(surveyed.targets.cost(unit), whole, list(blocks)),
        kept_ratio=kept,
        blocks=blocks,
    )


def _of(module: nn.Module, group: ChannelGroup) -> ChannelGroup:
    """Return a group with its modules taken from a copy of its network."""
    members, gates, bare = (
        tuple(replace(member, module=module.get_submodule(member.layer)) for member in several)
        for several in (group.members, group.gates, group.bare)
    )
    return replace(group, members=members, gates=gates, bare=bare)


def _unit_and_kept(surveyed: Survey) -> tuple[str, float]:
    """Return the unit of expected costs, and the share of the baseline to keep.

    Params stand for a size, MACs for a latency; only the final choice uses the target itself.
    """
    target, targets = surveyed.config.target, surveyed.targets
    if target.macs is not None:
        return "macs", target.macs
    if target.params is not None:
        return "params", target.params
    if target.size_mb is not None:
        return "params", min(1.0, target.size_mb * 1e6 / targets.file_bytes)
    return "macs", targets.latency_ratio or 1.0


def _branches(model: TorchModel) -> dict[str, str]:
    """Return removable residual block -> path of the module whose output is added to the block's input."""
    module, example = model.module, example_input(model.signature)
    norms = following_norms(module, NORMS, example)
    return {block: norms.get(layer, layer) for layer, block in closing_layers(module, example).items()}
