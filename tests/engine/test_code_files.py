"""The key of a stage follows what the factory imports, and nothing else that lies beside it."""

import os
from pathlib import Path

import pytest

from compress.engine.keys import _code_digest, python_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(
        tmp_path,
        {
            "net.py": "import torch\nfrom parts.stem import Stem\ndef build():\n    import late\n    return late.x\n",
            "parts/__init__.py": "from . import head\n",
            "parts/stem.py": "from .deep import *\nfrom ..outside import y\n",
            "parts/head.py": "", "parts/deep/__init__.py": "", "parts/deep/one.py": "", "late.py": "import later\n",
            "later.py": "x = 1\n", "outside.py": "", "notes.py": "", "train.py": "import net\n", "parts/unused.py": "",
        },
    )  # fmt: skip
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def digest(folder: Path) -> str:
    return _code_digest(str(folder / "net.py"), folder)


@pytest.mark.parametrize(
    "name", ["net.py", "parts/__init__.py", "parts/stem.py", "parts/head.py", "parts/deep/one.py", "late.py",
             "later.py", "parts/deep/__init__.py", "outside.py"],
)  # fmt: skip
def test_what_is_imported_counts(folder: Path, name: str) -> None:
    before = digest(folder)
    (folder / name).write_text((folder / name).read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert digest(folder) != before


@pytest.mark.parametrize("name", ["notes.py", "train.py", "parts/unused.py", "new.py", "new/__init__.py"])
def test_what_only_lies_beside_it_does_not(folder: Path, name: str) -> None:
    before = digest(folder)
    write(folder, {name: "changed = 1\n"})
    assert digest(folder) == before


def test_a_file_that_would_be_imported_instead_counts(folder: Path) -> None:
    before = digest(folder)
    write(folder, {"later/__init__.py": ""})
    assert digest(folder) != before


@pytest.mark.parametrize(
    "line", ["import importlib", "from importlib import import_module", "__import__('notes')", "exec('import notes')",
             "import sys\nsys.path.insert(0, 'x')", "import runpy", "this is no Python"],
)  # fmt: skip
def test_where_imports_cannot_be_followed_every_file_counts(folder: Path, line: str) -> None:
    write(folder, {"later.py": f"{line}\n"})
    before = digest(folder)
    write(folder, {"notes.py": "changed = 1\n"})
    assert digest(folder) != before


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("name", [".#net.py", "#net.py", "link.py", ".net.py.swp.py"])
def test_locks_of_editors_and_dangling_links_are_no_code(folder: Path, name: str) -> None:
    write(folder, {"later.py": "import importlib\n"})
    before = digest(folder)
    (folder / name).symlink_to("somebody@somewhere.1234:1700000000")
    assert digest(folder) == before
    assert folder / name not in list(python_files(folder))


def test_modules_and_packages_follow_their_imports(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = {place: _code_digest(place, folder) for place in ("parts.stem", "net", "parts")}
    write(folder, {"parts/head.py": "x = 1\n"})
    assert all(_code_digest(place, folder) != before[place] for place in before)
    before = {place: _code_digest(place, folder) for place in before}
    write(folder, {"parts/unused.py": "x = 1\n", "notes.py": "x = 1\n"})
    assert {place: _code_digest(place, folder) for place in before} == before


def test_the_place_does_not_matter_and_circles_end(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write(folder, {"later.py": "import net\n"})
    other = tmp_path_factory.mktemp("other") / "moved"
    before = digest(folder)
    folder.rename(other)
    assert digest(other) == before
    assert _code_digest(str(folder / "gone.py"), folder) == str(folder / "gone.py")
    assert _code_digest("no_such_module_anywhere", folder) == "no_such_module_anywhere"
