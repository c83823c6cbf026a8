"""infer.py of a bundle: the inputs of the verification from image files, predictions by task, boxes in the file."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from smallrun import Finished

from compress.bundle import infer
from compress.bundle.check import read_content, read_samples
from compress.bundle.write import write_bundle
from compress.data.preprocessing import Preprocessing, fit_letterbox
from compress.data.sources.boxes import moved
from compress.verification.runtimes.onnxruntime import OnnxRuntime

ALONE = """
import runpy, sys
class Hidden:
    def find_spec(self, name, *_):
        if name.partition('.')[0] not in {*sys.stdlib_module_names, 'numpy', 'onnxruntime', 'PIL'} - {HIDDEN}:
            raise ImportError(f'{name} is not installed', name=name)
sys.meta_path.insert(0, Hidden())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def alone(folder: Path, *arguments: object, hidden: str = "") -> subprocess.CompletedProcess[str]:
    """Run infer.py of a bundle with the standard library, numpy, Pillow and onnxruntime, or with one of them less."""
    code = ALONE.replace("HIDDEN", repr(hidden))
    command = [sys.executable, "-I", "-c", code, str(folder / "infer.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bundle(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked bundle, with its sample images as files 0.png, 1.png, ..."""
    folder = tmp_path_factory.mktemp("bundle")
    packed = write_bundle(finished.outcome.folder, folder / "model.zip")
    shutil.unpack_archive(packed, folder / "model")
    arrays = read_samples(read_content(packed)["samples.npz"])
    for number, image in enumerate(arrays["images"]):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder / "model"


def files(bundle: Path, count: int = 16) -> list[Path]:
    return [bundle.parent / f"{number}.png" for number in range(count)]


def test_inputs_and_outputs_are_those_of_the_verification(bundle: Path, tmp_path: Path) -> None:
    samples = read_samples((bundle / "samples.npz").read_bytes())
    done = alone(bundle, *files(bundle), "--inputs", tmp_path / "inputs.npy", hidden="onnxruntime")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert np.array_equal(np.load(tmp_path / "inputs.npy"), samples["inputs"])
    done = alone(bundle, *files(bundle), "--raw", tmp_path / "raw.npz", "--json", "--top", 2)
    assert (done.returncode, done.stderr) == (0, "")
    with np.load(tmp_path / "raw.npz") as raw:
        (outputs,) = raw.values()
    np.testing.assert_allclose(outputs, samples["expected"], atol=1e-5)
    for path, line, row in zip(files(bundle), done.stdout.splitlines(), samples["expected"], strict=True):
        found = json.loads(line)
        assert found["image"] == str(path)
        assert [one["index"] for one in found["predictions"]] == list(np.argsort(-row)[:2])
        assert found["predictions"][0]["score"] == pytest.approx(np.exp(row).max() / np.exp(row).sum(), abs=1e-5)
    assert (bundle.parent / "model.zip").is_file()


def test_a_line_has_the_classes_and_their_scores(bundle: Path) -> None:
    done = alone(bundle, *files(bundle, 2), "--top", 3)
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"{files(bundle)[0]}: class ")
    assert len(first.split(", ")) == 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"])
def test_every_mode_of_pillow_is_read_as_by_the_package(bundle: Path, tmp_path: Path, mode: str) -> None:
    from compress.data.sources.image_files import open_picture, to_pixels

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    if mode == "I;16":
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 65535, (16, 16)).astype(np.uint16))
    path = tmp_path / f"it.{'tif' if mode == 'CMYK' else 'png'}"
    (picture if mode == "I;16" else picture.convert(mode)).save(path)
    done = alone(bundle, path, "--inputs", tmp_path / "inputs.npy")
    assert done.returncode == 0, done.stderr
    wanted = Preprocessing.from_dict(json.loads((bundle / "model.json").read_text())["preprocessing"])
    assert np.array_equal(
        np.load(tmp_path / "inputs.npy"), wanted.normalize(to_pixels(open_picture(path), False)[None])
    )


