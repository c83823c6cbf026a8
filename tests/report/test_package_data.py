"""Templates and the style sheet are part of what is installed."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "compress").rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc")
)


def test_every_data_file_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    declared = {
        path.relative_to(ROOT).as_posix()
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert {"compress/report/style.css", "compress/report/templates/report.html.j2"} <= declared
    assert sorted(declared) == DATA


@pytest.mark.skipif(int(metadata.version("setuptools").partition(".")[0]) < 77, reason="setuptools cannot build it")
def test_a_built_wheel_holds_every_data_file(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("compress-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert set(DATA) <= set(archive.namelist())
