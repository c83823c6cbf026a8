"""Several runs side by side: values, limits of the comparison, settings that differ, and the page."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from page import Page
from report_samples import CONFIG, ENVIRONMENT, failing_verdict, passing_verdict, sample_stages

from compress.report import compare
from compress.report.build import build_report
from compress.report.comparability import list_caveats, list_latency_caveats, share_baseline
from compress.report.compare import letters_of, list_differences, name_runs, value_rows
from compress.report.model import read_report
from compress.report.page import CONTENT_POLICY
from compress.report.plots import Point, list_front
from compress.report.records import TOP1

NAMES = ["gentle", "harder"]
Plain = dict[str, Any]


def render_comparison(reports: list[Plain], names: list[str]) -> str:
    return compare.render_comparison([read_report(report) for report in reports], names)


def rows_of(reports: list[Plain]) -> dict[str, compare.Row]:
    return {row.label: row for row in value_rows([read_report(report) for report in reports])}


def make_reports() -> list[Plain]:
    provenance = {"data": {"train": "1" * 64, "evaluation": "2" * 64}}
    reports = [
        build_report(
            name, verdict, sample_stages(), copy.deepcopy(CONFIG), dict(ENVIRONMENT), copy.deepcopy(provenance)
        )
        for name, verdict in zip(NAMES, (passing_verdict(), failing_verdict()), strict=True)
    ]
    reports[1]["slim"]["macs"] = 12_000_000
    reports[1]["config"]["stages"][0]["target"]["macs"] = 0.3
    return reports


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_comparison(make_reports(), NAMES))


def test_values_stand_side_by_side(page: Page) -> None:
    for text in (
        "2 runs compared",
        "A gentle",
        "B harder",
        "MACs40.55 M20.45 M1.98× fewer12.00 M3.38× fewer",
        "Top-191.73 %91.04 %90.48 to 91.6087.04 %",
        "Latency p501.31 ms0.811 ms1.62× faster",
        "Speed-up–1.62×1.60 to 1.63",
        "Top-1 drop–0.69 %0.38 to 1.00",
        "max_drop.top1: got 4.69 %, limit 1.00 %.",
        "stages.prune.target.macs0.50.3",
        "night shots80.30 %1.50 % drop",
    ):
        assert text in page.text.replace("\xa0", " ")
    assert "Limits of the comparison" not in page.text
    assert "Environments that differ" not in page.text
    assert page.plots() == ["fronts", "noise"]


def test_the_page_needs_nothing_from_outside(page: Page) -> None:
    for tag, values in page.elements:
        assert tag not in ("script", "link", "iframe", "base", "img", "a")
        assert not any(key.startswith("on") for key in values)
        if values.get("http-equiv") == "Content-Security-Policy":
            assert values["content"] == CONTENT_POLICY
    ids = [values["id"] for _, values in page.elements if values.get("id")]
    assert len(ids) == len(set(ids))


def test_the_terminal_gets_the_same_values() -> None:
    columns, rows = compare.comparison_rows([read_report(report) for report in make_reports()], NAMES)
    assert columns == ["metric", "baseline", *NAMES]
    table = {row[0]: row[1:] for row in rows}
    assert table["Verdict"] == ["–", "passed", "failed"]
    assert table["MACs"] == ["40.55 M", "20.45 M", "12.00 M"]
    assert table["Top-1"][1] == "91.04 % (90.48 to 91.60)"
    assert all(len(row) == len(columns) for row in rows)


def test_a_baseline_under_noise_is_the_mean_of_its_distributions() -> None:
    reports = make_reports()
    for report in reports:
        report["slim"]["quality"] |= {"noise": 0.5, "corruptions": 0.4}
    rows = rows_of(reports)
    assert (rows["Noise"].baseline.text, rows["Noise"].runs[0].text) == ("75.00 %", "50.00 %")
    assert rows["Corruptions"].baseline.text == "83.12 %"
    reports[0]["details"]["robustness"]["distributions"][1]["baseline_top1"] = None
    assert rows_of(reports)["Noise"].baseline.text == "–"


def test_values_that_no_run_knows_are_left_out() -> None:
    reports = make_reports()
    for report in reports:
        report["details"] = {}
        report["slim"]["latency_ms"] = {}
        report["stages"] = []
    assert list(rows_of(reports)) == ["Verdict", "MACs", "Parameters", "ONNX size", "Top-1"]
    for report in reports:
        report["slim"] = report["baseline"] = None
    assert list(rows_of(reports)) == ["Verdict"]
    assert "2 runs compared" in render_comparison(reports, NAMES)


def test_a_baseline_that_is_not_shared_is_no_column() -> None:
    reports = make_reports()
    assert share_baseline([read_report(report) for report in reports])
    reports[1]["baseline"]["macs"] += 1
    read = [read_report(report) for report in reports]
    assert not share_baseline(read)
    assert compare.comparison_rows(read, NAMES)[0] == ["metric", *NAMES]
    html = render_comparison(reports, NAMES)
    assert "baseline of A" in html
    assert "The runs have different baselines (A: 40,551,424 MACs" in html
    reports[1]["baseline"] = None
    assert not share_baseline([read_report(report) for report in reports])


def change_images(report: Plain) -> None:
    report["details"]["evaluation"]["images"] = 500


def change_classes(report: Plain) -> None:
    report["details"]["quality"]["images_by_class"] = [1, 2]


def change_digest(report: Plain) -> None:
    report["provenance"]["data"]["evaluation"] = "3" * 64


def change_source(report: Plain) -> None:
    report["provenance"] = None
    report["config"]["data"] = {"evaluation": {"arrays": "/elsewhere/test.npz"}}


def change_mean(report: Plain) -> None:
    report["config"]["data"] = {"preprocessing": {"mean": [0.5]}}


def change_machine(report: Plain) -> None:
    report["environment"] = {**ENVIRONMENT, "cpu": "Other", "cores": 8}


def change_threads(report: Plain) -> None:
    report["details"]["latency"]["threads"] = 4


def change_runtime(report: Plain) -> None:
    report["environment"] = {**ENVIRONMENT, "versions": {"onnxruntime": "1.20.0"}}


def change_speed(report: Plain) -> None:
    report["baseline"]["latency_ms"]["p50"] *= 1.06


def change_noise(report: Plain) -> None:
    report["details"]["robustness"]["wanted"]["seed"] = 3


@pytest.mark.parametrize(
    ("change", "text", "spoils_latency"),
    [
        (change_images, "different images (A: 10,000 of 12 classes; B: 500 of 12 classes): top-1 and all other", False),
        (change_classes, "different images (A: 10,000 of 12 classes; B: 10,000 of 2 classes)", False),
        (change_digest, "evaluation data have different digests (A: 222222222222; B: 333333333333)", False),
        (change_source, "not all of them state its digest: the images may differ", False),
        (change_mean, "preprocessed in different ways", False),
        (change_machine, "different machines (A: Imaginary Processor 9000 @ 2.90GHz, 2 cores, Linux", True),
        (change_threads, "under different conditions (A: onnxruntime 1.31.1, CPUExecutionProvider, threads 1", True),
        (change_runtime, "under different conditions", True),
        (change_speed, "The same baseline took 1.31 ms (A) and 1.39 ms (B): the machine was not equally fast", True),
        (change_noise, "measured with different settings (A: 1000 images, uniform noise, seed 0; B: ", False),
    ],
)
def test_what_is_not_comparable_is_said(change: Callable[[Plain], None], text: str, spoils_latency: bool) -> None:
    reports = make_reports()
    for report in reports:
        report["config"]["data"] = {"evaluation": {"arrays": "/data/test.npz"}, "preprocessing": {"mean": [0.4]}}
    assert list_caveats([read_report(report) for report in reports], ["A", "B"]) == []
    change(reports[1])
    read = [read_report(report) for report in reports]
    caveats = list_caveats(read, ["A", "B"])
    assert len([caveat for caveat in caveats if text in caveat]) == 1, caveats
    assert bool(list_latency_caveats(read, ["A", "B"])) is spoils_latency


def test_latency_that_is_not_comparable_is_drawn_relative_to_the_baseline() -> None:
    reports = make_reports()
    assert "latency p50 (ms)" in render_comparison(reports, NAMES)
    change_machine(reports[1])
    html = render_comparison(reports, NAMES)
    assert "latency p50 (ms)" not in html
    assert "latency, % of the baseline" in html
    page = Page(html)
    assert "Limits of the comparison" in page.text
    assert "cpuImaginary Processor 9000 @ 2.90GHzOther" in page.text


def test_a_copy_of_a_run_is_said_to_be_one() -> None:
    reports = make_reports()
    copied = [read_report(report) for report in (*reports, copy.deepcopy(reports[0]))]
    caveats = list_caveats(copied, ["A", "B", "C"])
    assert caveats == ["C and A hold the same report, to the last digit: one is a copy."]


def test_runs_of_one_name_are_told_apart_by_what_they_were_called_by() -> None:
    reports = [read_report({"name": name, "verdict": {"checks": []}}) for name in ("net", "other", "net")]
    assert name_runs(reports, ["a/net", "a/other", "b/net"]) == ["net (a/net)", "other", "net (b/net)"]


def test_many_runs_fit_on_one_page() -> None:
    reports = [copy.deepcopy(make_reports()[number % 2]) for number in range(30)]
    for number, report in enumerate(reports):
        report["name"] = f"run-{number}"
    html = render_comparison(reports, [report["name"] for report in reports])
    assert "30 run-29" in Page(html).text
    assert len(html) < 3_000_000
    assert letters_of(30)[-5:] == ["Z", "27", "28", "29", "30"][-5:]


def test_hostile_text_is_escaped() -> None:
    evil = "<script>alert('x')</script>\"&"
    reports = make_reports()
    reports[0]["name"] = evil
    reports[0]["config"] = {evil: evil}
    reports[0]["environment"] = {"cpu": evil, evil: evil}
    reports[0]["verdict"]["checks"].append({"name": evil, "status": "fail", "unit": evil, "value": 1.0, "detail": evil})
    reports[0]["details"]["robustness"]["distributions"].append({"name": evil, "kind": evil, "top1": 0.5})
    html = render_comparison(reports, [evil, "b"])
    assert "<script" not in html
    assert Page(html).text.count("<script>alert(") > 5


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([{"name": "a", "seed": 0}, {"name": "b", "seed": 0}], []),
        ([{"seed": 0}, {}], [("seed", ["0", "–"])]),
        ([{"a": True}, {"a": 1}], [("a", ["true", "1"])]),
        ([{"a": 1}, {"a": 1.0}], []),
        ([{"a": None}, {"a": "null"}], [("a", ["null", "'null'"])]),
        ([{"a": [1, 2]}, {"a": [1]}], [("a", ["[1, 2]", "[1]"])]),
        ([{"a": {"b": 1, "c": 1}}, {"a": {"b": 2, "c": 1}}], [("a.b", ["1", "2"])]),
        ([{"a": {"b": 1}}, {"a": 3}], [("a", ["{b: 1}", "3"])]),
        (
            [{"stages": [{"stage": "prune", "x": 1}]}, {"stages": [{"stage": "load"}, {"stage": "prune", "x": 2}]}],
            [
                ("order of the stages", ["prune", "load → prune"]),
                ("stages.prune.x", ["1", "2"]),
                ("stages.load", ["–", "{}"]),
            ],
        ),
        (
            [
                {"stages": [{"stage": "prune", "x": 1}, {"stage": "prune", "x": 1}]},
                {"stages": [{"stage": "prune", "x": 1}, {"stage": "prune", "x": 3}]},
            ],
            [("stages.prune (2).x", ["1", "3"])],
        ),
    ],
)
def test_only_settings_that_differ_are_listed(configs: list[Any], expected: list[Any]) -> None:
    assert list_differences(configs) == expected


def test_the_front_is_what_no_other_run_betters() -> None:
    cheap, dear, bettered, twin = (
        Point(1.0, 90.0, "cheap"),
        Point(3.0, 95.0, "dear"),
        Point(2.0, 89.0, "bettered"),
        Point(1.0, 90.0, "twin"),
    )
    assert list_front([dear, bettered, cheap, twin], TOP1) == [cheap, twin, dear]
    assert list_front([dear, bettered, cheap], TOP1, more_is_better=True) == [dear]
