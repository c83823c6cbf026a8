"""Equal content has equal digests, and nothing else has."""

import hashlib
import os
from pathlib import Path

import pytest

from compress.errors import ArtifactError
from compress.storage.digest import canonical_json, digest_data, digest_file, digest_value


def test_digest_of_a_value_ignores_key_order_and_tuples() -> None:
    assert digest_value({"a": 1, "b": (1, 2)}) == digest_value({"b": [1, 2], "a": 1})
    assert digest_value({"a": 1}) != digest_value({"a": 1.5})
    assert digest_value({"a": None}) == hashlib.sha256(b'{"a":null}').hexdigest()


def test_not_a_number_has_no_digest() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_digest_of_a_file_is_sha256_of_its_bytes(tmp_path: Path) -> None:
    content = os.urandom(1 << 20) + b"tail"
    (tmp_path / "a").write_bytes(content)
    assert digest_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_missing_file_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no\.npz' must be a readable file: No such file"):
        digest_file(tmp_path / "no.npz")


def test_arrays_are_told_by_content_not_by_place(tmp_path: Path) -> None:
    for name, content in (("a.npy", b"x"), ("b.npy", b"x"), ("c.npy", b"y"), ("l.npy", b"l")):
        (tmp_path / name).write_bytes(content)

    def digest(name: str, **more: str) -> str:
        return digest_data({"arrays": str(tmp_path / name), "labels": str(tmp_path / "l.npy"), "image_key": "x"} | more)

    assert digest("a.npy") == digest("b.npy")
    assert digest("a.npy") != digest("c.npy")
    assert digest("a.npy") != digest("a.npy", image_key="z")
    assert digest("a.npy") != digest("a.npy", labels=str(tmp_path / "c.npy"))


def test_idx_images_and_labels_are_not_mixed_up(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert digest_data({"idx": a, "labels": b}) != digest_data({"idx": b, "labels": a})


def test_folder_notices_new_changed_and_renamed_files(tmp_path: Path) -> None:
    picture = tmp_path / "cat" / "1.png"
    picture.parent.mkdir()
    picture.write_bytes(b"1")
    seen = {digest_data({"folder": str(tmp_path)})}
    assert digest_data({"folder": str(tmp_path)}) in seen
    os.utime(picture, ns=(1, 1))
    seen.add(digest_data({"folder": str(tmp_path)}))
    picture.rename(picture.with_name("2.png"))
    seen.add(digest_data({"folder": str(tmp_path)}))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    seen.add(digest_data({"folder": str(tmp_path)}))
    assert len(seen) == 4


def test_missing_folder_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"Data folder '.*gone' does not exist"):
        digest_data({"folder": str(tmp_path / "gone")})


def test_torchvision_with_download_needs_no_files_and_without_lists_them(tmp_path: Path) -> None:
    source = {"torchvision": "CIFAR10", "root": str(tmp_path / "gone"), "download": True, "train": None}
    assert digest_data(source) == digest_data(source | {"root": "/elsewhere"})
    assert digest_data(source) != digest_data(source | {"train": False})
    with pytest.raises(ArtifactError, match="does not exist"):
        digest_data(source | {"download": False})
    (tmp_path / "file").write_bytes(b"1")
    here = source | {"root": str(tmp_path), "download": False}
    before = digest_data(here)
    (tmp_path / "file").write_bytes(b"22")
    assert digest_data(here) != before


def test_texts_of_an_own_data_set_that_name_no_data_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    source = {"own": "my.py:Data", "kwargs": {"prefix": "", "separator": "/", "here": ".", "root": "data"}}
    before = digest_data(source)
    (tmp_path / "run.log").write_text("a result")
    assert digest_data(source) == before
    (tmp_path / "data" / "1.png").write_bytes(b"1")
    assert digest_data(source) != before
