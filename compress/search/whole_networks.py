"""Search among candidate networks: widths and residual blocks in one solve, with damages learned from their losses.

    estimated damages, several prices of residual streams and of blocks -> the first networks
    factors learned from the losses so far, or the best factors varied  -> more networks
    the best few -> channels ranked anew without the removed blocks, full repair -> the least validation loss

Every network solves one knapsack within the budgets. The first rounds remove channels by one ranking, repair on few
images and score on part of the validation split: seconds each. The evaluation split is never used.

Source: Sun et al. 2025, "MDP: Multidimensional Vision Model Pruning with Latency Constraint", CVPR, arXiv:2504.02168,
for blocks and widths in one program; Frantar and Alistarh 2022, "SPDY: Accurate Pruning with Speedup Guarantees", ICML,
arXiv:2201.13096, for damages decided by complete networks.
"""

import math
from collections.abc import Sequence

import numpy as np

from compress.allocation.blocks import Structure, allocate_structure
from compress.allocation.factors import Fit, Observation, learn_factors
from compress.allocation.problem import Budget
from compress.errors import BudgetUnreachable
from compress.model.stage_records import BlockTrial, WholeNetworks
from compress.search.finalists import Finalists, order_finalists
from compress.search.pricing import Estimates, Pricing
from compress.search.pruner import Attempt, Prepared, Pruner
from compress.search.survey import Survey
from compress.search.whole_trials import NetworkTrials, Tried, name_structure

DRAWS = 4
SPREAD = 0.4
PATIENCE, STEPS = 2, 9
_HALVINGS = 40
_WIDENINGS = 3
_MOST_CORRECTION = 1.25
_LEAST_RISE = 0.05  # of the median rise
_CREDIBLE = 0.5  # of the least rise so far


def search(prepared: Prepared, blocks: Sequence[str], pruner: Pruner) -> tuple[Attempt, WholeNetworks]:
    """Return the network of least validation loss among those tried, repaired in full, and the record of the search.

    Args:
        prepared: The ranked network.
        blocks: Module paths of residual blocks that may be removed; empty to choose widths only.
        pruner: Steps that prune a network, with the settings and the number of networks to try.

    Raises:
        BudgetUnreachable: No network is within the budgets.
    """
    run = WholeNetworkSearch(prepared, blocks, pruner)
    run.try_all()
    finalists = Finalists(prepared, pruner)
    best = finalists.finish(order_finalists(run.trials.tried, run.usual_pricing()))
    return best, run.record(finalists.records)


