"""The parts of a latency ratio sum up to it, and a finished run's files are found and timed."""

import sys
from pathlib import Path

import pytest
import smallrun

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quotients(monkeypatch):
    """The module of the table, which lies outside the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quotients

    yield quotients
    for name in ("quotients", "made"):
        sys.modules.pop(name, None)


def test_parts_by_hand_sum_up_to_the_ratio(quotients):
    macs = {"wide": 300, "cheap": 100, "kept": 100}
    before = quotients.Timed(10.0, {"wide": 5.0, "cheap": 1.0, "kept": 2.0, "": 1.0}, macs, {})
    after = quotients.Timed(6.0, {"wide": 2.0, "kept": 2.0, "": 0.75}, {"wide": 75, "kept": 100}, {})
    found = quotients.find_losses(before, after)
    assert found.macs_left == pytest.approx(0.35)
    assert found.narrow_layers == pytest.approx({"wide": (2.0 - 1.25) / 10, "cheap": 0.0, "kept": 0.0})
    assert found.cheap_macs == pytest.approx((1.25 + 0.0 + 2.0 - 0.35 * 8.0) / 10)
    assert found.other_nodes == pytest.approx((0.75 - 0.35 * 1.0) / 10)
    assert found.between_nodes == pytest.approx((1.25 - 0.35 * 1.0) / 10)
    assert found.latency_left == pytest.approx(0.6)
    cells = [cell.strip() for cell in quotients.row("net", found).strip("|").split("|")]
    assert cells == ["net", "0.350", "0.600", "2.86×", "1.67×", "0.58", "+0.045", "+0.075", "+0.040", "+0.090"]
    assert quotients.worst_layers(found, before, after, 1) == [
        "  wide: , 16666666.7 to 26666666.7 ps for a MAC, +0.075"
    ]


def test_a_finished_run_is_timed(quotients, tmp_path, capsys):
    world = smallrun.make_world(tmp_path / "world")
    world.run({**world.values(), "name": "timed"})
    quotients.main([str(world.runs / "timed"), "--repeats", "2", "--sittings", "1", "--layers", "2"])
    printed = capsys.readouterr().out
    assert "| timed |" in printed
    assert printed.count("ps for a MAC") == 2
    with pytest.raises(SystemExit, match="must be the folder of a finished run"):
        quotients.main([str(tmp_path)])
