"""Sweep over several budgets: `sweep.json`, and one page with a plot and a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from compress.catalog import NOMINAL
from compress.report.build import write_json, write_page
from compress.report.details import Estimate
from compress.report.formats import (
    describe_difference,
    format_bytes,
    format_count,
    format_metric,
    format_ms,
    format_share,
    format_times,
)
from compress.report.model import Network, Report
from compress.report.page import render
from compress.report.plots import Panel, Point, plot_fronts
from compress.report.records import TOP1, Change
from compress.report.results import drop_on
from compress.report.stamp import stamp
from compress.tasks.base import Metric

SWEEP_SCHEMA = 1
DELTA = 0.005
State = Literal["done", "waiting", "not met", "stopped", "failed"]
POTENTIAL_COLUMNS = ("images", "removable MACs")


@dataclass(frozen=True, slots=True)
class SweepRun:
    """Result of one run.

    Attributes:
        budget: Limit of the quantity that is swept.
        run: Name of the run folder.
        report: Report of the run; None if it has none.
        error: Reason for the missing report.
        state: "done" if there is a report, else the reason in a word: "waiting", "not met" for a budget that cannot be
            reached, "stopped" for a run that could not pass its gates any more, "failed".
        seed: Seed of the run; None where all runs have that of the pipeline.
        settings: Varied settings by name; empty for a sweep.
    """

    budget: float
    run: str
    report: Report | None = None
    error: str | None = None
    state: State = "not met"
    seed: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """Outcome of the verdict, or the state of a run without one."""
        return self.state if self.report is None else self.report.verdict.outcome


@dataclass(frozen=True, slots=True)
class TimedRun:
    """Latency of a network, timed in turn with all others.

    Attributes:
        latency_ms: Median.
        ratio: Share of the baseline's latency.
        low: Lower end of the 95 % interval of `ratio`.
        high: Upper end.
    """

    latency_ms: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LatencyComparison:
    """Latency of all networks, timed in turn on one host.

    Attributes:
        key: Digest of the files and the conditions.
        host: Name of the host.
        conditions: Runtime, threads and batch size in words.
        baseline_ms: Median of the baseline.
        control: Interval of the baseline's latency over its own; None if it is not known.
        runs: Name of a run -> its latency.
    """

    key: str
    host: str
    conditions: str
    baseline_ms: float
    control: tuple[float, float] | None
    runs: dict[str, TimedRun]

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> LatencyComparison:
        """Return the comparison whose `asdict` is given.

        Raises:
            KeyError, TypeError: Values are missing or superfluous.
        """
        control = values["control"]
        return cls(
            **{key: values[key] for key in ("key", "host", "conditions", "baseline_ms")},
            control=None if control is None else (control[0], control[1]),
            runs={name: TimedRun(**one) for name, one in values["runs"].items()},
        )

    def describe(self) -> str:
        """Return the measurement in a sentence."""
        own = "" if self.control is None else f"; the baseline against itself: {_interval(*self.control)}"
        return f"Latency and speed-up: all networks timed in turn on {self.host}, {self.conditions}{own}."


@dataclass(frozen=True, slots=True)
class PrunePotential:
    """Largest share of the MACs that can be removed within a given drop of the primary metric.

    Attributes:
        delta: Largest drop against the baseline, as a share.
        nominal: Potential on unchanged images.
        average: Mean potential over all other distributions.
        minimum: Smallest potential of these distributions.
        worst: Name of the distribution with the smallest potential.
        distributions: Potential by distribution.
    """

    delta: float
    nominal: float
    average: float
    minimum: float
    worst: str
    distributions: dict[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """Runs that differ only in their seeds."""

    runs: tuple[SweepRun, ...]

    @property
    def reports(self) -> list[Report]:
        """Reports of the finished runs."""
        return [run.report for run in self.runs if run.report is not None]

    def mean_of(self, value: Callable[[SweepRun, Report], float | None]) -> Spread:
        """Return mean and standard deviation of a value over the finished runs."""
        found = [(run, run.report) for run in self.runs if run.report is not None]
        known = [one for run, report in found if (one := value(run, report)) is not None]
        if not known:
            return Spread(None, None)
        return Spread(fmean(known), stdev(known) if len(known) > 1 else None)

    @property
    def verdict(self) -> str:
        """Outcomes of the runs in words."""
        if len(self.runs) == 1:
            return self.runs[0].word
        return ", ".join(f"{count} {word}" for word, count in Counter(run.word for run in self.runs).items())


class Spread(NamedTuple):
    """Mean over seeds, and its sample standard deviation; None where it is not known."""

    mean: float | None
    sd: float | None

    def text(self, form: Callable[[float | None], str]) -> str:
        """Return mean and standard deviation, as in "99.1 % ± 0.1 %"."""
        return form(self.mean) if self.sd is None else f"{form(self.mean)} ± {form(self.sd)}"


@dataclass(frozen=True, slots=True)
class Sweep:
    """Results of a pipeline at several budgets.

    Attributes:
        name: Name of the pipeline.
        quantity: Quantity that the budgets limit, such as "latency".
        runs: Runs in order.
        kind: "sweep" or "search"; the name of the files.
        best: Run of the smallest passing budget; None for a sweep, and if no run passed.
        comparison: Latency of all networks in turn; None if it was not measured.
        front: Names of the runs on the Pareto front; empty except for a Pareto search.
    """

    name: str
    quantity: str
    runs: tuple[SweepRun, ...]
    kind: str = "sweep"
    best: str | None = None
    comparison: LatencyComparison | None = None
    front: tuple[str, ...] = ()

    @property
    def reports(self) -> list[Report]:
        """Reports of the runs that met their budget."""
        return [run.report for run in self.runs if run.report is not None]

    @property
    def metric(self) -> Metric:
        """Primary metric."""
        return next((report.metric for report in self.reports), TOP1)

    @property
    def baseline(self) -> Network | None:
        """Baseline of the first run that measured it."""
        return next((report.baseline for report in self.reports if report.baseline is not None), None)

    @property
    def gate(self) -> float | None:
        """Least or largest passing value of the primary metric; None without such a gate."""
        return gate_of(self.reports[0]) if self.reports else None

    @property
    def potential(self) -> PrunePotential | None:
        """Prune potential of the first seed; None if no run measured robustness and a baseline."""
        return prune_potential([row.reports[0] for row in self.grouped if row.reports])

    @property
    def grouped(self) -> list[Row]:
        """Runs by budget and settings, in order."""
        groups: dict[tuple[float, tuple[tuple[str, str], ...]], list[SweepRun]] = {}
        for run in self.runs:
            groups.setdefault((run.budget, tuple(run.settings.items())), []).append(run)
        return [Row(tuple(runs)) for runs in groups.values()]

    @property
    def varied(self) -> tuple[str, ...]:
        """Names of the varied settings."""
        return tuple(dict.fromkeys(name for run in self.runs for name in run.settings))

    @property
    def columns(self) -> tuple[str, ...]:
        """Titles of `rows`."""
        costs = ("MACs", "fewer MACs", "latency p50", "speed-up", "ONNX size")
        return ("budget", *self.varied, "verdict", self.metric.words, "change", *costs)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Cells of each row, as text; means and standard deviations over several seeds."""
        return [self._cells(row) for row in self.grouped]

    def _cells(self, row: Row) -> tuple[str, ...]:
        first, metric = row.runs[0], self.metric
        settings = [first.settings.get(name, "") for name in self.varied]
        verdict = f"{row.verdict}, smallest" if first.run == self.best else row.verdict
        if first.run in self.front:
            verdict += ", front"
        head = (f"{first.budget:g}", *settings, verdict)
        if not row.reports:
            return (*head, *[""] * (len(self.columns) - len(head)))
        before = None if self.baseline is None else self.baseline.quality.get(metric.name)
        quality = row.mean_of(lambda _, report: report.quality(metric.name).after)
        return (
            *head,
            quality.text(lambda value: format_metric(value, metric)),
            describe_difference(Change(before=before, after=quality.mean), metric),
            row.mean_of(lambda _, report: report.change("macs").after).text(format_count),
            row.mean_of(lambda _, report: _fewer_macs(report)).text(format_times),
            row.mean_of(self.latency_of).text(format_ms),
            row.mean_of(self.speedup_of).text(format_times),
            row.mean_of(lambda _, report: report.change("size_bytes").after).text(format_bytes),
        )

    def latency_of(self, run: SweepRun, report: Report) -> float | None:
        """Return the latency of a network, from the comparison of all if it has it."""
        timed = None if self.comparison is None else self.comparison.runs.get(run.run)
        return report.latency().after if timed is None else timed.latency_ms

    def speedup_of(self, run: SweepRun, report: Report) -> float | None:
        """Return the speed-up over the baseline, from the comparison of all if it has it."""
        timed = None if self.comparison is None else self.comparison.runs.get(run.run)
        return report.speedup if timed is None else 1 / timed.ratio


