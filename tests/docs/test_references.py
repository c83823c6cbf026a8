"""Names of modules and functions in docstrings and comments of the package."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "compress"
MODULES: dict[str, list[Path]] = {}
for path in sorted(PACKAGE.rglob("*.py")):
    MODULES.setdefault(path.stem, []).append(path)
DOTTED = re.compile(r"`(?:compress\.)?((?:\w+\.)*\w+)\.(\w+)`")
FILE = re.compile(r"`([\w/]+\.py)`")
SETTINGS = {"data", "deploy", "model", "stages", "task", "verify"}  # sections of a pipeline file
SUFFIXES = {"html", "json", "npz", "onnx", "pkl", "py", "sig", "txt", "yaml", "zip"}
OTHERS = {"check.py", "factory.py", "load_slim.py", "model.py"}  # of bundles, run folders and users


def names_of(path: Path) -> set[str]:
    """Return the top-level names of a module, and the attributes of its classes."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        for target in ast.walk(node) if isinstance(node, (ast.Assign, ast.AnnAssign)) else ():
            if isinstance(target, ast.Name):
                found.add(target.id)
    return found


def _exists(name: str) -> bool:
    return (ROOT / name).is_file() or bool(list(PACKAGE.rglob(name)))


def faults(text: str) -> list[str]:
    """Return the references of a docstring that lead nowhere."""
    found = [name for name in FILE.findall(text) if name not in OTHERS and not _exists(name)]
    for module, name in DOTTED.findall(text):
        stem = module.rpartition(".")[2]
        if module.startswith(("torch", "onnx")) or module in SETTINGS or name in SUFFIXES:
            continue
        if stem in MODULES and not any(name in names_of(path) for path in MODULES[stem]):
            found.append(f"{module}.{name}")
    return found


def test_names_in_docstrings_exist() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): faults(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")
    }
    assert len(found) > 300
    assert {path: names for path, names in found.items() if names} == {}


def test_a_name_that_leads_nowhere_is_found() -> None:
    assert faults("As `gates.no_such_gate`, in `no_such_file.py`, and `gates.Gates` in `gates.py`.") == [
        "no_such_file.py",
        "gates.no_such_gate",
    ]
