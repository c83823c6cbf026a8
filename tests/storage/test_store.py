"""Entries are whole or absent, whatever happens while they are written and whatever happens to them afterwards."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from compress.errors import ArtifactError
from compress.storage.digest import add_digest
from compress.storage.lock import Locks, try_lock
from compress.storage.store import ENTRY_SCHEMA, Store

KEY = "0" * 64


class Warned(Store):
    """A store that keeps its warnings."""

    def __init__(self, root: Path) -> None:
        self.warnings: list[str] = []
        super().__init__(root, self.warnings.append)


@pytest.fixture
def store(tmp_path: Path) -> Warned:
    return Warned(tmp_path / "store")


def writing(**files: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, text in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")

    return write


def left_over(store: Store) -> list[str]:
    """Return every file below the store that is not in a finished entry."""
    return [
        str(path) for path in store.root.rglob("*") if path.is_file() and path.relative_to(store.root).parts[0] != KEY
    ]


def test_what_is_put_can_be_got(store: Warned) -> None:
    assert store.get(KEY) is None
    put = store.put(KEY, writing(a="1", sub__b="2"), {"seconds": 0.1, "record": {"k": [1, None]}})
    got = store.get(KEY)
    assert got == put
    assert got is not None
    assert got.folder == store.root / KEY
    assert got.meta == {"seconds": 0.1, "record": {"k": [1, None]}}
    assert (got.folder / "sub" / "b").read_text(encoding="utf-8") == "2"
    assert store.warnings == []


def test_digest_is_that_of_names_and_contents(store: Warned) -> None:
    digests = {
        store.put(KEY, writing(**files), {}).digest
        for files in ({"a": "1"}, {"a": "2"}, {"b": "1"}, {"a": "1", "b": "1"})
    }
    assert len(digests) == 4
    assert store.put(KEY, writing(a="1"), {"other": 1}).digest == store.put(KEY + "1", writing(a="1"), {}).digest


def test_volatile_files_do_not_change_the_digest_and_are_checked_all_the_same(store: Warned) -> None:
    first = store.put(KEY, writing(a="1", sub__times="5 ms"), {}, ("times",))
    second = store.put(KEY, writing(a="1", sub__times="6 ms"), {}, ("times",))
    assert first.digest == second.digest
    (second.folder / "sub" / "times").write_text("7 ms", encoding="utf-8")
    assert store.get(KEY) is None
    assert "(sub/times)" in store.warnings[0]


def test_an_entry_is_replaced_as_a_whole(store: Warned) -> None:
    store.put(KEY, writing(a="1", old="x"), {})
    store.put(KEY, writing(a="2"), {"new": True})
    entry = store.get(KEY)
    assert entry is not None
    assert entry.meta == {"new": True}
    assert sorted(path.name for path in entry.folder.iterdir()) == ["a", "entry.json"]


def test_work_folder_goes_when_its_entry_is_there(store: Warned) -> None:
    work = store.work_folder(KEY)
    work.mkdir(parents=True)
    (work / "training_state.pt").write_text("half", encoding="utf-8")
    store.put(KEY, writing(a="1"), {})
    assert not work.exists()


def test_an_interrupted_write_leaves_no_entry(store: Warned) -> None:
    def write(folder: Path) -> None:
        writing(a="1")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put(KEY, write, {})
    assert store.get(KEY) is None
    assert store.warnings == []


def test_an_interrupted_replacement_leaves_the_entry_that_was_there(store: Warned) -> None:
    before = store.put(KEY, writing(a="1"), {})

    def write(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put(KEY, write, {})
    assert store.get(KEY) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_refusal_of_the_file_system_is_told_and_leaves_nothing(store: Warned, code: int) -> None:
    def write(folder: Path) -> None:
        writing(a="1")(folder)
        raise OSError(code, os.strerror(code))

    with pytest.raises(ArtifactError, match=f"could not be written to '.*store': {os.strerror(code)}") as caught:
        store.put(KEY, write, {})
    assert caught.value.hint == "Stages that are done stay; make room and give the same command again."
    assert store.get(KEY) is None
    assert left_over(store) == []


def test_a_refusal_keeps_the_work_folder_for_the_next_attempt(store: Warned) -> None:
    state = store.work_folder(KEY) / "training_state.pt"
    state.parent.mkdir(parents=True)
    state.write_text("epoch 3", encoding="utf-8")

    def write(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtifactError, match="No space left"):
        store.put(KEY, write, {})
    assert state.read_text(encoding="utf-8") == "epoch 3"


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [change, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_a_miss_that_is_told_by_name(store: Warned, damage: Callable[[Path], object]) -> None:
    entry = store.put(KEY, writing(whole="1", broken="22"), {})
    damage(entry.folder / "broken")
    assert store.get(KEY) is None
    assert store.warnings == [f"A stored stage is damaged (broken) and will be made again: {entry.folder}"]
    store.put(KEY, writing(whole="1", broken="22"), {})
    assert store.get(KEY) == entry


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"text"', "{}", "\udcff", '{"schema": 2}', '{"schema": 2, "files": {}, "meta": {}}',
     "[" * 100_000, '{"schema": ' + "9" * 9000 + "}", '{"schema": 2, "schema": 2}'],
)  # fmt: skip
def test_a_damaged_entry_json_is_a_miss_that_is_told(store: Warned, text: str) -> None:
    entry = store.put(KEY, writing(a="1"), {})
    (entry.folder / "entry.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert store.get(KEY) is None
    assert len(store.warnings) == 1
    assert "A stored stage is damaged (entry.json" in store.warnings[0]


@pytest.mark.parametrize("values", [{}, {"files": []}, {"files": {}}, {"files": {}, "digest": "x"}])
def test_a_record_that_lacks_a_value_is_a_miss_although_its_digest_is_right(store: Warned, values: object) -> None:
    entry = store.put(KEY, writing(a="1"), {})
    assert isinstance(values, dict)
    text = json.dumps(add_digest({"schema": 2, **values}))
    (entry.folder / "entry.json").write_text(text, encoding="utf-8")
    assert store.get(KEY) is None
    assert "A stored stage is damaged (entry.json" in store.warnings[0]


def test_every_changed_bit_of_a_record_is_a_miss(store: Warned) -> None:
    meta = {"record": {"loss": 0.25, "nan": float("nan"), "names": ["a", None], 7: True, 10: "ü"}, "seconds": 1e-9}
    entry = store.put(KEY, writing(a="1", sub__b="2"), meta)
    assert store.get(KEY) is not None
    path = entry.folder / "entry.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        got = store.get(KEY)
        assert got is None or json.loads(changed) == json.loads(whole), (place, bytes(changed[place - 9 : place + 9]))


def test_a_missing_entry_json_is_a_miss_that_is_told(store: Warned) -> None:
    entry = store.put(KEY, writing(a="1"), {})
    (entry.folder / "entry.json").unlink()
    assert store.get(KEY) is None
    assert "A stored stage is damaged (entry.json" in store.warnings[0]


def test_an_entry_of_another_version_is_a_silent_miss(store: Warned) -> None:
    entry = store.put(KEY, writing(a="1"), {})
    path = entry.folder / "entry.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for other in (add_digest({**values, "schema": 99}), {"schema": 1, "files": {}, "digest": "", "meta": {}}):
        path.write_text(json.dumps(other), encoding="utf-8")
        assert store.get(KEY) is None
    assert store.warnings == []


def test_a_file_that_cannot_be_read_is_a_miss(store: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(KEY, writing(a="1"), {})
    opened = Path.open

    def refuse(path: Path, *arguments: object, **options: object) -> object:
        if path.name == "a":
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **options)  # type: ignore[arg-type, call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    assert store.get(KEY) is None
    assert "damaged (a)" in store.warnings[0]


def test_sweep_removes_what_nobody_holds_and_nothing_else(store: Warned) -> None:
    """Process ids are not judged: the one in a name may be of another host."""
    entry = store.put(KEY, writing(a="1"), {})
    partial = store.root / ".partial"
    gone, at_work, without_lock = partial / "k.1", partial / "k.2", partial / f"k.{os.getpid()}"
    for folder in (gone, at_work, without_lock):
        folder.mkdir()
        (folder / "half").write_text("", encoding="utf-8")
    (partial / "k.1.lock").touch()
    work = store.work_folder("k")
    work.mkdir(parents=True)
    lock = try_lock(partial / "k.2.lock")
    assert lock is not None
    with lock:
        store.sweep()
        assert [folder.exists() for folder in (gone, at_work, without_lock)] == [False, True, False]
    store.sweep()
    assert list(partial.iterdir()) == []
    assert work.is_dir()
    assert store.get(KEY) == entry


def test_a_writer_at_work_holds_its_lock_until_the_entry_is_there(store: Warned) -> None:
    other = Warned(store.root)

    def write(folder: Path) -> None:
        writing(a="1")(folder)
        other.sweep()
        assert folder.is_dir()

    assert store.put(KEY, write, {}) == store.get(KEY)
    assert left_over(store) == []


def test_sweep_of_a_store_that_is_not_there_does_nothing(store: Warned) -> None:
    store.sweep()
    assert not store.root.exists()


def test_a_killed_writer_leaves_a_miss(store: Warned) -> None:
    code = (
        "import os, sys, pathlib\nfrom compress.storage.store import Store\n"
        "def write(folder):\n    (folder / 'a').write_text('1')\n    os.kill(os.getpid(), 9)\n"
        "Store(pathlib.Path(sys.argv[1]), print).put(sys.argv[2], write, {})\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.root), KEY], env=os.environ | {"PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode == -9
    assert store.get(KEY) is None
    assert store.warnings == []
    assert len(left_over(store)) == 2
    store.sweep()
    assert left_over(store) == []
    store.put(KEY, writing(a="1"), {})
    assert store.get(KEY) is not None


def test_a_store_can_be_moved(store: Warned, tmp_path: Path) -> None:
    entry = store.put(KEY, writing(a="1"), {"k": 1})
    shutil.move(store.root, tmp_path / "elsewhere")
    moved = Store(tmp_path / "elsewhere", store.warnings.append).get(KEY)
    assert moved is not None
    assert (moved.digest, moved.meta, moved.folder) == (entry.digest, entry.meta, tmp_path / "elsewhere" / KEY)


def test_an_entry_is_moved_into_place_not_copied(store: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is killed half way is an entry without some of its files."""
    written: list[tuple[int, Path]] = []

    def write(folder: Path) -> None:
        writing(a="1")(folder)
        written.append((folder.stat().st_ino, folder))

    entry = store.put(KEY, write, {})
    assert entry.folder.stat().st_ino == written[0][0]
    assert not written[0][1].exists()

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(ArtifactError, match="Invalid cross-device link"):
        store.put("other", writing(a="1"), {})
    assert store.get("other") is None
    assert not (store.root / "other").exists()


