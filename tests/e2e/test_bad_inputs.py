"""Every bad input ends with its exit code and a sentence that says what is wrong; never with a traceback."""

import errno
import pickle  # noqa: TID251 - to make files that must be refused
import shutil
import sys
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import smallrun
import torch
from blame import raising
from safetensors.torch import load_file, save_file
from smallrun import Finished, World, statuses
from typer.testing import Result

import compress
from compress.engine import runner
from compress.errors import ArtifactError, ModelError, RebuildMismatch

Values = dict[str, Any]


@pytest.fixture(scope="module")
def plain(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A copy of the finished run for tests that add files of their own and change none."""
    folder = tmp_path_factory.mktemp("bad") / "world"
    shutil.copytree(finished.world.folder, folder)
    return World(folder)


def refused(world: World, values: Values, code: int, *texts: str, lines: int = 3) -> Result:
    """Run a pipeline that must fail; check the exit code, the sentences and that there is nothing else."""
    done = world.call("run", values, "--quiet")
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    for text in texts:
        assert text in done.stderr
    assert "Traceback" not in done.output
    assert "Internal error" not in done.output
    assert len(done.stderr.splitlines()) <= lines
    return done


def with_weights(world: World, path: Path | str) -> Values:
    values = world.values()
    values["stages"][0]["weights"] = str(path)
    return values


def with_data(world: World, half: str = "train", **source: str) -> Values:
    values = world.values()
    values["data"][half] = source
    return values


# -- weights ---------------------------------------------------------------------------------------------------------


def test_missing_weights(plain: World) -> None:
    for command in ("run", "plan"):
        done = plain.call(command, with_weights(plain, "nowhere.safetensors"))
        assert done.exit_code == 4
        assert done.stderr == f"Weights file '{plain.folder / 'nowhere.safetensors'}' does not exist.\n"


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("container", ["pickle", "torch", "torch-legacy", "nested"])
def test_weights_that_would_run_code_are_refused_and_run_nothing(plain: World, tmp_path: Path, container: str) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "weights.pth"
    if container == "pickle":
        path.write_bytes(pickle.dumps(Trap(sprung)))
    elif container == "nested":
        torch.save({"state_dict": {"head.weight": torch.zeros(1), "extra": Trap(sprung)}}, path)
    else:
        torch.save(Trap(sprung), path, _use_new_zipfile_serialization=container == "torch")
    refused(plain, with_weights(plain, path), 4, "Stage 'load' (1 of 5): ",
            f"Weights file '{path}' was refused: it is not a plain state dict, reading it could run code",
            "Hint: Save `model.state_dict()`")  # fmt: skip
    assert not sprung.exists()


def test_a_pickled_module_is_refused(plain: World, tmp_path: Path) -> None:
    torch.save(nets.chain(), tmp_path / "model.pth")
    refused(plain, with_weights(plain, tmp_path / "model.pth"), 4, "was refused: it is not a plain state dict",
            'torch.save(model.state_dict(), "model_state.pt")', lines=6)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.safetensors", b"", "must be a safetensors file"),
        ("a.safetensors", b"\x00" * 100, "must be a safetensors file"),
        ("a.pth", b"", "is empty."),
        ("a.pth", b"PK\x03\x04 and no more", "is no readable torch checkpoint"),
        ("a.pth", b"some text", "Weights file"),
    ],
)
def test_files_that_hold_no_weights(plain: World, tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(plain, with_weights(plain, tmp_path / name), 4, "Stage 'load' (1 of 5): ", str(tmp_path / name), text)


def test_cut_off_weights(plain: World, tmp_path: Path) -> None:
    whole = (plain.folder / "chain.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(plain, with_weights(plain, tmp_path / "a.safetensors"), 4, "must be a safetensors file")
    torch.save(nets.chain().state_dict(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    refused(plain, with_weights(plain, tmp_path / "a.pth"), 4, "is no readable torch checkpoint")


def test_weights_in_a_checkpoint_with_wrappings_are_read(plain: World, tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in load_file(plain.folder / "chain.safetensors").items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    values = {**with_weights(plain, tmp_path / "checkpoint.pth"), "name": "wrapped"}
    outcome = plain.run(values)
    assert statuses(outcome) == [
        "load ran",
        *(f"{stage} unchanged" for stage in ("prune", "finetune", "export", "verify")),
    ]


def test_weights_of_another_network(plain: World, tmp_path: Path) -> None:
    save_file(nets.build("residual").state_dict(), tmp_path / "a.safetensors")
    done = refused(plain, with_weights(plain, tmp_path / "a.safetensors"), 4,
                   "must fit the network exactly; missing: body.1.0.weight", "unexpected: body.1.bn1.bias",
                   "Hint: Check model.factory and model.kwargs")  # fmt: skip
    assert "other shape: body.0.0.weight (16, 3, 3, 3) instead of (8, 3, 3, 3)" in done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(plain: World, tmp_path: Path, value: float) -> None:
    state = load_file(plain.folder / "chain.safetensors")
    state["head.bias"][1] = value
    save_file(state, tmp_path / "a.safetensors")
    text = f"Stage 'load' (1 of 5): '{tmp_path / 'a.safetensors'}' must be finite, NaN or infinity in head.bias."
    refused(plain, with_weights(plain, tmp_path / "a.safetensors"), 3, text)


# -- factory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "texts"),
    [
        ("import nothing_of_this_name", ("must import, got ModuleNotFoundError: No module named",)),
        ("def build(:", ("must import, got SyntaxError",)),
        ("def make(): return None", (" must have a callable 'build', it has none.",)),
        ("def build(name): return name", ("must return a torch.nn.Module, got str.",)),
        ("def build(): pass", ("must build the network with name='chain' (it takes ())", "got TypeError")),
        ("def build(name): raise RuntimeError('inner')", ("got RuntimeError: inner",)),
        ("import sys\ndef build(name): sys.exit(0)", ("SystemExit",)),
        ("raise SystemExit(0)", ("SystemExit",)),
    ],
)
def test_factories_that_build_nothing(plain: World, tmp_path: Path, code: str, texts: tuple[str, ...]) -> None:
    (tmp_path / "net.py").write_text(code, encoding="utf-8")
    values = plain.values()
    values["stages"][0]["model"]["factory"] = f"{tmp_path / 'net.py'}:build"
    refused(plain, values, 3, "Stage 'load' (1 of 5): ", str(tmp_path / "net.py"), *texts)


def test_a_factory_file_that_is_not_there(plain: World) -> None:
    values = plain.values()
    values["stages"][0]["model"]["factory"] = "nowhere.py:build"
    refused(plain, values, 3, f"Factory file '{plain.folder / 'nowhere.py'}' does not exist.")


def test_kwargs_that_the_factory_does_not_take(plain: World) -> None:
    values = plain.values()
    values["stages"][0]["model"]["kwargs"]["depth"] = 3
    refused(plain, values, 3, "must build the network with name='chain', depth=3 (it takes (name: ")


def test_a_network_that_is_no_classifier(plain: World, tmp_path: Path) -> None:
    code = "\nbuild_whole = build\ndef build(name): return build_whole(name).body\n"
    (tmp_path / "net.py").write_text(smallrun.NETS.read_text(encoding="utf-8") + code, encoding="utf-8")
    save_file(nets.chain().body.state_dict(), tmp_path / "body.safetensors")
    values = with_weights(plain, tmp_path / "body.safetensors")
    values["stages"][0]["model"]["factory"] = f"{tmp_path / 'net.py'}:build"
    refused(plain, values, 3, "A classifier must return one (N, classes) tensor, got (2, 16, 8, 8).")


# -- data ------------------------------------------------------------------------------------------------------------


def test_missing_data(plain: World) -> None:
    for command in ("run", "plan"):
        done = plain.call(command, with_data(plain, "evaluation", arrays="nowhere.npz"))
        assert done.exit_code == 4
        assert done.stderr == f"'{plain.folder / 'nowhere.npz'}' must be a readable file: No such file or directory.\n"


@pytest.mark.parametrize("half", ["train", "evaluation"])
@pytest.mark.parametrize(
    ("label", "text"), [(4, "number of classes the network has (4), got"), (-1, "0 or more, got -1")]
)
def test_labels_out_of_range(plain: World, tmp_path: Path, half: str, label: int, text: str) -> None:
    arrays = smallrun.pictures(264, seed=1)
    arrays["y"][7] = label
    np.savez(tmp_path / "a.npz", **arrays)
    refused(plain, with_data(plain, half, arrays=str(tmp_path / "a.npz")), 3, "Stage 'load' (1 of 5): Labels ", text)


def test_more_classes_than_the_network_has(plain: World, tmp_path: Path) -> None:
    arrays = smallrun.pictures(264, seed=1)
    arrays["y"] = np.arange(264) % 10
    np.savez(tmp_path / "a.npz", **arrays)
    refused(plain, with_data(plain, arrays=str(tmp_path / "a.npz")), 3,
            "Stage 'load' (1 of 5): Labels must be below the number of classes the network has (4), got ")  # fmt: skip


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (
            np.zeros((264, 16, 16, 4), np.uint8),
            "must be uint8 (N, H, W, C) with 1 or 3 channels, got uint8 (264, 16, 16, 4)",
        ),
        (
            np.zeros((264, 3, 16, 16), np.uint8),
            "must be uint8 (N, H, W, C) with 1 or 3 channels, got uint8 (264, 3, 16, 16)",
        ),
        (np.zeros((264, 16, 16, 3), np.float32), "got float32 (264, 16, 16, 3)"),
        (np.zeros((264, 16, 16, 1), np.uint8), "The network must run on images of shape (2, 1, 16, 16)"),
        (np.zeros((10, 16, 16, 3), np.uint8), "must have one label for each image, got 10 images, 264 labels"),
        (np.zeros((264, 16), np.uint8), "got uint8 (264, 16)"),
    ],
)
def test_images_of_the_wrong_shape(plain: World, tmp_path: Path, images: np.ndarray, text: str) -> None:
    np.savez(tmp_path / "a.npz", x=images, y=np.arange(264) % 4)
    refused(plain, with_data(plain, arrays=str(tmp_path / "a.npz")), 3, "Stage 'load' (1 of 5): ", text)


def test_images_of_the_wrong_size_for_a_linear_layer(plain: World, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((264, 20, 20, 3), np.uint8), y=np.arange(264) % 4)
    save_file(nets.build("linear_head").state_dict(), tmp_path / "linear.safetensors")
    values = with_data(plain, arrays=str(tmp_path / "a.npz"))
    values["stages"][0] |= {"weights": str(tmp_path / "linear.safetensors")}
    values["stages"][0]["model"]["kwargs"]["name"] = "linear_head"
    refused(plain, values, 3, "The network must run on images of shape (2, 3, 20, 20), got RuntimeError: ",
            "Hint: Check data.preprocessing")  # fmt: skip


@pytest.mark.parametrize("half", ["train", "evaluation"])
def test_evaluation_images_of_another_shape_than_the_training_images(plain: World, tmp_path: Path, half: str) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((264, 16, 16), np.uint8), y=np.arange(264) % 4)
    refused(plain, with_data(plain, half, arrays=str(tmp_path / "a.npz")), 3, "Stage 'load' (1 of 5): ", "(")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 and no more"])
def test_a_broken_data_file(plain: World, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    refused(plain, with_data(plain, arrays=str(tmp_path / "a.npz")), 4,
            f"Stage 'load' (1 of 5): '{tmp_path / 'a.npz'}' must be a readable .npz or .npy file")  # fmt: skip


def test_a_cut_off_data_file(plain: World, tmp_path: Path) -> None:
    whole = (plain.folder / "train.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:100_000])
    refused(plain, with_data(plain, arrays=str(tmp_path / "a.npz")), 4, "must be a readable .npz or .npy file")


def test_splits_that_leave_nothing_to_train_on(plain: World) -> None:
    values = plain.values()
    values["data"]["validation"] = 1000
    refused(
        plain, values, 3, "Stage 'load' (1 of 5): The training source must hold more images than are taken out of it"
    )


# -- stages that cannot do their work --------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(plain: World) -> None:
    values = plain.values()
    values["stages"][2]["learning_rate"] = 1e9
    refused(plain, values, 3, "Stage 'finetune' (3 of 5): The training loss must be finite, got ", " at step ",
            "Hint: Lower learning_rate")  # fmt: skip
    assert plain.call("run", plain.values(), "--quiet").exit_code == 0  # what was done before is still there


def test_an_unreachable_target(plain: World) -> None:
    values = plain.values()
    values["stages"][1] |= {"target": {"macs": 0.05}, "max_removed_ratio": 0.5}
    refused(
        plain,
        values,
        3,
        "Stage 'prune' (2 of 5): ",
        "0.050 ",
        "cannot be reached; the best is ",
        "max_removed_ratio 0.5",
    )


def test_a_prune_that_would_remove_nothing(plain: World) -> None:
    values = plain.values()
    values["stages"][1]["target"] = {"macs": 1.0}
    text = "Target macs 1.0 must remove something, but the network already has 1.000 of the baseline's macs."
    refused(plain, values, 3, f"Stage 'prune' (2 of 5): {text}")


def test_a_second_prune_with_the_same_target(plain: World) -> None:
    values = plain.values(middle=(smallrun.MIDDLE[0], smallrun.MIDDLE[0]))
    refused(
        plain,
        values,
        3,
        "Stage 'prune' (3 of 5): Target macs 0.6 must remove something, but the network already has 0.592",
    )


def test_more_blocks_than_there_are(plain: World) -> None:
    values = plain.values()
    values["stages"][1]["blocks"] = 1
    refused(plain, values, 2, "Stage 'prune' (2 of 5): blocks must not be more than the residual blocks", "(0), got 1.")


def test_a_low_rank_target_that_is_met_already(plain: World) -> None:
    middle = (smallrun.MIDDLE[0], {"stage": "low_rank", "target": {"macs": 0.9}})
    refused(
        plain,
        plain.values(middle=middle),
        3,
        "Stage 'low_rank' (3 of 5): The target must be below what the network has",
    )


# -- runtimes --------------------------------------------------------------------------------------------------------


def test_a_provider_that_is_not_there(plain: World) -> None:
    import onnxruntime

    values = plain.values()
    values["stages"][4]["provider"] = "CoreMLExecutionProvider"
    if "CoreMLExecutionProvider" not in onnxruntime.get_available_providers():
        text = "CoreMLExecutionProvider was asked for, but this build offers "
        refused(plain, values, 5, f"Section 'verify': Runtime 'onnxruntime': {text}", "CPUExecutionProvider")
    values["stages"][4]["provider"] = "NoExecutionProvider"
    refused(plain, values, 5, "provider must be one of ", "got 'NoExecutionProvider'.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(plain: World) -> None:
    values = plain.values()
    values["stages"][4]["provider"] = "CUDAExecutionProvider"
    refused(plain, values, 5, "Section 'verify': Runtime 'onnxruntime': CUDAExecutionProvider was asked for, but ")


# -- the store and the disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "file"),
    [(0, "baseline.onnx"), (0, "entry.json"), (1, "weights.safetensors"), (3, "model.onnx"), (4, "verdict.json")],
)
def test_a_damaged_result_is_made_again_with_a_warning(world: World, stage: int, file: str) -> None:
    before = smallrun.read_lock(world, "chain")
    folder = world.store / before[stage]["key"]
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 255
    (folder / file).unlink()  # files of a network's baseline are shared by the stages' folders
    (folder / file).write_bytes(content)
    progress = smallrun.Notes()
    outcome = world.run(world.values(), progress=progress)
    (warning,) = progress.warnings
    assert warning.startswith(f"A stored stage is damaged ({file}")
    assert warning.endswith(f"and will be made again: {folder}")
    wanted = ["unchanged"] * 5
    wanted[stage] = "ran"
    assert [entry["status"] for entry in outcome.report["stages"]] == wanted
    assert any(note.endswith(": its stored result is gone") for note in progress.notes)
    assert [entry["output"] for entry in smallrun.read_lock(world, "chain")][:4] == [
        entry["output"] for entry in before
    ][:4]


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1, "stages": [1]}', '{"schema": 1, "stages": 1}', "[]"])
def test_a_damaged_lock_costs_nothing_but_the_reasons(world: World, text: str) -> None:
    (world.runs / "chain" / "lock").write_text(text, encoding="utf-8")
    assert [entry["status"] for entry in world.run(world.values()).report["stages"]] == ["unchanged"] * 5


def test_a_runs_folder_that_is_a_file(plain: World, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("", encoding="utf-8")
    done = smallrun.call("run", str(plain.write(plain.values())), "--runs-dir", str(tmp_path / "runs"))
    assert done.exit_code == 4
    assert done.stderr == f"Store '{tmp_path / 'runs' / '.store'}' must be writable: Not a directory.\n"


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (
            "compress.engine.runner.save_artifact",
            "Stage 'finetune' (3 of 5): The result of the stage could not be written to ",
        ),
        ("compress.training.state.torch.save", "Stage 'finetune' (3 of 5) could not read or write "),
        ("compress.engine.run_folder.write_slim", "Run folder "),
        ("compress.engine.runner.write_atomic", "pipeline.yaml' must be writable: "),
    ],
)
def test_a_full_disk_keeps_what_is_done(world: World, monkeypatch: pytest.MonkeyPatch, place: str, text: str) -> None:
    values = world.values()
    values["stages"][2]["learning_rate"] = 0.01
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        refused(world, values, 4, text, "No space left on device")
    assert not list(world.store.glob(".partial/*"))
    outcome = world.run(values)
    assert statuses(outcome)[:2] == ["load unchanged", "prune unchanged"]
    assert outcome.verdict.passed


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("limit", [8_000, 20_000])
def test_a_file_system_that_refuses_larger_files(world: World, limit: int) -> None:
    """Real writes that fail in every library that writes, at one place or another."""
    values = world.values(middle=smallrun.MIDDLE[1:])
    arguments = ["run", str(world.write(values)), "--runs-dir", str(world.folder / "other-runs"), "--quiet"]
    code = (
        "import resource\nfrom compress.cli.commands import app\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)\n"
        f"app({arguments!r})\n"
    )
    stdout, stderr = (process := smallrun.start(code=code)).communicate()
    assert process.returncode in (3, 4), stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "Internal error" not in stderr
    assert "File too large" in stderr


# -- a checkpoint that is loaded -------------------------------------------------------------------------------------


def test_load_of_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"meta.json' does not exist"):
        compress.load(tmp_path)
    with pytest.raises(ArtifactError, match=r"meta.json' does not exist"):
        compress.load(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["meta.json", "recipe.json", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "text"])
def test_load_of_a_damaged_checkpoint(finished: Finished, tmp_path: Path, file: str, damage: str) -> None:
    shutil.copytree(finished.outcome.folder / "slim", tmp_path / "slim")
    path = tmp_path / "slim" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("" if damage == "empty" else '{"schema": 1}', encoding="utf-8")
    with pytest.raises((ArtifactError, RebuildMismatch), match=f"{Path(file).stem}|recipe"):
        compress.load(tmp_path)


def test_load_with_another_factory(finished: Finished) -> None:
    with pytest.raises(RebuildMismatch, match="must fit the network that the factory builds"):
        compress.load(finished.outcome.folder, lambda name: nets.build("linear_head"))
    with pytest.raises(ModelError, match="callable 'nothing'"):
        compress.load(finished.outcome.folder, f"{smallrun.NETS}:nothing")
    with pytest.raises(ModelError, match="must build the network with"):
        compress.load(finished.outcome.folder, lambda: nets.build("chain"))


def test_a_bug_is_told_as_one_and_leaves_its_traceback_in_a_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "publish", raising(ZeroDivisionError("by design")))
    monkeypatch.setattr("tempfile.tempdir", str(world.folder))
    done = world.call("run", world.values())
    assert done.exit_code == 70
    assert "ZeroDivisionError: by design" in done.stderr
    assert "Traceback" not in done.stderr
    (crash,) = world.folder.glob("compress-crash-*.txt")
    assert "Traceback" in crash.read_text(encoding="utf-8")
