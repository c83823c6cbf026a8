"""prune: TorchModel -> TorchModel with fewer channels and blocks, within budgets relative to the baseline."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from torch import nn

from compress.allocation.widths import Candidates
from compress.checkpoint.rebuild import example_input
from compress.config.schema.prune import CutConfig, PruneConfig
from compress.cost.macs import count_macs, count_params
from compress.cost.table_file import TableFile
from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.errors import WITHIN_HINT, AlreadyWithin, BudgetUnreachable, ConfigValueError, InternalError
from compress.model.artifacts import TorchModel
from compress.model.recipe import RemoveChannels
from compress.progress import Progress
from compress.pruning.blocks import find_removable_blocks
from compress.pruning.groups import Read, kept_outputs
from compress.pruning.ranking.selection import Groups, Selection
from compress.pruning.surgery import remove_channels
from compress.pruning.trial import silenced_copy
from compress.search.block_removal import Trunk, shorten
from compress.search.context import Record, StageContext
from compress.search.hooked_training import loss_and_quality, say_cut
from compress.search.isometry_record import measure_isometry
from compress.search.latency_loop import WITHIN as LATENCY_WITHIN
from compress.search.latency_loop import TimedChoice, latency_record
from compress.search.learned import learn
from compress.search.parts import Part, weights_digest
from compress.search.repairs import Repair, apply_repairs, repairs_towards
from compress.search.scoring import Scoring, criterion_name, scale_slots
from compress.search.survey import Survey, survey
from compress.search.validation import before_and_after, metric_of, validation_quality
from compress.search.whole_networks import Steps, search
from compress.search.width_latency import LatencyModel
from compress.storage.digest import digest_value
from compress.tasks.outputs import each
from compress.training.evaluate import evaluate_loss, run
from compress.training.memory_format import in_fastest_memory_format, set_memory_format

MET_WITHIN = 0.005
CUT_TOLERANCE = 1e-3
PATIENCE, TRIALS = 2, 9
UNITS = {
    "latency": "of the baseline's latency",
    "latency_ms": "ms",
    "macs": "of the baseline's macs",
    "params": "of the baseline's params",
    "size_mb": "MB",
}


@dataclass(frozen=True)
class Prepared:
    """A network about to be cut.

    Attributes:
        trunk: What channels are cut from.
        surveyed: What of it can be cut, and what is to be met.
        candidates: The groups with their scores and allowed widths.
        key: Tells it from others among the parts of the stage that are done.
        damage: Measure that widths are chosen by: scores, errors or sensitivity; None where a method decides.
    """

    trunk: Trunk
    surveyed: Survey
    candidates: list[Candidates]
    key: str
    damage: str | None = None


@dataclass(frozen=True)
class Attempt:
    """A network within the targets.

    Attributes:
        prepared: What it was cut from.
        model: The slim network.
        selection: The channels chosen.
        timed: Whole networks that were timed on the way.
        repairs: What was tried after the cut.
    """

    prepared: Prepared
    model: TorchModel
    selection: Selection
    timed: list[TimedChoice]
    repairs: list[Record]

    @property
    def removed_blocks(self) -> tuple[str, ...]:
        """The blocks that are gone."""
        return self.prepared.trunk.removed


@dataclass(frozen=True)
class Trial:
    """An attempt with a number of blocks removed.

    Attributes:
        blocks: That number.
        attempt: Gives what came of it; made again of its parts where an interrupted run tried it.
        loss: On the validation split; infinite where it is no number.
        cuts_channels: Whether any channel went.
    """

    blocks: int
    attempt: Callable[[], Attempt]
    loss: float
    cuts_channels: bool


class _LatestLatency:
    """Latency of the last network with a table of its own.

    Attributes:
        get: Gives it; after a kill it is made of its table when it is first asked for.
    """

    def __init__(self) -> None:
        self.get: Callable[[], LatencyModel | None] = lambda: None

    def is_other(self, found: LatencyModel | None) -> bool:
        """Whether a network has another table than this one."""
        known = self.get()
        return found is not None and (known is None or found.table is not known.table)


class PruneStage:
    """Choose, cut, repair; say what was asked and what was reached."""

    def __init__(self, config: PruneConfig) -> None:
        self.config = config
        self.memory_format = torch.contiguous_format

    def run(
        self, artifact: TorchModel, ctx: StageContext, trunks: Iterable[Trunk] | None = None
    ) -> tuple[TorchModel, Record]:
        """Return the slim network.

        Args:
            artifact: The network.
            ctx: Surroundings.
            trunks: What `shorten` gives of it, where a caller that runs several stages on it has that.

        Raises:
            BudgetUnreachable: The target cannot be met, or nothing would be removed.
            UntraceableModel: No channel graph could be built.
            UnsupportedLayer: The criterion cannot score a group.
            ConfigValueError: `exclude` or `blocks` does not fit the network.
            ArtifactError: The latency table given is of another machine or network.
        """
        with in_fastest_memory_format(artifact.module, ctx.data.validation) as memory_format:
            self.memory_format = memory_format
            model, record = self._run(artifact, self._shorten(artifact, ctx) if trunks is None else trunks, ctx)
        set_memory_format(model.module, torch.contiguous_format)
        return model, record

    def _shorten(self, artifact: TorchModel, ctx: StageContext) -> Iterator[Trunk]:
        config = self.config
        return shorten(artifact, config.score_images, config.repair, ctx, config.refit_images)

    def _run(self, artifact: TorchModel, trunks: Iterable[Trunk], ctx: StageContext) -> tuple[TorchModel, Record]:
        before = validation_quality(artifact.module, ctx)
        self._say_few_images(ctx)
        trials: list[Record] = []
        learned: Record | None = None
        networks: Record | None = None
        if self.config.method is not None:
            best, learned = self._learn(self._without_blocks(trunks, self._blocks_first), ctx)
        elif self.config.trials:
            best, networks = self._search(trunks, trials, ctx)
        elif self.config.blocks == "auto":
            best = self._best_attempt(trunks, trials, ctx)
        else:
            trunk = self._without_blocks(trunks, self._blocks_first)
            best = self._attempt(self._prepare(trunk, None, ctx), ctx)
        residual_trials: list[Record] = []
        if learned is None and networks is None:
            best = self._best_along_shortcuts(best, residual_trials, ctx)
        if not best.selection.removed and not best.removed_blocks:
            asked, reached = self._asked_and_reached(best)
            got = ", ".join(f"{value:.3f} {UNITS[name]}" for name, value in reached.items())
            wanted = ", ".join(f"{name} {value}" for name, value in asked.items())
            raise AlreadyWithin(
                f"Target {wanted} must remove something, but the network already has {got}.", hint=WITHIN_HINT
            )
        after = validation_quality(best.model.module, ctx)
        record = {
            **self._record(artifact, best),
            "removed_blocks": list(best.removed_blocks),
            "block_trials": trials,
            "residual_trials": residual_trials,
            "whole_networks": networks,
            "method": learned,
            "repairs": best.prepared.trunk.repairs + best.repairs,
            "excluded": [{"name": item.name, "reason": item.reason} for item in best.prepared.surveyed.excluded],
            "isometry": self._isometry(artifact, best, ctx),
            **before_and_after(ctx, before, after),
        }
        self._say(record, best, ctx.progress)
        return best.model, record

    def profile(self, artifact: TorchModel, ctx: StageContext) -> TableFile:
        """Return the timed variants that a run would choose widths by, without choosing any.

        Raises:
            As `run`.
        """
        trunks = self._shorten(artifact, ctx)
        trunk = self._without_blocks(trunks, self._blocks_first).model
        latency = survey(trunk, self.config, None, ctx).targets.latency
        if latency is None:
            raise InternalError("A stage without a latency target was asked for a latency table.")
        return latency.file

    @property
    def _blocks_first(self) -> int:
        """Number of blocks that are removed before anything is chosen."""
        return 0 if isinstance(self.config.blocks, str) else self.config.blocks

    def _search(self, trunks: Iterable[Trunk], trials: list[Record], ctx: StageContext) -> tuple[Attempt, Record]:
        """Choose among whole networks by damages that they teach; with blocks in the same solve where asked for.

        Args:
            trunks: As in `run`.
            trials: Numbers of blocks that were tried are added to it.
            ctx: Surroundings.
        """
        blocks: tuple[str, ...] = ()
        if self.config.blocks == "auto":
            prepared = self._best_attempt(trunks, trials, ctx).prepared
        else:
            trunk = self._without_blocks(trunks, self._blocks_first)
            prepared = self._prepare(trunk, None, ctx)
            if self.config.blocks == "joint":
                blocks = find_removable_blocks(trunk.whole, example_input(trunk.model.signature))
                if not blocks:
                    ctx.progress.note("no residual block can be removed: widths alone are chosen")

        def finish(one: Prepared, candidates: Sequence[Candidates], how: Record) -> Attempt:
            return self._repair(self._cut(self._choice(one, candidates, how, ctx), ctx), ctx)

        steps = Steps(
            lambda trunk, latency, among: self._prepare(trunk, latency, ctx, among),
            finish,
            lambda attempt: self._loss(attempt, ctx),
            self.memory_format,
        )
        best, record = search(prepared, blocks, self._factors(prepared), self.config.trials, steps, ctx)
        if blocks:
            trials.extend(record["finalists"])
        return best, record

    def _without_blocks(self, trunks: Iterable[Trunk], count: int) -> Trunk:
        """Return the network with a number of blocks removed.

        Raises:
            ConfigValueError: It has fewer; nothing is removed or repaired then.
        """
        for trunk in trunks:
            if len(trunk.removed) == count:
                return trunk
            if count > trunk.blocks:
                break
        there = trunk.blocks if count > trunk.blocks else len(trunk.removed)  # one may go only while another is there
        raise ConfigValueError(
            f"blocks must not be more than the residual blocks that can be removed ({there}), got {count}."
        )

    def _best_attempt(self, trunks: Iterable[Trunk], trials: list[Record], ctx: StageContext) -> Attempt:
        """Meet the targets with no block removed, with one, with two ...; keep the least validation loss.

        In a network of many blocks several go between one trial and the next, and the numbers around the best are tried
        in the end. More blocks are not tried when that loss has risen twice in a row, or when the blocks alone are more
        than was asked for. What was tried is added to `trials`.
        """
        best: Trial | None = None
        unreachable: BudgetUnreachable | None = None
        latency = _LatestLatency()
        rises = 0
        between: dict[int, Trunk] = {}  # near the best, not tried

        def attempt(trunk: Trunk) -> Trial | None:
            nonlocal unreachable
            try:
                trial = self._trial(trunk, latency, ctx)
            except BudgetUnreachable as error:
                trials.append({"blocks": len(trunk.removed), "loss": None, "reason": error.message})
                unreachable = unreachable or error
                return None
            trials.append({"blocks": trial.blocks, "loss": trial.loss, "reason": None})
            ctx.progress.note(f"{trial.blocks} blocks removed: validation loss {trial.loss:.4f} within the budget")
            return replace(trial, loss=math.inf if math.isnan(trial.loss) else trial.loss)

        for trunk in trunks:
            step, count = math.ceil(trunk.blocks / TRIALS) or 1, len(trunk.removed)
            if count % step:
                between[count] = trunk
                continue
            trial = attempt(trunk)
            if trial is None:
                continue
            is_better = best is None or trial.loss < best.loss
            rises = 0 if is_better else rises + 1
            best = trial if is_better else best
            if rises == PATIENCE or not trial.cuts_channels:
                break
            between = {
                other: kept for other, kept in between.items() if best is not None and other > best.blocks - step
            }
        while best is not None and (near := between.keys() & {best.blocks - 1, best.blocks + 1}):
            trial = attempt(between.pop(min(near)))
            best = trial if trial is not None and trial.loss < best.loss else best
        if best is None:
            raise unreachable or InternalError("No number of blocks was tried.")
        return best.attempt()

    def _trial(self, trunk: Trunk, latency: "_LatestLatency", ctx: StageContext) -> Trial:
        """Meet the targets without some blocks, or read what an interrupted run found; made again only if it is kept.

        Args:
            trunk: The network without these blocks.
            latency: Of the trials before this one; afterwards of this one, too.
            ctx: Surroundings.

        Raises:
            BudgetUnreachable: The targets cannot be met without these blocks.
        """
        key = {"part": "trial", "of": self._key(trunk, None, ctx), "target": self.config.target.given()}
        part, before = ctx.parts.find(key), latency.get
        if part is None:
            prepared = self._prepare(trunk, before(), ctx)
            found = prepared.surveyed.targets.latency
            is_timed_anew = latency.is_other(found)
            latency.get = lambda: found
            attempt = self._attempt(prepared, ctx)
            loss, cuts = self._loss(attempt, ctx), bool(attempt.selection.removed)
            ctx.parts.add(key, Part({"loss": loss, "cuts_channels": cuts, "is_timed_anew": is_timed_anew}))
            return Trial(len(trunk.removed), lambda: attempt, loss, cuts)
        if part.record["is_timed_anew"]:
            latency.get = cache(lambda: survey(trunk.model, self.config, before(), ctx).targets.latency)

        def again() -> Attempt:
            return self._attempt(self._prepare(trunk, before(), ctx), ctx)

        return Trial(len(trunk.removed), again, part.record["loss"], part.record["cuts_channels"])

    def _prepare(
        self, trunk: Trunk, latency: LatencyModel | None, ctx: StageContext, among: frozenset[str] | None = None
    ) -> Prepared:
        """Find what can be cut and what it costs.

        Args:
            trunk: The network, perhaps without some blocks.
            latency: Of the same network with more blocks; its table is used where it covers this one.
            ctx: Surroundings.
            among: As in `survey`.
        """
        surveyed = survey(trunk.model, self.config, latency, ctx, among=among)
        key = self._key(trunk, surveyed, ctx)
        scoring = Scoring(self.config, trunk, surveyed, key, ctx)
        return Prepared(trunk, surveyed, scoring.candidates(), key, scoring.damage)

    def _key(self, trunk: Trunk, surveyed: Survey | None, ctx: StageContext) -> str:
        """Return what tells a network from others, among the parts of the stage that are done."""
        values = {
            "config": self.config.model_dump(mode="json", exclude={"target", "blocks"}),
            "seed": ctx.seed,
            "removed": trunk.removed,
            "weights": [weights_digest(trunk.whole), weights_digest(trunk.model.module)],
            "levels": None if surveyed is None else surveyed.levels,
        }
        return digest_value(values)

    def _loss(self, attempt: Attempt, ctx: StageContext) -> float:
        """Return the validation loss of a network that was cut and repaired."""

        def measure() -> Part:
            return Part(evaluate_loss(attempt.model.module, ctx.data.validation, progress=ctx.progress))

        key = {"part": "loss", "of": attempt.prepared.key, "removed": attempt.selection.removed}
        return float(ctx.parts.keep(key, measure).record)

    def _best_along_shortcuts(self, kept: Attempt, trials: list[Record], ctx: StageContext) -> Attempt:
        """Meet the targets again with more channels of residual streams cut; keep the least validation loss.

        How much a channel that every block of a stage adds to is missed, scores and repairs say less surely than of one
        inside a block.

        Args:
            kept: The attempt that hardly touches them.
            trials: What was tried is added to it.
            ctx: Surroundings.
        """
        if self._factors(kept.prepared) == (1.0,):
            return kept
        best, least = kept, self._loss(kept, ctx)
        factors = self._factors(kept.prepared)
        trials.append({"factor": factors[0], "loss": least})
        tried = [kept.selection.removed]
        for factor in factors[1:]:
            found = self._chosen(kept.prepared, ctx, factor)
            if found.selection.removed in tried:
                continue
            tried.append(found.selection.removed)
            found = self._repair(self._cut(found, ctx), ctx)
            loss = self._loss(found, ctx)
            trials.append({"factor": factor, "loss": loss})
            ctx.progress.note(
                f"damage along shortcuts counted {factor:g} times: validation loss {loss:.4f}, {least:.4f} before"
            )
            if loss < least or math.isnan(least):
                best, least = found, loss
        return best

    def _factors(self, prepared: Prepared) -> tuple[float, ...]:
        """Return what the damage of channels along shortcuts is to be multiplied by, one after the other."""
        has_any = any(group.is_summed for group in prepared.surveyed.groups.values())
        return self.config.residual_factors if self.config.residual == "auto" and has_any else (1.0,)

    def _attempt(self, prepared: Prepared, ctx: StageContext) -> Attempt:
        """Cut channels until the targets are met, and repair."""
        return self._repair(self._cut(self._chosen(prepared, ctx, self._factors(prepared)[0]), ctx), ctx)

    def _chosen(self, prepared: Prepared, ctx: StageContext, factor: float) -> Attempt:
        """Choose channels to go until the targets are met; none is cut yet.

        Args:
            prepared: The network about to be cut.
            ctx: Surroundings.
            factor: Of the damage of channels along shortcuts.
        """
        groups = prepared.surveyed.groups
        candidates = [one.dearer(factor) if groups[one.name].is_summed else one for one in prepared.candidates]
        return self._choice(prepared, candidates, {"factor": factor}, ctx)

    def _choice(self, prepared: Prepared, candidates: Sequence[Candidates], how: Record, ctx: StageContext) -> Attempt:
        """Choose channels to go by candidates until the targets are met; none is cut yet.

        Args:
            prepared: The network about to be cut.
            candidates: Its groups, with the damages to choose by.
            how: Tells the choice from others of the same network.
            ctx: Surroundings.
        """
        key = {"part": "choice", "of": prepared.key, "target": self.config.target.given(), **how}
        part = ctx.parts.find(key)
        if part is None:
            selection, timed = prepared.surveyed.choose_timed(candidates, ctx.progress)
            ctx.parts.add(key, Part([asdict(selection), [asdict(choice) for choice in timed]]))
        else:
            values, choices = part.record
            removed = {name: tuple(channels) for name, channels in values["removed"].items()}
            selection = Selection(values["widths"], removed, values["is_optimal"])
            timed = [TimedChoice(**choice) for choice in choices]
        return Attempt(prepared, prepared.trunk.model, selection, timed, [])

    def _learn(self, trunk: Trunk, ctx: StageContext) -> tuple[Attempt, Record]:
        """Train while a method chooses what goes, cut that, and repair; say what the cut alone did to the loss."""
        learned = learn(trunk.model, self.config, ctx)
        model = learned.surveyed.model
        if learned.removed_blocks:
            ctx.progress.note(f"residual blocks removed: {', '.join(learned.removed_blocks)}")
        slim_trunk = Trunk(model, trunk.removed + learned.removed_blocks, trunk.repairs, model.module, trunk.blocks)
        key = self._key(slim_trunk, learned.surveyed, ctx)
        prepared = Prepared(slim_trunk, learned.surveyed, learned.candidates, key)
        cut = self._cut(Attempt(prepared, model, learned.selection, learned.timed, []), ctx)
        record = {**learned.record, **loss_and_quality(cut.model.module, "after_cut", ctx)}
        say_cut(record, metric_of(ctx.data.validation), ctx.progress)
        return self._repair(cut, ctx), record

    def _cut(self, attempt: Attempt, ctx: StageContext) -> Attempt:
        """Cut the channels that an attempt has chosen."""
        selection, trunk, groups = attempt.selection, attempt.prepared.trunk, attempt.prepared.surveyed.groups
        if not selection.removed:
            return attempt
        edit, module = RemoveChannels(selection.removed), trunk.model.module
        slim = remove_channels(module, edit, example_input(trunk.model.signature))
        set_memory_format(slim, self.memory_format)
        check_cut(slim, module, selection, groups, ctx.data.calibration)
        return replace(attempt, model=replace(trunk.model, module=slim, recipe=trunk.model.recipe.then(edit)))

    def _repair(self, attempt: Attempt, ctx: StageContext) -> Attempt:
        """Repair a network that was cut, in place."""
        selection, trunk, slim = attempt.selection, attempt.prepared.trunk, attempt.model.module
        if not selection.removed:
            return attempt
        example = example_input(attempt.model.signature)
        kept = kept_outputs(selection.removed, attempt.prepared.surveyed.groups)

        def repair() -> Part:
            names, images = self.config.repair, self.config.refit_images
            ((_, fold),) = repairs_towards(trunk.whole, slim, kept, ("bias_folding",), example, ctx, images)
            wanted = repairs_towards(trunk.whole, slim, kept, names, example, ctx, images)
            wanted = self._scaling(attempt, fold) + wanted
            return Part(apply_repairs(slim, wanted, ctx), slim.state_dict())

        part = ctx.parts.keep({"part": "repair", "of": attempt.prepared.key, "removed": selection.removed}, repair)
        slim.load_state_dict(part.tensors)
        return replace(attempt, repairs=part.record)

    def _isometry(self, artifact: TorchModel, best: Attempt, ctx: StageContext) -> Record:
        """Measure Jacobian singular values before the stage, after the cut of channels and after its repair."""
        unrepaired = replace(best, model=best.prepared.trunk.model, repairs=[])
        is_repaired = bool(best.selection.removed) and any(one["is_kept"] for one in best.repairs)
        networks = {
            "before": lambda: artifact.module,
            "after_cut": (lambda: self._cut(unrepaired, ctx).model.module)
            if is_repaired
            else lambda: best.model.module,
            "after_repair": (lambda: best.model.module) if is_repaired else None,
        }
        return measure_isometry(artifact, networks, ctx)

    def _scaling(self, attempt: Attempt, fold: Callable[[nn.Module], Sized]) -> list[Repair]:
        """Return the repair that multiplies what reads kept channels by the factors that the ranking found for them.

        The factors are found with means taken off, so that `fold`, which moves means into biases, is part of it.
        """
        selection, groups = attempt.selection, attempt.prepared.surveyed.groups
        chosen = {
            one.name: torch.from_numpy(scales)
            for one in attempt.prepared.candidates
            if one.name in selection.removed and (scales := one.unit_scales(selection.widths[one.name])) is not None
        }
        if not chosen or "scaling" not in self.config.repair:
            return []

        def scale(module: nn.Module) -> list[str]:
            """Multiply the slots that are left in each read of the slim network, which are in their old order."""
            for name, scales in chosen.items():
                group, gone = groups[name], torch.tensor(selection.removed[name])
                for read in group.reads:
                    weight = getattr(module.get_submodule(read.path), read.name)
                    stays = ~torch.isin(read.channels, gone)
                    slots = _positions_left(read, selection.removed, groups)[stays]
                    scale_slots(weight, read.dim, slots, scales.repeat(group.parts)[read.channels[stays]])
            fold(module)
            return list(chosen)

        return [("scaling", scale)]

    def _record(self, before: TorchModel, attempt: Attempt) -> Record:
        example = example_input(before.signature)
        selection, targets, timed = attempt.selection, attempt.prepared.surveyed.targets, attempt.timed
        figures = {
            f"{unit}_{when}": count
            for when, model in (("before", before), ("after", attempt.model))
            for unit, count in (("macs", count_macs(model.module, example)), ("params", count_params(model.module)))
        }
        for unit in ("macs", "params"):
            predicted = targets.cost(unit).at(selection.widths)
            if figures[f"{unit}_after"] != round(predicted):
                raise InternalError(f"The cut was predicted to leave {predicted} {unit}, it left another number.")
        asked, reached = self._asked_and_reached(attempt)
        latency = targets.latency
        return {
            "target": self.config.target.given(),
            "asked_ratio": asked[self._quantity],
            "reached_ratio": reached[self._quantity],
            "asked": asked,
            "reached": reached,
            "criterion": criterion_name(self.config) if self.config.method is None else None,
            "is_optimal": selection.is_optimal,
            "damage": attempt.prepared.damage,
            "groups": [_group_record(one, selection.widths[one.name]) for one in attempt.prepared.candidates],
            "shortfall": self._shortfall(asked, reached, bool(attempt.removed_blocks)),
            "latency": None if latency is None else latency_record(latency, selection.widths, timed),
            **figures,
        }

    @property
    def _quantity(self) -> str:
        """The first target, which the report shows."""
        return next(iter(self.config.target.given()))

    def _asked_and_reached(self, attempt: Attempt) -> tuple[dict[str, float], dict[str, float]]:
        """Return for each target what was asked and what was reached: shares of the baseline, MB or ms."""
        selection, targets, timed = attempt.selection, attempt.prepared.surveyed.targets, attempt.timed
        asked, reached = self.config.target.given(), targets.reached(selection.widths)
        if targets.latency is not None:
            chosen = [choice.ratio for choice in timed if choice.widths == selection.widths]
            ratio = chosen[-1] if chosen else targets.latency.predict_ratio(selection.widths)
            reached |= {"latency": ratio, "latency_ms": ratio * targets.latency.reference_ms}
        if "size_mb" in asked:
            reached["size_mb"] = targets.size_mb(selection.widths)
        return asked, {name: reached[name] for name in asked}

    def _shortfall(self, asked: Mapping[str, float], reached: Mapping[str, float], has_removed: bool) -> str | None:
        """Say so when no target is used up as nearly as it should be; None when one is and none is exceeded."""
        misses = {name: reached[name] / asked[name] - 1 for name in asked}
        tolerance = {name: LATENCY_WITHIN if name.startswith("latency") else MET_WITHIN for name in asked}
        if all(misses[name] <= tolerance[name] for name in asked) and any(
            abs(misses[name]) <= tolerance[name] for name in asked
        ):
            return None
        name = min(asked, key=lambda name: abs(misses[name]))
        return (
            f"asked for {asked[name]:.4f} {UNITS[name]}, reached {reached[name]:.4f}: the widths that the "
            f"ranking and the limits allow (multiples of {self.config.multiple_of} where groups are wide enough"
            f"{', blocks removed first' if has_removed else ''}) come no nearer"
        )

    def _say_few_images(self, ctx: StageContext) -> None:
        """Note where fewer images are there than were asked for; the default asks for as many as there are."""
        for name in ("score_images", "refit_images"):
            asked, there = getattr(self.config, name), len(ctx.data.calibration)
            if asked > there and asked != CutConfig.model_fields[name].default:
                ctx.progress.note(
                    f"{name}: {asked} asked for, the calibration split has {there}; data.calibration sets its size"
                )

    def _say(self, record: Record, attempt: Attempt, progress: Progress) -> None:
        if record["shortfall"] is not None:
            progress.note(f"target: {record['shortfall']}")
        repair, default = self.config.repair, CutConfig.model_fields["repair"].default
        has_factors = any(one.scales is not None for one in attempt.prepared.candidates)
        if "scaling" in repair and repair != default and not has_factors:
            progress.note("repair: scaling was left out, as nothing found factors for the channels that it keeps")
        cut, removed = len(attempt.selection.removed), len(attempt.removed_blocks)
        progress.note(
            f"{cut} of {len(attempt.prepared.surveyed.groups)} channel groups cut, {removed} blocks removed: "
            f"{record['macs_before'] / record['macs_after']:.2f}x fewer MACs in this stage"
        )


@torch.no_grad()
def check_cut(slim: nn.Module, original: nn.Module, selection: Selection, groups: Groups, split: Split) -> None:
    """Check that the cut network equals the original with the removed channels silenced.

    Raises:
        InternalError: It does not.
    """
    images, _ = next(evaluation_batches(split.first(8), 8, "nothing"))
    wanted = each(run(silenced_copy(original, selection.removed, groups), images))
    for got, expected in zip(each(run(slim, images)), wanted, strict=True):
        difference = float((got - expected).abs().max())
        if not difference <= CUT_TOLERANCE * (1 + float(expected.abs().max())):
            raise InternalError(f"The cut network differs from the silenced original by {difference:.2g}.")


def _positions_left(read: Read, removed: Mapping[str, Sequence[int]], groups: Groups) -> torch.Tensor:
    """Return (n,) the place of each slot of a read in the slim network; arbitrary for slots that are gone."""
    gone = [
        other.slots[torch.isin(other.channels, torch.tensor(removed[name]))]
        for name in removed
        for other in groups[name].reads
        if (other.path, other.name, other.dim) == (read.path, read.name, read.dim)
    ]
    before = torch.unique(torch.cat(gone)) if gone else torch.zeros(0, dtype=torch.int64)
    return read.slots - torch.searchsorted(before, read.slots)


def _group_record(one: Candidates, width: int) -> Record:
    level = one.levels.index(width)
    return {
        "name": one.name,
        "width_before": one.full,
        "width_after": width,
        "damage": float(one.damages[level]),
        "damage_error": None if one.errors is None else float(one.errors[level]),
    }
