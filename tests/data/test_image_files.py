"""Each mode of Pillow is read with the right scale, or refused with the file and the mode."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from compress.config.schema.data import FolderSource
from compress.data.preprocessing import Preprocessing
from compress.data.sources.annotated import read_masks
from compress.data.sources.classification import order_warning, read_folder
from compress.data.sources.image_files import open_picture, to_pixels
from compress.data.sources.user import as_image
from compress.errors import DataError

SAME = Preprocessing().fit_image
RAMP = np.linspace(0, 255, 64).reshape(8, 8)
GREY = Image.fromarray(np.rint(RAMP).astype(np.uint8))


def _saved(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


def _read(path: Path, grey: bool = True) -> np.ndarray:
    return to_pixels(open_picture(path), grey)


EIGHT_BITS = {
    "png": ("L", "LA", "P", "RGB", "RGBA"),
    "tif": ("CMYK", "YCbCr"),
    "webp": ("RGBA",),
    "bmp": ("RGB",),
}


@pytest.mark.parametrize(("name", "mode"), [(f"a.{kind}", one) for kind, modes in EIGHT_BITS.items() for one in modes])
@pytest.mark.parametrize("grey", [True, False])
def test_eight_bit_modes_keep_their_brightness(tmp_path: Path, name: str, mode: str, grey: bool) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    picture = GREY.convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    found = _read(_saved(tmp_path / name, picture, **options), grey)
    assert found.dtype == np.uint8
    assert found.shape == (8, 8, 1 if grey else 3)
    assert np.abs(found.astype(int).mean(-1) - RAMP).max() <= 3


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
@pytest.mark.parametrize("grey", [True, False])
def test_sixteen_bits_are_divided_by_257(tmp_path: Path, name: str, grey: bool) -> None:
    deep = np.rint(RAMP * 257).astype(np.uint16)
    found = _read(_saved(tmp_path / name, Image.fromarray(deep)), grey)
    assert found.shape == (8, 8, 1 if grey else 3)
    assert np.array_equal(found[..., 0], np.rint(RAMP).astype(np.uint8))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    assert set(_read(_saved(tmp_path / "a.png", GREY.convert("1"))).ravel()) == {0, 255}


@pytest.mark.parametrize("values", [RAMP.astype(np.float32) / 255, (RAMP * 1000).astype(np.int32)], ids=["F", "I"])
def test_values_without_a_known_white_are_refused_by_file_and_mode(tmp_path: Path, values: np.ndarray) -> None:
    path = _saved(tmp_path / "deep.tif", Image.fromarray(values))
    mode = {"f": "F", "i": "I"}[values.dtype.kind]
    with pytest.raises(DataError, match=rf"deep\.tif' must be an image of 8 bits .*, it has the mode {mode}"):
        _read(path)
    with pytest.raises(DataError, match="'own:Set' must be an image"):
        as_image(Image.fromarray(values), "own:Set")


def test_transparency_of_palettes_is_dropped_without_a_warning(tmp_path: Path) -> None:
    path = _saved(tmp_path / "a.png", GREY.convert("P"), transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(_read(path)[..., 0], np.asarray(GREY))


def test_orientation_in_exif_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert np.array_equal(_read(_saved(tmp_path / "a.png", GREY, exif=exif))[..., 0], np.asarray(GREY))


def test_pictures_of_own_data_sets_are_read_alike() -> None:
    deep = Image.fromarray(np.rint(RAMP * 257).astype(np.uint16))
    assert np.array_equal(as_image(deep)[..., 0], np.rint(RAMP).astype(np.uint8))
    assert as_image(GREY.convert("RGBA")).shape == (8, 8, 3)


@pytest.mark.parametrize("damage", ["cut", "header", "bomb", "empty"])
def test_damaged_pictures_are_refused_by_name(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _saved(
        tmp_path / "broken.png", Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    )
    data = path.read_bytes()
    path.write_bytes({"cut": data[:200], "header": data[:14] + b"\xff" + data[15:], "bomb": data, "empty": b""}[damage])
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"broken\.png' must be a readable image: \S"):
        open_picture(path)


def test_a_mask_of_floating_point_numbers_is_refused(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    _saved(tmp_path / "images" / "a.png", GREY)
    _saved(tmp_path / "masks" / "a.tif", Image.fromarray(RAMP.astype(np.float32)))
    source = read_masks(tmp_path / "images", tmp_path / "masks", Preprocessing(), False, 0)
    with pytest.raises(DataError, match="must have one channel and the size of its picture"):
        source.read_targets(np.array([0]))


# -- order of class folders --------------------------------------------------------------------------------------------


def _class_folders(root: Path, names: list[str]) -> Path:
    for place, name in enumerate(names):
        (root / name).mkdir()
        _saved(root / name / "a.png", Image.fromarray(np.full((4, 4), place, np.uint8)))
    return root


def test_folders_are_in_text_order_unless_their_order_is_given(tmp_path: Path) -> None:
    root = _class_folders(tmp_path, ["0", "1", "2", "10"])
    assert read_folder(root, SAME, True).classes == ("0", "1", "10", "2")
    given = read_folder(root, SAME, True, ("0", "1", "2", "10"))
    assert given.classes == ("0", "1", "2", "10")
    assert given.read(np.arange(4))[:, 0, 0, 0].tolist() == [0, 1, 2, 3] == given.labels.tolist()


@pytest.mark.parametrize("order", [("0", "1"), ("0", "1", "2", "3"), ("0", "1", "1")])
def test_an_order_that_is_not_that_of_the_folders_is_refused(tmp_path: Path, order: tuple[str, ...]) -> None:
    root = _class_folders(tmp_path, ["0", "1", "2"])
    with pytest.raises(DataError, match=r"classes must name each class folder in .* once"):
        read_folder(root, SAME, True, order)


@pytest.mark.parametrize(
    ("classes", "warned"),
    [
        (("0", "1", "10", "2"), True),
        (("class_1", "class_10", "class_2"), True),
        (("0", "1", "2"), False),
        (("00", "01", "10"), False),
        (("cat", "dog"), False),
        (("n01440764", "n01443537"), False),
        (("0", "1", "2", "10"), False),  # given in that order
        ((), False),
    ],
)
def test_text_order_of_counted_names_is_warned_about(classes: tuple[str, ...], warned: bool) -> None:
    assert (order_warning(classes) is not None) == warned


def test_numbers_are_names_of_folders_in_a_pipeline() -> None:
    check = TypeAdapter(FolderSource).validate_python
    assert check({"folder": "x", "classes": [0, 1, "two"]}).classes == ("0", "1", "two")
    assert check({"folder": "x"}).classes is None
    with pytest.raises(ValidationError):
        check({"folder": "x", "classes": "abc"})
