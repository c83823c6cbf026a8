"""What a file takes besides time per call."""

from pathlib import Path

import pytest
from exported import exported

from compress.errors import ArtifactError
from compress.verification.measuring import Conditions
from compress.verification.probe import main, probe
from compress.verification.resources import Resources


def test_a_new_process_says_what_a_start_takes() -> None:
    said = probe(exported("residual"), Conditions(batch_size=2))
    assert said["start_ms"] > 0
    assert said["memory_bytes"] is None or said["memory_bytes"] >= 0  # in this process there may be room already


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
