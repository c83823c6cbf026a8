"""Latency of a network at other widths, on the target runtime: tables for budgets in milliseconds.

    plan variants -> time those that no table holds yet -> build the table -> budget
                                       a choice of widths -> timed as a complete network, next to the baseline

For a device or runtime that cannot time nodes, the table is fitted to complete variants (`search/device_latency.py`).

Tables are stored in a folder that all runs share, one file for each network and set of conditions. Variants that were
timed before a kill are not timed again.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

from compress.allocation.problem import Budget, TableCost
from compress.config.schema.verify import DeployConfig
from compress.cost.conditions import TableConditions
from compress.cost.fitted_table import FittedTable, fit_table
from compress.cost.latency_table import WHOLE_QUANTILE, LatencyTable, Sample, build_table, latency_cost
from compress.cost.table_file import SCHEMA, TableFile, network_digest
from compress.cost.variants import Site, VariantWriter
from compress.errors import ArtifactError, BudgetUnreachable, InternalError, ModelError
from compress.model.artifacts import TorchModel
from compress.onnx_file.counting import rows_of
from compress.onnx_file.io import load_onnx, save_onnx
from compress.pruning.width_costs import LayerAxes
from compress.search.context import StageContext
from compress.search.deployed_files import Copy, conditions_here, timed_file, variant_copies
from compress.search.device_latency import DeviceTiming, describe_fit
from compress.search.export import conditions_of, exported
from compress.verification.measurement import Conditions, PairLatency, latency_inputs, measure_pair, time_complete
from compress.verification.profiling import profile_models
from compress.verification.runtimes.base import Runtime

_FEWEST_VARIANTS, _MOST_VARIANTS = 10, 32
_JITTER = 0.1
_NOISY = 0.2

Widths = Mapping[str, int]


@dataclass(frozen=True)
class LatencyModel:
    """The latency of one network as a function of its widths.

    Attributes:
        writer: Writes variants of the network's file.
        axes: Sizes of its layers by the widths.
        levels: Channel group -> its allowed widths.
        table: Latency of its layers by their widths.
        file: The timed variants that the table is made of.
        reference_ms: Latency of the baseline, on the scale of the table.
        is_measured_here: True where widths can be timed; a table of another machine cannot be checked on this one.
        variants: Predicted and measured milliseconds of each variant timed.
        time_pair: Widths -> the network at those widths and the baseline, timed in turn as complete networks.
    """

    writer: VariantWriter
    axes: LayerAxes
    levels: Mapping[str, Sequence[int]]
    table: LatencyTable | FittedTable
    file: TableFile
    reference_ms: float
    is_measured_here: bool
    variants: tuple[tuple[float, float], ...]
    time_pair: Callable[[Widths], PairLatency]

    def predict_ratio(self, widths: Widths) -> float:
        """Return the latency by the table, as a share of the baseline's."""
        return self.table.network_ms(self.writer.sites, self.axes.sizes(widths)) / self.reference_ms

    @cached_property
    def cost(self) -> TableCost:
        """The latency in milliseconds, as tables over the allowed widths."""
        return latency_cost(self.table, self.writer.sites, self.axes.axes, self.levels)

    def stairs(self, widths: Widths) -> dict[str, list[tuple[int, float]]]:
        """Return group -> network latency in ms at each allowed width, with other groups at the given widths."""
        chosen = {name: list(levels).index(widths[name]) for name, levels in self.levels.items()}
        return {
            name: [(width, self.cost.at({**chosen, name: option})) for option, width in enumerate(levels)]
            for name, levels in self.levels.items()
        }

    def layers(self, widths: Widths) -> dict[str, tuple[float, float]]:
        """Return layer -> its milliseconds by the table, at the full widths and at the given ones."""
        times: dict[str, tuple[float, float]] = {}
        sizes = self.axes.sizes(widths)
        for site in self.writer.sites:
            whole, slim = (
                self.table.site_ms(site.kind, *pair) for pair in (site.sizes, sizes.get(site.layer, site.sizes))
            )
            before = times.get(site.layer, (0.0, 0.0))
            times[site.layer] = (before[0] + whole, before[1] + slim)
        return times

    def budget(self, ratio: float, blocks: Mapping[str, str] | None = None) -> Budget:
        """Return the budget of the latency.

        Args:
            ratio: Allowed share of the baseline's latency.
            blocks: Module path of a residual block -> the decision whose option 0 removes it.
        """
        cost = self.switched_cost(blocks) if blocks else self.cost
        return Budget("ms", cost, ratio * self.reference_ms, self.reference_ms, "the baseline's latency")

    def switched_cost(self, blocks: Mapping[str, str]) -> TableCost:
        """Return the latency in milliseconds with residual blocks that may be removed; `blocks` as in `budget`."""
        switches = {
            site.layer: decision
            for site in self.writer.sites
            for block, decision in blocks.items()
            if f"{site.layer}.".startswith(f"{block}.")
        }
        return latency_cost(self.table, self.writer.sites, self.axes.axes, self.levels, switches)


