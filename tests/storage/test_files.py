"""Files are written whole, whatever happens on the way."""

from pathlib import Path

import pytest

from compress.storage.files import write_atomic


@pytest.mark.parametrize(("content", "bytes_"), [("naïve\n", "naïve\n".encode()), (b"\x00\r\n", b"\x00\r\n")])
@pytest.mark.parametrize("is_shared", [False, True])
def test_the_file_holds_what_was_written_and_nothing_lies_beside_it(tmp_path: Path, content, bytes_, is_shared) -> None:
    path = tmp_path / "new" / "file.json"
    for _ in range(2):
        write_atomic(path, content, is_shared=is_shared)
        assert path.read_bytes() == bytes_
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("place", ["pathlib.Path.write_bytes", "compress.storage.files.os.replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(OSError, match="No space left"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".file.part").write_text("half of something")
    write_atomic(tmp_path / "file", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
