"""What came out at several budgets? `sweep.json`, and one page with a picture and a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.catalog import NOMINAL
from compress.report.build import write_json, write_page
from compress.report.markup import (
    escape,
    format_bytes,
    format_count,
    format_share,
    render_figure,
    render_section,
    render_table,
)
from compress.report.metric import TOP1, format_metric, metric_of, metric_of_report, scale_of, worse_by
from compress.report.outcome import find, outcome_of
from compress.report.page import render_page
from compress.report.plots import plot_front
from compress.tasks.base import Metric

SWEEP_SCHEMA = 1
DELTA = 0.005
POTENTIAL_COLUMNS = ("images", "MACs that can go")
COLUMNS = ("budget", "verdict", "top-1", "change", "MACs", "fewer MACs", "latency p50", "speed-up", "ONNX size")


def build_sweep(name: str, quantity: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of `sweep.json`.

    Args:
        name: Of the pipeline.
        quantity: What the budgets limit, such as "latency".
        rows: For each budget {"budget", "run": name of its run folder, "report": its `report.json` or None,
            "error": why there is none}.

    Returns:
        Keys schema, name, quantity, baseline (figures, or None), runs, prune_potential (or None). Each run has budget,
        run, error, passed, outcome, macs, params, size_bytes, top1, latency_ms (p50), and speedup and fewer_macs
        against the baseline of that run. Of another task than classification `top1` is called as its figure is, and
        `metric` says what that is.
    """
    reports = [row["report"] for row in rows if row["report"] is not None]
    metric = metric_of_report(reports[0]) if reports else TOP1
    runs = [_summary(row, metric) for row in rows]
    baselines = [row["report"]["baseline"] for row in rows if find(row, "report", "baseline")]
    return {
        "schema": SWEEP_SCHEMA,
        "name": name,
        "quantity": quantity,
        "baseline": baselines[0] if baselines else None,
        "runs": runs,
        "prune_potential": prune_potential(reports),
        **_stated(metric),
    }


def prune_potential(reports: Sequence[dict[str, Any]], delta: float = DELTA) -> dict[str, Any] | None:
    """Return how much could be removed at no more than a given loss, on each distribution that was looked at.

    Args:
        reports: `report.json` of runs that are alike but for their budgets.
        delta: Largest loss of top-1 against the baseline, as a share.

    Returns:
        "delta"; "distributions": name -> largest share of MACs that a run removed without losing more there, 0 where
        every run does; "nominal": that of the images as they are; "average" and "minimum" over the others, and
        "worst": where that is. None where no run looked at noise or corruptions next to a baseline.

    Source: Liebenwein et al. 2021, "Lost in Pruning", arXiv:2103.03014.
    """
    potential: dict[str, float] = {}
    for report in reports:
        worse = worse_by(metric_of_report(report))
        before, after = find(report, "baseline", "macs"), find(report, "slim", "macs")
        for one in find(report, "details", "robustness", "distributions") or []:
            drop = find(one, "changes", worse, "value")
            if not before or after is None or drop is None:
                continue
            removed = 1 - after / before if drop <= delta + 1e-9 else 0.0
            potential[one["name"]] = max(potential.get(one["name"], 0.0), removed)
    others = {name: share for name, share in potential.items() if name != NOMINAL}
    if not others or NOMINAL not in potential:
        return None
    worst = min(others, key=lambda name: others[name])
    return {
        "delta": delta,
        "nominal": potential[NOMINAL],
        "average": sum(others.values()) / len(others),
        "minimum": others[worst],
        "worst": worst,
        "distributions": potential,
    }