def model_latency(
    model: TorchModel,
    axes: LayerAxes,
    levels: Mapping[str, Sequence[int]],
    deploy: DeployConfig,
    ctx: StageContext,
    count_macs: Callable[[Widths], float],
    longer: LatencyModel | None = None,
) -> LatencyModel:
    """Time those variants of a network that no table holds, and return its latency as a function of widths.

    Args:
        model: The present network.
        axes: Sizes of its layers by the widths of its channel groups.
        levels: Channel group -> its allowed widths.
        deploy: Target runtime, perhaps with a latency table.
        ctx: Context of the stage, with the folder for latency tables.
        count_macs: Function from widths to MACs, to check the sizes of a variant.
        longer: Latency of the same network with more blocks; its table is reused if it covers this network.

    Raises:
        ArtifactError: The table of `deploy` is of another machine, runtime or network.
        BudgetUnreachable: The table of `deploy` does not cover the network without blocks.
        ConfigValueError: The runtime cannot time single nodes.
        DeviceFailed: The command of the device fails.
        ModelError: The network's ONNX file cannot be narrowed like its layers.
        RuntimeUnavailable: The provider is not available.
    """
    path = exported(model, ctx.folder, ctx)
    source = load_onnx(path, weights=True)
    writer = VariantWriter(source)
    most = max((len({*out.slots, *inp.slots}) for out, inp in axes.axes.values()), default=0)
    conditions = conditions_of(deploy)
    planned = plan_variants(levels, has_pairs=most > 1, has_sums=most > 2 or not conditions.times_nodes)
    _check_variant(writer, axes, planned[1], count_macs)
    reference, copy = timed_file(model.baseline.onnx_path, ctx), variant_copies(source, writer, ctx)
    timing = _Timing(reference, writer, copy, axes, conditions, ctx)
    if longer is not None and longer.table.covers(writer.sites):
        return replace(longer, writer=writer, axes=axes, levels=levels, time_pair=timing.pair)
    if longer is not None and deploy.table is not None:
        raise BudgetUnreachable("The latency table given knows no network with these blocks removed.")
    here = conditions_here(ctx)
    known, is_foreign = _known_table(deploy, here, writer, ctx)
    if is_foreign and known is not None:
        table = known
        _check_covers(table, planned, axes)
    else:
        path = table_path(ctx, here, writer.sites, deploy.repeats)
        if timing.conditions.times_nodes:
            table = timing.complete(known, planned, here, path)
        else:
            table = timing.as_complete(levels).complete(known, planned, here, path, deploy.variants)
    built, variants = _built(table, writer.sites, ctx, is_fitted=not timing.conditions.times_nodes)
    if built.spread > _NOISY:
        ctx.progress.warn(
            f"{timing.place} is too noisy for a budget in milliseconds to be met closely: single calls scatter by "
            f"{built.spread:.0%} of their median. Stop other work on it, or raise deploy.repeats "
            f"({deploy.repeats} now)."
        )
    return LatencyModel(writer, axes, levels, built, table, table.reference_ms, not is_foreign, variants, timing.pair)


