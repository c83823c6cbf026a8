"""What a file takes besides time per call."""

import sys
from pathlib import Path

import pytest
from exported import exported

import compress
from compress.errors import ArtifactError
from compress.verification.measuring import Conditions
from compress.verification.probe import main, probe
from compress.verification.resources import Resources, _probe


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


def test_the_best_batch_size_counts() -> None:
    entries = [{"batch_size": 1, "slim": 10.0}, {"batch_size": 8, "slim": 30.0, "baseline": 5.0}]
    assert Resources(throughput=entries).best_throughput("slim") == 30.0
    assert Resources(throughput=entries).best_throughput("other") is None