def test_what_is_written_is_beside_the_entries_until_it_is_whole(store: Warned) -> None:
    seen: list[Path] = []

    def write(folder: Path) -> None:
        seen.append(folder)
        assert list(folder.iterdir()) == [], "an empty folder is given"
        assert not (store.root / KEY).exists()

    entry = store.put(KEY, write, {})
    (partial,) = seen
    assert partial.parent == store.root / ".partial"
    assert partial.name.startswith(f"{KEY}.")
    assert [path.name for path in entry.folder.iterdir()] == ["entry.json"]
    assert list((store.root / ".partial").iterdir()) == []
    assert store.work_folder(KEY) == store.root / ".work" / KEY


def test_an_entry_states_its_files_with_their_digests(store: Warned) -> None:
    import hashlib

    entry = store.put(KEY, writing(a="1", sub__b="2", sub__times="3"), {"k": "\u00e9"}, ("times",))
    values = json.loads((entry.folder / "entry.json").read_text(encoding="utf-8"))
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("a", "1"), ("sub/b", "2"))}
    assert set(values) >= {"schema", "files", "digest", "meta"}
    assert values["schema"] == ENTRY_SCHEMA
    assert set(values["files"]) == {"a", "sub/b", "sub/times"}
    assert {name: values["files"][name].split(":")[-1] for name in digests} == digests
    assert (values["digest"], values["meta"]) == (entry.digest, {"k": "\u00e9"})


