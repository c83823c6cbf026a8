"""Files for ncnn and OpenVINO beside the ONNX file: a run writes, judges and publishes the same ones."""

import io
import json
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
from exported import exported
from smallrun import World, make_world, statuses

import compress.catalog as catalog
import compress.formats.files as formats
from compress.bundle import check
from compress.bundle.write import write_bundle
from compress.errors import ArtifactError, ExportFailed, PackageMissing
from compress.formats.files import find_format, list_formats, write_formats
from compress.stages.verify import with_formats
from compress.storage.digest import digest_file
from compress.verification.other_runtimes import Also
from compress.verification.runtimes.base import Runtime
from compress.verification.runtimes.litert import LiteRt
from compress.verification.runtimes.ncnn import Ncnn
from compress.verification.runtimes.openvino import OpenVino
from compress.verification.scope import Scope

for _name in ("ncnn", "openvino"):
    pytest.importorskip(_name)

HAS_LITERT = find_spec("litert_torch") is not None
FILES = {
    **({"litert": ("model.tflite",)} if HAS_LITERT else {}),
    "ncnn": ("model.ncnn.bin", "model.ncnn.param"),
    "openvino": ("model.bin", "model.xml"),
}
RUNTIMES: dict[str, type[Runtime]] = {"litert": LiteRt, "ncnn": Ncnn, "openvino": OpenVino}
IMAGES = {"image": nets.images().numpy()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    shutil.copy(exported("residual"), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("name", FILES)
def test_the_runtime_opens_the_file_that_was_written(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RUNTIMES[name]
    with runtime.from_file(path, provider="CPU", threads=1) as opened:
        wanted = opened.run(IMAGES)
    assert find_format(path, name) is None
    assert write_formats(path, (name,)) == {name: FILES[name]}
    assert list_formats(path) == (name,)
    seen: list[str] = []
    for kind in ("litert", "ncnn"):
        there = f"compress.verification.runtimes.{kind}.convert_to_{kind}"
        monkeypatch.setattr(there, lambda *_: seen.append("converted"))
    with runtime.from_file(path, provider="CPU", threads=1) as opened:
        got = opened.run(IMAGES)
        opened.bind(IMAGES)()
    assert seen == []
    np.testing.assert_allclose(got["logits"], wanted["logits"], atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_damaged_or_of_another_model_are_refused(path: Path, name: str) -> None:
    write_formats(path, (name,))
    weights = path.parent / "formats" / name / FILES[name][0]
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactError, match=f"{weights}' must be the result of the conversion"):
        RUNTIMES[name].from_file(path, provider="CPU", threads=1).__enter__()
    weights.write_bytes(content)
    shutil.copy(exported("chain"), path)
    with pytest.raises(ArtifactError, match="it is of another file") as caught:
        RUNTIMES[name].from_file(path, provider="CPU", threads=1).__enter__()
    assert caught.value.hint == "Run the pipeline again, or delete the folder."
    record = path.parent / "formats" / name / "source.json"
    record.write_text(record.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ArtifactError, match=r"source\.json"):
        find_format(path, name)


def test_a_file_that_cannot_be_converted_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ArtifactError("pnnx cannot convert 'model.onnx': no such thing")

    monkeypatch.setitem(formats.FORMATS, "ncnn", refuse)
    with pytest.raises(ExportFailed, match="cannot be converted into the format ncnn: pnnx cannot convert"):
        write_formats(path, ("ncnn",))
    assert list_formats(path) == ()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("formats") / "world")


def values_with(world: World, formats: list[str], **verify: Any) -> dict[str, Any]:
    values = world.values()
    values["stages"][-2]["also"] = formats
    values["stages"][-1] |= verify
    return values


def test_a_run_writes_judges_and_publishes_the_same_files(world: World) -> None:
    outcome = world.run(values_with(world, list(FILES)))
    assert outcome.verdict.passed
    checks = {check.name: check for check in outcome.verdict.checks}
    assert {f"also.{name}" for name in FILES} <= set(outcome.verdict.required)
    assert {checks[f"also.{name}"].status for name in FILES} == {"pass"}
    folder = world.runs / "chain"
    for name, files in FILES.items():
        assert {one.name for one in (folder / "formats" / name).iterdir()} == {*files, "source.json"}
        assert find_format(folder / "model.onnx", name) == folder / "formats" / name
        stored = list(world.store.rglob(f"formats/{name}/{files[0]}"))
        assert {digest_file(one) for one in stored} == {digest_file(folder / "formats" / name / files[0])}
    record = json.loads((folder / "report.json").read_text())["stages"][3]["record"]
    assert record["formats"] == {name: list(files) for name, files in FILES.items()}
    _require_bundle(folder, world.folder / "it.zip", world.folder / "mine.npy")
    again = world.run(values_with(world, list(FILES)))
    assert set(statuses(again)) == {f"{stage} unchanged" for stage in ("load", "prune", "finetune", "export", "verify")}
    without = world.run(world.values())
    assert statuses(without)[3] == "export ran"
    assert not (folder / "formats").exists(), "files of an earlier run do not stay"


def _require_bundle(run: Path, path: Path, mine: Path) -> None:
    """Check that a bundle has the formats, and that its check judges the outputs of one of them."""
    write_bundle(run, path)
    with zipfile.ZipFile(path) as archive:
        for name, files in FILES.items():
            assert json.loads(archive.read("model.json"))["formats"][name] == list(files)
            for file in files:
                assert archive.read(file) == (run / "formats" / name / file).read_bytes()
                assert f"`{file}`" in archive.read("README.md").decode()
        samples = np.load(io.BytesIO(archive.read("samples.npz")))["inputs"]
    with OpenVino(run / "model.onnx") as runtime:
        (outputs,) = runtime.run({runtime.signature.inputs[0].name: samples}).values()
    for shift, code in ((0.0, 0), (0.1, 1)):
        np.save(mine, outputs + np.float32(shift))
        assert check.main([str(path), "--outputs", str(mine)]) == code
    assert check.main([str(path)]) == 0


def test_a_format_that_computes_otherwise_fails_the_verdict(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = formats.FORMATS["ncnn"]

    def convert(path: Path, folder: Path) -> None:
        real(path, folder)
        weights = np.fromfile(folder / "model.ncnn.bin", np.float32)
        weights[-1] += 1  # the bias of the last class
        weights.tofile(folder / "model.ncnn.bin")

    monkeypatch.setitem(formats.FORMATS, "ncnn", convert)
    outcome = world.run({**values_with(world, ["ncnn"], also=[{"runtime": "ncnn", "provider": "CPU"}]), "seed": 5})
    check = next(one for one in outcome.verdict.checks if one.name == "also.ncnn")
    assert (check.status, check.value) == ("fail", pytest.approx(1, abs=1e-3))
    assert not outcome.verdict.passed
    assert "also.ncnn" in outcome.verdict.required, "it is in the file as not required"


def test_each_format_is_required_once_and_not_beside_itself(path: Path) -> None:
    write_formats(path, ("ncnn", "openvino"))
    given = Scope(also=(Also("a", "ncnn", "CPU", 1), Also("b", "ncnn", "CPU", 2), Also("c", "onnx_reference", "CPU")))
    found = [(one.label, one.is_required) for one in with_formats(given, path, "onnxruntime").also]
    assert found == [("a", True), ("b", True), ("c", False), ("openvino", True)]
    assert [one.label for one in with_formats(Scope(), path, "openvino").also] == ["ncnn"]


def test_a_written_file_needs_no_converter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_formats(path, ("ncnn",))
    real = catalog.find_spec
    monkeypatch.setattr(catalog, "find_spec", lambda name: None if name == "pnnx" else real(name))
    with Ncnn(path) as opened:
        assert opened.run(IMAGES)
    shutil.rmtree(path.parent / "formats")
    with pytest.raises(PackageMissing, match="needs the package pnnx"):
        Ncnn(path).__enter__()


def test_a_package_that_is_missing_is_named_before_any_stage(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = catalog.find_spec
    monkeypatch.setattr(catalog, "find_spec", lambda name: None if name == "pnnx" else real(name))
    monkeypatch.setattr("compress.engine.runner._Run._make", lambda *_: pytest.fail("a stage ran"))
    done = world.call("run", {**values_with(world, ["ncnn"]), "seed": 6})
    assert done.exit_code == 5
    assert "Section 'export.also: ncnn': Runtime 'ncnn' needs the package pnnx, which is not installed." in done.stderr
