"""May these runs be compared at all? What was not the same for all of them, in sentences."""

from collections.abc import Callable, Sequence
from typing import Any

from compress.report.markup import MISSING, format_ms, format_whole
from compress.report.metric import format_metric, metric_of_report
from compress.report.outcome import find

DRIFT = 1.05  # by how much the baseline's latency may differ between runs
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def list_caveats(reports: Sequence[dict[str, Any]], letters: Sequence[str]) -> list[str]:
    """Return what stands between the runs and a fair comparison, as plain sentences.

    Args:
        reports: As in `report.json`.
        letters: What each run is called.
    """
    found = [
        *_list_data_caveats(reports, letters),
        *_list_baseline_caveats(reports, letters),
        *list_latency_caveats(reports, letters),
    ]
    for place, report in enumerate(reports):
        same = [letters[other] for other in range(place) if reports[other] == report]
        if same:
            found.append(f"{letters[place]} and {same[0]} hold the same report, to the last digit: one is a copy.")
    return found


def list_latency_caveats(reports: Sequence[dict[str, Any]], letters: Sequence[str]) -> list[str]:
    """Return why milliseconds of these runs are not to be compared; [] when they are."""
    measured = [number for number, report in enumerate(reports) if find(report, "details", "latency")]
    reports, letters = [reports[number] for number in measured], [letters[number] for number in measured]
    found = []
    machines = _describe_differences(reports, letters, _machine)
    if machines:
        found.append(
            f"The runs were measured on different machines ({machines}): their latencies are not comparable. A "
            "speed-up is measured in turn with the baseline on one machine; even so it is that machine's."
        )
    conditions = _describe_differences(reports, letters, _conditions)
    if conditions:
        found.append(f"Latency was measured under different conditions ({conditions}): it is not comparable.")
    if not found and (speeds := _describe_drift(reports, letters)):
        found.append(
            f"The same baseline took {speeds}: the machine was not equally fast. Milliseconds of one run are not to be "
            "compared with those of another, speed-ups are."
        )
    return found


def share_baseline(reports: Sequence[dict[str, Any]]) -> bool:
    """Whether all runs started from the same network, as far as MACs, params, size and top-1 tell."""
    known = [_baseline(report) for report in reports]
    return None not in known and len(set(known)) == 1


def _describe_drift(reports: Sequence[dict[str, Any]], letters: Sequence[str]) -> str:
    """Return the fastest and the slowest latency of one baseline, where they are too far apart; else ""."""
    times = [
        (find(report, "baseline", "latency_ms", "p50"), letter) for report, letter in zip(reports, letters, strict=True)
    ]
    known = [(time, letter) for time, letter in times if time]
    if len(known) < 2 or not share_baseline(reports) or max(known)[0] <= DRIFT * min(known)[0]:
        return ""
    return " and ".join(f"{format_ms(time)} ({letter})" for time, letter in (min(known), max(known)))


def _list_data_caveats(reports: Sequence[dict[str, Any]], letters: Sequence[str]) -> list[str]:
    found = []
    images = _describe_differences(reports, letters, _images)
    digests = _describe_differences(
        reports, letters, lambda report: _shorten(find(report, "provenance", "data", "evaluation"))
    )
    what = f"{metric_of_report(reports[0]).words} and all else that follows from predictions"
    if images:
        found.append(f"The runs were evaluated on different images ({images}): {what} are not comparable.")
    elif digests:
        found.append(
            f"The evaluation data have different digests ({digests}): {what} are comparable only "
            "where the images are the same nevertheless."
        )
    elif any(find(report, "provenance", "data", "evaluation") is None for report in reports) and _describe_differences(
        reports, letters, lambda report: _text(find(report, "config", "data", "evaluation"))
    ):
        found.append(
            "The runs name different evaluation data, and not all of them hold its digest: whether the images are the "
            "same is not known."
        )
    if _describe_differences(reports, letters, lambda report: _text(find(report, "config", "data", "preprocessing"))):
        found.append("The images were preprocessed in different ways; the settings below say how.")
    robustness = _describe_differences(reports, letters, _wanted)
    if robustness:
        found.append(f"Noise and corruptions were looked at in different ways ({robustness}).")
    return found


def _list_baseline_caveats(reports: Sequence[dict[str, Any]], letters: Sequence[str]) -> list[str]:
    baselines = _describe_differences(reports, letters, _baseline)
    if not baselines:
        return []
    return [f"The runs have different baselines ({baselines}): each change is relative to the run's own."]


def _describe_differences(
    reports: Sequence[dict[str, Any]], letters: Sequence[str], describe: Callable[[dict[str, Any]], str | None]
) -> str:
    """Return "A: this; B, C: that", or "" when all that is known is the same."""
    groups: dict[str, list[str]] = {}
    for report, letter in zip(reports, letters, strict=True):
        text = describe(report)
        if text is not None:
            groups.setdefault(text, []).append(letter)
    return "; ".join(f"{', '.join(those)}: {text}" for text, those in groups.items()) if len(groups) > 1 else ""


def _machine(report: dict[str, Any]) -> str | None:
    environment = report.get("environment") or {}
    parts = [environment.get("cpu"), environment.get("cores"), environment.get("platform")]
    if all(part is None for part in parts):
        return None
    cpu, cores, platform = (MISSING if part is None else part for part in parts)
    return f"{cpu}, {cores} cores, {platform}"


def _conditions(report: dict[str, Any]) -> str:
    latency = find(report, "details", "latency") or {}
    versions = find(report, "environment", "versions") or {}
    release = next((versions[name] for name in _RUNTIMES if versions.get(name)), "")
    runtime, provider = (latency.get(key) or MISSING for key in ("runtime", "provider"))
    threads, batch = (MISSING if latency.get(key) is None else latency[key] for key in ("threads", "batch_size"))
    return f"{f'{runtime} {release}'.rstrip()}, {provider}, threads {threads}, batch {batch}"


def _images(report: dict[str, Any]) -> str | None:
    """Return how many images of which classes a run was evaluated on."""
    count = format_whole(find(report, "details", "evaluation", "images"))
    if count is None:
        return None
    classes = find(report, "details", "quality", "images_by_class")
    return f"{count} of {len(classes)} classes" if classes else count


def _baseline(report: dict[str, Any]) -> str | None:
    baseline = report.get("baseline") or {}
    metric = metric_of_report(report)
    figures = [baseline.get("macs"), baseline.get("params"), find(baseline, "quality", metric.name)]
    if None in figures:
        return None
    macs, params, quality = figures
    return f"{macs:,} MACs, {params:,} params, {metric.words} {format_metric(metric, quality)}"


def _wanted(report: dict[str, Any]) -> str | None:
    wanted = find(report, "details", "robustness", "wanted")
    if not wanted:
        return None
    return f"{wanted.get('images')} images, {wanted.get('noise')} noise, seed {wanted.get('seed')}"


def _shorten(digest: Any) -> str | None:
    return None if digest is None else str(digest)[:12]


def _text(value: Any) -> str | None:
    return None if value is None else repr(value)