def potential_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the cells of `POTENTIAL_COLUMNS`, the smallest potential first; [] where none is known."""
    found = find(report, "prune_potential", "distributions") or {}
    return [[name, format_share(share)] for name, share in sorted(found.items(), key=lambda item: item[1])]


def describe_potential(report: dict[str, Any]) -> str:
    """Return the prune potential in a sentence; "" where none is known."""
    found = find(report, "prune_potential")
    if found is None:
        return ""
    return (
        f"Prune potential at {100 * found['delta']:g} points of loss: {format_share(found['nominal'])} of the MACs on "
        f"the images as they are, {format_share(found['average'])} on average over noise and corruptions, "
        f"{format_share(found['minimum'])} on {found['worst']}."
    )


def write_sweep(report: dict[str, Any], folder: Path) -> None:
    """Write `sweep.json` and `sweep.html`; each file is whole or not there.

    Raises:
        ArtifactError: A file cannot be written.
    """
    write_json(report, folder / "sweep.json")
    write_page(render_sweep(report), folder / "sweep.html")


def render_sweep(report: dict[str, Any]) -> str:
    """Return the whole page."""
    runs, baseline = report["runs"], report["baseline"]
    parts = []
    if baseline is not None:
        metric = metric_of(report)
        points = [(run["speedup"], run[metric.name], f"{run['budget']:g}") for run in runs]
        svg = plot_front("front", points, find(baseline, "quality", metric.name), metric)
        caption = (
            "Each point is a run, named after its budget. Filled points are the front: no other run is faster and as "
            "accurate, or as fast and more accurate."
        )
        parts.append(render_section("Accuracy and speed", render_figure(svg, caption)))
    rows = [[escape(cell) for cell in cells] for cells in sweep_rows(report)]
    for cells, run in zip(rows, runs, strict=True):
        if run["error"] is None:
            cells[0] = f'<a href="../{escape(run["run"])}/report.html">{cells[0]}</a>'
    errors = "".join(
        f"<p>Budget {run['budget']:g}: {escape(run['error'])}</p>\n" for run in runs if run["error"] is not None
    )
    table = render_table(sweep_columns(report), rows, numeric=range(2, len(COLUMNS)))
    parts.append(render_section(f"Budgets of {report['quantity']}", table, errors))
    if potentials := potential_rows(report):
        shown = [[escape(cell) for cell in row] for row in potentials]
        sentence = f"<p>{escape(describe_potential(report))}</p>\n"
        parts.append(render_section("Prune potential", sentence, render_table(POTENTIAL_COLUMNS, shown, numeric=(1,))))
    return render_page(f"{report['name']}: sweep", "compress sweep", report["name"], "".join(parts))


def sweep_columns(report: dict[str, Any]) -> tuple[str, ...]:
    """Return `COLUMNS` with the figure that decides."""
    return tuple(metric_of(report).words if column == TOP1.words else column for column in COLUMNS)


def sweep_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the cells of `COLUMNS` for each run, as plain text."""
    metric = metric_of(report)
    baseline = find(report, "baseline", "quality", metric.name)
    rows = []
    for run in report["runs"]:
        budget = f"{run['budget']:g}"
        if run["error"] is not None:
            rows.append([budget, "not met", *[""] * (len(COLUMNS) - 2)])
            continue
        quality = run[metric.name]
        change = None if quality is None or baseline is None else scale_of(metric) * (quality - baseline)
        rows.append(
            [
                budget,
                run.get("outcome") or ("passed" if run["passed"] else "failed"),
                format_metric(metric, quality),
                "" if change is None else f"{change:+.2f} points" if metric.is_share else f"{change:+.4g}",
                format_count(run["macs"]),
                _times(run["fewer_macs"]),
                "" if run["latency_ms"] is None else f"{run['latency_ms']:.3g} ms",
                _times(run["speedup"]),
                format_bytes(run["size_bytes"]),
            ]
        )
    return rows


def _stated(metric: Metric) -> dict[str, Any]:
    return {} if metric == TOP1 else {"metric": metric.to_dict()}


def _summary(row: dict[str, Any], metric: Metric) -> dict[str, Any]:
    report = row["report"] or {}
    baseline, slim = report.get("baseline"), report.get("slim")
    return {
        "budget": row["budget"],
        "run": row["run"],
        "error": row["error"],
        "passed": find(report, "verdict", "passed"),
        "outcome": None if row["report"] is None else outcome_of(report),
        "macs": find(slim, "macs"),
        "params": find(slim, "params"),
        "size_bytes": find(slim, "size_bytes"),
        metric.name: find(slim, "quality", metric.name),
        "latency_ms": find(slim, "latency_ms", "p50"),
        "speedup": _speedup(report),
        "fewer_macs": _ratio(find(baseline, "macs"), find(slim, "macs")),
    }


def _speedup(report: dict[str, Any]) -> float | None:
    """Return the speed-up that the gates of the run were held to; of older reports the quotient of the medians."""
    ratio: float | None = find(report, "details", "latency", "ratio", "value")
    if ratio:
        return 1 / ratio
    return _ratio(*(find(report, network, "latency_ms", "p50") for network in ("baseline", "slim")))


def _ratio(before: float | None, after: float | None) -> float | None:
    return before / after if before is not None and after else None


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"
