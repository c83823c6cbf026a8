"""Reasons why runs are not comparable, as sentences: other images, machines, conditions or baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import JsonValue

from compress.report.formats import MISSING, format_metric, format_ms, format_whole
from compress.report.model import Report

DRIFT = 1.05  # largest ratio of the baseline's latency between runs
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def list_caveats(reports: Sequence[Report], letters: Sequence[str]) -> list[str]:
    """Return all reasons why the runs are not comparable, as sentences.

    Args:
        reports: Reports of the runs.
        letters: Short name of each run.
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


def list_latency_caveats(reports: Sequence[Report], letters: Sequence[str]) -> list[str]:
    """Return the reasons why milliseconds of these runs are not comparable; [] where they are."""
    measured = [number for number, report in enumerate(reports) if report.details.latency.model_fields_set]
    reports, letters = [reports[number] for number in measured], [letters[number] for number in measured]
    found = []
    are_here = all(report.details.latency.device is None for report in reports)
    machines = _describe_differences(reports, letters, _machine) if are_here else ""
    if machines:
        found.append(
            f"The runs were measured on different machines ({machines}): their latencies are not comparable. A "
            "speed-up is measured in turn with the baseline on one machine, and holds for that machine."
        )
    conditions = _describe_differences(reports, letters, _conditions)
    if conditions:
        found.append(f"Latency was measured under different conditions ({conditions}): it is not comparable.")
    if not found and (speeds := _describe_drift(reports, letters)):
        found.append(
            f"The same baseline took {speeds}: the machine was not equally fast. Milliseconds of different runs are "
            "not comparable, speed-ups are."
        )
    return found


def share_baseline(reports: Sequence[Report]) -> bool:
    """Return whether all runs started from the same network, as far as MACs, params and the primary metric tell."""
    known = [_baseline(report) for report in reports]
    return None not in known and len(set(known)) == 1


def _describe_drift(reports: Sequence[Report], letters: Sequence[str]) -> str:
    """Return the fastest and the slowest latency of one baseline if they differ too much; else ""."""
    times = [(report.latency().before, letter) for report, letter in zip(reports, letters, strict=True)]
    known = [(time, letter) for time, letter in times if time]
    if len(known) < 2 or not share_baseline(reports) or max(known)[0] <= DRIFT * min(known)[0]:
        return ""
    return " and ".join(f"{format_ms(time)} ({letter})" for time, letter in (min(known), max(known)))


def _list_data_caveats(reports: Sequence[Report], letters: Sequence[str]) -> list[str]:
    found = []
    images = _describe_differences(reports, letters, _images)
    digests = _describe_differences(reports, letters, lambda report: (_digest(report) or "")[:12] or None)
    subject = f"{reports[0].metric.words} and all other metrics"
    if images:
        found.append(f"The runs were evaluated on different images ({images}): {subject} are not comparable.")
    elif digests:
        found.append(
            f"The evaluation data have different digests ({digests}): {subject} are comparable only where the images "
            "are the same nevertheless."
        )
    elif None in map(_digest, reports) and _describe_differences(
        reports, letters, lambda report: _text(_data_settings(report).get("evaluation"))
    ):
        found.append(
            "The runs name different evaluation data, and not all of them state its digest: the images may differ."
        )
    if _describe_differences(reports, letters, lambda report: _text(_data_settings(report).get("preprocessing"))):
        found.append("The images were preprocessed in different ways; see the settings below.")
    robustness = _describe_differences(reports, letters, _robustness_settings)
    if robustness:
        found.append(f"Noise and corruptions were measured with different settings ({robustness}).")
    return found


def _list_baseline_caveats(reports: Sequence[Report], letters: Sequence[str]) -> list[str]:
    baselines = _describe_differences(reports, letters, _baseline)
    if not baselines:
        return []
    return [f"The runs have different baselines ({baselines}): each change is relative to the run's own."]


def _describe_differences(
    reports: Sequence[Report], letters: Sequence[str], describe: Callable[[Report], str | None]
) -> str:
    """Return "A: this; B, C: that", or "" when all that is known is the same."""
    groups: dict[str, list[str]] = {}
    for report, letter in zip(reports, letters, strict=True):
        text = describe(report)
        if text is not None:
            groups.setdefault(text, []).append(letter)
    return "; ".join(f"{', '.join(those)}: {text}" for text, those in groups.items()) if len(groups) > 1 else ""


def _machine(report: Report) -> str | None:
    machine = report.environment
    parts = [machine.cpu, machine.cores, machine.platform]
    if all(part is None for part in parts):
        return None
    cpu, cores, platform = (MISSING if part is None else part for part in parts)
    return f"{cpu}, {cores} cores, {platform}"


def _conditions(report: Report) -> str:
    latency, versions = report.details.latency, report.environment.versions
    release = next((version for name in _RUNTIMES if (version := versions.get(name))), "")
    runtime, provider = (value or MISSING for value in (latency.runtime, latency.provider))
    threads, batch = (MISSING if value is None else value for value in (latency.threads, latency.batch_size))
    if latency.device:
        stated = f" ({latency.runtime})" if latency.runtime else ""
        return f"device {latency.device}{stated}, threads {threads}, batch size {batch}"
    return f"{f'{runtime} {release}'.rstrip()}, {provider}, threads {threads}, batch size {batch}"


def _images(report: Report) -> str | None:
    """Return the number of images and classes that a run was evaluated on."""
    images, classes = report.details.evaluation.images, report.details.quality.images_by_class
    if images is None:
        return None
    return f"{format_whole(images)} of {len(classes)} classes" if classes else format_whole(images)


def _baseline(report: Report) -> str | None:
    macs, params, quality = (
        change.before for change in (report.change("macs"), report.change("params"), report.quality())
    )
    if macs is None or params is None or quality is None:
        return None
    value = format_metric(quality, report.metric)
    return f"{macs:,.0f} MACs, {params:,.0f} params, {report.metric.words} {value}"


def _robustness_settings(report: Report) -> str | None:
    wanted = report.details.robustness.wanted
    return None if wanted is None else f"{wanted.images} images, {wanted.noise} noise, seed {wanted.seed}"


def _digest(report: Report) -> str | None:
    return None if report.provenance is None else report.provenance.data.evaluation


def _data_settings(report: Report) -> dict[str, JsonValue]:
    settings = report.config.get("data")
    return settings if isinstance(settings, dict) else {}


def _text(value: JsonValue) -> str | None:
    return None if value is None else repr(value)
