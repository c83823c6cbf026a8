"""A run is handed over as one file, and that file proves itself where nothing of this project is installed."""

import errno
import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import onnx
import pytest
import smallrun
from smallrun import Finished, World
from typer.testing import Result

import compress
from compress.bundle import check
from compress.bundle.write import write_bundle
from compress.cost.conditions import has_vnni
from compress.storage.digest import add_digest

FILES = [
    "README.md", "check.py", "infer.py", "manifest.json", "model.json", "model.onnx", "pixels.py", "preprocessing.py",
    "samples.npz",
]  # fmt: skip
ALONE = (
    "import runpy, sys\n"
    "class Hidden:\n"
    "    def find_spec(self, name, *_):\n"
    "        if name.partition('.')[0] not in {*sys.stdlib_module_names, 'numpy', 'onnxruntime'}:\n"
    "            raise ImportError(f'{name} is not installed')\n"
    "sys.meta_path.insert(0, Hidden())\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


@pytest.fixture(scope="module")
def packed(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the small run; not to be changed."""
    return write_bundle(finished.outcome.folder, tmp_path_factory.mktemp("packed") / "model.zip")


@pytest.fixture
def extracted(packed: Path, tmp_path: Path) -> Path:
    """The same, as a program that unpacks leaves it."""
    shutil.unpack_archive(packed, tmp_path / "model")
    return tmp_path / "model"


def alone(script: Path, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script with the standard library, numpy and onnxruntime, and nothing else that is installed."""
    command = [sys.executable, "-I", "-c", ALONE, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def described(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(check.read_content(path)["model.json"])
    return values


# -- the bundle of a run ----------------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bytes(finished: Finished, packed: Path, world: World, tmp_path: Path) -> None:
    again = write_bundle(finished.outcome.folder, tmp_path / "again.zip")
    assert again.read_bytes() == packed.read_bytes()
    copied = world.runs / "chain"  # elsewhere, and then run once more, which does nothing
    assert write_bundle(copied, tmp_path / "copied.zip").read_bytes() == packed.read_bytes()
    world.run(world.values())
    assert write_bundle(copied, tmp_path / "rerun.zip").read_bytes() == packed.read_bytes()


def test_a_bundle_holds_what_it_should(finished: Finished, packed: Path) -> None:
    content = check.read_content(packed)
    assert sorted(content) == FILES
    assert content["model.onnx"] == (finished.outcome.folder / "model.onnx").read_bytes()
    assert content["check.py"] == Path(check.__file__).read_bytes()
    report, model = finished.outcome.report, json.loads(content["model.json"])
    assert model["signature"]["inputs"][0]["shape"] == ["batch", 3, 16, 16]
    assert (model["preprocessing"]["mean"], model["preprocessing"]["std"]) == ([0.5], [0.25])
    assert (model["metrics"]["slim"], model["metrics"]["baseline"]) == (report["slim"], report["baseline"])
    assert model["metrics"]["intervals"]["slim"]["top1"].keys() == {"value", "low", "high", "detail", "images"}
    assert model["verdict"] == report["verdict"]
    assert model["precision"] == "fp32"
    promised = {"tolerance": 0.001, "min_agreement": 1.0, "max_latency_ms": None, "provider": bundles.CPU}
    assert model["promises"] == promised
    assert model["measured"]["latency_ms"] == report["slim"]["latency_ms"]["p50"]
    assert model["licence"] == {"model": None, "data": None, "data_name": None}
    made = model["provenance"]
    assert made["recipe"] == json.loads((finished.outcome.folder / "slim" / "recipe.json").read_text(encoding="utf-8"))
    assert made["versions"].keys() >= {"compress", "torch", "onnx", "numpy"}
    assert made["seed"] == 0
    assert all(re.fullmatch(r"[0-9a-f]{64}", made["data"][half]) for half in ("train", "evaluation"))
    assert made["config"]["stages"][1]["target"]["macs"] == 0.6


def test_a_bundle_names_no_folder_of_the_machine(finished: Finished, packed: Path) -> None:
    for content in check.read_content(packed).values():
        for folder in (finished.world.folder, Path(compress.__file__).parents[1]):
            assert str(folder).encode() not in content
    assert described(packed)["provenance"]["config"]["data"]["train"]["arrays"] == "train.npz"


def test_samples_are_images_of_the_evaluation_split(finished: Finished, packed: Path) -> None:
    arrays = check.read_samples(check.read_content(packed)["samples.npz"])
    with np.load(finished.world.folder / "test.npz") as test:
        chosen = np.linspace(0, 63, 16).astype(int)
        np.testing.assert_array_equal(arrays["images"], test["x"][chosen])
        np.testing.assert_array_equal(arrays["labels"], test["y"][chosen])
    assert arrays["inputs"].shape == (16, 3, 16, 16)
    assert (arrays["expected"].argmax(1) == arrays["labels"]).all()


def test_more_samples_than_images_are_all_of_them(finished: Finished, tmp_path: Path) -> None:
    path = write_bundle(finished.outcome.folder, tmp_path / "it.zip", samples=1000)
    assert described(path)["samples"] == 64
    assert check.main([str(path), "--repeats", "1"]) == 0


def test_licences_come_from_the_card_or_the_command_line(world: World, tmp_path: Path) -> None:
    (world.folder / "net").mkdir()
    shutil.copy(smallrun.NETS, world.folder / "net" / "nets.py")
    card = "licence: MIT\ndata: {name: Gratings, licence: CC0}\n"
    (world.folder / "net" / "card.yaml").write_text(card, encoding="utf-8")
    values = world.values()
    values["stages"][0]["model"]["factory"] = "net/nets.py:build"
    folder = world.run(values).folder
    stated = {"model": "MIT", "data": "CC0", "data_name": "Gratings"}
    assert described(write_bundle(folder, tmp_path / "one.zip"))["licence"] == stated
    path = write_bundle(folder, tmp_path / "two.zip", licence="Licence Ouverte 2.0, Étalab")
    assert described(path)["licence"] == stated | {"model": "Licence Ouverte 2.0, Étalab"}
    text = check.read_content(path)["README.md"].decode("utf-8")
    assert "Licence of the model: Licence Ouverte 2.0, Étalab. Of the data (Gratings): CC0." in text


# -- by itself --------------------------------------------------------------------------------------------------------


def test_the_check_needs_numpy_and_onnxruntime_only(packed: Path, extracted: Path, tmp_path: Path) -> None:
    for arguments in ([], [extracted], [packed]):
        done = alone(extracted / "check.py", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == "PASSED: 3 checks made, none failed."
    plain = subprocess.run([sys.executable, "check.py"], capture_output=True, text=True, check=False, cwd=extracted)
    assert (plain.returncode, plain.stderr) == (0, "")
    assert sorted(path.name for path in extracted.iterdir()) == FILES


def test_the_example_of_the_readme_runs(extracted: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (extracted / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) == 5
    script = extracted.parent / "example.py"
    script.write_text(code, encoding="utf-8")
    done = alone(script, cwd=extracted)
    assert (done.returncode, done.stderr) == (0, "")
    expected = np.load(extracted / "samples.npz")["expected"].argmax(axis=1)
    assert done.stdout.strip() == str(expected)


def test_two_hundred_flipped_bits_of_the_archive_are_found(packed: Path, tmp_path: Path) -> None:
    data, generator = packed.read_bytes(), random.Random(7)
    for number in range(200):
        path = tmp_path / "flipped.zip"
        path.write_bytes(bundles.flipped(data, generator.randrange(len(data)), generator.randrange(8)))
        with pytest.raises(check.Stop, match=r".") as raised:
            check.check_integrity(check.read_content(path))
        assert (raised.value.check, raised.value.exit_code) == ("integrity", 4)
        if number < 3:
            done = alone(Path(check.__file__), path)
            assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (4, "", 2)


def test_two_hundred_flipped_bits_of_extracted_files_are_found(extracted: Path) -> None:
    generator = random.Random(8)
    files = sorted(extracted.iterdir())
    for number in range(200):
        path = generator.choice(files)
        data = path.read_bytes()
        path.write_bytes(bundles.flipped(data, generator.randrange(len(data)), generator.randrange(8)))
        with pytest.raises(check.Stop, match=re.escape(path.name)) as raised:
            check.check_integrity(check.read_content(extracted))
        assert (raised.value.check, raised.value.exit_code) == ("integrity", 4)
        if number < 3:
            done = alone(Path(check.__file__), extracted)
            assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (4, "", 2)
        path.write_bytes(data)
    assert check.check_integrity(check.read_content(extracted))


def test_another_runs_model_fails_parity(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = check.read_content(packed)
    model = onnx.load_from_string(content["model.onnx"])
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    largest.raw_data = bytes(len(largest.raw_data))
    other = bundles.sealed(content | {"model.onnx": model.SerializeToString()})
    assert check.main([str(bundles.write_zip(other, tmp_path / "it.zip"))]) == 1
    assert "FAILED: parity failed, of 3 checks made." in capsys.readouterr().out


# -- other networks ---------------------------------------------------------------------------------------------------


def bundle_of(world: World, change: Callable[[dict[str, Any]], object], **options: Any) -> Path:
    """Run the small pipeline with other settings and return its bundle."""
    values = world.values()
    change(values)
    return write_bundle(world.run(values).folder, world.folder / "it.zip", **options)


def test_weights_in_a_file_of_their_own_go_along(world: World) -> None:
    path = bundle_of(world, lambda v: v["stages"][-2].update(external_data=True))
    assert sorted(check.read_content(path)) == sorted([*FILES, "model.onnx.data"])
    assert check.main([str(path)]) == 0


def test_a_fixed_batch_stays_fixed(world: World, tmp_path: Path) -> None:
    path = bundle_of(world, lambda v: v["stages"][-2].update(dynamic_batch=False))
    assert described(path)["signature"]["inputs"][0]["shape"][0] == 1
    assert check.main([str(path)]) == 0
    shutil.unpack_archive(path, tmp_path / "it")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "it" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    done = alone(tmp_path / "example.py", cwd=tmp_path / "it")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[0]\n")


def test_a_promise_of_the_pipeline_is_held_to_on_the_device(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle_of(world, lambda v: v["stages"][-1]["gates"].update(max_latency_ms=1e4))
    assert check.main([str(path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"pass     latency    median of \d+ calls.*, at most 10000 ms was promised; ", said), said


def test_a_run_that_failed_is_handed_over_only_when_asked(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = world.values()
    values["stages"][-1]["gates"]["max_size_mb"] = 1e-6
    folder = world.run(values).folder
    refused = smallrun.call("bundle", str(folder), "-o", str(tmp_path / "it.zip"))
    assert refused.exit_code == 2
    assert refused.stderr == (
        "A run must have passed its verification to be handed over, 'chain' failed: max_size_mb.\n"
        "Hint: --allow-failed bundles it all the same, and model.json records that.\n"
    )
    assert not (tmp_path / "it.zip").exists()
    assert smallrun.call("bundle", str(folder), "-o", str(tmp_path / "it.zip"), "--allow-failed").exit_code == 0
    assert described(tmp_path / "it.zip")["verdict"]["passed"] is False
    assert b"**It did not pass its verification** (max_size_mb)" in check.read_content(tmp_path / "it.zip")["README.md"]
    assert check.main([str(tmp_path / "it.zip")]) == 0
    assert "Warning: this model did not pass its verification: max_size_mb." in capsys.readouterr().out


def test_a_rounded_file_promises_what_rounding_allows_and_says_what_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle_of(
        world,
        lambda v: v["stages"].insert(-1, {"stage": "quantize", "images": 32, "reduce_range": has_vnni() is False}),
    )
    model, content = described(path), check.read_content(path)
    largest = float(np.abs(check.read_samples(content["samples.npz"])["expected"]).max())
    assert model["precision"] == "int8"
    kept = {"min_agreement": 0.9, "max_latency_ms": None, "provider": bundles.CPU}
    assert model["promises"] == {"tolerance": pytest.approx(0.05 * largest), **kept}
    assert model["promises"]["tolerance"] > 0.01
    assert check.main([str(path)]) == 0
    assert "top-1 the same on 16 of 16 (at least 90 % must be)" in capsys.readouterr().out
    text = content["README.md"].decode("utf-8")
    assert "It is quantised to INT8" in text
    status = {one["name"]: one["status"] for one in model["verdict"]["checks"]}
    own = sum(value != "skipped" for value in status.values()) - 5
    counted = f"{own} checks on this file, 4 on the float file that it was quantised from, 1 on the baseline"
    assert f"It passed its verification: {counted}; none failed." in text
    (agreeing,) = [one["value"] for one in model["verdict"]["checks"] if one["name"] == "quantized_agreement"]
    assert f"It gives {100 * agreeing:.2f} % of the evaluation images the class that the float file gives." in text
    assert re.search(
        r"Effect of each part on top-1: all stages .* percentage points, from .*; quantisation [+-]\d", text
    )


def test_a_float_file_is_not_said_to_be_rounded(packed: Path) -> None:
    text = check.read_content(packed)["README.md"].decode("utf-8")
    assert "INT8" not in text
    assert "float file" not in text
    assert re.search(r"It passed its verification: \d+ checks on this file, 1 on the baseline; none", text)


def test_a_run_verified_in_another_runtime_can_be_handed_over(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = {"runtime": "onnx_reference", "provider": "CPU", "repeats": 2}

    def change(values: dict[str, Any]) -> None:
        values["stages"][-1].update(elsewhere)
        values["stages"][-1]["gates"]["max_latency_ms"] = 1e6

    path = bundle_of(world, change)
    promises = described(path)["promises"]
    assert (promises["provider"], promises["max_latency_ms"]) == (bundles.CPU, None)
    assert check.main([str(path)]) == 0
    said = capsys.readouterr().out
    assert "pass     provider   CPUExecutionProvider was asked for and is in use" in said
    assert "skipped  latency    no promise in milliseconds was made" in said
    assert ", onnx_reference on CPU, 1 thread)" in said


@pytest.mark.parametrize("name", ["batch_size", "threads"])
def test_more_than_a_check_can_repeat_is_refused(world: World, tmp_path: Path, name: str) -> None:
    folder = world.runs / "chain"
    rewrite(lambda report: report["config"]["stages"][-1].update({name: 65_537}))(folder)
    done = call(folder, "-o", str(tmp_path / "it.zip"))
    message = f"{name} of verify must be at most 65,536 for a run to be handed over, got 65,537.\n"
    assert (done.exit_code, done.stderr) == (2, message)
    assert not (tmp_path / "it.zip").exists()


def test_what_checks_say_names_no_folder(world: World, tmp_path: Path) -> None:
    folder = world.runs / "chain"

    def fail(report: dict[str, Any]) -> None:
        report["verdict"]["passed"] = False
        report["verdict"]["checks"][0] |= {
            "status": "fail",
            "detail": f"'{folder}/of mine/model.onnx' must be an ONNX model, its checker says: No {folder}/net.onnx",
        }

    rewrite(fail)(folder)
    path = write_bundle(folder, tmp_path / "it.zip", allows_failed=True)
    detail = described(path)["verdict"]["checks"][0]["detail"]
    assert detail == "'model.onnx' must be an ONNX model, its checker says: No net.onnx"
    assert all(str(world.folder).encode() not in content for content in check.read_content(path).values())


# -- the command ------------------------------------------------------------------------------------------------------


def call(folder: Path, *arguments: str) -> Result:
    return smallrun.call("bundle", str(folder), *arguments)


def test_the_command_says_what_it_wrote_and_what_is_next(
    finished: Finished, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(finished.outcome.folder)
    size = packed.stat().st_size
    assert (done.exit_code, done.stdout) == (
        0,
        f"chain.zip is written, {size:,} bytes; next: compress check chain.zip\n",
    )
    assert (tmp_path / "chain.zip").read_bytes() == packed.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["chain.zip"]


def test_a_bundle_is_made_where_torch_is_not_installed(finished: Finished, packed: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('torch', 'torchvision', 'torch_pruning', 'onnxscript'):\n"
        "            raise ImportError(f'{name} is not installed')\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from compress.cli.commands import app\n"
        f"app(['bundle', {str(finished.outcome.folder)!r}, '-o', {str(tmp_path / 'it.zip')!r}])"
    )
    process = smallrun.start(code=code)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert (tmp_path / "it.zip").read_bytes() == packed.read_bytes()


def earlier(path: Path) -> bytes:
    """Write what passes for a bundle, and return it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("manifest.json", "model.onnx"):
            archive.writestr(name, "mine")
    return path.read_bytes()


def test_an_existing_file_stays_unless_it_is_to_be_replaced(finished: Finished, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "it.zip"
    mine = earlier(out)
    done = call(finished.outcome.folder, "-o", str(out))
    message = f"{out} exists already and must not be overwritten.\nHint: --force replaces it.\n"
    assert (done.exit_code, done.stderr) == (2, message)
    assert out.read_bytes() == mine
    assert call(finished.outcome.folder, "-o", str(out), "--force").exit_code == 0
    assert out.read_bytes() == packed.read_bytes()


def test_a_place_that_cannot_be_written_is_refused(finished: Finished, tmp_path: Path) -> None:
    done = call(finished.outcome.folder, "-o", str(tmp_path / "no" / "it.zip"))
    place = tmp_path / "no" / "it.zip"
    message = f"-o must be a file to write, '{place}' is in a folder that does not exist.\n"
    assert (done.exit_code, done.stderr) == (2, message)
    done = call(finished.outcome.folder, "-o", str(tmp_path))
    assert (done.exit_code, done.stderr) == (2, f"-o must be a file to write, '{tmp_path}' is a folder.\n")
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_a_zip_is_written_and_never_into_the_run(world: World, tmp_path: Path) -> None:
    folder = world.runs / "chain"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = call(folder, "-o", str(folder / "model.onnx"), "--force")
    message = f"-o must be a file to write whose name ends in .zip, got '{folder / 'model.onnx'}'.\n"
    assert (done.exit_code, done.stderr) == (2, message)
    (tmp_path / "runs").symlink_to(world.runs)
    (tmp_path / "linked.zip").symlink_to(folder / "model.onnx")
    done = call(folder, "-o", str(tmp_path / "linked.zip"), "--force")
    assert done.exit_code == 2
    assert "linked.zip' is a symbolic link to " in done.stderr
    for out in (folder / "it.zip", folder / "slim" / "it.zip", tmp_path / "runs/chain/it.zip"):
        done = call(folder, "-o", str(out), "--force")
        assert done.exit_code == 2
        assert done.stderr.startswith(
            f"-o must lie outside of the run folder, '{out}' is inside of '{folder}'.\nHint: "
        )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_full_disk_leaves_nothing_half_written(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = earlier(tmp_path / "it.zip")

    def refuse(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    done = call(finished.outcome.folder, "-o", str(tmp_path / "it.zip"), "--force")
    message = f"'{tmp_path / 'it.zip'}' cannot be written: No space left on device.\n"
    assert (done.exit_code, done.stderr) == (4, message)
    assert [path.name for path in tmp_path.iterdir()] == ["it.zip"]
    assert (tmp_path / "it.zip").read_bytes() == mine


def test_a_wrong_number_of_samples_is_refused(finished: Finished, tmp_path: Path) -> None:
    assert call(finished.outcome.folder, "-o", str(tmp_path / "it.zip"), "--samples", "0").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def append(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b" ")


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Return what changes a report in place."""

    def write(folder: Path) -> None:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        change(report)
        (folder / "report.json").write_text(json.dumps(add_digest(report)), encoding="utf-8")

    return write


def edit(folder: Path) -> None:
    """Let a verdict pass by hand, without a new digest."""
    path = folder / "report.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"limit": 0.5', '"limit": 0.9'), encoding="utf-8")


def unseal(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    del report["record_digest"]
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def put(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (shutil.rmtree, "RUN must be a run folder such as runs/NAME, '{}' does not exist."),
    "no run": (drop("pipeline.yaml"), "RUN must be a run folder such as runs/NAME, '{}' has no pipeline.yaml."),
    "unfinished": (drop("report.json"), "The run in '{}' must be finished, it has no report.json."),
    "no model": (drop("model.onnx"), "The run in '{}' must hold 'model.onnx', it is missing."),
    "another model": (append("model.onnx"), "'{}/model.onnx' must be the file that the run verified, of sha256 "),
    "another recipe": (append("slim/recipe.json"), "'{}/slim/recipe.json' must be the file that the run verified, "),
    "no report": (put("report.json", b"text"), "'{}/report.json' must be readable JSON: "),
    "a list": (put("report.json", b"[]"), "'{}/report.json' must hold a JSON object."),
    "an edited report": (edit, "'{}/report.json' differs from its digest: it was damaged or edited."),
    "no digest": (unseal, "'{}/report.json' has no digest of itself (record_digest)."),
    "another schema": (rewrite(lambda r: r.update(schema=7)), "'{}/report.json' must have schema 1, got 7."),
    "an older report": (
        rewrite(lambda r: r.pop("provenance")),
        "'{}/report.json' must state the digest of model.onnx; an older version wrote it.",
    ),
    "no config": (
        rewrite(lambda r: r.pop("config")),
        "'{}/report.json' lacks a value, or holds one of another kind: KeyError: 'data'",
    ),
    "no verdict": (
        rewrite(lambda r: r.update(verdict=None)),
        "'{}/report.json' is not as a run writes it: 'verdict' is missing.",
    ),
    "wrong data": (
        rewrite(lambda r: r["config"]["data"].update(train=3)),
        "'{}/report.json' lacks a value, or holds one of another kind: ValidationError: ",
    ),
    "other preprocessing": (
        rewrite(lambda r: r["config"]["data"]["preprocessing"].update(mean=[0.4])),
        "'{}/model.onnx' and the pipeline must state the same preprocessing, they do not.",
    ),
    "no images": (
        rewrite(lambda r: r["config"]["data"]["evaluation"].update(arrays="/nowhere/test.npz")),
        "'/nowhere/test.npz' must be a readable file: No such file or directory.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(DAMAGES))
def test_a_folder_that_is_not_what_the_run_left_is_refused(world: World, tmp_path: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    folder = world.runs / "chain"
    damage(folder)
    done = call(folder, "-o", str(tmp_path / "it.zip"))
    assert (done.exit_code, done.stdout) == (4, "")
    assert done.stderr.startswith(message.format(folder))
    assert "Internal error" not in done.stderr
    assert not (tmp_path / "it.zip").exists()


def test_an_unfinished_run_is_told_how_to_finish(world: World, tmp_path: Path) -> None:
    folder = world.runs / "chain"
    (folder / "report.json").unlink()
    done = call(folder, "-o", str(tmp_path / "it.zip"))
    command = f"compress run {folder / 'pipeline.yaml'} --runs-dir {world.runs}"
    assert done.stderr.splitlines()[1] == f"Hint: `{command}` finishes it."
    assert smallrun.call(*command.split()[1:], "--quiet").exit_code == 0
    assert call(folder, "-o", str(tmp_path / "it.zip")).exit_code == 0


def test_a_file_and_a_folder_of_something_else_are_no_run(finished: Finished, tmp_path: Path) -> None:
    done = call(finished.outcome.folder / "model.onnx", "-o", str(tmp_path / "it.zip"))
    assert (done.exit_code, "model.onnx' is a file." in done.stderr) == (4, True)
    done = call(tmp_path, "-o", str(tmp_path / "it.zip"))
    assert (done.exit_code, "has no pipeline.yaml.\nHint: `compress run PIPELINE` makes one." in done.stderr) == (
        4,
        True,
    )


def test_other_evaluation_images_are_refused(world: World, tmp_path: Path) -> None:
    folder = world.run(world.values()).folder
    np.savez(world.folder / "test.npz", **smallrun.pictures(64, seed=9))
    done = call(folder, "-o", str(tmp_path / "it.zip"))
    assert (done.exit_code, done.stderr.splitlines()[0]) == (
        4,
        "The evaluation images must be those that the run was verified on, they have changed since.",
    )


# -- signatures -------------------------------------------------------------------------------------------------------


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys, made as the documentation says."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("keys")
    openssl("genpkey", "-algorithm", "ed25519", "-out", folder / "key.pem")
    openssl("pkey", "-in", folder / "key.pem", "-pubout", "-out", folder / "pub.pem")
    openssl("pkey", "-in", folder / "key.pem", "-aes256", "-passout", "pass:secret", "-out", folder / "locked.pem")
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", folder / "curve.pem")
    (folder / "text.pem").write_text("no key", encoding="utf-8")
    return folder


def test_a_bundle_is_signed_and_the_signature_is_found_good(finished: Finished, keys: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.zip", tmp_path / "second.zip"
    for out in (first, second):
        assert call(finished.outcome.folder, "-o", str(out), "--sign", str(keys / "key.pem")).exit_code == 0
    assert first.read_bytes() == second.read_bytes()
    done = smallrun.call("check", str(first), "--public-key", str(keys / "pub.pem"))
    assert done.exit_code == 0
    assert done.stdout.splitlines()[1].startswith("pass     signature  signed with the key of ")
    assert done.stdout.splitlines()[-1] == "PASSED: 4 checks made, none failed."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.pem", "Key '{}' must be a readable file: No such file or directory."),
        ("text.pem", "'{}' must hold a private key in PEM form."),
        ("pub.pem", "'{}' must hold a private key in PEM form."),
        ("locked.pem", "Key '{}' must not be encrypted."),
        ("curve.pem", "Key '{}' must be an Ed25519 key, it is a key of "),
    ],
)
def test_a_key_that_cannot_sign_is_refused(
    finished: Finished, keys: Path, tmp_path: Path, name: str, message: str
) -> None:
    done = call(finished.outcome.folder, "-o", str(tmp_path / "it.zip"), "--sign", str(keys / name))
    assert done.exit_code == 4
    assert done.stderr.startswith(message.format(keys / name))
    assert list(tmp_path.iterdir()) == []


def test_a_signature_needs_its_package(
    finished: Finished, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    done = call(finished.outcome.folder, "-o", str(tmp_path / "it.zip"), "--sign", str(keys / "key.pem"))
    assert (done.exit_code, done.stderr) == (
        5,
        "--sign needs the package cryptography, which is not installed.\nHint: pip install 'cryptography>=43'\n",
    )
    assert list(tmp_path.iterdir()) == []