def gate_of(report: Report) -> float | None:
    """Return the least passing value of the primary metric, or the largest if lower is better; None without a gate."""
    stages = report.config.get("stages")
    last = stages[-1] if isinstance(stages, list) and stages else None
    gates = last.get("gates") if isinstance(last, dict) else None
    if not isinstance(gates, dict):
        return None
    metric, before = report.metric, report.quality().before
    sign = 1 if metric.higher_is_better else -1
    limits = [
        value
        for key, offset in (("min", None), ("max", None), ("max_drop", before), ("max_rise", before))
        if (value := _limit_of(gates.get(key), metric.name, offset, sign)) is not None
    ]
    return None if not limits else sign * max(sign * limit for limit in limits)


def _limit_of(limits: Any, name: str, before: float | None, sign: int) -> float | None:
    limit = limits.get(name) if isinstance(limits, dict) else None
    if not isinstance(limit, (int, float)):
        return None
    return float(limit) if before is None else before - sign * float(limit)


def _fewer_macs(report: Report) -> float | None:
    macs = report.change("macs")
    return macs.before / macs.after if macs.before is not None and macs.after else None


def prune_potential(reports: Sequence[Report], delta: float = DELTA) -> PrunePotential | None:
    """Return the share of MACs that can be removed within a given drop, on each distribution.

    Args:
        reports: Reports of runs that differ only in their budgets.
        delta: Largest drop of the primary metric against the baseline, as a share.

    Returns:
        For each distribution, the largest share of MACs that a run removed within the drop; 0 without such a run. None
        if no run measured robustness and a baseline.

    Source: Liebenwein et al. 2021, "Lost in Pruning", arXiv:2103.03014.
    """
    potential: dict[str, float] = {}
    for report in reports:
        macs = report.change("macs")
        for one in report.details.robustness.distributions:
            drop = drop_on(one, report.metric)
            if not macs.before or macs.after is None or drop is None:
                continue
            removed = 1 - macs.after / macs.before if drop <= delta + 1e-9 else 0.0
            potential[one.name] = max(potential.get(one.name, 0.0), removed)
    others = {name: share for name, share in potential.items() if name != NOMINAL}
    if not others or NOMINAL not in potential:
        return None
    worst = min(others, key=lambda name: others[name])
    average = sum(others.values()) / len(others)
    return PrunePotential(delta, potential[NOMINAL], average, others[worst], worst, potential)


