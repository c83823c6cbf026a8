"""What came out? The sections on the verdict, the two networks' figures, the checks and what was measured."""

from typing import Any

from compress.catalog import HARDER, SHARES
from compress.report.fronts import Panel, Point, plot_fronts
from compress.report.markup import (
    escape,
    format_bytes,
    format_count,
    format_measure,
    format_ms,
    format_number,
    format_share,
    format_whole,
    render_details,
    render_facts,
    render_figure,
    render_section,
    render_split,
    render_table,
)
from compress.report.metric import (
    CHANGE_COLUMNS,
    CHANGE_KIND,
    compare_figures,
    compare_quality,
    describe_ratio,
    format_change,
    format_metric,
    metric_of_report,
    scale_of,
    title_of,
)
from compress.report.plots import count_beyond_edge, plot_latency
from compress.report.svg import are_numbers
from compress.tasks.base import Metric

NO_BREAK = "\u00a0"
_KINDS = {"noise": "noise", "corruptions": "corruption"}
OUTCOMES = ("passed", "failed", "inconclusive")
STATUS_WORDS = {"pass": "passed", "fail": "failed", "inconclusive": "inconclusive", "skipped": "skipped"}


def find(values: Any, *keys: str) -> Any:
    """Return what lies under nested `keys`, or None as soon as one is missing.

    >>> find({"a": {"b": 1}}, "a", "b"), find({"a": None}, "a", "b")
    (1, None)
    """
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def render_verdict(report: dict[str, Any]) -> str:
    """Return the banner: the outcome in words and colour, the reasons, and the gist in one line."""
    checks = find(report, "verdict", "checks") or []
    outcome = outcome_of(report)
    made = [check for check in checks if check.get("status") != "skipped"]
    broken = [check for check in checks if is_broken(check, report)]
    if outcome == "passed":
        skipped = len(checks) - len(made)
        text = f"All {len(made)} checks hold" if len(made) > 1 else "The one check made holds"
        reason = f"<p>{text}{f'; {skipped} skipped' if skipped else ''}.</p>"
    elif broken:
        reason = f"<ul>{''.join(f'<li>{describe_broken(check)}</li>' for check in broken)}</ul>"
    else:
        reason = "<p>Nothing was checked, or a required check was not made, so nothing is known to hold.</p>"
    gist = ", ".join(f'<span class="whole">{escape(change)}</span>' for change in list_changes(report))
    tone, word = {"passed": "pass", "failed": "fail"}.get(outcome, "warn"), outcome.capitalize()
    gist = f"<p>{gist}.</p>" if gist else ""
    return f'<div class="verdict {tone}" role="status"><h2>{word}</h2>\n{reason}{gist}</div>\n'


def render_comparison(report: dict[str, Any]) -> str:
    """Return the table of the baseline's and the slim network's figures."""
    metric = metric_of_report(report)
    rows = [
        compare_figures("MACs", *_both(report, "macs"), format_count, "fewer", "more"),
        compare_figures("Parameters", *_both(report, "params"), format_count, "fewer", "more"),
        compare_figures("ONNX size", *_both(report, "size_bytes"), format_bytes, "smaller", "larger"),
        *(
            compare_quality(name_metric(key), *_both_quality(report, key), quality_kind(report, key))
            for key in list_keys(report, "quality")
        ),
        *(
            compare_figures(f"Latency {key}", *_both(report, "latency_ms", key), format_ms, "faster", "slower")
            for key in list_keys(report, "latency_ms")
        ),
    ]
    shown = [row for row in rows if row]
    if not shown:
        return render_section("Before and after", "<p>Verification measured neither network.</p>\n")
    table = render_table(CHANGE_COLUMNS, shown, numeric=(1, 2, 3), kind=CHANGE_KIND)
    images = find(report, "details", "evaluation", "images")
    notes = [
        f"{escape(title_of(metric))} over {escape(format_whole(images))} evaluation images, on the ONNX files."
        if images
        else "",
        _describe_labels(report),
        _describe_runtime(report),
        "MACs: multiply–accumulates of convolution and linear layers for one image.",
    ]
    caption = f"{escape(title_of(metric))} against what the network costs."
    figure = render_figure(plot_fronts("change", _list_panels(report, metric), metric), caption)
    note = f'<p class="muted">{" ".join(filter(None, notes))}</p>\n'
    return render_section("Before and after", table, note, figure)