def _built(
    file: TableFile, sites: Sequence[Site], ctx: StageContext, is_fitted: bool
) -> tuple[LatencyTable | FittedTable, tuple[tuple[float, float], ...]]:
    """Return the table of timed variants, and the predicted and measured milliseconds of each of them."""
    totals = [sample.total_ms for sample in file.samples]
    if is_fitted:
        fitted = fit_table(sites, file.samples)
        ctx.progress.note(describe_fit(fitted))
        return fitted, tuple(zip(fitted.predicted_ms, totals, strict=True))
    built = build_table(sites, file.samples)
    ctx.progress.note(
        f"latency table: {len(file.samples)} variants timed, {sum(map(len, built.entries.values()))} entries, "
        f"predicts them within {built.error:.1%} (median); single calls scatter by {built.spread:.1%}"
    )
    return built, tuple((built.network_ms(sites, one.sizes), one.total_ms) for one in file.samples)


def plan_variants(levels: Mapping[str, Sequence[int]], has_pairs: bool, has_sums: bool = False) -> list[dict[str, int]]:
    """Return the widths of the variants to time: all full, all least, then each group through all of its levels.

    Args:
        levels: Channel group -> its allowed widths, ascending.
        has_pairs: Whether some layer is narrowed on both sides, so that pairs of levels matter.
        has_sums: Whether some layer is narrowed by more than two groups, as behind a concatenation. Sums over widths
            that are drawn one by one are all alike, so in half of the variants all groups are narrow or wide together.

    Levels are shuffled for each group on its own, so that pairs of them are spread evenly; the plan is always the same
    for the same levels.
    """
    most = max((len(widths) for widths in levels.values()), default=1)
    wanted = (4 if has_sums else 3) * most if has_pairs else most + 4
    count = min(max(wanted, _FEWEST_VARIANTS), max(_MOST_VARIANTS, most))
    random = np.random.default_rng(0)
    columns = {}
    for name, widths in sorted(levels.items()):
        rounds = -(-count // len(widths))
        columns[name] = np.concatenate([random.permutation(widths) for _ in range(rounds)])[:count]
    if has_sums:
        columns = {name: _half_in_order(column, random) for name, column in columns.items()}
    full, least = ({name: widths[end] for name, widths in levels.items()} for end in (-1, 0))
    return [full, least, *({name: int(columns[name][row]) for name in levels} for row in range(count))]


def _half_in_order(column: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the widths with their first half sorted in ascending order, up to random noise."""
    half = len(column) // 2
    share = column[:half] / column.max()
    order = np.argsort(share + random.normal(0, _JITTER, half))
    return np.concatenate([column[:half][order], column[half:]])


class _Timing:
    """Times variants of one network next to the baseline."""

    def __init__(
        self,
        reference: Path,
        writer: VariantWriter,
        copy: Copy,
        axes: LayerAxes,
        conditions: Conditions,
        ctx: StageContext,
    ) -> None:
        self.reference, self.writer, self.copy, self.axes = reference, writer, copy, axes
        self.conditions, self.ctx = conditions, ctx

    def complete(
        self, known: TableFile | None, planned: Sequence[Widths], here: TableConditions, path: Path
    ) -> TableFile:
        """Return the table with every planned variant; missing variants are timed, and each is saved at once."""
        samples = list(known.samples) if known is not None else []
        reference_ms = known.reference_ms if known is not None else None
        have = [sample.sizes for sample in samples]
        missing = [sizes for sizes in map(self.axes.sizes, planned) if sizes not in have]
        if known is not None and not missing:
            return known
        with tempfile.TemporaryDirectory(dir=self.ctx.folder) as folder:
            profiles = profile_models(
                self._variants(missing, Path(folder)),
                len(missing),
                self.reference,
                self._inputs,
                self.conditions,
                self.ctx.progress,
            )
            table = known
            for sizes, profile in zip(missing, profiles, strict=True):
                now_ms = float(np.quantile(profile.reference_ms, WHOLE_QUANTILE))
                reference_ms = reference_ms or now_ms
                names, node_ms = profile.nodes.names, profile.nodes.milliseconds
                samples.append(Sample.of(sizes, names, node_ms, profile.total_ms, now_ms / reference_ms))
                table = TableFile(here, network_digest(self.writer.sites), reference_ms, tuple(samples))
                table.write(path)
        if table is None:
            raise InternalError("A latency table was completed without a variant.")
        return table

    def as_complete(self, levels: Mapping[str, Sequence[int]]) -> DeviceTiming:
        """Return the timing of complete variants, for a device or runtime that cannot time nodes."""
        conditions, progress = self.conditions, self.ctx.progress
        return DeviceTiming(
            self.writer.sites,
            self.axes,
            levels,
            self.reference,
            self._variants,
            lambda path: time_complete(path, self.ctx.data.calibration, conditions, progress),
            self.ctx.folder,
            progress,
        )

    @property
    def place(self) -> str:
        """The machine or device that is timed, at the beginning of a sentence."""
        device = self.conditions.device
        return "This machine" if device is None else f"Device '{device.device}'"

    def pair(self, widths: Widths) -> PairLatency:
        """Time the network at the given widths and the baseline, in turn."""
        with tempfile.TemporaryDirectory(dir=self.ctx.folder) as folder:
            variant = next(self._variants([self.axes.sizes(widths)], Path(folder)))
            return measure_pair(variant, self.reference, self.ctx.data.calibration, self.conditions, self.ctx.progress)

    def _variants(self, sizes: Sequence[Mapping[str, tuple[int, int]]], folder: Path) -> Iterator[Path]:
        full = self.axes.sizes({})
        for number, wanted in enumerate(sizes):
            path = folder / f"variant{number}.onnx"
            variant = self.copy(self.writer.write(wanted, full))
            save_onnx(variant, path, variant.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF - 10**8)
            yield path

    def _inputs(self, session: Runtime) -> dict[str, np.ndarray]:
        return latency_inputs(session, self.ctx.data.calibration, self.conditions.batch_size)


def _check_variant(
    writer: VariantWriter, axes: LayerAxes, widths: Widths, count_macs: Callable[[Widths], float]
) -> None:
    """Raise ModelError unless a variant's file loses as many MACs as the network does at its widths."""
    hint = "Use a target of macs or params for this network."
    try:
        rows = rows_of(writer.write(axes.sizes(widths), axes.sizes({})))
    except (ModelError, IndexError) as error:
        reason = f"at its least widths its shapes do not fit ({error})".replace("\n", " ")
        raise ModelError(
            f"The ONNX file must be narrowed as the network is, to be timed: {reason}.", hint=hint
        ) from error
    removed = sum(row.macs for row in rows_of(writer.write({}, {}))) - sum(row.macs for row in rows)
    expected = count_macs({}) - count_macs(widths)
    if abs(removed - expected) > 0.5:
        raise ModelError(
            f"The ONNX file must be narrowed as the network is, to be timed: {expected:.0f} MACs should go at the "
            f"least widths, {removed} do. Layers outside of modules, or constants without their layer's name, are "
            "the usual reasons.",
            hint=hint,
        )


def _known_table(
    deploy: DeployConfig, here: TableConditions, writer: VariantWriter, ctx: StageContext
) -> tuple[TableFile | None, bool]:
    """Return the table to start from, and whether it is of another machine.

    Raises:
        ArtifactError: The table given is of another network, or of other conditions and that was not accepted.
    """
    if deploy.table is None:
        path = table_path(ctx, here, writer.sites, deploy.repeats)
        return TableFile.read_cached(path, ctx.progress.warn), False
    table = TableFile.read(Path(deploy.table))
    if table.network != network_digest(writer.sites):
        raise ArtifactError(f"Latency table '{deploy.table}' must be of this network, it is of another one.")
    differences = here.differences(table.conditions)
    if differences and not deploy.accept_foreign_table:
        raise ArtifactError(
            f"Latency table '{deploy.table}' must be of this machine, runtime and provider: {'; '.join(differences)}.",
            hint="With --accept-foreign-table it is used as it is, and nothing is measured here.",
        )
    return table, bool(differences)


def _check_covers(table: TableFile, planned: Sequence[Widths], axes: LayerAxes) -> None:
    have = [sample.sizes for sample in table.samples]
    missing = sum(axes.sizes(widths) not in have for widths in planned)
    if missing:
        raise ArtifactError(
            f"The latency table must hold the {len(planned)} variants this pipeline asks for, {missing} are missing.",
            hint="Make it with compress profile and the same multiple_of, min_width, max_removed_ratio and exclude.",
        )


def table_path(ctx: StageContext, here: TableConditions, sites: Sequence[Site], repeats: int, suffix: str = "") -> Path:
    """Return the path of a network's latency table; each number of repeats has its own table."""
    return ctx.latency_tables / f"{network_digest(sites)[:16]}-{here.key[:16]}-{repeats}-{SCHEMA}{suffix}.json"