def potential_rows(potential: PrunePotential) -> list[tuple[str, str]]:
    """Return the cells of `POTENTIAL_COLUMNS`, the smallest potential first."""
    found = sorted(potential.distributions.items(), key=lambda item: item[1])
    return [(name, format_share(share)) for name, share in found]


def describe_potential(potential: PrunePotential) -> str:
    """Return the prune potential in a sentence."""
    return (
        f"Prune potential at a drop of {100 * potential.delta:g} percentage points: {format_share(potential.nominal)} "
        f"of the MACs on unchanged images, {format_share(potential.average)} on average over noise and corruptions, "
        f"{format_share(potential.minimum)} on {potential.worst}."
    )


def write_sweep(sweep: Sweep, folder: Path) -> None:
    """Write `sweep.json` and `sweep.html`, or `search.json` and `search.html`; each file is complete or absent.

    Raises:
        ArtifactError: A file cannot be written.
    """
    write_json({**to_plain(sweep), "made": stamp()}, folder / f"{sweep.kind}.json")
    write_page(render_sweep(sweep), folder / f"{sweep.kind}.html")


def to_plain(sweep: Sweep) -> dict[str, Any]:
    """Return the content of `sweep.json`.

    Returns:
        Keys schema, name, quantity, baseline (or None), runs, prune_potential (or None); of a search also best, the
        name of a run or None, and gate, the limit of the primary metric; of a Pareto search also front, names of runs.
        Each run has budget, run,
        error, passed, outcome, macs, params, size_bytes, the primary metric under its name, latency_ms (p50), and
        speedup and fewer_macs against the baseline of that run; with several seeds also seed, of a Pareto search
        settings. `rows` has means and standard deviations over several seeds. `comparison` has the latency of all
        networks, timed in turn. `metric` describes a primary metric other than top1.
    """
    metric, potential = sweep.metric, sweep.potential
    return {
        "schema": SWEEP_SCHEMA,
        "name": sweep.name,
        "quantity": sweep.quantity,
        "baseline": None if sweep.baseline is None else sweep.baseline.model_dump(),
        "runs": [_run_to_plain(run, metric) for run in sweep.runs],
        "prune_potential": None if potential is None else asdict(potential),
        **({} if metric == TOP1 else {"metric": metric.to_dict()}),
        **({"best": sweep.best, "gate": sweep.gate} if sweep.kind == "search" else {}),
        **({"front": list(sweep.front)} if sweep.front else {}),
        **({} if sweep.comparison is None else {"comparison": asdict(sweep.comparison)}),
        **({"rows": [_row_to_plain(row, sweep) for row in sweep.grouped]} if _has_seeds(sweep) else {}),
    }