def render_checks(report: dict[str, Any]) -> str:
    """Return the table of everything that was checked, what failed first."""
    checks = sorted(find(report, "verdict", "checks") or [], key=lambda check: not is_broken(check, report))
    rows = [
        (
            f"<code>{escape(check.get('name'))}</code>",
            render_badge(check.get("status", "skipped")),
            escape(format_measure(check.get("value"), check.get("unit") or "")),
            escape(format_measure(check.get("limit"), check.get("unit") or "")),
            f'<div class="text">{escape(check.get("detail"))}</div>',
        )
        for check in checks
    ]
    table = (
        render_table(("check", "result", "value", "limit", "detail"), rows, numeric=(2, 3), kind="stacked checks")
        if rows
        else ""
    )
    return render_section("Checks", table)


def render_latency(report: dict[str, Any]) -> str:
    """Return the picture of both latency distributions."""
    latency = find(report, "details", "latency") or {}
    baseline, slim = latency.get("baseline_ms") or [], latency.get("slim_ms") or []
    beyond = count_beyond_edge(baseline, slim)
    caption = f"{beyond} slow call{'s lie' if beyond > 1 else ' lies'} beyond the right edge." if beyond else ""
    figure = render_figure(plot_latency("latency", baseline, slim), caption)
    facts = [
        *((key, latency.get(key)) for key in ("runtime", "provider", "threads")),
        ("images a call", latency.get("batch_size")),
        ("warm-up calls", latency.get("warmup")),
        ("timed calls, baseline and slim", f"{len(baseline)} and {len(slim)}"),
        ("inputs and outputs", "on the device" if latency.get("io_binding") else None),
        *_list_ratio(latency.get("ratio")),
    ]
    return render_section("Latency", render_split(render_facts(facts), figure)) if figure else ""


