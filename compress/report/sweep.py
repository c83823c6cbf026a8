"""Sweep over several budgets: `sweep.json`, and one page with a plot and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.catalog import NOMINAL
from compress.report.build import write_json, write_page
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
POTENTIAL_COLUMNS = ("images", "removable MACs")


@dataclass(frozen=True, slots=True)
class SweepRun:
    """Result at one budget.

    Attributes:
        budget: Limit of the quantity that is swept.
        run: Name of the run folder.
        report: Report of the run; None if the budget was not met.
        error: Reason for the missing report.
    """

    budget: float
    run: str
    report: Report | None = None
    error: str | None = None


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
class Sweep:
    """Results of a pipeline at several budgets.

    Attributes:
        name: Name of the pipeline.
        quantity: Quantity that the budgets limit, such as "latency".
        runs: Runs in order.
        kind: "sweep", or "search" for a search of the smallest passing budget; the name of the files.
        best: Run of the smallest passing budget; None for a sweep, and if no run passed.
    """

    name: str
    quantity: str
    runs: tuple[SweepRun, ...]
    kind: str = "sweep"
    best: str | None = None

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
    def potential(self) -> PrunePotential | None:
        """Prune potential; None if no run measured robustness and a baseline."""
        return prune_potential(self.reports)

    @property
    def columns(self) -> tuple[str, ...]:
        """Titles of `rows`."""
        costs = ("MACs", "fewer MACs", "latency p50", "speed-up", "ONNX size")
        return ("budget", "verdict", self.metric.words, "change", *costs)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Cells of each run, as text."""
        before = None if self.baseline is None else self.baseline.quality.get(self.metric.name)
        return [_make_row(run, before, len(self.columns), run.run == self.best) for run in self.runs]


def _make_row(run: SweepRun, before: float | None, count: int, is_best: bool) -> tuple[str, ...]:
    budget, report = f"{run.budget:g}", run.report
    if report is None:
        return (budget, "not met", *[""] * (count - 2))
    metric, macs, latency = report.metric, report.change("macs"), report.latency().after
    after = report.quality(metric.name).after
    change = Change(before=before, after=after)
    return (
        budget,
        f"{report.verdict.outcome}, smallest" if is_best else report.verdict.outcome,
        format_metric(after, metric),
        describe_difference(change, metric),
        format_count(macs.after),
        format_times(_fewer_macs(report)),
        format_ms(latency),
        format_times(report.speedup),
        format_bytes(report.change("size_bytes").after),
    )


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
        name of a run or None. Each run has budget, run,
        error, passed, outcome, macs, params, size_bytes, the primary metric under its name, latency_ms (p50), and
        speedup and fewer_macs against the baseline of that run. `metric` describes a primary metric other than top1.
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
        **({"best": sweep.best} if sweep.kind == "search" else {}),
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
    }


def render_sweep(sweep: Sweep) -> str:
    """Return the HTML page of a sweep."""
    metric, baseline, potential = sweep.metric, sweep.baseline, sweep.potential
    points = []
    for run in sweep.runs:
        quality = None if run.report is None else run.report.quality(metric.name).after
        if run.report is not None and run.report.speedup is not None and quality is not None:
            points.append(Point(run.report.speedup, metric.scale * quality, f"{run.budget:g}"))
    before = None if baseline is None else baseline.quality.get(metric.name)
    if points and before is not None:
        points.append(Point(1.0, metric.scale * before, "", is_baseline=True))
    panel = Panel("speed-up over the baseline", points, more_is_better=True)
    return render(
        "sweep.html.j2",
        f"{sweep.name}: {sweep.kind}",
        sweep.name,
        f"compress {sweep.kind}",
        sweep=sweep,
        front=plot_fronts("front", [panel], metric),
        rows=list(zip(sweep.runs, sweep.rows, strict=True)),
        potential=None if potential is None else describe_potential(potential),
        potential_columns=POTENTIAL_COLUMNS,
        potential_rows=[] if potential is None else potential_rows(potential),
    )