def read_comparison(folder: Path, kind: str = "sweep") -> LatencyComparison | None:
    """Return the comparison of latencies that an earlier sweep has written; None without one."""
    try:
        values = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        return LatencyComparison.from_plain(values["comparison"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _has_seeds(sweep: Sweep) -> bool:
    return any(len(row.runs) > 1 for row in sweep.grouped)


def _row_to_plain(row: Row, sweep: Sweep) -> dict[str, Any]:
    metric = sweep.metric
    values: dict[str, Callable[[SweepRun, Report], float | None]] = {
        metric.name: lambda _, report: report.quality(metric.name).after,
        "macs": lambda _, report: report.change("macs").after,
        "params": lambda _, report: report.change("params").after,
        "size_bytes": lambda _, report: report.change("size_bytes").after,
        "latency_ms": sweep.latency_of,
        "speedup": sweep.speedup_of,
    }
    return {
        "budget": row.runs[0].budget,
        "runs": [run.run for run in row.runs],
        "done": len(row.reports),
        "passed": sum(report.verdict.passed for report in row.reports),
        **{name: row.mean_of(value)._asdict() for name, value in values.items()},
    }


def _run_to_plain(run: SweepRun, metric: Metric) -> dict[str, Any]:
    report = run.report
    slim = (None if report is None else report.slim) or Network()
    return {
        "budget": run.budget,
        "run": run.run,
        "error": run.error,
        "passed": None if report is None else report.verdict.passed,
        "outcome": None if report is None else report.verdict.outcome,
        "macs": slim.macs,
        "params": slim.params,
        "size_bytes": slim.size_bytes,
        metric.name: slim.quality.get(metric.name),
        "latency_ms": slim.latency_ms.get("p50"),
        "speedup": None if report is None else report.speedup,
        "fewer_macs": None if report is None else _fewer_macs(report),
        **({} if run.seed is None else {"seed": run.seed}),
        **({"settings": dict(run.settings)} if run.settings else {}),
        **({"state": run.state} if report is None else {}),
    }


def render_sweep(sweep: Sweep) -> str:
    """Return the HTML page of a sweep or search."""
    metric, baseline, potential = sweep.metric, sweep.baseline, sweep.potential
    points = [point for row in sweep.grouped if (point := _make_point(row, sweep)) is not None]
    before = None if baseline is None else baseline.quality.get(metric.name)
    if points and before is not None:
        points.append(Point(1.0, metric.scale * before, "", is_baseline=True))
    gate = None if sweep.gate is None else metric.scale * sweep.gate
    panel = Panel("speed-up over the baseline", points, more_is_better=True, gate=gate)
    return render(
        "sweep.html.j2",
        f"{sweep.name}: {sweep.kind}",
        sweep.name,
        f"compress {sweep.kind}",
        sweep=sweep,
        front=plot_fronts("front", [panel], metric),
        rows=list(zip(sweep.grouped, sweep.rows, strict=True)),
        first_number=len(sweep.varied) + 2,
        potential=None if potential is None else describe_potential(potential),
        potential_columns=POTENTIAL_COLUMNS,
        potential_rows=[] if potential is None else potential_rows(potential),
    )


def _make_point(row: Row, sweep: Sweep) -> Point | None:
    """Return the point of a row: one run with its interval, or the mean over seeds and one standard deviation."""
    metric = sweep.metric
    speedup = row.mean_of(sweep.speedup_of).mean
    quality = row.mean_of(lambda _, report: report.quality(metric.name).after)
    if speedup is None or quality.mean is None:
        return None
    low = high = None
    if quality.sd is not None:
        low, high = quality.mean - quality.sd, quality.mean + quality.sd
    elif len(row.reports) == 1:
        estimate = row.reports[0].details.quality.slim.get(metric.name, Estimate())
        low, high = estimate.low, estimate.high
    ends = [None if end is None else metric.scale * end for end in (low, high)]
    is_failed = not any(report.verdict.passed for report in row.reports)
    label = f"{row.runs[0].budget:g}"
    return Point(speedup, metric.scale * quality.mean, label, ends[0], ends[1], is_failed=is_failed)


def _interval(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"
