"""Search among whole networks: widths and residual blocks in one solve, with damages learned from their losses.

    estimated damages, several prices of residual streams and of blocks -> the first networks
    factors learned from the losses so far, or the best factors varied  -> more networks
    the best few -> channels ranked anew without the blocks that go, full repair -> the least validation loss

Every network is the answer of one knapsack within the budgets. The first rounds cut the network with one ranking of its
channels, repair it on few images and score it on part of the validation split: seconds each. The evaluation split is
never looked at.

Source: Sun et al. 2025, "MDP: Multidimensional Vision Model Pruning with Latency Constraint", CVPR, arXiv:2504.02168,
for blocks and widths in one program; Frantar and Alistarh 2022, "SPDY: Accurate Pruning with Speedup Guarantees", ICML,
arXiv:2201.13096, for damages that whole networks decide about.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import nn

from compress.allocation.blocks import Structure, allocate_structure, block_decision
from compress.allocation.factors import Fit, Observation, learn_factors
from compress.allocation.problem import Budget
from compress.allocation.widths import Candidates
from compress.checkpoint.rebuild import example_input
from compress.errors import BudgetUnreachable, InternalError
from compress.model.recipe import RemoveBlock, RemoveChannels
from compress.pruning.groups import kept_outputs
from compress.pruning.ranking.sensitivity import block_damage
from compress.pruning.surgery import remove_block, remove_channels
from compress.search.block_removal import Trunk, places_in_whole, without_blocks
from compress.search.context import Record, StageContext
from compress.search.parts import Part, weights_digest
from compress.search.repairs import apply_repairs, repairs_towards
from compress.search.width_latency import LatencyModel
from compress.training.evaluate import evaluate_loss
from compress.training.memory_format import set_memory_format

if TYPE_CHECKING:
    from compress.stages.prune import Attempt, Prepared

TRIAL_IMAGES = 256
FINALISTS = 3
DRAWS = 4
SPREAD = 0.4
PATIENCE, STEPS = 2, 9
_HALVINGS = 40
_WIDENINGS = 3
_MOST_CORRECTION = 1.25
_LEAST_RISE = 0.05  # of the median rise
_CREDIBLE = 0.5  # of the least rise so far
T = TypeVar("T")
_INSIDE, _RESIDUAL, _BLOCK = "inside", "residual", "block"


@dataclass(frozen=True)
class Steps:
    """Functions of the stage that the search calls.

    Attributes:
        prepare: Ranks the channels of a network without some blocks, groups computed by the given layers only.
        finish: Chooses widths of a network within the targets by candidates, cuts and repairs it; the last argument
            tells the choice from others of the same network.
        loss: Validation loss of what that gives.
        memory_format: That networks are fastest in.
    """

    prepare: "Callable[[Trunk, LatencyModel | None, frozenset[str]], Prepared]"
    finish: "Callable[[Prepared, Sequence[Candidates], Record], Attempt]"
    loss: "Callable[[Attempt], float]"
    memory_format: torch.memory_format


@dataclass(frozen=True)
class Pricing:
    """Factors and power of estimated damages.

    Attributes:
        source: What it comes from, in words.
        power: Of each damage.
        factors: Decision -> what that is multiplied by.
    """

    source: str
    power: float
    factors: Mapping[str, float]

    def damage(self, name: str, damage: float | np.ndarray) -> float | np.ndarray:
        """Return the damage of a decision as the knapsack sees it."""
        return self.factors[name] * damage**self.power


@dataclass(frozen=True)
class Tried:
    """A whole network that was cut, repaired and scored.

    Attributes:
        structure: Its widths and blocks.
        pricing: What it is the best by.
        loss: On part of the validation split; infinite where it is no number.
        predicted: The same, predicted; None before there was anything to learn from.
    """

    structure: Structure
    pricing: Pricing
    loss: float
    predicted: float | None

    @property
    def record(self) -> Record:
        """Values for the report."""
        return {
            "source": self.pricing.source,
            "blocks": len(self.structure.removed),
            "removed": list(self.structure.removed),
            "loss": self.loss if math.isfinite(self.loss) else None,
            "predicted_loss": self.predicted,
        }


def search(
    prepared: "Prepared",
    blocks: Sequence[str],
    residual_factors: Sequence[float],
    count: int,
    steps: Steps,
    ctx: StageContext,
) -> "tuple[Attempt, Record]":
    """Return the network of least validation loss among those tried, repaired in full, and what was tried.

    Args:
        prepared: The network about to be cut.
        blocks: Module paths of residual blocks that may be removed; none to choose widths only.
        residual_factors: What the estimated damage of channels along shortcuts is multiplied by, one after the other.
        count: Networks to try.
        steps: What the stage does.
        ctx: Surroundings.

    Raises:
        BudgetUnreachable: Nothing is within the budgets.
    """
    return _Search(prepared, blocks, steps, ctx).run(residual_factors, count)


@dataclass
class _Search:
    prepared: "Prepared"
    blocks: Sequence[str]
    steps: Steps
    ctx: StageContext
    tried: list[Tried] = field(default_factory=list)
    correction: float = 1.0
    needs_batch_norm: bool | None = None
    streams: dict[float, float] = field(default_factory=dict)  # factor of residual streams -> loss with all blocks

    def __post_init__(self) -> None:
        self.config, self.surveyed = self.prepared.surveyed.config, self.prepared.surveyed
        self.module, self.whole = self.prepared.trunk.model.module, self.prepared.trunk.whole
        self.example = example_input(self.prepared.trunk.model.signature)
        self.candidates = {one.name: one for one in self.prepared.candidates}
        self.decisions = {block: block_decision(block) for block in self.blocks}
        groups = self.surveyed.groups
        self.kinds = {name: _RESIDUAL if groups[name].is_summed else _INSIDE for name in self.candidates}
        self.kinds |= dict.fromkeys(self.decisions.values(), _BLOCK)
        self.split = self.ctx.data.validation.first(self.config.score_images)
        self.base_loss = float(self._kept("intact", {}, lambda: evaluate_loss(self.module, self.split)))
        self.block_damages = self._measure_blocks()
        self._budgets: list[Budget] = []
        self._shorter: dict[tuple[str, ...], Prepared] = {(): self.prepared}

    def run(self, residual_factors: Sequence[float], count: int) -> "tuple[Attempt, Record]":
        """As `search`."""
        self._set_budgets()
        self._try_prices(residual_factors, count)
        fit = self._learn()
        failures = number = 0
        while len(self.tried) < count and failures < 2:
            found = self._draw(number, fit)
            number += 1
            failures = 0 if found is not None else failures + 1
            if found is not None:
                self._try(*found, count, fit)
                fit = self._learn()
        if fit is None:
            self.ctx.progress.note(
                f"whole_networks: no factors of damages were learned from {len(self.tried)} networks, as no loss rose"
            )
        best, finalists = self._finish()
        return best, self._record(fit, finalists, count)

    def _try_prices(self, residual_factors: Sequence[float], count: int) -> None:
        """Try networks with all blocks and several factors of residual streams; then lower the price of blocks.

        Blocks become half as dear from one solve to the next. In a network of many blocks several more must go before
        another network is tried. It ends when the loss has risen twice in a row.
        """
        for factor in residual_factors[:count]:
            pricing = self._priced(f"streams x {factor:g}", factor, None)
            structure = self._solve(pricing)
            if not self.tried and self._correct(structure):
                structure = self._solve(pricing)
            self.streams.setdefault(factor, self._try(pricing, structure, count, None).loss)
        if not self.blocks:
            return
        best = self._best
        factor = min(self.streams, key=lambda one: self.streams[one])
        price = self._damage(best) / min(self.block_damages.values())  # at which no block is worth what channels cost
        last, rises, least = len(best.structure.removed), 0, best.loss
        step = math.ceil(len(self.blocks) / STEPS)
        for _ in range(_HALVINGS):
            price /= 2
            pricing = self._priced(f"blocks x {price:.3g}", factor, price)
            structure = self._solve(pricing)
            if len(structure.removed) >= last + step:
                last = len(structure.removed)
                tried = self._try(pricing, structure, count, None)
                rises = rises + 1 if tried.loss >= least else 0
                least = min(least, tried.loss)
            if price == 0 or rises == PATIENCE or last == len(self.blocks) or len(self.tried) >= max(count // 2, 2):
                return

    def _priced(self, source: str, residual: float, block: float | None) -> Pricing:
        """Return estimates with a factor for residual streams and one for blocks; None to keep all blocks."""
        of_kind = {_INSIDE: 1.0, _RESIDUAL: residual, _BLOCK: self._dearest(residual) if block is None else block}
        return Pricing(source, 1.0, {name: of_kind[kind] for name, kind in self.kinds.items()})

    def _dearest(self, residual: float) -> float:
        """Return a price of blocks at which the least harmful one counts more than all channels."""
        most = [
            float(one.damages.max()) * (residual if self.kinds[name] == _RESIDUAL else 1.0)
            for name, one in self.candidates.items()
        ]
        return (sum(most) or 1.0) / min(self.block_damages.values(), default=1.0)

    def _draw(self, number: int, fit: Fit | None) -> tuple[Pricing, Structure] | None:
        """Return a network that was not tried, the most promising of a few; None where draws give none.

        Even numbers are drawn around what was learned, odd ones around the best network. More and more variation is
        added until a network is new. A prediction far below the best loss so far is an error of the fit.
        """
        random = np.random.default_rng([self.ctx.seed, number])
        centre, source = self._best.pricing, "near the best"
        if fit is not None and number % 2 == 0:
            centre, source = Pricing("learned", fit.power, fit.factors), "learned"
        known = {self._key(one.structure) for one in self.tried}
        for widening in range(_WIDENINGS):
            found: dict[str, tuple[float, Pricing, Structure]] = {}
            for draw in range(DRAWS):
                spread = 0.0 if source == "learned" and not (draw or widening) else SPREAD * 2**widening
                pricing = self._varied(centre, source, spread, random)
                structure = self._solve(pricing)
                if (key := self._key(structure)) not in known:
                    found[key] = (fit.rise(self._damages(structure)) if fit else 0.0, pricing, structure)
            if found:
                credible = _CREDIBLE * (self._best.loss - self.base_loss)
                _, pricing, structure = min(found.values(), key=lambda one: (one[0] < credible, abs(one[0] - credible)))
                return pricing, structure
        return None

    def _varied(self, pricing: Pricing, source: str, spread: float, random: np.random.Generator) -> Pricing:
        """Return factors multiplied by log-normal noise, one for each kind and one for each decision."""
        of_kind = {kind: random.normal() for kind in (_INSIDE, _RESIDUAL, _BLOCK)}
        factors = {
            name: factor * math.exp(spread * (of_kind[self.kinds[name]] + random.normal()))
            for name, factor in pricing.factors.items()
        }
        return Pricing(source, pricing.power, factors)

    def _learn(self) -> Fit | None:
        """Return factors that explain the losses so far; None where there is nothing to explain."""
        seen = [(one, one.loss - self.base_loss) for one in self.tried if math.isfinite(one.loss)]
        rises = [rise for _, rise in seen if rise > 0]
        if not rises:
            return None
        least = _LEAST_RISE * float(np.median(rises))
        observations = [Observation(self._damages(one.structure), max(rise, least)) for one, rise in seen]
        observations = [one for one in observations if sum(one.damages.values()) > 0]
        return learn_factors(observations, self.kinds) if observations else None

    def _damages(self, structure: Structure) -> dict[str, float]:
        """Return decision -> estimated damage of what was chosen."""
        damages = {
            name: float(one.damages[one.levels.index(structure.widths[name])]) for name, one in self.candidates.items()
        }
        return damages | {self.decisions[block]: self.block_damages[block] for block in structure.removed}

    def _damage(self, tried: Tried) -> float:
        """Return the damage of a network's channels as its pricing counts it."""
        found = self._damages(tried.structure)
        return sum(float(tried.pricing.damage(name, found[name])) for name in self.candidates)

    @property
    def _best(self) -> Tried:
        return min(self.tried, key=lambda one: one.loss)

    def _solve(self, pricing: Pricing) -> Structure:
        """Return the widths and blocks of least damage within the budgets."""
        candidates = _repriced(self.candidates.values(), pricing, {name: name for name in self.candidates})
        blocks = {
            block: float(pricing.damage(decision, self.block_damages[block]))
            for block, decision in self.decisions.items()
        }
        return allocate_structure(candidates, blocks, self._budgets, self.surveyed.limits.text)

    def _set_budgets(self) -> None:
        self.surveyed.targets.correction = self.correction
        self._budgets = self.surveyed.targets.budgets(self.surveyed.levels, self.decisions)

    def _correct(self, structure: Structure) -> bool:
        """Time a network with all its blocks, and move the limit of the latency by what the table is wrong.

        Returns:
            Whether the limit has moved.
        """
        latency = self.surveyed.targets.latency
        if latency is None or not latency.is_measured_here or structure.removed:
            return False
        ratio = self._kept("ratio", {"widths": structure.widths}, lambda: latency.time_pair(structure.widths).ratio)
        correction = latency.predict_ratio(structure.widths) / ratio
        self.correction = min(max(correction, 1 / _MOST_CORRECTION), _MOST_CORRECTION)
        try:
            self._set_budgets()
            self._solve(self._priced("", 1.0, 1.0))
        except BudgetUnreachable:
            self.correction = 1.0
            self._set_budgets()
        return self.correction != 1.0

    def _try(self, pricing: Pricing, structure: Structure, count: int, fit: Fit | None) -> Tried:
        """Cut, repair and score a network; one that was tried is not tried again."""
        for one in self.tried:
            if self._key(one.structure) == self._key(structure):
                return one
        loss = self._loss(structure)
        predicted = None if fit is None else self.base_loss + fit.rise(self._damages(structure))
        tried = Tried(structure, pricing, math.inf if math.isnan(loss) else loss, predicted)
        self.tried.append(tried)
        said = "" if predicted is None else f", {predicted:.4f} predicted"
        blocks = f", {len(structure.removed)} blocks removed" if self.blocks else ""
        self.ctx.progress.note(
            f"network {len(self.tried)} of {count} ({pricing.source}){blocks}: validation loss {loss:.4f}{said}"
        )
        return tried

    def _loss(self, structure: Structure) -> float:
        """Return the loss of a network after a quick repair.

        The first one decides whether statistics of batch norms are measured again in all of them.
        """
        removed = self._removed(structure)

        def measure() -> dict[str, float]:
            slim = self._cut(structure, removed)
            kept = kept_outputs(removed, self.surveyed.groups)
            images = min(TRIAL_IMAGES, self.config.refit_images)
            wanted = repairs_towards(self.whole, slim, kept, self.config.repair, self.example, self.ctx, images)
            losses = {}
            for name, repair in wanted:
                if name != "batch_norm":
                    repair(slim)
            losses["refitted"] = evaluate_loss(slim, self.split)
            for name, repair in wanted:
                if name == "batch_norm" and self.needs_batch_norm is not False:
                    repair(slim)
                    losses["batch_norm"] = evaluate_loss(slim, self.split)
            return losses

        key = {"cut": removed, "removed": structure.removed, "batch_norm": self.needs_batch_norm}
        losses: dict[str, float] = self._kept("network", key, measure)
        refitted, measured = losses["refitted"], losses.get("batch_norm", math.nan)
        if self.needs_batch_norm is None:
            self.needs_batch_norm = measured < refitted or (math.isnan(refitted) and not math.isnan(measured))
        return measured if self.needs_batch_norm else refitted

    def _cut(self, structure: Structure, removed: Mapping[str, tuple[int, ...]]) -> nn.Module:
        module = self.module
        slim = (
            remove_channels(module, RemoveChannels(dict(removed)), self.example) if removed else copy.deepcopy(module)
        )
        for block in structure.removed:
            slim = remove_block(slim, RemoveBlock(block))
        set_memory_format(slim, self.steps.memory_format)
        return slim

    def _removed(self, structure: Structure) -> dict[str, tuple[int, ...]]:
        """Return group -> the channels that go, by the ranking of the network with all its blocks."""
        groups = self.surveyed.groups
        return {
            name: groups[name].expand(one.removed_units(structure.widths[name]))
            for name, one in self.candidates.items()
            if structure.widths[name] < one.full
        }

    def _finish(self) -> "tuple[Attempt, list[Record]]":
        """Finish the best networks; return that of least validation loss, and what came of each."""
        best: tuple[float, Attempt] | None = None
        records: list[Record] = []
        unreachable: BudgetUnreachable | None = None
        for tried in self._ordered():
            blocks = len(tried.structure.removed)
            try:
                attempt = self._finished(tried)
            except BudgetUnreachable as error:
                unreachable = unreachable or error
                records.append({"blocks": blocks, "loss": None, "reason": error.message})
                continue
            loss = self.steps.loss(attempt)
            records.append({"blocks": blocks, "loss": loss, "reason": None})
            self.ctx.progress.note(f"{blocks} blocks removed, repaired in full: validation loss {loss:.4f}")
            if best is None or loss < best[0] or math.isnan(best[0]):
                best = loss, attempt
            if sum(record["loss"] is not None for record in records) == FINALISTS:
                break
        if best is None:
            raise unreachable or InternalError("No whole network was tried.")
        return best[1], records

    def _ordered(self) -> list[Tried]:
        """Return the networks to finish, best first; where blocks go, the last to be finished has the usual estimates.

        Damages that were learned on the network with these blocks need not hold without them.
        """
        ordered = sorted(self.tried, key=lambda one: one.loss)
        best = ordered[0]
        if not best.structure.removed:
            return ordered
        factor = min(self.streams, key=lambda one: self.streams[one])
        usual = self._priced(f"streams x {factor:g}", factor, None)
        return [*ordered[: FINALISTS - 1], replace(best, pricing=usual), *ordered[FINALISTS - 1 :]]

    def _finished(self, tried: Tried) -> "Attempt":
        """Return a network within the targets: channels ranked without the blocks that go, widths by its pricing."""
        prepared = self._prepared(tried.structure.removed)
        places = places_in_whole(prepared.surveyed.groups, self.surveyed.groups)
        names = {name: before for name, (before, _) in places.items()}
        candidates = _repriced(prepared.candidates, tried.pricing, names)
        return self.steps.finish(prepared, candidates, asdict(tried.pricing))

    def _prepared(self, blocks: tuple[str, ...]) -> "Prepared":
        """Return the network without some blocks, its channels ranked."""
        if blocks not in self._shorter:
            layers = frozenset(member.layer for group in self.surveyed.groups.values() for member in group.producers)
            found = self.steps.prepare(self._without(blocks), self.surveyed.targets.latency, layers)
            surveyed = replace(found.surveyed, excluded=self.surveyed.excluded)
            self._shorter[blocks] = replace(found, surveyed=surveyed)
        return self._shorter[blocks]

    def _without(self, blocks: tuple[str, ...]) -> Trunk:
        """Return the network without some blocks, repaired."""
        trunk, names = self.prepared.trunk, self.config.repair
        model = without_blocks(trunk.model, blocks)

        def repair() -> Part:
            module = model.module
            wanted = repairs_towards(self.whole, module, {}, names, self.example, self.ctx, self.config.refit_images)
            tried = apply_repairs(module, wanted, self.ctx, enough=("least_squares",))  # a cut follows
            return Part(tried, module.state_dict())

        key = {"part": "without", "of": self.prepared.key, "removed": blocks, "weights": weights_digest(self.module)}
        part = self.ctx.parts.keep(key, repair)
        model.module.load_state_dict(part.tensors)
        return Trunk(model, trunk.removed + blocks, trunk.repairs + part.record, self.whole, trunk.blocks)

    def _measure_blocks(self) -> dict[str, float]:
        """Return block -> how much the loss rises when it is skipped; above 0, so that each has a price."""
        if not self.blocks:
            return {}
        split = self.ctx.data.calibration.first(min(TRIAL_IMAGES, self.config.score_images))

        def measure() -> dict[str, float]:
            return block_damage(self.module, self.blocks, lambda one: evaluate_loss(one, split), self.ctx.progress)

        found: dict[str, float] = self._kept("block damages", {"blocks": list(self.blocks)}, measure)
        finite = [value for value in found.values() if math.isfinite(value)]
        most = max((abs(value) for value in finite), default=0.0) or 1.0
        return {block: max(value if math.isfinite(value) else most, 1e-3 * most) for block, value in found.items()}

    def _kept(self, what: str, key: Mapping[str, object], make: Callable[[], T]) -> T:
        """Return a plain value that was found before, or find it and keep it."""
        full = {"part": f"joint {what}", "of": self.prepared.key, "images": self.config.score_images, **key}
        value: T = self.ctx.parts.keep(full, lambda: Part(make())).record
        return value

    @staticmethod
    def _key(structure: Structure) -> str:
        return f"{structure.removed} {sorted(structure.widths.items())}"

    def _record(self, fit: Fit | None, finalists: list[Record], count: int) -> Record:
        return {
            "count": count,
            "correction": self.correction,
            "block_damages": self.block_damages,
            "tried": [one.record for one in self.tried],
            "finalists": finalists,
            "fit": None if fit is None else asdict(fit),
        }


def _repriced(candidates: Iterable[Candidates], pricing: Pricing, names: Mapping[str, str]) -> list[Candidates]:
    """Return candidates whose damages count as much as a pricing says; `names` says as which group in it."""
    return [
        replace(one, measured=np.asarray(pricing.damage(names[one.name], one.damages)), errors=None)
        for one in candidates
    ]