def test_all_damaged_files_are_named_in_order(store: Warned) -> None:
    entry = store.put(KEY, writing(a="1", b="2", c="3"), {})
    change(entry.folder / "c")
    change(entry.folder / "a")
    assert store.get(KEY) is None
    assert store.warnings == [f"A stored stage is damaged (a, c) and will be made again: {entry.folder}"]


def test_an_entry_without_a_digest_says_so(store: Warned) -> None:
    entry = store.put(KEY, writing(), {})
    for changed in ({"digest": 1, "meta": {}}, {"digest": "x", "meta": 1}):
        values = add_digest({"schema": ENTRY_SCHEMA, "files": {}, **changed})
        (entry.folder / "entry.json").write_text(json.dumps(values), encoding="utf-8")
        assert store.get(KEY) is None
    assert len(store.warnings) == 2
    assert all("entry.json (TypeError('no digest or no record in it'))" in said for said in store.warnings)


def test_a_changed_record_is_named_with_its_file(store: Warned) -> None:
    entry = store.put(KEY, writing(), {"k": 1})
    path = entry.folder / "entry.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"k": 1', '"k": 2'), encoding="utf-8")
    assert store.get(KEY) is None
    assert "entry.json ('entry.json' differs from its digest" in store.warnings[0]


def test_the_lock_folder_of_a_result_is_named_after_its_key(store: Warned) -> None:
    assert store.lock_folder(KEY) == store.root / ".locks" / KEY


