"""Output and picture of the README, and the five pipelines of its table of results."""

import sys
from pathlib import Path
from xml.dom import minidom

import pytest

ROOT = Path(__file__).parents[2]
PAGE = """<style>:root { --ink: #112233; --slim: #445566; } @media dark { :root { --ink: #ffffff; } }</style>
<svg class="plot" viewBox="0 0 400 200" role="img"><title id="a">Training loss</title>
<g style="fill: var(--ink)"/></svg>
<svg class="plot" viewBox="0 0 400 200" role="img"><title id="b">Channels of 2 &lt;groups&gt;</title>
<g style="stroke: var(--slim)"/></svg>
<svg class="plot" viewBox="0 0 300 90" role="img"><title id="c">Top-1 over latency</title>
<g style="fill: var(--ink)"/></svg>
"""
OUTPUT = """[5/5] verify: done in 3.0 s
Checks:
  check  status
Before and after:
  metric    baseline  slim
  MACs          2,000  1,000
  top5 (%)     100.00  99.00
  churn          0.01  0.02
  latency p50    2.00  1.00
PASSED: 3 checks made, none failed.
"""
VALUES = {"macs": 2e6, "params": 3e3, "size_bytes": 4e6, "quality": {"top1": 0.9}, "latency_ms": {"p50": 1.5}}
REPORT = {"name": "a", "verdict": {"passed": True}, "baseline": VALUES, "slim": VALUES}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """A module beside the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield __import__(request.param)
    for name in ("quickstart", "results", "made"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("benchmark", ["quickstart"], indirect=True)
def test_the_last_table_is_shown_with_marks_for_what_is_left_out(benchmark) -> None:
    assert benchmark.shortened(benchmark.last_table(OUTPUT)).splitlines() == [
        "Before and after:",
        "  metric    baseline  slim",
        "  MACs          2,000  1,000",
        "  ...",
        "  latency p50    2.00  1.00",
        "PASSED: 3 checks made, none failed.",
    ]


@pytest.mark.parametrize("benchmark", ["quickstart"], indirect=True)
def test_the_picture_holds_verdict_values_and_two_plots_in_light_colours(benchmark) -> None:
    text = benchmark.draw(REPORT, PAGE)
    minidom.parseString(text)
    assert "a: passed" in text
    assert text.count("2.00 M") == 2
    assert "var(" not in text
    assert "#112233" in text
    assert "#445566" in text
    assert "Training loss" not in text
    assert text.index("Accuracy, latency and MACs") < text.index("Channels before and after pruning")
    assert "a: failed" in benchmark.draw({**REPORT, "verdict": {"passed": False}}, PAGE)


@pytest.mark.parametrize("benchmark", ["results"], indirect=True)
def test_the_results_table_has_five_pipelines_whose_weights_are_there_or_given(
    benchmark, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("CIFAR10_ARRAYS", str(tmp_path))
    for name in ("train.npz", "test.npz"):
        (tmp_path / name).touch()
    published = tmp_path / "resnet56.th"
    published.touch()
    weights = benchmark.weights_of([f"resnet56_latency={published}"])
    assert len(benchmark.PIPELINES) == 5
    for name in benchmark.PIPELINES:
        assert benchmark.load(ROOT / "pipelines" / name, weights).config.name == Path(name).stem
    with pytest.raises(ValueError, match=r"needs weights(.|\n)*--weights resnet56_latency=FILE"):
        benchmark.load(ROOT / "pipelines" / "resnet56_latency.yaml", {})
    with pytest.raises(ValueError, match="must be PIPELINE=FILE with an existing file, got 'a=b'"):
        benchmark.weights_of(["a=b"])


@pytest.mark.parametrize("benchmark", ["results"], indirect=True)
def test_rows_of_the_readme_are_pipelines_of_the_results_table(benchmark) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- results: begin -->")[2]
    rows = [
        line.split("|")[1].strip() for line in text.partition("<!-- results: end -->")[0].splitlines() if "|" in line
    ]
    assert {f"{name}.yaml" for name in rows[2:]} <= set(benchmark.PIPELINES)
    assert rows[2:]
