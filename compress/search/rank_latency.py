"""Choice of ranks by measured milliseconds.

    factorise all layers at several shared errors -> time each layer in each of those networks
    -> each layer stays dense or takes one of those factorisations: a knapsack, the least damage within the budget
    -> the choice is timed as a complete network, and made again until the budget is met

ALDS or the energy rule can replace the knapsack. For them every scheme is timed by itself, since the cheapest in MACs
need not be the fastest. Only a factorisation that is measured faster than its dense layer can be chosen.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from compress.allocation.knapsack import allocate
from compress.allocation.problem import Budget, Decision, Factor, TableCost
from compress.config.schema.low_rank import RankAllocation
from compress.config.schema.verify import DeployConfig
from compress.cost.latency_table import BEFORE, WHOLE_QUANTILE, Sample
from compress.cost.table_file import TableFile, network_digest
from compress.cost.variants import Site, VariantWriter
from compress.errors import BudgetUnreachable
from compress.lowrank.allocations import Rule, choose_options, rank_options
from compress.lowrank.factorize import Moments
from compress.lowrank.ranks import LayerSpectra, RankChoice, choose_ranks, solve_relative_error
from compress.lowrank.surgery import factorized_copy
from compress.model.artifacts import TorchModel
from compress.model.recipe import Factorize
from compress.onnx_file.io import ONE_FILE_LIMIT_BYTES, load_onnx, save_onnx
from compress.search.context import StageContext
from compress.search.deployed_files import conditions_here, timed_file, timed_files, variant_copies
from compress.search.export import conditions_of, export_present
from compress.search.width_latency import table_path
from compress.verification.measurement import PairLatency, latency_inputs, measure_pair
from compress.verification.profiling import profile_models

ERRORS, LARGEST_ERROR = 7, 0.95


@dataclass(frozen=True)
class RankSelection:
    """Selection of one option for each layer.

    Attributes:
        widths: Layer -> index of its option.
        is_optimal: True if it is proved that no choice within the budget does less damage; for ALDS, that no choice
            has a smaller largest bound.
    """

    widths: dict[str, int]
    is_optimal: bool


@dataclass(frozen=True)
class RankLatency:
    """Latency of a network as a function of the schemes and ranks of its layers.

    Attributes:
        model: The network.
        ctx: Context of the stage, with its folder, the images and the target runtime.
        options: Layer -> its choices, the dense layer last.
        option_ms: Layer -> (options,) milliseconds of each.
        fixed_ms: Latency of all other layers, in ms.
        reference_ms: Latency of the baseline, in ms.
        moments: Layer -> second moments of its inputs, as `factorized_copy` takes them.
        allocation: Rule of the choice; "shared_error" is the knapsack.
        in_ms: True states latencies in milliseconds in errors, for a target in milliseconds.
    """

    model: TorchModel
    ctx: StageContext
    options: Mapping[str, tuple[RankChoice, ...]]
    option_ms: Mapping[str, np.ndarray]
    fixed_ms: float
    reference_ms: float
    moments: Mapping[str, Moments]
    allocation: RankAllocation = "shared_error"
    in_ms: bool = False

    def chosen(self, widths: Mapping[str, int]) -> tuple[RankChoice, ...]:
        """Return the choice of each layer."""
        return tuple(self.options[layer][option] for layer, option in widths.items())

    def predict_ratio(self, widths: Mapping[str, int]) -> float:
        """Return the sum of the layers' latencies, as a share of the baseline's latency."""
        return self.cost.at(dict(widths)) / self.reference_ms

    def time_pair(self, widths: Mapping[str, int]) -> PairLatency:
        """Time the factorised network and the baseline, in turn."""
        with tempfile.TemporaryDirectory(dir=self.ctx.folder) as folder:
            path = Path(folder) / "factorised.onnx"
            export_present(factorised(self.model, self.chosen(widths), self.moments), path, self.ctx)
            conditions, reference = conditions_of(self.ctx.deploy), timed_file(self.model.baseline.onnx_path, self.ctx)
            with timed_files([path], self.ctx) as (timed,):
                return measure_pair(timed, reference, self.ctx.data.calibration, conditions, self.ctx.progress)

    def select(self, limit_ms: float) -> RankSelection:
        """Return the choice of the rule `allocation` within a latency; by default the one of least damage.

        Raises:
            BudgetUnreachable: Even the fastest options take longer, or no factorisation is faster than its layer.
        """
        budget = Budget("ms", self.cost, limit_ms, self.reference_ms, "the baseline's latency", self.in_ms)
        decisions = [
            Decision(layer, np.asarray([choice.error_bound**2 for choice in found]))
            for layer, found in self.options.items()
        ]
        if not decisions:
            raise BudgetUnreachable("No factorisation of any layer is faster than the layer itself, as measured.")
        limits = f", with the factorisations of {len(decisions)} layers that are faster"
        if self.allocation != "shared_error":
            return self._select_by(self.allocation, budget, limits)
        found = allocate(decisions, [budget], limits)
        return RankSelection(dict(found.choice), found.is_optimal)

    def _select_by(self, rule: Rule, budget: Budget, limits: str) -> RankSelection:
        errors = [np.asarray([choice.error_bound for choice in found]) for found in self.options.values()]
        times = [self.option_ms[layer] for layer in self.options]
        rest_ms = budget.limit * (1 + 1e-9) - self.fixed_ms
        picked = choose_options(rule, errors, times, rest_ms)
        if picked is None:
            best = self.fixed_ms + sum(float(row.min()) for row in times)
            asked, reached = budget.show(budget.limit), budget.show(best)
            raise BudgetUnreachable(f"Target {asked} cannot be reached; the best is {reached}{limits}.", best=best)
        return RankSelection(dict(zip(self.options, picked, strict=True)), rule == "alds")

    @cached_property
    def cost(self) -> TableCost:
        """The latency as a table for each layer."""
        return TableCost(self.fixed_ms, tuple(Factor((layer,), ms) for layer, ms in self.option_ms.items()))


def factorised(model: TorchModel, choices: Sequence[RankChoice], moments: Mapping[str, Moments]) -> TorchModel:
    """Return the network with its layers factorised, except those whose choice has no scheme."""
    edits = [Factorize(c.layer, c.scheme, c.ranks) for c in choices if c.scheme is not None]
    module, _ = factorized_copy(model.module, edits, moments)
    return replace(model, module=module, recipe=model.recipe.then(*edits))


def rank_latency(
    model: TorchModel,
    spectra: Sequence[LayerSpectra],
    moments: Mapping[str, Moments],
    multiple_of: int,
    deploy: DeployConfig,
    ctx: StageContext,
    allocation: RankAllocation = "shared_error",
) -> RankLatency:
    """Time the layers of a network, dense and at several shared relative errors, and return its latency.

    Args:
        model: The network.
        spectra: Singular values of its layers that can be factorised.
        moments: Layer -> second moments of its inputs, as far as they are known.
        multiple_of: Ranks are multiples of this.
        deploy: Target runtime.
        ctx: Splits, folder and listener of the stage.
        allocation: Rule of the later choice; "alds" needs spectra with norm bounds.

    Raises:
        BudgetUnreachable: No layer gets cheaper at any error.
        ModelError, RuntimeUnavailable: The network cannot be timed.
    """
    trials = [tuple(RankChoice(s.layer, None, (), 0.0, s.macs, s.params) for s in spectra)]
    if allocation == "shared_error":
        trials += _shared_trials(spectra, multiple_of)
    else:
        trials += _scheme_trials(spectra, multiple_of, allocation)
    if len(trials) == 1:
        raise BudgetUnreachable(
            f"At least one layer must get cheaper by factorisation, none of {len(spectra)} does at any rank.",
            hint="Lower multiple_of, allow more schemes, exclude fewer layers, or leave the stage out.",
        )
    times: dict[RankChoice, list[float]] = {}
    rests, scales, reference_ms = [], [], 0.0
    for choices, (layer_ms, total_ms, beside_ms) in zip(
        trials, _time(model, trials, moments, deploy, ctx), strict=True
    ):
        reference_ms = reference_ms or beside_ms
        slowness = beside_ms / reference_ms
        known = {choice.layer: layer_ms.get(choice.layer, 0.0) / slowness for choice in choices}
        for choice in choices:
            times.setdefault(choice, []).append(known[choice.layer])
        rests.append(sum(layer_ms.values()) / slowness - sum(known.values()))
        scales.append(total_ms / sum(layer_ms.values()))
    scale = float(np.median(scales))
    mean_ms = {choice: scale * float(np.mean(found)) for choice, found in times.items()}
    options = _faster_options(trials[0], mean_ms)
    option_ms = {layer: np.asarray([mean_ms[choice] for choice in found]) for layer, found in options.items()}
    rest = scale * float(np.median(rests)) + sum(mean_ms[dense] for dense in trials[0] if dense.layer not in options)
    ctx.progress.note(
        f"{len(options)} of {len(spectra)} layers have a factorisation that is faster than they are, as measured"
    )
    return RankLatency(model, ctx, options, option_ms, rest, reference_ms, moments, allocation)


def _shared_trials(spectra: Sequence[LayerSpectra], multiple_of: int) -> list[tuple[RankChoice, ...]]:
    """Return the cheapest choice of every layer at each of several shared errors; empty if none gets cheaper."""
    if not any(choice.scheme for choice in choose_ranks(spectra, 1.0, multiple_of)):
        return []
    dense_macs = sum(layer.macs for layer in spectra)
    least = solve_relative_error(spectra, 0, dense_macs - 1, multiple_of)
    errors = np.linspace(least, max(least, LARGEST_ERROR), ERRORS)
    return [choose_ranks(spectra, float(error), multiple_of) for error in errors]


def _scheme_trials(spectra: Sequence[LayerSpectra], multiple_of: int, rule: Rule) -> list[tuple[RankChoice, ...]]:
    """Return, for each scheme, choices of all its layers at several shared errors; other layers stay dense.

    Layers whose only scheme is "svd" are timed with the first scheme, which saves timings of "svd" alone.
    """
    names = list(dict.fromkeys(option.scheme for layer in spectra for option in layer.schemes))
    first = next((name for name in names if name != "svd"), "svd")
    trials: list[tuple[RankChoice, ...]] = []
    for name in (first, *(name for name in names if name not in (first, "svd"))):
        schemes = {name, "svd"} if name == first else {name}
        layers = [replace(one, schemes=tuple(o for o in one.schemes if o.scheme in schemes)) for one in spectra]
        options = [rank_options(layer, rule, multiple_of) for layer in layers]
        errors = np.concatenate([np.zeros(0), *(one.errors[:-1] for one in options)])
        if not len(errors):
            continue
        largest = max(one.cheapest_within(np.inf, "macs").error_bound for one in options)
        levels = dict.fromkeys(np.linspace(errors.min(), largest, ERRORS).tolist())
        found = [tuple(one.cheapest_within(level, "macs") for one in options) for level in levels]
        trials += list(dict.fromkeys(found))
    return trials


def _faster_options(dense: Sequence[RankChoice], ms: Mapping[RankChoice, float]) -> dict[str, tuple[RankChoice, ...]]:
    """Return layer -> its factorisations that are faster than the dense layer, followed by the dense layer."""
    options: dict[str, tuple[RankChoice, ...]] = {}
    for whole in dense:
        faster = [c for c in ms if c.layer == whole.layer and c.scheme is not None and ms[c] < ms[whole]]
        if faster:
            options[whole.layer] = (*sorted(faster, key=lambda choice: -choice.error_bound), whole)
    return options


def _time(
    model: TorchModel,
    trials: Sequence[Sequence[RankChoice]],
    moments: Mapping[str, Moments],
    deploy: DeployConfig,
    ctx: StageContext,
) -> Iterator[tuple[dict[str, float], float, float]]:
    """Yield for each trial the ms of each layer ("" for other nodes), of the complete network, and of the baseline."""
    with tempfile.TemporaryDirectory(dir=ctx.folder) as folder:
        written = []
        for number, choices in enumerate(trials):
            path = Path(folder) / f"trial{number}.onnx"
            export_present(factorised(model, choices, moments), path, ctx)
            source = load_onnx(path, weights=True)
            writer = VariantWriter(source)
            variant = variant_copies(source, writer, ctx)(writer.write({}, {}))
            save_onnx(variant, path, variant.ByteSize() > ONE_FILE_LIMIT_BYTES)
            written.append((path, writer.sites))
        for choices, (_, sites), table in zip(trials, written, _tables(model, written, deploy, ctx), strict=True):
            (sample,) = table.samples
            layer_ms = {"": 0.0}
            for site, ms in sample.site_ms.items():
                layer = "" if site == BEFORE else _owner(sites[site].layer, choices)
                layer_ms[layer] = layer_ms.get(layer, 0.0) + ms
            yield layer_ms, sample.total_ms, table.reference_ms


def _tables(
    model: TorchModel, written: Sequence[tuple[Path, Sequence[Site]]], deploy: DeployConfig, ctx: StageContext
) -> list[TableFile]:
    """Return a table of one sample for each file; tables of an earlier process are read instead of timed."""
    conditions, here = conditions_of(deploy), conditions_here(ctx)
    places = [table_path(ctx, here, sites, deploy.repeats, "-whole") for _, sites in written]
    missing = [index for index, place in enumerate(places) if not TableFile.read_cached(place, ctx.progress.warn)]
    profiles = profile_models(
        (written[index][0] for index in missing),
        len(missing),
        timed_file(model.baseline.onnx_path, ctx),
        lambda session: latency_inputs(session, ctx.data.calibration, conditions.batch_size),
        conditions,
        ctx.progress,
    )
    for index, profile in zip(missing, profiles, strict=True):
        sample = Sample.of({}, profile.nodes.names, profile.nodes.milliseconds, profile.total_ms)
        beside_ms = float(np.quantile(profile.reference_ms, WHOLE_QUANTILE))
        TableFile(here, network_digest(written[index][1]), beside_ms, (sample,)).write(places[index])
    return [TableFile.read(place) for place in places]


def _owner(name: str, choices: Sequence[RankChoice]) -> str:
    """Return the layer that a site is, or is a factor of; "" for a site of no such layer."""
    found = [choice.layer for choice in choices if name == choice.layer or name.startswith(f"{choice.layer}.")]
    return max(found, key=len, default="")