def test_a_file_that_cannot_be_removed_does_not_stop_the_sweep(store: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.root / ".partial").mkdir(parents=True)
    (store.root / ".partial" / "a.file").write_text("no folder", encoding="utf-8")
    dead = store.root / ".partial" / "b.dead"
    dead.mkdir()
    store.sweep()
    assert not dead.exists()


def test_sweep_removes_locks_without_a_folder_and_folders_without_a_lock(
    store: Warned, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = store.root / ".partial"
    partial.mkdir(parents=True)
    (partial / "a.1.lock").touch()
    store.sweep()
    assert list(partial.iterdir()) == []
    monkeypatch.setattr("compress.storage.lock.Locks.try_lock", lambda self, path: nullcontext())
    (partial / "a.2").mkdir()
    store.sweep()
    assert list(partial.iterdir()) == []


def test_a_lock_that_cannot_be_tried_does_not_stop_the_sweep(store: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, tried = store.root / ".partial", []
    for name in ("a.1", "b.2", "c.3"):
        (partial / name).mkdir(parents=True)

    def only_from_the_second_on(self: Locks, path: Path) -> AbstractContextManager[None]:
        tried.append(path)
        if len(tried) == 1:
            raise OSError("no lock")
        return nullcontext()

    monkeypatch.setattr("compress.storage.lock.Locks.try_lock", only_from_the_second_on)
    store.sweep()
    assert len(tried) == 3
    assert [path.name for path in partial.iterdir()] == [tried[0].stem]


def test_a_file_system_error_without_words_is_told_as_it_is(store: Warned) -> None:
    def write(folder: Path) -> None:
        raise OSError("something odd")

    with pytest.raises(ArtifactError, match=r"could not be written to '.*': something odd"):
        store.put(KEY, write, {})
