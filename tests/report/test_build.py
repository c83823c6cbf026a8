import json
import math
import sys
from pathlib import Path, PurePosixPath
from subprocess import run
from typing import Any

import numpy as np
import pytest
from report_samples import (
    BASELINE,
    CONFIG,
    ENVIRONMENT,
    SLIM,
    check,
    failing_verdict,
    measured,
    passing_verdict,
    sample_stages,
)

from compress.errors import ArtifactError, InternalError
from compress.model.artifacts import ModelMetrics, Verdict
from compress.report import provenance as environment
from compress.report.build import StageRun, build_report, write_report
from compress.report.provenance import describe_environment
from compress.storage.digest import add_digest


def report_of(verdict: Verdict, stages: list[StageRun] | None = None) -> dict[str, Any]:
    return build_report("demo", verdict, sample_stages() if stages is None else stages, CONFIG, ENVIRONMENT)


def test_report_has_the_public_layout() -> None:
    report = json.loads(json.dumps(report_of(passing_verdict()), allow_nan=False))
    assert report["schema"] == 1
    assert report["name"] == "demo"
    assert report["verdict"]["passed"] is True
    assert report["verdict"]["checks"][1] == {
        "name": "parity",
        "status": "pass",
        "value": 3.8e-06,
        "limit": 1e-3,
        "unit": "",
        "detail": "Largest absolute difference to torch on 64 real samples.",
        "remedy": "",
    }
    for key, figures in (("baseline", BASELINE), ("slim", SLIM)):
        assert report[key] == {
            "macs": figures.macs,
            "params": figures.params,
            "size_bytes": figures.size_bytes,
            "quality": figures.quality,
            "latency_ms": figures.latency_ms,
        }
    assert [stage["stage"] for stage in report["stages"]] == [run.stage for run in sample_stages()]
    assert report["stages"][0].keys() == {"stage", "status", "seconds", "record"}
    assert report["stages"][0]["status"] == "unchanged"
    assert report["environment"] == ENVIRONMENT
    assert report["config"] == CONFIG
    assert report["details"] == measured()
    assert report["non_finite"] == []


def test_failed_verdict_is_reported_as_failed() -> None:
    assert report_of(failing_verdict())["verdict"]["passed"] is False


def test_networks_that_were_not_measured_are_null() -> None:
    report = report_of(Verdict((), ("parity",), None, None))
    assert report["slim"] is None
    assert report["baseline"] is None
    assert report["verdict"] == {"passed": False, "outcome": "failed", "required": ["parity"], "checks": []}


def test_numbers_without_a_json_spelling_become_null_and_are_told() -> None:
    slim = ModelMetrics(1, 1, 1, {"top1": math.nan}, {"p50": math.inf, "p95": 1.0})
    verdict = Verdict(
        (check("parity", "fail", math.nan, 1e-3, "", "Off."),), (), slim, BASELINE, {"a": [1.0, -math.inf]}
    )
    report = report_of(verdict, [StageRun("finetune", "ran", 1.0, {"epochs": [{"loss": np.float32("nan")}]})])
    json.dumps(report, allow_nan=False)
    assert report["verdict"]["checks"][0]["value"] is None
    assert report["verdict"]["checks"][0]["detail"] == "Off. (the value was nan)"
    assert report["slim"]["quality"] == {"top1": None}
    assert report["details"] == {"a": [1.0, None]}
    assert report["non_finite"] == [
        "verdict.checks[0].value: nan",
        "slim.quality.top1: nan",
        "slim.latency_ms.p50: inf",
        "details.a[1]: -inf",
        "stages[0].record.epochs[0].loss: nan",
    ]


def test_foreign_plain_values_become_json_values() -> None:
    record = {"ranks": (np.int64(8), np.float64(0.5)), "file": PurePosixPath("a/b.onnx"), 3: True}
    report = report_of(passing_verdict(), [StageRun("low_rank", "ran", 1.0, record)])
    plain = report["stages"][0]["record"]
    assert plain == {"ranks": [8, 0.5], "file": "a/b.onnx", "3": True}
    assert type(plain["ranks"][0]) is int
    assert plain["3"] is True


def test_value_that_is_not_plain_is_refused_with_its_place() -> None:
    with pytest.raises(InternalError, match=r"must hold plain values, got ndarray at stages\[0\]\.record\.w"):
        report_of(passing_verdict(), [StageRun("prune", "ran", 1.0, {"w": np.zeros(2)})])


def test_written_files_are_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    report = report_of(passing_verdict())
    write_report(report, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8")) == add_digest(report)
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8").endswith("</html>\n")


def test_undecodable_file_name_does_not_break_the_files(tmp_path: Path) -> None:
    report = build_report("demo", passing_verdict(), [], {"arrays": "caf\udce9.npz"}, {})
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["config"] == {"arrays": "caf\udce9.npz"}


def test_interrupted_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old")

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.storage.files.os.replace", refuse)
    with pytest.raises(ArtifactError, match=r"must be written to .*report\.json, got: No space left on device"):
        write_report(report_of(passing_verdict(), []), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_environment_names_machine_and_versions_but_no_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "somebody")
    found = describe_environment()
    assert found.keys() == {"platform", "python", "cpu", "cores", "memory_bytes", "versions"}
    assert found["cores"] >= 1
    assert found["cpu"]
    assert found["versions"]["numpy"] == np.__version__
    assert {"compress", "torch", "onnx", "onnxslim"} <= found["versions"].keys()
    text = json.dumps(found)
    assert environment.platform.node() not in text
    assert "somebody" not in text


def test_environment_names_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.15.0", "onnxruntime-gpu": "1.31.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise environment.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(environment.metadata, "version", version)
    versions = describe_environment()["versions"]
    assert versions["torch"] == "2.15.0"
    assert versions["onnx"] is None
    assert versions["onnxruntime-gpu"] == "1.31.1"
    assert "onnxruntime" not in versions
    del installed["onnxruntime-gpu"]
    assert describe_environment()["versions"]["onnxruntime"] is None


def test_processor_name_is_read_where_linux_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast One: 3 GHz\nflags\t: avx2\n")
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "cpuinfo")
    assert describe_environment()["cpu"] == "Fast One: 3 GHz"
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "missing")
    assert describe_environment()["cpu"] not in ("", "Fast One: 3 GHz")


def test_importing_the_report_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, compress.report.build, compress.report.provenance\n"
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