def test_what_cannot_be_read_or_is_missing_is_named(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    cut = (bundle.parent / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    for name, message in (
        ("nowhere.png", "must be a readable image: "),
        ("text.png", "must be a readable image: "),
        ("cut.png", "must be a readable image: "),
        ("float.tif", "must have 8 bits a channel or 16-bit grey, its mode is F."),
    ):
        done = alone(bundle, tmp_path / name)
        assert done.returncode == 4, name
        assert f"{name}' {message}" in done.stderr
        assert "Traceback" not in done.stderr
    for package, name in (("onnxruntime", "onnxruntime"), ("PIL", "pillow")):
        done = alone(bundle, files(bundle)[0], hidden=package)
        assert (done.returncode, done.stderr) == (5, f"{name} is not installed: pip install {name}\n")
    done = alone(bundle, files(bundle)[0], "--provider", "NoSuchProvider")
    assert done.returncode == 5
    assert "Execution provider NoSuchProvider is not available, ONNX Runtime has " in done.stderr
    done = alone(bundle, files(bundle)[0], "--raw", tmp_path / "no" / "raw.npz")
    assert done.returncode == 4
    assert "cannot be written: No such file or directory." in done.stderr
    assert alone(bundle, files(bundle)[0], "--top", 0).returncode == 2
    shutil.copytree(bundle, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.onnx").write_bytes(b"no model")
    done = alone(tmp_path / "damaged", files(bundle)[0])
    assert done.returncode == 4
    assert "model.onnx' cannot be opened: " in done.stderr
    assert "Traceback" not in done.stderr
    shutil.copy(bundle / "infer.py", tmp_path / "infer.py")
    done = alone(tmp_path, files(bundle)[0])
    assert done.returncode == 4
    assert "must be that of a bundle" in done.stderr


# -- tasks without one value for each class ---------------------------------------------------------------------------


def described(bundle: Path, folder: Path, **changes: Any) -> Any:
    """Return the model of a bundle with other values in model.json, not opened."""
    shutil.copytree(bundle, folder)
    values = json.loads((folder / "model.json").read_text()) | changes
    (folder / "model.json").write_text(json.dumps(values))
    spec = importlib.util.spec_from_file_location("infer_of_a_bundle", folder / "infer.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model(opens=False)


def test_areas_of_a_segmentation_network(bundle: Path, tmp_path: Path) -> None:
    model = described(bundle, tmp_path / "model", task="segmentation", classes=["road", "sky", "car"])
    logits = np.zeros((1, 3, 2, 4), np.float32)
    logits[0, 1, 0] = 1
    logits[0, 2, 1, :1] = 2
    found = model.predictions({"logits": logits}, (2, 4), 5)
    assert [(one["class"], one["share"]) for one in found] == [("sky", 0.5), ("road", 0.375), ("car", 0.125)]
    assert list(infer.lines_of(Path("x.png"), found, "segmentation")) == ["x.png: sky 0.500, road 0.375, car 0.125"]


def test_numbers_of_a_regression_network(bundle: Path, tmp_path: Path) -> None:
    model = described(bundle, tmp_path / "model", task="regression")
    found = model.predictions({"y": np.array([[1.5, -2.0]], np.float32)}, (2, 4), 5)
    assert list(infer.lines_of(Path("x.png"), found, "regression")) == ["x.png: 1.5, -2"]


DECODER = """
import numpy as np
def decode(outputs, image_size, scale):
    assert image_size == (16, 16)
    boxes = np.asarray(outputs["boxes"][0], np.float32) * scale
    return [{"boxes": boxes, "scores": np.array([0.9, 0.1]), "labels": np.array([1, 0])}]
"""


@pytest.mark.parametrize("letterbox", [None, [16, 16]])
def test_boxes_of_a_detector_are_in_pixels_of_the_file(bundle: Path, tmp_path: Path, letterbox: Any) -> None:
    changes: dict[str, Any] = {"task": "detection", "classes": ["cat", "dog"], "letterbox": letterbox}
    changes["decoder"] = {"name": "decode", "kwargs": {"scale": 2.0}}
    preprocessing = json.loads((bundle / "model.json").read_text())["preprocessing"]
    geometry = preprocessing | ({} if letterbox else {"resize": 20, "crop": [16, 16]})
    model = described(bundle, tmp_path / "model", **changes, preprocessing=geometry)
    (tmp_path / "model" / "decode.py").write_text(DECODER)
    height, width = 40, 60
    in_file = np.array([[20.0, 10.0, 30.0, 25.0], [21.0, 11.0, 29.0, 20.0]], np.float32)
    target = {"boxes": in_file, "labels": np.array([1, 0])}
    if letterbox:
        scale = 16 / 60
        top = (16 - round(40 * scale)) // 2
        inside = moved(target, (scale, scale), (top, 0), (16, 16))["boxes"]
    else:
        inside = moved(target, *Preprocessing.from_dict(geometry).geometry(height, width))["boxes"]
    found = model.predictions({"boxes": inside[None] / 2}, (height, width), 5)
    assert [one["class"] for one in found] == ["dog"], "the other one has too small a score"
    np.testing.assert_allclose(found[0]["box"], in_file[0], atol=1e-3)
    (line,) = infer.lines_of(Path("x.png"), found, "detection")
    assert line.startswith("x.png: dog 0.900 [20.0, 10.0, 30.0, 25.0]")
    assert list(infer.lines_of(Path("x.png"), [], "detection")) == ["x.png: nothing with a score of at least 0.25"]


def test_a_letterbox_is_that_of_the_evaluation_images(bundle: Path, tmp_path: Path) -> None:
    model = described(bundle, tmp_path / "model", letterbox=[16, 16])
    image = np.random.default_rng(0).integers(0, 255, (20, 31, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "it.png")
    array, size = model.read(tmp_path / "it.png")
    assert size == (20, 31)
    assert np.array_equal(array, model.preprocessing.normalize(fit_letterbox(image, (16, 16))[None]))


def test_outputs_without_a_known_decoder_can_only_be_written(bundle: Path, tmp_path: Path) -> None:
    described(bundle, tmp_path / "model", task="detection")
    done = alone(tmp_path / "model", files(bundle)[0])
    assert done.returncode == 2
    assert "decoded by a function that this bundle does not contain; --raw FILE.npz writes them" in done.stderr
    assert alone(tmp_path / "model", files(bundle)[0], "--raw", tmp_path / "raw.npz").returncode == 0
    with OnnxRuntime(bundle / "model.onnx") as runtime, np.load(tmp_path / "raw.npz") as raw:
        assert list(raw) == [spec.name for spec in runtime.signature.outputs]
