"""The one form that a bundle's archive has, and everything that is not of that form."""

import io
import os
import random
import zipfile
from pathlib import Path

import bundles
import numpy as np
import pytest
from bundles import raw_zip

from compress.bundle import check
from compress.bundle.samples import pack_arrays

FILES = {"b.txt": b"second", "a.txt": b"first\n" * 9, "empty": b""}


def archive(files: dict[str, bytes]) -> bytes:
    return check.build_archive(files)


def test_an_archive_comes_back_and_other_programs_read_it() -> None:
    data = archive(FILES)
    assert check.read_archive(data, "it") == FILES
    with zipfile.ZipFile(io.BytesIO(data)) as read:
        assert read.testzip() is None
        assert read.namelist() == ["a.txt", "b.txt", "empty"]
        assert {name: read.read(name) for name in read.namelist()} == FILES
        assert {info.date_time for info in read.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.external_attr >> 16 for info in read.infolist()} == {0o100644}


def test_the_order_of_files_does_not_matter() -> None:
    assert archive(FILES) == archive(dict(reversed(FILES.items())))


def test_an_archive_of_nothing_is_one() -> None:
    assert check.read_archive(archive({}), "it") == {}


def test_every_single_bit_of_an_archive_counts() -> None:
    data = archive(FILES)
    for place in range(len(data)):
        for bit in range(8):
            with pytest.raises(check.Stop, match=r"^it "):
                check.read_archive(bundles.flipped(data, place, bit), "it")


def test_every_shorter_archive_is_refused() -> None:
    data = archive(FILES)
    for length in range(len(data)):
        with pytest.raises(check.Stop, match=r"^it "):
            check.read_archive(data[:length], "it")


def test_random_bytes_are_refused_and_nothing_else_happens() -> None:
    generator = random.Random(5)
    end = archive({})
    for _ in range(300):
        data = generator.randbytes(generator.randrange(200)) + generator.choice([b"", end, b"PK"])
        if data != end:
            with pytest.raises(check.Stop, match=r"^it "):
                check.read_archive(data, "it")


def deflated(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as written:
        for name, content in files.items():
            written.writestr(name, content)
    return stream.getvalue()


def stored(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as written:
        for name, content in files.items():
            written.writestr(name, content)
    return stream.getvalue()


NO_NAME = "which is no plain file name: nothing was unpacked"
CUT = "it does not end with its directory: it was cut off, changed, or has data after it"
OTHER = "it is damaged, or was not written by compress: byte {} is another one"
BAD = {
    "no archive": (b"text" * 30, "it is no zip archive"),
    "nothing": (b"", "it is no zip archive"),
    "cut off": (archive(FILES)[:-1], CUT),
    "data after": (archive(FILES) + b"more", CUT),
    "data before": (b"more" + archive(FILES), OTHER.format(0)),
    "a comment": (archive(FILES)[:-2] + b"\x04\x00note", CUT),
    "parent": (raw_zip(("../x", b"1")), f"it holds '../x', {NO_NAME}"),
    "absolute": (raw_zip(("/etc/x", b"1")), f"it holds '/etc/x', {NO_NAME}"),
    "in a folder": (raw_zip(("a/b", b"1")), f"it holds 'a/b', {NO_NAME}"),
    "a folder": (raw_zip(("a/", b"")), f"it holds 'a/', {NO_NAME}"),
    "drive": (raw_zip(("C:x", b"1")), f"it holds 'C:x', {NO_NAME}"),
    "backslash": (raw_zip(("..\\x", b"1")), f"it holds '..\\\\x', {NO_NAME}"),
    "two points": (raw_zip(("..", b"1")), f"it holds '..', {NO_NAME}"),
    "no name": (raw_zip(("", b"1")), f"it holds '', {NO_NAME}"),
    "hidden": (raw_zip((".profile", b"1")), f"it holds '.profile', {NO_NAME}"),
    "point at the end": (raw_zip(("x.", b"1")), f"it holds 'x.', {NO_NAME}"),
    "nul": (raw_zip(("x\0y", b"1")), f"it holds 'x\\x00y', {NO_NAME}"),
    "line break": (raw_zip(("x\ny", b"1")), f"it holds 'x\\ny', {NO_NAME}"),
    "not ascii": (raw_zip(("é", b"1")), f"it holds '\\u251c\\u2310', {NO_NAME}"),
    "long": (raw_zip(("x" * 101, b"1")), f"it holds '{'x' * 101}', {NO_NAME}"),
    "link": (raw_zip(("x", b"/etc"), kind=0o120777 << 16), "it holds 'x' as a link, a bundle has files only"),
    "encrypted": (raw_zip(("x", b"1"), flags=1), "it holds 'x' encrypted, a bundle is not"),
    "twice": (raw_zip(("x", b"1"), ("x", b"2")), "it holds 'x' twice"),
    "compressed": (deflated({"x": b"0" * 10**6}), "it holds 'x' compressed, a bundle does not: nothing was unpacked"),
    "unknown method": (
        raw_zip(("x", b"1"), method=99),
        "it holds 'x' compressed, a bundle does not: nothing was unpacked",
    ),
    "declared size": (
        raw_zip(("x", b"1"), size=2**32 - 1),
        f"it states {2**32 - 1} bytes for 'x', which it does not hold",
    ),
    "one over the other": (
        raw_zip(*[(f"{i:02}", b"0" * 5000) for i in range(64)], size=300_000, overlapping=True),
        "it states 300000 bytes for '01', which it does not hold",
    ),
    "many files": (raw_zip(*[(f"x{i}", b"") for i in range(65)]), "it lists 65 files, a bundle has at most 64"),
    "more listed": (raw_zip(("x", b"1"), count=9), "it is damaged: Bad CRC-32 for file 'x'"),
    "other program": (stored(FILES), OTHER.format(10)),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_what_is_no_bundle_is_refused_with_a_sentence(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(check.Stop, match=r".") as raised:
        check.read_archive(data, "it")
    assert raised.value.detail == message
    assert (raised.value.check, raised.value.exit_code) == ("integrity", 4)


def test_arrays_are_packed_alike_and_numpy_reads_them(tmp_path: Path) -> None:
    arrays = {"inputs": np.arange(6, dtype=np.float32).reshape(2, 3), "labels": np.array([1, 2], ">i8")}
    data = pack_arrays(arrays)
    assert data == pack_arrays(dict(reversed(arrays.items())))
    (tmp_path / "samples.npz").write_bytes(data)
    with np.load(tmp_path / "samples.npz") as read:
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[name], array)


def test_a_bundle_beyond_the_limit_is_refused_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "large.zip"
    with path.open("wb") as stream:
        os.truncate(stream.fileno(), 2**31)  # takes no room on the disk
    assert check.main([str(path)]) == 4
    assert "has 2,147,483,648 bytes, a bundle has at most 2,147,483,647: nothing was read" in capsys.readouterr().out
