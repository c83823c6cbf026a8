"""The page on architecture: files exist, rooms are complete and in the order of the contracts, twenty questions."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "compress"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PATH = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|md|yaml|yml|onnx))`|`((?:[\w-]+/)+)`")


def _named(text: str) -> list[str]:
    return [file or folder for file, folder in PATH.findall(text)]


def test_every_file_named_exists() -> None:
    named = [name for name in _named(TEXT) if not name.endswith(".onnx")]
    assert len(named) > 70
    missing = [name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()]
    assert missing == []


def test_files_of_the_drawing_exist() -> None:
    (drawing,) = re.findall(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)
    named = re.findall(r"^ *((?:\w+/)+\w+\.py)", drawing, flags=re.MULTILINE)
    assert len(named) >= 8
    assert [name for name in named if not (PACKAGE / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_named_on_other_pages_exist(page: Path) -> None:
    if "experiments" in page.parts:
        pytest.skip("experiments name the files of their day")
    named = re.findall(r"`((?:compress/|tests/|benchmarks/|models/)?(?:[\w-]+/)+[\w-]+\.py)`", page.read_text("utf-8"))
    assert [name for name in named if not (PACKAGE / name).is_file() and not (ROOT / name).is_file()] == [
        name for name in named if name == "compress/stages/NAME.py"
    ]


def test_rooms_are_complete_and_in_the_order_of_the_import_contracts() -> None:
    rooms = re.findall(r"^\| `(\w+)/` \|", TEXT, flags=re.MULTILINE)
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(rooms) == packages
    assert len(rooms) == len(packages)
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert modules <= {name.removesuffix(".py") for name in re.findall(r"`(\w+\.py)`", TEXT)}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib comes with Python 3.11")
def test_no_room_stands_above_one_that_imports_it() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one["type"] == "layers" and "compress.cli" in one["layers"]]
    row = {name: index for index, layer in enumerate(layers) for name in re.findall(r"compress\.(\w+)", layer)}
    rooms = [room for room in re.findall(r"^\| `(\w+)/` \|", TEXT, flags=re.MULTILINE) if room != "testing"]
    assert [row[room] for room in rooms] == sorted(row[room] for room in rooms)


def test_there_are_twenty_questions_with_files() -> None:
    section = TEXT.partition("## Twenty questions")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+\?) \| (.+) \|$", section, flags=re.MULTILINE)
    assert len(rows) == 20
    assert all(_named(answer) for _, answer in rows)
