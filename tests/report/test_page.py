import base64
import copy
import json
import re
from typing import Any

import pytest
from markupsafe import Markup
from page import Page
from report_samples import (
    CONFIG,
    ENVIRONMENT,
    check,
    failing_verdict,
    finetune_record,
    low_rank_record,
    passing_verdict,
    prune_record,
    sample_stages,
    worst_images,
)

from compress.errors import ArtifactError
from compress.model.artifacts import Verdict
from compress.report import plots
from compress.report.build import StageRun, build_report
from compress.report.details import Latency
from compress.report.model import read_report
from compress.report.page import render_report
from compress.report.plots import count_beyond_edge, plot_latency, plot_training, plot_widths
from compress.report.records import Group, TrainingRecord
from compress.report.results import list_severities
from compress.report.svg import VARIABLES

MEASURED = ["noise", "severities", "latency", "throughput"]


def report_of(verdict: Verdict, stages: list[StageRun] | None = None, name: str = "demo") -> dict[str, Any]:
    return build_report(name, verdict, sample_stages() if stages is None else stages, CONFIG, ENVIRONMENT)


def render_html(report: dict[str, Any]) -> str:
    return render_report(read_report(report))


@pytest.fixture(scope="module")
def html() -> str:
    return render_html(report_of(passing_verdict()))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are there but empty, for speed."""
    svg = '<svg aria-labelledby="{0}-title"><title id="{0}-title">x</title></svg>'
    monkeypatch.setattr(plots, "render_svg", lambda key, *_: Markup(svg).format(key))


def test_page_says_what_was_measured(html: str) -> None:
    text = Page(html).text
    for phrase in (
        "Passed All 4 checks hold; 1 skipped.",
        "1.98× fewer",
        "1.62× faster",
        "−0.69 percentage points",
        "91.04 %",
        "0.811 ms",
        "571.2 kB",
        "CPUExecutionProvider, 1 thread, batch size 1",
        "10,000 evaluation images",
        "peak learning rate0.02",
        "5 of 6",
        "32 × 24",
        "17 min 24 s",
        "Imaginary Processor 9000",
        "not installed",
        "batch_size: 128",
        "0.504 is the nearest that multiples of 8 reach.",
        "excluded: conv1, layer2.0.conv2 (its channels run through a zero-padded shortcut that cannot be cut).",
    ):
        assert phrase in text


def test_verdict_comes_before_everything_else(html: str) -> None:
    order = ["Passed", "Before and after", "Checks", "widths of the channel groups", "Latency", "Stages", "Pipeline"]
    places = [html.index(f"<h2>{title}" if "widths" not in title else title) for title in order]
    assert places == sorted(places)


@pytest.mark.usefixtures("undrawn")
def test_failed_verdict_names_the_check_and_sorts_it_first() -> None:
    page = render_html(report_of(failing_verdict(), []))
    text = Page(page).text.replace("\xa0", " ")
    assert "Failed max_drop.top1: got 4.69 %, limit 1.00 %. Top-1 fell from 91.73 % to 87.04 %." in text
    assert page.index('<th scope="row"><code>max_drop.top1') < page.index('<th scope="row"><code>parity')
    assert "<title>demo: failed</title>" in page
    assert 'class="verdict fail"' in page
    assert 'class="verdict pass"' not in page


@pytest.mark.parametrize(
    ("checks", "words"),
    [
        ((), "Failed Nothing was checked"),
        (
            (check("parity", "skipped", None, None, "", "No samples."),),
            "Failed parity was required, but skipped: No samples.",
        ),
    ],
)
def test_verdict_that_checked_too_little_says_so(checks: tuple[Any, ...], words: str) -> None:
    assert words in Page(render_html(report_of(Verdict(checks, ("parity",), None, None), []))).text


@pytest.mark.usefixtures("undrawn")
def test_worse_figures_are_not_called_better() -> None:
    report = report_of(passing_verdict(), [])
    report["baseline"], report["slim"] = report["slim"], report["baseline"]
    text = Page(render_html(report)).text
    assert "1.98× more" in text
    assert "1.62× slower" in text
    assert "+0.69 percentage points" in text


def test_page_needs_nothing_from_outside(html: str) -> None:
    for tag, values in Page(html).elements:
        assert tag not in ("script", "link", "iframe", "base")
        assert tag != "img" or (values.pop("src") or "").startswith("data:image/png;base64,")
        for key in ("src", "href", "xlink:href", "action", "data"):
            assert (values.get(key) or "#").startswith("#"), (tag, values)
        assert not any(key.startswith("on") for key in values)
    assert not re.search(r"url\((?!#)|@import", html)
    assert not re.search(r"https?://", html)


def test_ids_are_unique_and_every_reference_is_met(html: str) -> None:
    elements = Page(html).elements
    ids = [values["id"] for _, values in elements if values.get("id")]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:xlink:href="#|url\(#|aria-labelledby=")([^")]+)', html))
    assert used
    assert used <= set(ids)


@pytest.mark.usefixtures("undrawn")
def test_hostile_text_is_escaped_everywhere() -> None:
    evil = "<script>alert('x')</script>\"&"
    verdict = Verdict((check(evil, "fail", 1.0, 2.0, evil, evil),), (evil,), None, None, {"latency": {"runtime": evil}})
    prune = prune_record() | {
        "criterion": evil,
        "groups": [{"name": evil, "width_before": 8, "width_after": 4}],
        "removed_blocks": [evil],
        "excluded": [{"name": evil, "reason": evil}],
        "shortfall": evil,
    }
    low_rank = {
        "layers": [{"layer": evil, "scheme": evil, "ranks": [8]}],
        "dense": [{"layer": evil, "reason": evil}],
    }
    stages = [
        StageRun("prune", "ran", 1.0, prune),
        StageRun("low_rank", "ran", 1.0, low_rank),
        StageRun("export", "ran", 1.0, {"files": [evil], "opset": 18}),
        StageRun(evil, "ran", 1.0, {}),
    ]
    report = build_report(
        evil, verdict, stages, {"name": evil, evil: 1}, {"cpu": evil, evil: evil, "versions": {evil: evil}}
    )
    html = render_html(report)
    assert "<script" not in html
    assert Page(html).text.count("<script>alert(") > 15


def test_text_where_a_number_must_be_is_refused() -> None:
    report = report_of(passing_verdict(), [StageRun("export", "ran", 1.0, {"opset": "<script>"})])
    with pytest.raises(ArtifactError, match=r"'stages\[0\]\.record\.opset' must be a whole number, got '<script>'\."):
        render_html(report)


def test_pictures_are_there_for_every_stage_that_has_data(html: str) -> None:
    assert Page(html).plots() == ["change", "widths-1", "training-2", *MEASURED]
    twice = [StageRun("prune", "ran", 1.0, prune_record()), StageRun("finetune", "ran", 1.0, finetune_record())] * 2
    page = Page(render_html(report_of(passing_verdict(), twice)))
    staged = ["widths-0", "training-1", "widths-2", "training-3"]
    assert page.plots() == ["change", *staged, *MEASURED]
    assert "widths of the channel groups (stage 3 of 4)" in page.text


def test_pictures_take_their_colours_and_fonts_from_the_page(html: str) -> None:
    assert "var(--slim)" in html
    assert not [color for color in VARIABLES if color in html]
    assert not re.search(r"(fill|stroke): #", html)
    assert "DejaVu Sans'" not in html


def test_page_degrades_when_records_are_empty_or_missing() -> None:
    for record in ({}, {"groups": [], "layers": [], "epochs": [], "excluded": None, "files": None}):
        stages = [StageRun(run.stage, "unchanged", 0.0, record) for run in sample_stages()]
        page = Page(render_html(report_of(Verdict((), (), None, None), stages)))
        assert page.plots() == []
        assert "Verification measured neither network." in page.text
    assert "Failed" in Page(render_html({"verdict": {"checks": []}})).text
    with pytest.raises(ArtifactError, match=r"The report is not as a run writes it: 'verdict' is missing\."):
        render_html({"verdict": None})


@pytest.mark.usefixtures("undrawn")
def test_page_survives_the_loss_of_any_single_value() -> None:
    whole = report_of(passing_verdict())
    for stage in range(len(whole["stages"])):
        for key in whole["stages"][stage]["record"]:
            for replacement in ("missing", None):
                report = copy.deepcopy(whole)
                record = report["stages"][stage]["record"]
                if replacement is None:
                    record[key] = None
                else:
                    del record[key]
                assert "Passed" in Page(render_html(report)).text


def test_same_report_gives_the_same_page(html: str) -> None:
    assert render_html(report_of(passing_verdict())) == html


def test_chosen_epoch_is_marked() -> None:
    record = finetune_record()
    assert "epoch 5 chosen (91.20 %)" in plot_training("t", TrainingRecord.model_validate(record))
    assert "chosen" not in plot_training("t", TrainingRecord.model_validate(record | {"chosen_epoch": None}))


def test_epochs_are_counted_in_whole_numbers() -> None:
    record = finetune_record()
    svg = plot_training("t", TrainingRecord.model_validate({"epochs": record["epochs"][:1], "chosen_epoch": 1}))
    assert not {"0.8", "1.2", "1.4"} & set(re.findall(r">([\d.]+)</text>", svg))


def test_plots_leave_out_numbers_that_are_null() -> None:
    def training(*epochs: dict[str, Any]) -> str:
        return plot_training("t", TrainingRecord.model_validate({"epochs": epochs, "chosen_epoch": len(epochs)}))

    epochs = [{"epoch": 1, "loss": None, "validation_top1": 0.5}, {"epoch": 2, "loss": 0.3, "validation_top1": None}]
    assert "<svg" in training(*epochs)
    assert "<svg" in training(epochs[0])
    assert training({"epoch": 1, "loss": None}) == ""
    assert "median 1.50 ms" in plot_latency("l", Latency(baseline_ms=(1.0, None, 2.0), slim_ms=(None,)))
    assert plot_latency("l", Latency(baseline_ms=(None,))) == ""
    assert plot_widths("w", [Group.model_validate({"name": "a", "width_before": 8, "width_after": None})]) == ""


def test_widths_are_written_beside_the_bars() -> None:
    svg = plot_widths("w", [Group.model_validate({"name": "$a$ 中", "width_before": 64, "width_after": 24})])
    assert "64 → 24" in svg
    assert "$a$ 中" in svg


def test_long_tail_is_counted_and_does_not_decide_the_axis() -> None:
    steady = tuple(1.0 + 0.001 * number for number in range(100))
    long = Latency(baseline_ms=(*steady, 50.0, 60.0), slim_ms=steady)
    assert count_beyond_edge(Latency(baseline_ms=steady, slim_ms=steady)) == 0
    assert count_beyond_edge(long) == 2
    assert count_beyond_edge(Latency()) == 0
    assert "60" not in re.findall(r">([\d.]+)</text>", plot_latency("l", long))


def test_latency_that_never_varies_can_be_drawn() -> None:
    assert plot_latency("l", Latency(baseline_ms=(1.0,) * 5, slim_ms=(1.0,) * 5)).count("median 1.00 ms") == 2


def test_a_budget_in_milliseconds_says_what_was_predicted_and_what_was_measured() -> None:
    record = prune_record()
    record |= {
        "target": {"latency_ms": 0.25, "macs": 0.6},
        "asked": {"latency_ms": 0.25, "macs": 0.6},
        "reached": {"latency_ms": 0.246, "macs": 0.413},
        "latency": {
            "reference_ms": 0.5,
            "predicted_ratio": 0.512,
            "measured_ratio": 0.492,
            "rounds": [{"predicted": 0.5, "measured": 0.48}, {"predicted": 0.512, "measured": 0.492}],
            "table_error": 0.021,
            "scatter": 0.013,
        },
    }
    stages = [StageRun("prune", "ran", 41.2, record)]
    page = Page(render_html(report_of(passing_verdict(), stages))).text
    for text in ("latency (ms), target", "MACs kept, reached", "41.3", "51.2", "49.2", "2.1"):
        assert text in page
    record["latency"] |= {"measured_ratio": None, "rounds": []}
    assert "not measured" in render_html(report_of(passing_verdict(), stages))


def test_a_budget_in_milliseconds_is_drawn() -> None:
    steps = [{"width": 8, "ms": 0.8}, {"width": 16, "ms": 1.0}]
    latency = {
        "reference_ms": 2.0,
        "rounds": [{"predicted": 0.5, "measured": 0.55}],
        "variants": [{"predicted_ms": 1.0, "measured_ms": 1.1}, {"predicted_ms": 2.0, "measured_ms": 1.9}],
        "stairs": [{"name": "a<b", "chosen": 8, "steps": steps}, {"name": "whole", "chosen": 16, "steps": steps[1:]}],
        "layers": [{"layer": "conv<1>", "ms_before": 0.2, "ms_after": 0.1}],
    }
    record = {"groups": [{"name": "a<b", "width_before": 16, "width_after": 8, "damage": 0.125}], "latency": latency}
    html = render_html(report_of(passing_verdict(), [StageRun("prune", "ran", 1.0, record)]))
    page = Page(html)
    assert page.plots() == ["change", "widths-0", "stairs-0", "prediction-0", "layers-0", *MEASURED]
    assert "0.125" in page.text
    assert "networks chosen" in html
    assert "a<b" not in html.replace("<b>", "")
    assert ">whole<" not in html, "no stairs of one step"
    for empty in ({}, {"stairs": [], "variants": [], "layers": []}):
        bare = render_html(report_of(passing_verdict(), [StageRun("prune", "ran", 1.0, record | {"latency": empty})]))
        assert Page(bare).plots() == ["change", "widths-0", *MEASURED]


@pytest.mark.usefixtures("undrawn")
def test_what_was_tried_is_told() -> None:
    record = {
        "groups": [{"name": "a", "width_before": 16, "width_after": 8}],
        "block_trials": [
            {"blocks": 0, "loss": None, "reason": "Target cannot be reached."},
            {"blocks": 1, "loss": 0.625, "reason": None},
        ],
        "whole_networks": {
            "tried": [
                {"source": "streams x 4", "blocks": 3, "loss": 0.4375, "predicted_loss": None},
                {"source": "learned", "blocks": 2, "loss": None, "predicted_loss": 0.3125},
            ]
        },
        "repairs": [{"repair": "least_squares", "loss_before": 2.5, "loss_after": 0.5, "is_kept": True}],
    }
    tried = {"rewrites": [{"rewrite": "padded_shortcuts", "places": 2, "speedup": 1.07, "is_kept": True}]}
    stages = [StageRun("load", "ran", 1.0, tried), StageRun("prune", "ran", 1.0, record)]
    text = Page(render_html(report_of(passing_verdict(), stages))).text
    for phrase in ("Target cannot be reached.", "0.625", "least_squares", "2.5 → 0.5", "padded_shortcuts", "1.07×"):
        assert phrase in text
    for phrase in ("whole networks that were tried", "streams x 4", "0.4375", "learned", "0.3125"):
        assert phrase in text


@pytest.mark.parametrize("stage", ["prune", "low_rank"])
def test_what_a_method_learned_is_told_and_its_training_is_drawn(stage: str) -> None:
    learned = {
        "name": "gates",
        "figures": {"reactivated": 7, "left_ratio": 0.0125, "own_figure": 3.5},
        "loss_before_cut": 0.25,
        "loss_after_cut": 0.26,
        "top1_before_cut": 0.915,
        "top1_after_cut": 0.9125,
        "validation_top1_before": 0.8775,
        **finetune_record(),
    }
    record = {"prune": prune_record, "low_rank": low_rank_record}[stage]() | {"method": learned}
    page = Page(render_html(report_of(passing_verdict(), [StageRun(stage, "ran", 1.0, record)])))
    told = ("gates", "0.25 → 0.26", "91.50 % → 91.25 %", "1.25 %", "own_figure", "87.75 %", "5 of 6")
    for phrase in told:
        assert phrase in page.text, phrase
    assert "training-1" in page.plots()


def test_quality_shows_what_changed_and_the_classes_that_lost_most() -> None:
    page = Page(render_html(report_of(passing_verdict())))
    assert "91.04 % (90.48 to 91.60)" in page.text
    assert "312 images lost, 243 won" in page.text
    assert page.text.index("class <10>") < page.text.index("class <9>") < page.text.index("class <1>")
    assert "1 more classes" in page.text
    assert "class <11>" not in page.text, "it has no images"


@pytest.mark.usefixtures("undrawn")
def test_robustness_shows_the_largest_loss_first() -> None:
    page = Page(render_html(report_of(passing_verdict())))
    names = ["uniform noise 0.3", "uniform noise 0.2", "jpeg 3", "uniform noise 0.1", "nominal", "brightness 3"]
    places = [page.text.index(name) for name in names]
    assert places[:2] == sorted(places[:2])
    assert places[-2:] == sorted(places[-2:])
    assert "−0.20 % (−1.20 to 0.80)" in page.text
    assert "noise" in page.plots()


@pytest.mark.usefixtures("undrawn")
def test_quality_without_a_baseline_is_of_the_file_alone() -> None:
    report = report_of(passing_verdict())
    quality = report["details"]["quality"]
    quality |= {"changes": None, "baseline": None, "baseline_by_class": None}
    for one in report["details"]["robustness"]["distributions"]:
        one |= {"baseline_top1": None, "changes": {}}
    page = Page(render_html(report))
    assert "91.04 % (90.48 to 91.60)" in page.text
    assert "images lost" not in page.text
    del report["details"]["quality"], report["details"]["robustness"]
    assert "noise" not in Page(render_html(report)).plots()


def test_images_of_the_worst_classes_have_captions() -> None:
    html = render_html(report_of(passing_verdict()))
    page = Page(html)
    images = [values for tag, values in page.elements if tag == "img"]
    assert len(images) == 8
    assert images[1]["alt"] == "class <10> → class <1>"
    assert "class <10> → class <1> no. 97" in page.text
    assert "class <10> top-1 92.00 % → 81.00 %, −11.00 percentage points" in page.text
    assert "img-src data:" in html
    assert "that the baseline classifies correctly and the file does not" in page.text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "image",
    [
        None,
        7,
        "",
        "no base64",
        '"><script>alert(1)</script>',
        base64.b64encode(b"GIF89a").decode(),
        base64.b64encode(b"<svg onload='alert(1)'>").decode(),
        base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(100_000)).decode(),
        "é" * 8,
    ],
)
def test_what_is_no_small_png_is_left_out(image: Any) -> None:
    report = report_of(passing_verdict(), [])
    report["details"]["quality"]["worst_images"] = [
        {"class": 1, "label": 1, "predicted": 2, "index": 3, "image": image}
    ]
    html = render_html(report)
    assert "<img" not in html
    assert "Images of the worst classes" not in html
    assert "<script" not in html


@pytest.mark.usefixtures("undrawn")
def test_images_without_names_or_baseline_have_numbers() -> None:
    report = report_of(passing_verdict(), [])
    quality = report["details"]["quality"]
    quality |= {"classes": [], "baseline": None, "baseline_by_class": None}
    quality["worst_images"] = worst_images(10, 8)
    page = Page(render_html(report))
    assert "10 → 3" in page.text
    assert "class 10 top-1 81.00 %" in page.text
    assert "that the file misclassifies, of the classes with the lowest top-1" in page.text
    assert sum(tag == "img" for tag, _ in page.elements) == 32, "no more, whatever the file holds"


@pytest.mark.usefixtures("undrawn")
def test_what_a_call_costs_besides_time_is_told() -> None:
    page = Page(render_html(report_of(passing_verdict(), [])))
    for text in (
        "Cold start33.9 ms21.4 ms1.58× faster",
        "Peak memory44.90 MB41.20 MB1.09× less",
        "Energy of a call0.0119 J0.0071 J1.68× less",
        "Images per second, batch size 89111,580",
        "1.73× more",
        "58 on CUDAExecutionProvider, 3 on CPUExecutionProvider. CUDAExecutionProvider was asked for. Fell back to "
        "another one: Shape /flatten/Shape,",
    ):
        assert text in page.text
    gains = [values for tag, values in page.elements if tag == "span" and values.get("class") == "loss"]
    assert not gains, "more images per second is no loss"


@pytest.mark.usefixtures("undrawn")
def test_what_was_not_measured_at_run_time_is_left_out() -> None:
    report = report_of(passing_verdict(), [])
    report["details"]["runtime"] = {"cold_start_ms": {"slim": 3.0}, "throughput": [{"batch_size": 1, "slim": 9.0}]}
    report["details"]["providers"] = {"asked": "CPUExecutionProvider", "nodes": {"CPUExecutionProvider": 9}}
    page = Page(render_html(report))
    assert "Cold start–3.00 ms" in page.text
    assert "Peak memory" not in page.text
    assert "throughput" not in page.plots()
    assert "None fell back to another one." in page.text
    report["details"]["providers"]["fell_back"] = [f"Conv conv{number}" for number in range(50)]
    assert "Conv conv19 and 30 more." in Page(render_html(report)).text
    del report["details"]["runtime"], report["details"]["providers"]
    assert "Resources" not in render_html(report)


@pytest.mark.usefixtures("undrawn")
def test_other_runtimes_have_a_row_each_with_times_or_the_reason() -> None:
    report = report_of(passing_verdict(), [])
    report["details"]["also"] = [
        {"label": "CPU.2", "status": "pass", "p50_ms": 1.25, "shipping_p50_ms": 2.5, "max_abs": 1e-6},
        {"label": "CUDA", "status": "skipped", "reason": "no <GPU> here"},
        {},
    ]
    text = Page(render_html(report)).text
    assert "CPU.2pass1.252.51e-06 CUDAskipped–––no <GPU> here –––––" in text
    del report["details"]["also"]
    assert "Other runtimes" not in render_html(report)


@pytest.mark.usefixtures("undrawn")
def test_every_percentile_that_was_measured_is_a_row() -> None:
    report = report_of(passing_verdict(), [])
    text = Page(render_html(report)).text
    for name, change in (("p50", "1.62"), ("p90", "1.61"), ("p95", "1.60"), ("p99", "1.30")):
        assert re.search(rf"Latency {name}[\d.]+ ms[\d.]+ ms{change}× faster", text)
    del report["baseline"]["latency_ms"]["p99"], report["slim"]["latency_ms"]["p99"]
    assert "p99" not in Page(render_html(report)).text.partition("Checks")[0]


@pytest.mark.usefixtures("undrawn")
def test_the_picture_of_the_change_needs_both_networks() -> None:
    report = report_of(passing_verdict(), [])
    assert "change" in Page(render_html(report)).plots()
    for key in ("latency_ms", "macs"):
        report["baseline"][key] = None
    assert "change" not in Page(render_html(report)).plots()
    report["baseline"] = None
    assert "change" not in Page(render_html(report)).plots()


@pytest.mark.usefixtures("undrawn")
def test_a_corruption_at_several_severities_is_a_curve_and_shifted_data_are_named() -> None:
    report = report_of(passing_verdict(), [])
    found = report["details"]["robustness"]["distributions"]
    assert list_severities(read_report(report).details.robustness) == {
        "fog": ([(0, 0.917), (1, 0.894), (5, 0.722)], [(0, 0.91), (1, 0.89), (5, 0.71)])
    }
    page = Page(render_html(report))
    assert "Noise, corruptions and shifted data" in page.text
    assert "night shots (shifted data)" in page.text
    assert "Corruptions, mean of 483.12 %82.00 %−1.12 percentage points" in page.text
    report["details"]["robustness"]["distributions"] = [one for one in found if one["kind"] in ("nominal", "shifted")]
    page = Page(render_html(report))
    assert {"noise", "severities"}.isdisjoint(page.plots())
    assert "night shots" in page.text


@pytest.mark.usefixtures("undrawn")
def test_many_distributions_are_folded() -> None:
    report = report_of(passing_verdict(), [])
    report["details"]["robustness"]["distributions"] = [
        {"name": f"blur_{place} 3", "kind": "corruption", "top1": 0.5, "baseline_top1": 0.6} for place in range(45)
    ]
    page = Page(render_html(report))
    assert "33 more, with smaller drops" in page.text
    assert "blur_44 3" in page.text


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_before_there_were_pictures_and_run_time_still_renders() -> None:
    report = report_of(passing_verdict())
    details = report["details"]
    for key in ("runtime", "providers"):
        del details[key]
    del details["quality"]["worst_images"], report["provenance"]
    page = Page(render_html(report))
    assert "91.04 %" in page.text
    assert "img" not in [tag for tag, _ in page.elements]
    del details["quality"], details["robustness"]
    assert "Quality" not in render_html(report)


def test_a_page_of_everything_is_small() -> None:
    verdict = passing_verdict()
    quality, robustness = verdict.details["quality"], verdict.details["robustness"]
    count = 1000
    quality |= {
        "classes": [f"a long name of a class, number {number}" for number in range(count)],
        "images_by_class": [50] * count,
        "slim_by_class": [0.7 + number / 10_000 for number in range(count)],
        "baseline_by_class": [0.8] * count,
        "worst_images": worst_images(4, 8, 64),
    }
    example = robustness["distributions"][-1]
    corruptions = [f"corruption_{place}" for place in range(9)]
    robustness["distributions"] = [
        {**example, "name": "nominal", "kind": "nominal"},
        *(
            {**example, "name": f"{name} {severity}", "kind": "corruption"}
            for name in corruptions
            for severity in range(1, 6)
        ),
    ]
    report = report_of(verdict)
    html = render_html(report)
    assert Page(html).plots().count("severities") == 1
    assert html.count("<img") == 32
    assert len(html.encode()) < 3_000_000
    assert len(json.dumps(report, indent=1)) < 3_000_000
