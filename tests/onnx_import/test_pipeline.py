"""A pipeline on an ONNX file: the same stages, and a result that needs the file no more."""

from pathlib import Path

import nets
import onnx
import pytest
import smallrun
import torch
from exported import SIGNATURE

from compress.checkpoint.layout import load_slim, write_digests
from compress.checkpoint.rebuild import read_weights
from compress.config.load import load_pipeline
from compress.cost.conditions import has_vnni
from compress.data.from_config import Splits
from compress.data.preprocessing import Preprocessing
from compress.engine.keys import build_steps
from compress.engine.runner import plan
from compress.errors import ArtifactError, ConfigError, RebuildMismatch
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.onnx_file.io import PREPROCESSING_KEY, is_quantized, load_onnx
from compress.onnx_import.importer import import_onnx
from compress.quantization.onnx_int8 import Quantization, quantize_onnx

CLASSES = ("rows", "columns", "rising", "falling")
PREPROCESSING = Preprocessing(mean=(0.5,), std=(0.25,))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> smallrun.World:
    world = smallrun.make_world(tmp_path_factory.mktemp("onnx"), "residual")
    write_file(world)
    return world


def write_file(world: smallrun.World, scale: float = 1.0) -> Path:
    module = nets.build("residual")
    module.load_state_dict(read_weights(world.folder / "residual.safetensors"))
    with torch.no_grad():
        module.head.weight.mul_(scale)
    path = world.folder / "net.onnx"
    export_onnx(module, SIGNATURE, path, ExportSettings(opset=18), preprocessing=PREPROCESSING, classes=CLASSES)
    return path


def values(world: smallrun.World) -> dict:
    found = world.values("residual")
    found["stages"][0] = {"stage": "load", "model": {"onnx": "net.onnx"}}
    found["stages"].insert(2, {"stage": "low_rank", "target": {"macs": 0.5}})
    return found


def test_run_needs_the_file_no_more_and_rebuilds_strictly(world):
    given = values(world)
    del given["data"]["preprocessing"]  # the file says
    outcome = world.run(given)
    assert outcome.verdict.passed
    assert outcome.report["config"]["data"]["preprocessing"]["mean"] == [0.5]
    assert outcome.report["provenance"]["weights"] is not None
    assert 0 < outcome.report["stages"][0]["record"]["import_error"] < 1e-5
    folder = world.runs / "residual"
    path = world.folder / "net.onnx"
    path.rename(world.folder / "elsewhere.onnx")
    slim = load_slim(folder)
    (world.folder / "elsewhere.onnx").rename(path)
    from compress.onnx_file.io import read_metadata

    assert read_metadata(load_onnx(folder / "model.onnx")).classes == CLASSES
    images = nets.images(3)
    shipped = import_onnx(folder / "model.onnx")
    with torch.no_grad():
        assert torch.allclose(slim(images), shipped(images), atol=1e-4)
    sizes = {file.name: file.stat().st_size for file in (folder / "slim").iterdir()}
    assert set(sizes) == {"digests.json", "meta.json", "recipe.json", "structure.onnx", "weights.safetensors"}
    assert sizes["structure.onnx"] < sizes["weights.safetensors"]
    again = plan(world.load(given), world.runs)
    assert {stage.status for stage in again} == {"unchanged"}


@pytest.mark.parametrize("end", [[{"stage": "quantize", "images": 32}], []], ids=["int8 again", "float"])
def test_a_quantised_file_is_cut_in_float_and_rounded_again(world, end, tmp_path):
    source = world.folder / "net.onnx"
    split = Splits(world.load(values(world)).config.data).calibration
    quantize_onnx(source, world.folder / "int8.onnx", split, Quantization(images=32, reduce_range=not has_vnni()))
    given = world.values("residual")
    given["name"], given["stages"][0] = "from-int8", {"stage": "load", "model": {"onnx": "int8.onnx"}}
    if end:
        end = [{**end[0], "reduce_range": not has_vnni()}]
    given["stages"][-1:-1] = end
    progress = smallrun.Notes()
    outcome = world.run(given, progress=progress)
    assert outcome.verdict.passed, outcome.verdict
    assert outcome.report["slim"]["macs"] <= 0.6 * outcome.report["baseline"]["macs"]
    if end:  # the second run finds the network of the first in the store
        (note,) = [note for note in progress.notes if "is quantised: the baseline is its float form" in note]
        assert note.startswith("'int8.onnx'")
    assert 0 < outcome.report["stages"][0]["record"]["rounding_error"] < 0.2
    assert is_quantized(load_onnx(world.runs / "from-int8" / "model.onnx")) == bool(end)
    assert not is_quantized(load_onnx(world.runs / "from-int8" / "slim" / "structure.onnx"))
    images = nets.images(3)
    float_network = import_onnx(source)
    with torch.no_grad():
        slim, whole = load_slim(world.runs / "from-int8")(images), float_network(images)
    assert slim.shape == whole.shape
    assert not torch.equal(slim, whole)


