"""Exit codes, messages and start-up of the command line."""

import json
import os
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from blame import raising
from typer.testing import CliRunner, Result

import compress
from compress.cli.commands import app
from compress.cli.exits import guarded
from compress.errors import ArtifactError, InternalError, RuntimeUnavailable, StageError
from compress.model.artifacts import CheckResult, Verdict

ROOT = Path(compress.__file__).parents[1]
GOOD = ROOT / "tests" / "config" / "good" / "minimal.yaml"
BAD = ROOT / "tests" / "config" / "bad" / "criterion_unknown.yaml"
PASSED = Verdict((CheckResult("parity", "pass", 0.0, 1.0, "", ""),), (), None, None)
FAILED = Verdict((CheckResult("parity", "fail", 2.0, 1.0, "", ""),), (), None, None)


@dataclass(frozen=True)
class Row:
    stage: str
    status: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    verdict: Verdict
    folder: Path
    report: dict[str, Any]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="compress")


def provide(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    """Put a module in the place of one that imports torch."""
    module = types.ModuleType(name)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(compress, name.partition(".")[2], module, raising=False)


def start(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compress", *arguments] if code is None else [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# -- what is quick ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["validate", str(GOOD)], ["--help"], ["list"], ["schema"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom compress.cli.commands import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'matplotlib', 'PIL', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = start(code=code)
    assert (done.returncode, done.stderr) == (0, "")


def test_import_of_the_package_is_light_and_load_and_version_are_there() -> None:
    code = (
        "import sys, compress\nassert callable(compress.load) and compress.__version__\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert start(code=code).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        compress.nothing  # noqa: B018


# -- commands --------------------------------------------------------------------------------------------------------


def test_validate_accepts_and_refuses_files_and_goes_on_after_a_bad_one() -> None:
    done = call("validate", BAD, GOOD)
    assert done.exit_code == 2
    assert done.stdout == f"{GOOD}: valid, load -> export -> verify.\n"
    assert done.stderr.startswith(f"{BAD}:11:16: stages[1].criterion must be one of")
    assert done.stderr.endswith("Hint: did you mean 'taylor'?\n")
    assert call("validate", GOOD).exit_code == 0


def test_validate_takes_overrides_and_seed() -> None:
    assert call("validate", BAD, "--set", "stages.prune.criterion=l1").exit_code == 0
    done = call("validate", GOOD, "--seed", "-1")
    assert (done.exit_code, done.stderr) == (2, "--seed: seed must be at least 0, got -1.\n")


def test_run_passes_everything_on_and_says_where_the_results_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def run(*arguments: Any) -> Outcome:
        calls.append(arguments)
        for name in ("model.onnx", "report.html"):
            (tmp_path / name).write_bytes(b"")
        return Outcome(PASSED, tmp_path, {})

    provide(monkeypatch, "compress.engine.runner", run_with_others=run)
    done = call("run", GOOD, "--set", "name=other", "--seed", 3, "--runs-dir", tmp_path)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-3:] == [
        "PASSED: 1 check made, none failed.",
        f"ONNX file: {tmp_path / 'model.onnx'}",
        f"Report: {tmp_path / 'report.html'}",
    ]
    pipeline, folder, console, writes_curves, remote = calls[0]
    assert (pipeline.config.name, pipeline.config.seed, folder, console.quiet) == ("other", 3, tmp_path, False)
    assert (writes_curves, remote) == (False, None)
    call("run", GOOD, "--tensorboard")
    assert calls[-1][3] is True
    assert "Report" not in call("run", GOOD, "--quiet").stdout


def test_failed_verdict_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    provide(monkeypatch, "compress.engine.runner", run_with_others=lambda *_: Outcome(FAILED, tmp_path, {}))
    provide(monkeypatch, "compress.engine.verify_file", verify_file=lambda *_: FAILED)
    assert call("run", GOOD).exit_code == 1
    done = call("verify", "model.onnx", "--pipeline", GOOD)
    assert done.exit_code == 1
    assert done.stdout.endswith("FAILED: parity failed, of 1 check made.\n")


def test_verdicts_are_written_for_ci(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    provide(monkeypatch, "compress.engine.runner", run_with_others=lambda *_: Outcome(FAILED, tmp_path, {}))
    provide(monkeypatch, "compress.engine.verify_file", verify_file=lambda *_: PASSED)
    junit, summary = tmp_path / "out.xml", tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert call("run", GOOD, "--junit", junit, "--json", tmp_path / "out.json", "--github-summary").exit_code == 1
    assert '<failure message="" type="failure">' in junit.read_text()
    assert json.loads((tmp_path / "out.json").read_text())["verdict"]["passed"] is False
    assert summary.read_text().startswith("## minimal\n\nFAILED")
    assert call("verify", "model.onnx", "--pipeline", GOOD, "--junit", junit).exit_code == 0
    assert 'failures="0"' in junit.read_text()
    done = call("run", GOOD, "--json", "-", "--github-summary")
    assert json.loads(done.stdout)["verdict"]["passed"] is False
    assert "\n::error title=minimal%3A parity::" in done.stderr
    refused = call("run", GOOD, "--junit", tmp_path)
    assert (refused.exit_code, "--junit must be a file to write" in refused.stderr) == (2, True)


def test_plan_shows_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("load", "unchanged", ()), Row("export", "run", ("opset changed", "input changed"))]
    provide(monkeypatch, "compress.engine.runner", plan=lambda *_: rows)
    done = call("plan", GOOD)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == "  export  run        opset changed, input changed"


def test_inspect_prints_the_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    class Overview:
        def tables(self, with_layers: bool) -> list[object]:
            return [("layers" if with_layers else "network", ("name", "MACs"), [("conv", 12)])]

        def to_dict(self) -> dict[str, object]:
            return {"macs": 12}

    def inspect_target(*arguments: object) -> Overview:
        calls.append((*arguments[:4], arguments[5]))
        return Overview()

    provide(monkeypatch, "compress.inspection.overview", inspect_target=inspect_target)
    done = call("inspect", "net.py:build", "--input-shape", "3,32,32", "--set", "seed=1", "--layers", "--latency")
    assert done.stdout == "layers:\n  name  MACs\n  conv    12\n"
    assert calls == [("net.py:build", (3, 32, 32), ("seed=1",), True, False)]
    done = call("inspect", "sound.py:build", "--input", "1,16000", "--json", tmp_path / "a.json", "--second-opinion")
    assert done.stdout == "network:\n  name  MACs\n  conv    12\n"
    assert calls[1] == ("sound.py:build", (1, 16000), (), False, True)
    values = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert (values["macs"], values["made"]["tool"]) == (12, "compress")
    done = call("inspect", "net.py:build", "--json", "-")
    assert json.loads(done.stdout)["macs"] == 12
    assert done.stderr.startswith("network:\n")


@pytest.mark.parametrize("shape", ["3,0,32", "a,b,c", "3,-1,2", "3,,2", ""])
def test_bad_input_is_refused(shape: str) -> None:
    done = call("inspect", "net.py:build", "--input", shape)
    assert done.exit_code == 2
    assert done.stderr == f"--input must be positive whole numbers, got '{shape}'.\nHint: such as 3,224,224\n"


@pytest.mark.parametrize("shape", ["3,32", "2,32,32", "3,0,32", "a,b,c", "3,32,32,1", ""])
def test_bad_input_shape_is_refused(shape: str, tmp_path: Path) -> None:
    done = call("init", "d", "a:b", "--weights", "w", "--out", tmp_path / "a.yaml", "--input-shape", shape)
    assert done.exit_code == 2
    assert done.stderr == (
        f"--input-shape must be channels (1 or 3), height and width, got '{shape}'.\nHint: such as 3,32,32\n"
    )


def test_list_shows_names_of_one_kind_or_of_all() -> None:
    done = call("list", "criteria")
    names = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    assert {"bn_scale", "l1", "l2", "random", "reconstruction", "taylor", "greedy", "grasp", "pfp"} < set(names)
    assert [name for name in names if name.startswith("tp_")] == [
        "tp_bn_scale", "tp_fpgm", "tp_hessian", "tp_lamp", "tp_magnitude", "tp_random", "tp_taylor"
    ]  # fmt: skip
    assert all(len(line.split()) > 2 for line in done.stdout.splitlines()[2:])  # each says what it does
    for title in ("criteria:", "methods:", "stages:", "datasets:", "tasks:", "runtimes:"):
        assert title in call("list").stdout
    lines = [line.split() for line in call("list", "ranks").stdout.splitlines()[2:]]
    assert {words[0] for words in lines if words[1] == "schemes"} == {"nc", "nc2", "nc4", "vh", "tucker2", "svd"}
    assert [words[0] for words in lines if words[1] == "allocation"] == ["shared_error", "alds", "energy"]
    assert [words[0] for words in lines if words[1] == "method"] == ["trp"]
    done = call("list", "criterion")
    assert done.exit_code == 2
    assert done.stderr == (
        "list takes one of criteria, methods, ranks, stages, networks, datasets, tasks, runtimes, got 'criterion'.\n"
        "Hint: did you mean 'criteria'?\n"
    )


def test_schema_is_json_schema_of_a_pipeline() -> None:
    schema = json.loads(call("schema").stdout)
    assert set(schema["required"]) == {"name", "data", "stages"}
    assert "PruneConfig" in schema["$defs"]


def test_version_is_printed() -> None:
    assert call("--version").stdout == f"compress {compress.__version__}\n"


# -- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (StageError("Stage 'prune' failed.", hint="try less."), 3, "Stage 'prune' failed.\nHint: try less.\n"),
        (ArtifactError("File is corrupt."), 4, "File is corrupt.\n"),
        (RuntimeUnavailable("No CUDA."), 5, "No CUDA.\n"),
        (OSError(28, "No space left on device", "/runs/x"), 4,
         "The system refused to write or read '/runs/x': No space left on device.\n"),
        (KeyboardInterrupt(), 130,
         "Interrupted; the stages that were completed are kept, the same command goes on from there.\n"),
    ],
)  # fmt: skip
def test_errors_become_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str) -> None:
    provide(monkeypatch, "compress.engine.runner", run_with_others=raising(error))
    done = call("run", GOOD)
    assert (done.exit_code, done.stderr, done.stdout) == (code, text, "")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "What was to be computed did not fit into memory.\n"),
        (MemoryError("Unable to allocate 9 TiB for an array."),
         "What was to be computed did not fit into memory: Unable to allocate 9 TiB for an array.\n"),
    ],
)  # fmt: skip
def test_too_little_memory_is_no_fault_of_the_program(
    monkeypatch: pytest.MonkeyPatch, error: MemoryError, text: str
) -> None:
    provide(monkeypatch, "compress.engine.runner", run_with_others=raising(error))
    done = call("run", GOOD)
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr == text + "Hint: Try a smaller batch size, or fewer or smaller images.\n"


