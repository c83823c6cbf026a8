"""The table of graph speeds judges its figures, and says what failed."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FIGURES = {
    "groups": 37.0,
    "graph_s": 1.0,
    "cut_s": 0.5,
    "cpu_s": 2.0,
    "model_mb": 100.0,
    "before_mb": 800.0,
    "peak_mb": 1250.0,
}


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark, which lies outside the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import graph_speed

    yield graph_speed
    sys.modules.pop("graph_speed", None)


def test_rows_say_whether_limits_are_kept(speed: ModuleType) -> None:
    slow = {**FIGURES, "graph_s": 3.0, "peak_mb": 1400.0}
    assert speed.row("compress", "resnet50", [FIGURES], 3.0) == (
        "| resnet50 | compress | 37 | 1.00 | 0.50 | 1.50 (within 3) | 2.00 | 100 | 800 | 1250 (within 1300) |"
    )
    assert "| 3.50 (above 3) | 2.00 | 100 | 800 | 1400 (above 1300) |" in speed.row("compress", "a", [slow], 3.0)
    assert speed.row("torch-pruning", "a", [FIGURES], 3.0).endswith("| 1.50 | 2.00 | 100 | 800 | 1250 |")
    assert "| 1.50 |" in speed.row("compress", "a", [FIGURES, slow, FIGURES], None)  # the median
    failed = speed.row("compress", "a", [FIGURES, "more than 9 s"], 3.0)
    assert "more than 9 s" in failed
    assert failed.count("|") == speed.row("compress", "a", [FIGURES], 3.0).count("|")


def test_growth_is_a_power_of_the_depth(speed: ModuleType) -> None:
    assert speed.exponent([20, 56, 110], [2.0, 5.6, 11.0]) == pytest.approx(1.0)
    assert speed.exponent([10, 20, 40], [1.0, 4.0, 16.0]) == pytest.approx(2.0)


def test_a_measurement_counts_groups_and_a_failed_one_is_not_repeated(speed: ModuleType) -> None:
    figures = speed.measure_here("compress", "8")
    assert figures["groups"] >= 3
    assert figures["peak_mb"] >= figures["before_mb"] > figures["model_mb"] > 0
    found = speed.measure_in_turn(["compress"], "9", 2, 60.0)  # depths are 6n + 2
    assert len(found["compress"]) == 1
    assert "depth must be 6n + 2" in found["compress"][0]
