"""A file that no run made is held to a pipeline's gates, alone and against a baseline."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import smallrun
from exported import SIGNATURE
from safetensors.torch import load_file

from compress.engine.verify_file import verify_file
from compress.errors import ArtifactError, DataError, RuntimeUnavailable
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.progress import SilentProgress

Values = dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> smallrun.World:
    """Images, and two files: the trained network, and one that was never trained."""
    world = smallrun.make_world(tmp_path_factory.mktemp("standalone"))
    module = nets.chain()
    module.load_state_dict(load_file(world.folder / "chain.safetensors"))
    export_onnx(module, SIGNATURE, world.folder / "trained.onnx", ExportSettings(opset=18))
    export_onnx(nets.chain(), SIGNATURE, world.folder / "untrained.onnx", ExportSettings(opset=18))
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
        f"from compress.cli.commands import app\napp(['verify', *{[str(one) for one in arguments]!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    assert "PASSED" in done.stdout
    assert 'failures="0"' in junit.read_text(encoding="utf-8")


def test_other_tasks_are_verified_where_torch_is_not_installed(tmp_path: Path) -> None:
    value = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 3, 16, 16]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "one", value[:1], value[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save_model(onnx.helper.make_model(graph, ir_version=10, opset_imports=opset), tmp_path / "m.onnx")
    images = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3)).astype(np.uint8)
    np.savez(
        tmp_path / "a.npz", x=images, y=images.argmax(-1)
    )  # the network says at each pixel which colour is strongest
    common = "preprocessing: {}\nresources: null\nwarmup: 2\nrepeats: 10\n"
    for name, text in (
        ("labelled", "task: segmentation\nevaluation: {arrays: a.npz}\ngates: {min: {miou: 0.99}}\n"),
        ("unlabelled", "task: embedding\nevaluation: {unlabelled: a.npz}\ngates: {max: {distance: 0.01}}\n"),
    ):
        (tmp_path / f"{name}.yaml").write_text(common + text, encoding="utf-8")
        file = tmp_path / "m.onnx"
        arguments = ["verify", file, "--against", file, "--gates", tmp_path / f"{name}.yaml"]
        code = (
            "import sys\n"
            "class Hidden:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name.partition('.')[0] in ('torch', 'torchvision', 'torch_pruning', 'onnxscript'):\n"
            "            raise ImportError(f'{name} is not installed')\n"
            "sys.meta_path.insert(0, Hidden())\n"
            f"from compress.cli.commands import app\napp({[str(one) for one in arguments]!r})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert "PASSED" in done.stdout


def gates_file(world: smallrun.World, text: str) -> str:
    (world.folder / "gates.yaml").write_text(text, encoding="utf-8")
    return str(world.folder / "gates.yaml")


NO_RESOURCES = "warmup: 2\nrepeats: 20\nresources: null\n"


def test_gates_of_their_own_need_no_pipeline(world: smallrun.World) -> None:
    gates = gates_file(
        world, NO_RESOURCES + "preprocessing: {mean: [0.5], std: [0.25]}\ngates: {max_drop: {top1: 0.1}}"
    )
    trained, untrained = (str(world.folder / name) for name in ("trained.onnx", "untrained.onnx"))
    rest = ("--against", trained, "--data", str(world.folder / "test.npz"), "--gates", gates)
    assert smallrun.call("verify", trained, *rest).exit_code == 0
    page = world.folder / "page.html"
    done = smallrun.call("verify", untrained, *rest, "--report", str(page))
    assert done.exit_code == 1
    assert "FAILED: max_drop.top1 failed, of " in done.stdout
    assert "max_drop.top1" in page.read_text("utf-8")
    done = smallrun.call("verify", untrained, *rest, "--report", str(world.folder))
    assert done.exit_code == 2
    assert "--report must be a file to write" in done.stderr


def test_a_file_that_says_how_images_are_prepared_needs_no_more(world: smallrun.World) -> None:
    from compress.data.preprocessing import Preprocessing

    module = nets.chain()
    module.load_state_dict(load_file(world.folder / "chain.safetensors"))
    said = world.folder / "said.onnx"
    export_onnx(
        module, SIGNATURE, said, ExportSettings(opset=18), preprocessing=Preprocessing(mean=(0.5,), std=(0.25,))
    )
    arguments = ("--data", str(world.folder / "test.npz"), "--set", "resources=null", "--set", "repeats=10")
    assert smallrun.call("verify", str(said), *arguments).exit_code == 0
    done = smallrun.call("verify", str(world.folder / "trained.onnx"), *arguments)
    assert done.exit_code == 2
    assert "preprocessing must be given: " in done.stderr
    assert "Hint: in the file of gates" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("--pipeline", "a.yaml", "--data", "test.npz")])
def test_either_a_pipeline_or_gates_are_to_be_given(world: smallrun.World, arguments: tuple[str, ...]) -> None:
    done = smallrun.call("verify", str(world.folder / "trained.onnx"), *arguments)
    assert done.exit_code == 2
    assert "verify takes either --pipeline, or --data and --gates" in done.stderr


def test_shifted_data_sets_are_looked_at_and_held_to_gates(world: smallrun.World) -> None:
    import numpy as np

    arrays = smallrun.pictures(64, seed=5)
    np.savez(world.folder / "dark.npz", x=arrays["x"] // 4, y=arrays["y"])
    values = with_gates(world, max_drop={"shifted": 0.5, "worst_distribution": 0.5}, min={"shifted": 0.01})
    shifted = {"dark": {"arrays": "dark.npz"}}
    values["stages"][-1]["robustness"] = {"noise_levels": [], "corruptions": [], "shifted": shifted}
    result = verify(world, values, "trained.onnx", "trained.onnx")
    assert result["passed"]
    found = result["verdict"].details["robustness"]["distributions"]
    assert [(one["name"], one["kind"]) for one in found] == [("nominal", "nominal"), ("dark", "shifted")]
    assert result["min.shifted"].value == pytest.approx(found[1]["top1"])
    assert found[1]["top1"] < found[0]["top1"]
    assert result["max_drop.shifted"].value == 0


def test_a_shifted_data_set_with_other_classes_is_told(world: smallrun.World) -> None:
    import numpy as np

    for name, classes in (("named", ["a", "b", "c", "d"]), ("others", ["a", "b", "d", "c"])):
        np.savez(world.folder / f"{name}.npz", **smallrun.pictures(8, seed=5), classes=np.array(classes))
    values = world.values()
    values["data"]["evaluation"] = {"arrays": "named.npz"}
    values["stages"][-1]["robustness"] = {"images": 8, "shifted": {"web": {"arrays": "others.npz"}}}
    with pytest.raises(DataError, match=r"Shifted data set 'web' must have the classes of the evaluation split"):
        verify(world, values, "trained.onnx")


def test_start_memory_and_throughput_are_measured_and_held_to_gates(world: smallrun.World) -> None:
    limits = {"max_cold_start_ms": 60_000, "max_memory_mb": 1e-6, "min_images_per_second": 1}
    values = with_gates(world, **limits)
    values["stages"][-1]["resources"] = {"batch_sizes": [4, 1]}
    result = verify(world, values, "trained.onnx", "trained.onnx")
    found = result["verdict"].details["runtime"]
    assert set(found["cold_start_ms"]) == set(found["peak_memory_bytes"]) == {"slim", "baseline"}
    assert [entry["batch_size"] for entry in found["throughput"]] == [1, 4]
    assert result["max_cold_start_ms"].status == "pass"
    assert result["max_memory_mb"].status == "fail"
    assert result["max_memory_mb"].value == found["peak_memory_bytes"]["slim"] / 1e6 > 0
    assert result["min_images_per_second"].value == max(entry["slim"] for entry in found["throughput"])


def test_limits_on_what_is_not_looked_at_fail(world: smallrun.World) -> None:
    result = verify(world, with_gates(world, max_memory_mb=100.0), "trained.onnx")
    assert (result["max_memory_mb"].status, result["passed"]) == ("skipped", False)
    assert result["max_memory_mb"].detail == "resources are not looked at"


def test_the_next_step_for_a_file_that_cannot_be_opened_is_not_another_runtime(world: smallrun.World) -> None:
    path = world.folder / "unknown.onnx"
    model = onnx.load(world.folder / "trained.onnx")
    model.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(model, path)
    result = verify(world, with_gates(world, max_size_mb=1.0), path.name)
    assert (result["structure"].status, result["provider"].status) == ("fail", "fail")
    assert "export the network again" in result["structure"].remedy
    assert "a file that the runtime opens" in result["provider"].remedy
