"""Joules of a call, from counters such as Linux shows them."""

from pathlib import Path

import pytest

from compress.verification.resources import EnergyMeter


def counter(root: Path, name: str, microjoules: object, most: object = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n", encoding="ascii")
    (folder / "max_energy_range_uj").write_text(f"{most}\n", encoding="ascii")
    return folder


def test_all_packages_count_and_their_parts_do_not(tmp_path: Path) -> None:
    packages = [counter(tmp_path, f"intel-rapl:{number}", 100) for number in (0, 1)]
    counter(tmp_path, "intel-rapl:0:0", 100)  # the cores of the first package are in it
    meter = EnergyMeter.find(tmp_path)
    assert meter is not None

    def call() -> None:
        for package in packages:
            value = int((package / "energy_uj").read_text())
            (package / "energy_uj").write_text(str(value + 300_000), encoding="ascii")

    assert meter.joules_of(call, seconds=0) == pytest.approx(0.6)


def test_a_counter_that_began_anew_is_followed(tmp_path: Path) -> None:
    package = counter(tmp_path, "intel-rapl:0", 900_000, 1_000_000)
    meter = EnergyMeter.find(tmp_path)
    assert meter is not None
    joules = meter.joules_of(lambda: (package / "energy_uj").write_text("200000", encoding="ascii"), seconds=0)
    assert joules == pytest.approx(0.3)


def test_without_readable_counters_there_is_no_meter(tmp_path: Path) -> None:
    assert EnergyMeter.find(tmp_path / "nowhere") is None
    assert EnergyMeter.find(tmp_path) is None
    counter(tmp_path, "intel-rapl:0", "secret")
    assert EnergyMeter.find(tmp_path) is None
