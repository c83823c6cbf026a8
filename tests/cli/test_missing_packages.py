"""What is not installed is told with exit code 5 and the line that installs it, before any work, and never as a bug."""

import re
import sys
from pathlib import Path

import pytest
import tomllib

from compress.catalog import INSTALL, missing_package, require_packages
from compress.cli.exits import guarded
from compress.errors import OutOfMemory, PackageMissing, is_out_of_memory

ROOT = Path(__file__).parents[2]
EXTRAS = re.compile(r"compress\s*\[[a-z]")


def test_no_text_recommends_this_programs_extras() -> None:
    """The name `compress` on the package index belongs to somebody else."""
    places = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.yml")]
    for folder in ("compress", "benchmarks", "models", "pipelines"):
        places += [path for kind in ("*.py", "*.yaml", "*.md", "*.txt", "*.j2") for path in (ROOT / folder).rglob(kind)]
    found = [str(path) for path in places if EXTRAS.search(path.read_text(encoding="utf-8"))]
    assert found == []
    assert not any("compress" in line for line in INSTALL.values())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_what_is_installed_is_what_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {one for extra in project["optional-dependencies"].values() for one in extra}
    assert {line.removeprefix("pip install '").removesuffix("'") for line in INSTALL.values()} <= declared


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PackageMissing, match=r"It needs the package timm, which is not installed\.") as caught:
        require_packages(["timm", "numpy"], "It")
    assert (caught.value.exit_code, caught.value.hint) == (5, "pip install 'timm>=1.0.20'")
    both = missing_package(["a", "b"], "It")
    assert (both.message, both.hint) == (
        "It needs the packages a and b, which are not installed.",
        "pip install a; pip install b",
    )
    require_packages(["numpy", "cryptography"], "The tests")


def test_a_module_that_is_missing_anywhere_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def command() -> None:
        import scipyy.sparse  # type: ignore[import-not-found]  # noqa: F401

    with pytest.raises(Exception) as caught:  # noqa: PT011
        command()
    assert caught.value.exit_code == 5  # type: ignore[attr-defined]
    assert "needs the package scipyy, which is not installed.\nHint: pip install scipyy" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
        RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 9"),
    ],
)
def test_memory_that_cannot_be_had_is_no_bug(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def command() -> None:
        raise error

    assert is_out_of_memory(error)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        command()
    assert caught.value.exit_code == OutOfMemory.exit_code  # type: ignore[attr-defined]
    assert "did not fit into memory" in capsys.readouterr().err
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
