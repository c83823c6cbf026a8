"""Memory follows what is asked for, not what a file claims; numbers beyond what is computed with are refused."""

import gzip
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compress.data.sources.classification as sources
from compress.config.document import parse_document, parse_value
from compress.data.preprocessing import Preprocessing
from compress.data.sources.boxes import MOST_CATEGORY, read_coco, read_yolo
from compress.data.sources.classification import load_numpy, read_idx
from compress.errors import ArtifactError, ConfigSyntaxError, DataError
from compress.storage.digest import digest_file
from compress.tasks.segmentation import Segmentation

PREPROCESSING = Preprocessing(mean=(0.5,), std=(0.5,))


def idx(path: Path, shape: tuple[int, ...], content: bytes) -> Path:
    data = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("shape", "content", "said"),
    [
        ((2**32 - 1, 2**32 - 1, 2**32 - 1), b"", "the file is too small for that"),
        ((2, 28, 28), bytes(10**7), "header says"),
        ((1000,), bytes(10), "header says"),
        ((), b"", "header says|must be integers|must be uint8"),
    ],
)
def test_an_idx_file_that_claims_more_or_less_than_it_holds_is_refused(
    tmp_path: Path, suffix: str, shape: tuple[int, ...], content: bytes, said: str
) -> None:
    path = idx(tmp_path / f"images{suffix}", shape, content)
    with pytest.raises((ArtifactError, DataError), match=said):
        read_idx(path, path)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(3 * 10**6))
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ArtifactError, match=r"must fit into memory \(1,000,000 bytes\).* has 3,000,000"):
        load_numpy(tmp_path / "bomb.npz")
    monkeypatch.setattr(sources, "_MOST_DEFLATED", 10**9)
    with pytest.raises(ArtifactError, match="must fit into memory"):
        read_idx(idx(tmp_path / "bomb.gz", (2000, 1000), bytes(10)), tmp_path / "labels")


def coco(folder: Path, **changes: object) -> Path:
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    values: dict[str, object] = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 1}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (folder / "boxes.json").write_text(json.dumps(values | changes), encoding="utf-8")
    return folder / "boxes.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"categories": [{"id": 10**9, "name": "a"}]},
        {"categories": [{"id": -1, "name": "a"}]},
        {"annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 10**9}]},
        {"annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 10**400}]},
        {"annotations": [{"image_id": 1, "bbox": [1, 2, 3, 10**400], "category_id": 1}]},
        {"annotations": [{"image_id": 1, "bbox": [1, 2, 3, float("inf")], "category_id": 1}]},
        {"annotations": [{"image_id": float("inf"), "bbox": [1, 2, 3, 4], "category_id": 1}]},
    ],
)
def test_category_ids_and_boxes_beyond_the_limit_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    path = coco(tmp_path, **changes)
    with pytest.raises(ArtifactError, match="must be JSON of the COCO form"):
        read_coco(path, tmp_path, PREPROCESSING, False, None)


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text("[" * 10**5, encoding="utf-8")
    with pytest.raises(ArtifactError, match="must be JSON of the COCO form"):
        read_coco(tmp_path / "boxes.json", tmp_path, PREPROCESSING, False, None)


@pytest.mark.parametrize("label", ["1000000000", "1e300", "-1", "65536", "0.5"])
def test_classes_of_yolo_beyond_the_limit_are_refused(tmp_path: Path, label: str) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(f"{label} 0.5 0.5 0.1 0.1\n", encoding="utf-8")
    source = read_yolo(tmp_path, tmp_path, PREPROCESSING, False, None)
    with pytest.raises(DataError, match=f"must be a class \\(0 to {MOST_CATEGORY}\\)"):
        source.read_targets(np.array([0]))


@pytest.mark.parametrize("wrong", [10**9, 4, -1])
def test_mask_pixels_of_no_class_are_refused_wherever_they_come(wrong: int) -> None:
    """The first batch is looked at before any work; the others are when they are used."""
    masks = torch.zeros((2, 4, 4), dtype=torch.int64)
    masks[1, 2, 3] = wrong
    outputs = torch.zeros((2, 4, 4, 4))
    with pytest.raises(DataError, match=f"from 0 to 3 .* got {wrong}"):
        Segmentation().facts(outputs.numpy(), masks.numpy())
    with pytest.raises(DataError, match=f"from 0 to 3 .* got {wrong}"):
        Segmentation().training_loss(outputs, masks, 0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1" + "0" * 400, "must be between -9223372036854775808 and 9223372036854775807"),
        (str(2**63), "must be between"), (str(-(2**63) - 1), "must be between"),
        ("0x8000000000000000", "must be between"),
        ("1e300", r"must be between -3\.4e\+38 and 3\.4e\+38"), ("1e400", "must be finite"),
        ("9" * 9000, "must have at most 4096 digits"), ("x" * 5000, "must have at most 4096 characters"),
        ('"a\\0b"', "must hold no NUL character"), ('"\\ud800"', "must hold no lone surrogate"),
    ],
)  # fmt: skip
def test_numbers_and_texts_have_limits(text: str, said: str) -> None:
    with pytest.raises(ConfigSyntaxError, match=said):
        parse_value(text)
    (problem,) = parse_document(f"a:\n  b: {text}\n", "p.yaml").problems
    assert problem.text.startswith("a.b must")
    assert len(problem.text) < 200


@pytest.mark.parametrize("text", [str(2**63 - 1), str(-(2**63)), "3e38", "x" * 4096, '"\\udce9"'])
def test_what_is_within_the_limits_is_read(text: str) -> None:
    parse_value(text)


@pytest.mark.skipif(os.name == "nt", reason="devices and pipes of POSIX")
def test_a_file_without_an_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(ArtifactError, match="must be a regular file, it is a device, a pipe or a socket"):
            digest_file(path)
