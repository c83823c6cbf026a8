"""What a file takes besides time per call."""

import sys
from pathlib import Path

import numpy as np
import pytest
from exported import PREPROCESSING, exported

import compress
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import ArtifactError
from compress.verification import resources
from compress.verification.gates import Gates
from compress.verification.measurement import Conditions
from compress.verification.resources import Resources, _probe
from compress.verification.start_probe import main, probe


def test_a_new_process_says_what_a_start_takes() -> None:
    said = probe(exported("residual"), Conditions(batch_size=2))
    assert said["start_ms"] > 0
    assert said["memory_bytes"] is None or said["memory_bytes"] >= 0  # in this process there may be room already


@pytest.mark.parametrize("place", ["here", "empty", "relative"])
def test_a_new_process_runs_nothing_that_lies_in_the_current_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tempfile", "json", "numpy", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    (tmp_path / "compress").mkdir()
    (tmp_path / "compress" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    path = exported("residual")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [{"here": str(tmp_path), "empty": "", "relative": "."}[place], *sys.path])
    assert _probe(path, Conditions())["start_ms"] > 0
    assert not (tmp_path / "ran").exists()


def test_a_new_process_finds_the_package_where_this_one_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it came by PYTHONPATH, the current folder or an editable install: its folder need not be searched."""
    folder = Path(compress.__file__).resolve().parents[1]
    path = exported("residual")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place or ".").resolve() != folder])
    assert _probe(path, Conditions())["start_ms"] > 0


def test_a_file_that_cannot_be_opened_is_told_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.onnx").write_text("no model", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"must be a readable ONNX model"):
        probe(tmp_path / "text.onnx", Conditions())
    request = f'{{"path": "{tmp_path / "text.onnx"}", "conditions": {{}}}}'
    assert main(request) == ArtifactError.exit_code
    assert "must be a readable ONNX model" in capsys.readouterr().err


def two_images() -> Split:
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    return Split("evaluation", ArraySource(pixels, np.zeros(2, np.int64), ()), np.arange(2), PREPROCESSING)


def test_a_process_that_fails_is_a_reason_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.sys, "executable", "/nowhere/python")
    found = resources.measure_resources({"slim": exported("chain")}, two_images(), Conditions(), (1, 2))
    assert found.missing["start"] == found.missing["memory"]
    assert found.missing["start"].startswith("a new process could not be measured: ")
    assert (found.cold_start_ms, [entry["batch_size"] for entry in found.throughput]) == ({}, [1, 2])


def test_what_the_system_does_not_say_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{"start_ms": ms, "memory_bytes": None} for ms in (5.0, 9.0, 7.0)])
    monkeypatch.setattr(resources, "_probe", lambda *_: next(answers))
    found = resources.measure_resources({"slim": exported("chain")}, two_images(), Conditions(), (1,))
    assert (found.cold_start_ms, found.peak_memory_bytes) == ({"slim": 7.0}, {})
    assert found.missing["memory"] == "it cannot be read on this system"
    assert "start" not in found.missing
    memory, start = Gates(max_memory_mb=1.0, max_cold_start_ms=7.0).check_resources(found, "slim")[::-1]
    assert (memory.name, memory.status, memory.detail) == ("max_memory_mb", "skipped", found.missing["memory"])
    assert (start.name, start.status) == ("max_cold_start_ms", "pass")


def test_the_best_batch_size_counts() -> None:
    entries = [{"batch_size": 1, "slim": 10.0}, {"batch_size": 8, "slim": 30.0, "baseline": 5.0}]
    assert Resources(throughput=entries).best_throughput("slim") == 30.0
    assert Resources(throughput=entries).best_throughput("other") is None
