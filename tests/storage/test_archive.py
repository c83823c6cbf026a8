"""One file for one entry: equal for equal entries, refused when a bit differs, and never outside of its folder."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from compress.storage.archive import is_safe_name, pack, read_record, unpack
from compress.storage.digest import RecordDamaged
from compress.storage.store import ENTRY_FILE, Store

KEY = "0" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    def write(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_bytes(bytes(range(256)) * 5)
        (folder / "größe").write_text("1", encoding="utf-8")

    made = Store(tmp_path / "store", pytest.fail)
    made.put(KEY, write, {"loss": float("nan")})
    return made


@pytest.fixture
def packed(store: Store, tmp_path: Path) -> Path:
    pack(store.root / KEY, KEY, tmp_path / "packed")
    return tmp_path / "packed"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_entry_comes_back_to_the_byte(store: Store, packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    unpack(packed, KEY, target)
    assert contents(target) == contents(store.root / KEY)
    pack(target, KEY, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == packed.read_bytes()


def test_the_record_is_read_without_the_rest(store: Store, packed: Path) -> None:
    whole = packed.read_bytes()
    entry = store.get(KEY)
    assert entry is not None
    assert read_record(io.BytesIO(whole[: whole.rindex(b"sub/weights")]), KEY)["digest"] == entry.digest
    for cut in (0, 20, 150, 700):
        with pytest.raises(RecordDamaged, match=r"first line|tar archive|first file"):
            read_record(io.BytesIO(whole[:cut]), KEY)


def test_every_flipped_bit_and_every_lost_end_is_refused(packed: Path, tmp_path: Path) -> None:
    whole = packed.read_bytes()
    damaged = tmp_path / "damaged"
    for place in range(0, len(whole), 67):
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(RecordDamaged, match=r"its content has SHA-256|its first line"):
            unpack(damaged, KEY, tmp_path / "nowhere")
    for length in (0, 10, 146, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        with pytest.raises(RecordDamaged, match=r"its content has SHA-256|its first line"):
            unpack(damaged, KEY, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_an_entry_of_another_key_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordDamaged, match="its first line must be 'compress-entry 1 111111111111"):
        unpack(packed, "1" * 64, tmp_path)


def forged(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    """Write a file with a right digest and any members: name, type, content or target."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = content.decode() if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(content))
    digest = hashlib.sha256(body.getvalue()).hexdigest()
    path.write_bytes(f"compress-entry 1 {KEY} {digest}\n".encode() + body.getvalue())
    return path


FILE, LINK, HARD, FOLDER, PIPE = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE


@pytest.mark.parametrize(
    "members",
    [
        [("../outside", FILE, b"x")],
        [("a/../../outside", FILE, b"x")],
        [("/tmp/outside", FILE, b"x")],
        [("C:outside", FILE, b"x")],
        [("a\\..\\outside", FILE, b"x")],
        [("./a", FILE, b"x")],
        [("link", LINK, b"..")],
        [("link", LINK, b".."), ("link/outside", FILE, b"x")],
        [("hard", HARD, b"../secret")],
        [("folder", FOLDER, b"")],
        [("pipe", PIPE, b"")],
        [("a", FILE, b"1"), ("a", FILE, b"2")],
    ],
)
def test_names_outside_of_the_folder_and_other_than_files_are_refused(tmp_path: Path, members: list) -> None:
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    with pytest.raises(RecordDamaged, match=r"must be a plain file inside|twice"):
        unpack(forged(tmp_path / "forged", *members), KEY, target)
    assert set(contents(tmp_path)) <= {"forged", "deep/target/a"}


def test_what_is_no_tar_archive_is_refused(tmp_path: Path) -> None:
    body = b"no archive" * 100
    (tmp_path / "x").write_bytes(f"compress-entry 1 {KEY} {hashlib.sha256(body).hexdigest()}\n".encode() + body)
    with pytest.raises(RecordDamaged, match="it is no readable tar archive"):
        unpack(tmp_path / "x", KEY, tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "a//b", "a/", "a/./b", "~\0"])
def test_unsafe_names(name: str) -> None:
    assert not is_safe_name(name)
    assert is_safe_name("a/b.c")


def test_an_adopted_entry_is_checked_as_a_whole(store: Store, tmp_path: Path) -> None:
    whole = contents(store.root / KEY)
    other = Store(tmp_path / "other", pytest.fail)

    def filled(changes: dict[str, bytes | None]) -> None:
        def fill(folder: Path) -> None:
            for name, content in {**whole, **changes}.items():
                if content is not None:
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_bytes(content)

        other.adopt(KEY, fill)

    for changes, said in (
        ({"sub/weights": b"x"}, "sub/weights"),
        ({"sub/weights": None}, "sub/weights"),
        ({ENTRY_FILE: b"{}"}, "no digest of itself"),
        ({ENTRY_FILE: None}, "does not exist"),
        ({"more": b"x"}, f"more not in {ENTRY_FILE}"),
    ):
        with pytest.raises(RecordDamaged, match=said):
            filled(changes)
        assert other.get(KEY) is None
        assert list((other.root / ".partial").iterdir()) == []
    filled({})
    (mine, theirs) = (one.get(KEY) for one in (store, other))
    assert mine is not None
    assert theirs is not None
    assert mine.digest == theirs.digest