def _list_ratio(ratio: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """Return the speed-up and the baseline's ratio to itself with their intervals; nothing where not measured."""
    value, low, high = (find(ratio, key) for key in ("value", "low", "high"))
    if not value or not low or not high:
        return []
    facts: list[tuple[str, Any]] = [
        ("speed-up, with 95 % confidence", f"{1 / value:.3f}× ({1 / high:.3f} to {1 / low:.3f})")
    ]
    itself = [find(ratio, "control", key) for key in ("value", "low", "high")]
    if all(itself):
        facts.append(("baseline / baseline in the same run", "{:.3f} ({:.3f} to {:.3f})".format(*itself)))
    return [*facts, ("sittings", find(ratio, "sittings"))]


def render_parity(report: dict[str, Any]) -> str:
    """Return how closely the file agrees with the torch network."""
    parity = find(report, "details", "parity") or {}
    quantiles = parity.get("quantiles") or {}
    facts: list[tuple[str, Any]] = [("real samples", parity.get("samples"))]
    facts += [
        (name, format_number(value))
        for name, value in (
            ("largest difference", parity.get("max_abs")),
            ("mean difference", parity.get("mean_abs")),
            *((f"difference {quantile}", value) for quantile, value in quantiles.items()),
        )
        if value is not None
    ]
    agreement = parity.get("top1_agreement")
    facts.append(("same top-1 class", None if agreement is None else format_share(agreement)))
    return render_section("Parity of the ONNX file with torch", render_facts(facts))


def render_config(text: str) -> str:
    """Return the resolved pipeline, folded.

    Args:
        text: YAML.
    """
    return render_section("Pipeline", render_details("resolved configuration", f"<pre>{escape(text)}</pre>\n"))


def outcome_of(report: dict[str, Any]) -> str:
    """Return "passed", "failed" or "inconclusive"; reports of older versions know the first two only.

    >>> outcome_of({"verdict": {"passed": True}}), outcome_of({"verdict": {"passed": False, "outcome": "inconclusive"}})
    ('passed', 'inconclusive')
    """
    known = find(report, "verdict", "outcome")
    return known if known in OUTCOMES else "passed" if find(report, "verdict", "passed") else "failed"


def is_broken(check: dict[str, Any], report: dict[str, Any]) -> bool:
    """Whether a check keeps a verdict from passing."""
    required = find(report, "verdict", "required") or []
    status = check.get("status")
    return status in ("fail", "inconclusive") or (status == "skipped" and check.get("name") in required)


def describe_broken(check: dict[str, Any]) -> str:
    """Return why a check did not pass and what to do next, as HTML."""
    unit = check.get("unit") or ""
    skipped = " was required, but skipped" if check.get("status") == "skipped" else ""
    figures = [
        f"{word} {format_measure(check.get(key), unit)}".replace(" ", NO_BREAK)
        for word, key in (("got", "value"), ("limit", "limit"))
        if check.get(key) is not None
    ]
    remedy = check.get("remedy")
    parts = [", ".join(figures), check.get("detail") or "", f"Next step: {remedy}" if remedy else ""]
    text = ". ".join(part for part in parts if part)
    skipped = " is inconclusive" if check.get("status") == "inconclusive" else skipped
    return f"<strong><code>{escape(check.get('name'))}</code></strong>{skipped}{': ' if text else ''}{escape(text)}"


def render_badge(status: str) -> str:
    """Return the status of a check in words and colour."""
    tone = status if status in STATUS_WORDS else "skipped"
    return f'<span class="badge {tone}">{escape(STATUS_WORDS.get(status, status))}</span>'


def _both(report: dict[str, Any], *keys: str) -> tuple[Any, Any]:
    return find(report, "baseline", *keys), find(report, "slim", *keys)


def list_keys(report: dict[str, Any], group: str) -> list[str]:
    """Return what is known of either network in a group of figures, such as "quality", in the order met."""
    return list(dict.fromkeys(key for network in ("baseline", "slim") for key in (find(report, network, group) or {})))


def find_quality(report: dict[str, Any], network: str, metric: str) -> float | None:
    """Return a metric of "baseline" or "slim"; the baseline's mean over noise or corruptions from each of them."""
    value: float | None = find(report, network, "quality", metric)
    if value is not None or network != "baseline" or metric not in _KINDS:
        return value
    found = find(report, "details", "robustness", "distributions") or []
    key = f"baseline_{metric_of_report(report).name}"
    each = [one.get(key) for one in found if one.get("kind") == _KINDS[metric]]
    return sum(each) / len(each) if each and None not in each else None


def name_metric(metric: str) -> str:
    """Return a metric as people say it.

    >>> name_metric("top1"), name_metric("worst_class")
    ('Top-1', 'Worst class')
    """
    known = {"miou": "mIoU", "map": "mAP", "map50": "mAP at 0.5", "map75": "mAP at 0.75", "rmse": "RMSE", "mae": "MAE"}
    if metric in known:
        return known[metric]
    return metric.replace("top", "Top-") if metric.startswith("top") else metric.replace("_", " ").capitalize()


def quality_kind(report: dict[str, Any], name: str) -> Metric:
    """Return what kind of figure a name in a report's quality stands for: a share or not."""
    metric = metric_of_report(report)
    if name == metric.name or name in HARDER:
        return metric
    return Metric(name, is_share=metric.name == "top1" or name in SHARES)


def _both_quality(report: dict[str, Any], key: str) -> tuple[float | None, float | None]:
    return find_quality(report, "baseline", key), find_quality(report, "slim", key)


def _describe_labels(report: dict[str, Any]) -> str:
    """Return a sentence where images had no labels; "" where they had."""
    if find(report, "details", "quality", "is_labelled") is not False:
        return ""
    return "The images have no labels: what is measured is how near the outputs are to those of the untouched network."


def _list_panels(report: dict[str, Any], metric: Metric) -> list[Panel]:
    """Return quality over latency and over MACs, from the baseline to the slim network."""
    panels = []
    for title, form, keys in (("latency p50 (ms)", 1.0, ("latency_ms", "p50")), ("MACs (millions)", 1e6, ("macs",))):
        points = []
        for label in ("baseline", "slim"):
            cost, quality = find(report, label, *keys), find(report, label, "quality", metric.name)
            if are_numbers(cost, quality):
                interval = find(report, "details", "quality", label, metric.name)
                name, is_baseline = ("", True) if label == "baseline" else (label, False)
                points.append(Point.of(cost / form, quality, interval, name, is_baseline, scale_of(metric)))
        if len(points) == 2:
            panels.append(Panel(title, points, is_joined=True))
    return panels


def list_changes(report: dict[str, Any]) -> list[str]:
    """Return the changes that matter most, in words."""
    changes = []
    for keys, less, more in (
        (("macs",), "fewer MACs", "more MACs"),
        (("latency_ms", "p50"), "faster", "slower"),
        (("size_bytes",), "smaller", "larger"),
    ):
        before, after = find(report, "baseline", *keys), find(report, "slim", *keys)
        if before and after:
            changes.append(describe_ratio(before, after, less, more))
    metric = metric_of_report(report)
    before, after = (find(report, network, "quality", metric.name) for network in ("baseline", "slim"))
    if before is not None and after is not None:
        changes.append(f"{metric.words} {format_metric(metric, after)} ({format_change(metric, before, after)})")
    return changes


def _describe_runtime(report: dict[str, Any]) -> str:
    """Return where latency was measured, as a sentence; "" when nothing is known."""
    latency = find(report, "details", "latency") or {}
    names = [escape(latency[key]) for key in ("runtime", "provider") if latency.get(key)]
    threads, batch = latency.get("threads"), latency.get("batch_size")
    names += [f"{escape(threads)} thread{'' if threads == 1 else 's'}"] if threads is not None else []
    names += [f"batch {escape(batch)}"] if batch is not None else []
    return f"Latency in {', '.join(names)}; both networks timed in turn." if names else ""