def test_structure_of_another_network_is_noticed(world, tmp_path):
    if not (world.runs / "residual" / "slim").is_dir():
        world.run(values(world))
    import shutil

    shutil.copytree(world.runs / "residual" / "slim", tmp_path / "slim")
    export_onnx(nets.build("concat"), SIGNATURE, tmp_path / "slim" / "structure.onnx", ExportSettings(opset=18))
    write_digests(tmp_path / "slim")
    with pytest.raises(RebuildMismatch):
        load_slim(tmp_path / "slim")
    (tmp_path / "slim" / "structure.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"structure\.onnx"):
        load_slim(tmp_path / "slim")


def test_key_follows_the_content_of_the_file_and_not_its_place(world):
    def digest(given: dict) -> dict:
        return build_steps(world.load(given))[0].fixed

    before = digest(values(world))
    original = (world.folder / "net.onnx").read_bytes()
    moved = values(world)
    moved["stages"][0]["model"]["onnx"] = "moved.onnx"
    (world.folder / "moved.onnx").write_bytes(original)
    assert digest(moved) == before
    write_file(world, scale=1.5)
    try:
        assert digest(values(world))["files"] != before["files"]
    finally:
        (world.folder / "net.onnx").write_bytes(original)


def test_file_that_is_missing_or_does_not_fit_is_named(world):
    given = values(world)
    given["stages"][0]["model"]["onnx"] = "nowhere.onnx"
    with pytest.raises(ArtifactError, match=r"nowhere\.onnx' does not exist"):
        world.run(given)
    given = values(world)
    given["data"]["preprocessing"]["crop"] = [8, 8]
    result = world.call("run", given)
    assert result.exit_code == 3
    assert "takes images of shape (3, 16, 16), got (3, 8, 8)" in " ".join(result.output.split())


@pytest.mark.parametrize("within", [(), ("training",)])
def test_feature_maps_of_a_file_are_refused_before_any_work(world, within):
    given, features = values(world), {"distillation": {"features": 1.0}}
    training = {"steps": 2, **features}
    if within:
        given["stages"][1] |= {"method": "gsm", within[0]: training}
        given["stages"][1].pop("criterion", None)
    else:
        given["stages"].insert(2, {"stage": "finetune", **training})
    with pytest.raises(ConfigError) as caught:
        world.load(given)
    place = "stages[1].training" if within else "stages[2]"
    assert f"{place}.distillation.features must be left out with model.onnx" in str(caught.value)
    given["stages"][0] = world.values("residual")["stages"][0]
    assert world.load(given)


@pytest.mark.parametrize("written", ['{"mean": [0.5], "brightness": 2}', '"as usual"'])
def test_preprocessing_that_a_file_says_wrongly_is_refused_unless_it_is_given(world, written):
    model = onnx.load(world.folder / "net.onnx")
    onnx.helper.set_model_props(model, {PREPROCESSING_KEY: written})
    onnx.save_model(model, world.folder / "odd.onnx")
    given = values(world)
    given["stages"][0]["model"]["onnx"] = "odd.onnx"
    assert world.load(given).resolved["data"]["preprocessing"]["std"] == [0.25]
    del given["data"]["preprocessing"]
    with pytest.raises(ArtifactError, match="must say how images are prepared"):
        world.load(given)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ({"model": {"onnx": "net.onnx"}, "weights": "w.safetensors"}, "stages[0].weights must be left out"),
        ({"model": {"factory": "a.py:b"}}, "stages[0].weights is missing"),
        (
            {"model": {"factory": "a.py:b", "onnx": "net.onnx"}},
            "exactly one of the keys factory, onnx, timm, torchvision",
        ),
        ({"model": {"onnx": "net.onnx", "inputs": {"x": [3, "a", 4]}}}, "stages[0].model.inputs.x[1] must be"),
    ],
)
def test_mistakes_in_the_load_stage_are_worded(world, load, said):
    given = values(world)
    given["stages"][0] = {"stage": "load", **load}
    with pytest.raises(ConfigError) as caught:
        load_pipeline(world.write(given, "wrong.yaml"), environ={})
    assert said in str(caught.value)
