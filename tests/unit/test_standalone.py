"""A file that no run made is held to a pipeline's gates, alone and against a baseline."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import nets
import pytest
import smallrun
from exported import SIGNATURE
from safetensors.torch import load_file

from compress.errors import ArtifactError, DataError, RuntimeUnavailable
from compress.exporting.torch_onnx import export_onnx
from compress.progress import SilentProgress
from compress.standalone import verify_file

Values = dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> smallrun.World:
    """Images, and two files: the trained network, and one that was never trained."""
    world = smallrun.make_world(tmp_path_factory.mktemp("standalone"))
    module = nets.chain()
    module.load_state_dict(load_file(world.folder / "chain.safetensors"))
    export_onnx(module, SIGNATURE, world.folder / "trained.onnx", opset=18)
    export_onnx(nets.chain(), SIGNATURE, world.folder / "untrained.onnx", opset=18)
    return world


def with_gates(world: smallrun.World, **gates: Any) -> Values:
    values = world.values()
    values["stages"][-1]["gates"] = gates
    return values


def verify(world: smallrun.World, values: Values, file: str, against: str | None = None) -> dict[str, Any]:
    """Return the checks by name, and the verdict as "passed"."""
    baseline = None if against is None else world.folder / against
    verdict = verify_file(world.folder / file, world.load(values), baseline, SilentProgress())
    return {check.name: check for check in verdict.checks} | {"passed": verdict.passed, "verdict": verdict}


def test_a_good_file_alone_passes_what_can_be_measured(world: smallrun.World) -> None:
    result = verify(world, with_gates(world, max_size_mb=1.0, max_latency_ms=1000.0), "trained.onnx")
    assert result["passed"]
    for name in ("structure", "provider", "evaluation", "max_size_mb", "max_latency_ms"):
        assert result[name].status == "pass"
    assert (result["parity"].status, result["macs_agree"].status) == ("skipped", "skipped")
    assert result["verdict"].slim.quality["top1"] > 0.9
    assert result["verdict"].baseline is None


def test_gates_that_compare_fail_without_a_baseline(world: smallrun.World) -> None:
    result = verify(world, with_gates(world, max_drop={"top1": 0.5}, min_speedup=0.01), "trained.onnx")
    assert not result["passed"]
    assert result["max_drop.top1"].status == "skipped"
    assert result["min_speedup"].status == "skipped"


def test_gates_that_compare_are_measured_against_a_baseline(world: smallrun.World) -> None:
    values = with_gates(world, max_drop={"top1": 0.1}, min_speedup=0.01)
    result = verify(world, values, "trained.onnx", "trained.onnx")
    assert result["passed"]
    assert result["max_drop.top1"].value == 0
    assert set(result["verdict"].baseline.latency_ms) >= {"p50", "p95"}


def test_a_file_that_is_worse_than_its_baseline_fails(world: smallrun.World) -> None:
    result = verify(world, with_gates(world, max_drop={"top1": 0.1}), "untrained.onnx", "trained.onnx")
    assert not result["passed"]
    check = result["max_drop.top1"]
    assert check.status == "fail"
    drop = result["verdict"].baseline.quality["top1"] - result["verdict"].slim.quality["top1"]
    assert check.value == pytest.approx(drop)
    assert drop > 0.1


@pytest.mark.parametrize(("file", "against"), [("nowhere.onnx", None), ("trained.onnx", "nowhere.onnx")])
def test_a_missing_file_is_told(world: smallrun.World, file: str, against: str | None) -> None:
    with pytest.raises(ArtifactError, match=r"ONNX file '.*nowhere.onnx' does not exist"):
        verify(world, world.values(), file, against)


def test_a_file_that_is_no_model_is_told(world: smallrun.World) -> None:
    (world.folder / "text.onnx").write_text("no model", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"text\.onnx"):
        verify(world, world.values(), "text.onnx")


def test_a_provider_that_is_not_there_is_told(world: smallrun.World) -> None:
    values = world.values()
    values["stages"][-1]["provider"] = "NoExecutionProvider"
    with pytest.raises(RuntimeUnavailable, match=r"provider must be one of .*, got 'NoExecutionProvider'"):
        verify(world, values, "trained.onnx")


def test_labels_that_the_file_does_not_have_are_told(world: smallrun.World) -> None:
    import numpy as np

    arrays = smallrun.pictures(64, seed=3)
    np.savez(world.folder / "more.npz", x=arrays["x"], y=arrays["y"] + 3)
    values = world.values()
    values["data"]["evaluation"] = {"arrays": "more.npz"}
    with pytest.raises(DataError, match=r"[Ll]abel"):
        verify(world, values, "trained.onnx")


def test_the_command_needs_neither_weights_nor_training_images(world: smallrun.World, tmp_path: Path) -> None:
    values = with_gates(world, max_drop={"top1": 0.1})
    values["data"]["train"] = {"arrays": "nowhere.npz"}
    values["stages"][0]["weights"] = "nowhere.safetensors"
    pipeline = str(world.write(values, "alone.yaml"))
    trained, untrained = (str(world.folder / name) for name in ("trained.onnx", "untrained.onnx"))
    assert smallrun.call("verify", trained, "--pipeline", pipeline, "--against", trained).exit_code == 0
    done = smallrun.call("verify", untrained, "--pipeline", pipeline, "--against", trained)
    assert done.exit_code == 1
    assert "FAILED: max_drop.top1 failed, of " in done.stdout


def test_a_file_is_verified_where_torch_is_not_installed(world: smallrun.World) -> None:
    values = with_gates(world, max_drop={"top1": 0.1}, min_speedup=0.01)
    values["stages"][-1]["robustness"] = {"images": 8, "noise_levels": [0.1], "corruptions": ["jpeg", "elastic"]}
    file, junit = world.folder / "trained.onnx", world.folder / "out.xml"
    arguments = [file, "--pipeline", world.write(values), "--against", file, "--junit", junit]
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('torch', 'torchvision', 'torch_pruning', 'onnxscript'):\n"
        "            raise ImportError(f'{name} is not installed')\n"
        "sys.meta_path.insert(0, Hidden())\n"
        f"from compress.cli import app\napp(['verify', *{[str(one) for one in arguments]!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    assert "PASSED" in done.stdout
    assert 'failures="0"' in junit.read_text(encoding="utf-8")