@pytest.mark.parametrize("name", ["run", "sweep", "profile", "verify", "check", "bundle", "report", "inspect"])
def test_what_an_interruption_leaves_is_said_of_the_commands_that_keep_stages(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    keeps = name in ("run", "sweep", "profile")
    for error, code in ((KeyboardInterrupt(), 130), (ZeroDivisionError(), 70)):
        command = raising(error)
        command.__name__ = name
        with pytest.raises(typer.Exit, match=str(code)) as caught:
            guarded(command)()
        assert caught.value.exit_code == code
        told = capsys.readouterr().err
        assert ("stages that were completed are kept" in told) is keeps
        assert ("the same command starts anew" in told) is (code == 130 and not keeps)


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), InternalError("invariant broken")])
def test_fault_of_our_own_is_a_paragraph_and_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    provide(monkeypatch, "compress.engine.runner", run_with_others=raising(error))
    done = call("run", GOOD)
    [crash] = tmp_path.glob("compress-crash-*.txt")
    assert done.exit_code == 70
    assert str(crash) in done.stderr
    assert str(error) in done.stderr
    assert "Traceback" not in done.output
    assert done.stderr.count("\n") == 1
    assert "Traceback (most recent call last)" in crash.read_text(encoding="utf-8")


def test_wrong_pipeline_is_refused_before_anything_heavy_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compress.engine.runner", None)  # an import of it would raise
    assert call("run", BAD).exit_code == 2
    assert call("plan", BAD).exit_code == 2


@pytest.mark.parametrize("arguments", [["run"], ["rn"], ["run", "a.yaml", "--sett", "x"], ["validate", "--seed", "x"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert "Usage: compress" in done.stderr
    assert "Traceback" not in done.output


def test_program_ends_with_the_code_and_without_traceback() -> None:
    done = start("validate", "no-such-file.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "no-such-file.yaml: the pipeline file does not exist.\n"


def test_closed_pipe_is_quiet() -> None:
    command = f'"{sys.executable}" -m compress schema | head -c 1 >/dev/null; exit "${{PIPESTATUS[0]}}"'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 when everything fitted into the pipe before it was closed
