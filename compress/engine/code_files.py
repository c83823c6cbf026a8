"""Python files that a piece of user code is made of: its own file and, from there, everything it imports.

Imports are read, not run: all `import` statements of a file, wherever they stand in it, looked for in a few folders.
What is found in none of them belongs to Python or to an installed package. Code that imports by other means, or changes
where Python looks, cannot be followed so; then every Python file of its folder counts.
"""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

NO_CODE = ("site-packages", "node_modules", "__pycache__")
_OURS = "compress"  # its changes are told by the versions of stages
_BY_OTHER_MEANS = {"importlib", "runpy", "imp", "pkgutil", "site", "zipimport", "__import__", "exec", "eval"}


def code_files(starts: Sequence[Path], roots: Sequence[Path], whole: Path) -> list[Path]:
    """Return the files that some code is made of, sorted.

    Args:
        starts: Its own files.
        roots: Folders in which imported names are looked for, in this order.
        whole: Folder all of whose files count where imports cannot be followed.
    """
    found: set[Path] = set()
    waiting = list(starts)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        imported = _imported(path, roots)
        if imported is None:
            return sorted(found.union(waiting, python_files(whole)))
        waiting += imported
    return sorted(found)


def python_files(folder: Path) -> Iterator[Path]:
    """Yield the .py files of a folder and its sub-folders, less hidden ones, installed packages and what runs wrote.

    Links to nowhere, such as the lock of an editor, are no files.
    """
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            written_by_runs = (entry / ".store").is_dir() or (entry / "recipe.json").is_file()
            if not (entry.name in NO_CODE or written_by_runs):
                yield from python_files(entry)
        elif entry.suffix == ".py" and entry.is_file():
            yield entry


def _imported(path: Path, roots: Sequence[Path]) -> list[Path] | None:
    """Return the files that a file imports; None where reading it does not tell."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if any(map(_by_other_means, nodes)):
        return None
    files: list[Path] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            files += [file for alias in node.names for file in resolve(alias.name.split("."), roots)]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            places = [_ancestor(path, node.level)] if node.level else roots
            for alias in node.names:
                if alias.name == "*":  # may mean every module of a package
                    files += _all_of(base, places)
                files += resolve([*base, alias.name], places)
    return files


def _by_other_means(node: ast.AST) -> bool:
    """Whether code imports otherwise than by a statement, or changes where Python looks."""
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] in _BY_OTHER_MEANS for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.level == 0 and (node.module or "").partition(".")[0] in {*_BY_OTHER_MEANS, "sys"}
    if isinstance(node, ast.Name):
        return node.id in _BY_OTHER_MEANS
    return isinstance(node, ast.Attribute) and node.attr == "path" and _is_name(node.value, "sys")


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _ancestor(path: Path, level: int) -> Path:
    """Return the folder that a relative import of so many dots starts from."""
    return path.parents[min(level, len(path.parents)) - 1]


def resolve(parts: Sequence[str], roots: Sequence[Path]) -> list[Path]:
    """Return the files that the import of a dotted name runs: those of its packages, and its own; [] where none is."""
    if parts[0] == _OURS:
        return []
    for root in roots:
        files: list[Path] = []
        folder = root
        for part in parts:
            package, module = folder / part / "__init__.py", folder / f"{part}.py"
            if package.is_file():
                files.append(package)
            elif module.is_file():
                files.append(module)
                break
            elif not (folder / part).is_dir():
                break  # the rest names something inside of a module
            folder = folder / part
        if files:
            return files
    return []


def _all_of(base: Sequence[str], roots: Sequence[Path]) -> list[Path]:
    for root in roots:
        folder = root.joinpath(*base)
        if base and folder.is_dir():
            return list(python_files(folder))
    return []