class WholeNetworkSearch:
    """Search that tries networks one after the other, with prices learned from the losses so far.

    Args:
        prepared: The ranked network.
        blocks: Residual blocks that may be removed.
        pruner: Steps that prune a network, with the settings, splits and parts of the stage.

    Attributes:
        trials: The networks tried.
        fit: Factors learned from their losses; None before any loss has risen.
    """

    def __init__(self, prepared: Prepared, blocks: Sequence[str], pruner: Pruner) -> None:
        self._surveyed, self._seed, self._progress = prepared.surveyed, pruner.ctx.seed, pruner.ctx.progress
        self._count, self._factors = pruner.config.trials, pruner.stream_factors(prepared)
        self.trials = NetworkTrials(prepared, pruner.ctx, pruner.memory_format)
        self.estimates = Estimates(prepared.candidates, prepared.surveyed.groups, self.trials.measure_blocks(blocks))
        self._solver = _Solver(prepared.surveyed, self.estimates)
        self._streams: dict[float, float] = {}  # factor of residual streams -> loss with all blocks
        self.fit: Fit | None = None

    def try_all(self) -> None:
        """Try the number of networks that the settings request, or fewer if no new ones are found."""
        self._try_prices()
        self.fit = self.learn()
        failures = number = 0
        while len(self.trials.tried) < self._count and failures < 2:
            found = self._draw(number)
            number += 1
            failures = 0 if found is not None else failures + 1
            if found is not None:
                self._try(*found)
                self.fit = self.learn()
        if self.fit is None:
            count = len(self.trials.tried)
            self._progress.note(
                f"whole_networks: no factors of damages were learned from {count} networks, as no loss rose"
            )

    def learn(self) -> Fit | None:
        """Return factors that explain the losses so far; None if no loss has risen."""
        tried, base = self.trials.tried, self.trials.base_loss
        seen = [(one, one.loss - base) for one in tried if math.isfinite(one.loss)]
        rises = [rise for _, rise in seen if rise > 0]
        if not rises:
            return None
        least = _LEAST_RISE * float(np.median(rises))
        observations = [Observation(self.estimates.damages(one.structure), max(rise, least)) for one, rise in seen]
        observations = [one for one in observations if sum(one.damages.values()) > 0]
        return learn_factors(observations, self.estimates.kinds) if observations else None

    def usual_pricing(self) -> Pricing:
        """Return prices without learned factors, with the best factor of residual streams."""
        factor = min(self._streams, key=lambda one: self._streams[one])
        return self.estimates.price(f"streams x {factor:g}", factor)

    def record(self, finalists: Sequence[BlockTrial]) -> WholeNetworks:
        """Return the record of the search."""
        return WholeNetworks(
            count=self._count,
            correction=self._solver.correction,
            block_damages=self.estimates.block_damages,
            tried=tuple(one.record for one in self.trials.tried),
            finalists=tuple(finalists),
            fit=self.fit,
        )

    def _try_prices(self) -> None:
        """Try networks with all blocks and several factors of residual streams; then lower the price of blocks."""
        for factor in self._factors[: self._count]:
            pricing = self.estimates.price(f"streams x {factor:g}", factor)
            structure = self._solver.solve(pricing)
            if not self.trials.tried and self._solver.correct(structure, self.trials):
                structure = self._solver.solve(pricing)
            self._streams.setdefault(factor, self._try(pricing, structure).loss)
        if self.estimates.decisions:
            self._try_block_prices()

    def _try_block_prices(self) -> None:
        """Try networks with fewer and fewer blocks.

        Each solve halves the price of blocks. In a network of many blocks, a solve must remove several more blocks to
        be tried. The search ends when the loss has risen twice in a row, or when half of all networks are tried.
        """
        estimates, best, count = self.estimates, self.trials.best, len(self.estimates.decisions)
        factor = min(self._streams, key=lambda one: self._streams[one])
        # at this price the removal of any block costs as much as all removed channels, or more
        price = estimates.channel_damage(best.structure, best.pricing) / min(estimates.block_damages.values())
        last, rises, least = len(best.structure.removed), 0, best.loss
        step = math.ceil(count / STEPS)
        for _ in range(_HALVINGS):
            price /= 2
            pricing = estimates.price(f"blocks x {price:.3g}", factor, price)
            structure = self._solver.solve(pricing)
            if len(structure.removed) >= last + step:
                last = len(structure.removed)
                tried = self._try(pricing, structure)
                rises = rises + 1 if tried.loss >= least else 0
                least = min(least, tried.loss)
            is_enough = len(self.trials.tried) >= max(self._count // 2, 2)
            if price == 0 or rises == PATIENCE or last == count or is_enough:
                return

    def _draw(self, number: int) -> tuple[Pricing, Structure] | None:
        """Return the most promising of a few new networks; None if the draws yield no new network.

        Draws of even number vary the learned prices, draws of odd number the prices of the best network. The variation
        grows until a network is new. A prediction far below the best loss so far counts as an error of the fit.
        """
        random = np.random.default_rng([self._seed, number])
        centre, source = self.trials.best.pricing, "near the best"
        if self.fit is not None and number % 2 == 0:
            centre, source = Pricing("learned", self.fit.power, self.fit.factors), "learned"
        for widening in range(_WIDENINGS):
            found: dict[str, tuple[float, Pricing, Structure]] = {}
            for draw in range(DRAWS):
                spread = 0.0 if source == "learned" and not (draw or widening) else SPREAD * 2**widening
                pricing = self.estimates.vary(centre, source, spread, random)
                structure = self._solver.solve(pricing)
                if self.trials.find(structure) is None:
                    rise = self.fit.rise(self.estimates.damages(structure)) if self.fit else 0.0
                    found[name_structure(structure)] = (rise, pricing, structure)
            if found:
                credible = _CREDIBLE * (self.trials.best.loss - self.trials.base_loss)
                _, pricing, structure = min(found.values(), key=lambda one: (one[0] < credible, abs(one[0] - credible)))
                return pricing, structure
        return None

    def _try(self, pricing: Pricing, structure: Structure) -> Tried:
        """Prune, repair and score a network, or return its earlier trial."""
        if (known := self.trials.find(structure)) is not None:
            return known
        predicted = None
        if self.fit is not None:
            predicted = self.trials.base_loss + self.fit.rise(self.estimates.damages(structure))
        tried = self.trials.add(structure, pricing, predicted)
        said = "" if predicted is None else f", {predicted:.4f} predicted"
        blocks = f", {len(structure.removed)} blocks removed" if self.estimates.decisions else ""
        self._progress.note(
            f"network {len(self.trials.tried)} of {self._count} ({pricing.source}){blocks}: validation loss "
            f"{tried.loss:.4f}{said}"
        )
        return tried


class _Solver:
    """Solver for widths and blocks of least priced damage within the budgets.

    Attributes:
        correction: Factor of the latency limit that corrects the error of the latency table.
    """

    def __init__(self, surveyed: Survey, estimates: Estimates) -> None:
        self.correction = 1.0
        self._surveyed, self._estimates = surveyed, estimates
        self._budgets: list[Budget] = []
        self._set_budgets()

    def solve(self, pricing: Pricing) -> Structure:
        """Return the widths and blocks of least damage.

        Raises:
            BudgetUnreachable: No network is within the budgets.
        """
        candidates = pricing.repriced(self._estimates.candidates.values())
        blocks = self._estimates.priced_blocks(pricing)
        return allocate_structure(candidates, blocks, self._budgets, self._surveyed.limits.text)

    def correct(self, structure: Structure, trials: NetworkTrials) -> bool:
        """Time a network with all its blocks, and move the limit of the latency by the error of the table.

        Returns:
            Whether the limit has moved.
        """
        latency = self._surveyed.targets.latency
        if latency is None or not latency.is_measured_here or structure.removed:
            return False
        widths = structure.widths
        ratio = trials.keep("ratio", {"widths": widths}, lambda: latency.time_pair(widths).ratio)
        correction = latency.predict_ratio(widths) / ratio
        self.correction = min(max(correction, 1 / _MOST_CORRECTION), _MOST_CORRECTION)
        try:
            self._set_budgets()
            self.solve(self._estimates.price("", 1.0, 1.0))
        except BudgetUnreachable:
            self.correction = 1.0
            self._set_budgets()
        return self.correction != 1.0

    def _set_budgets(self) -> None:
        self._surveyed.targets.correction = self.correction
        self._budgets = self._surveyed.targets.budgets(self._surveyed.levels, self._estimates.decisions)
