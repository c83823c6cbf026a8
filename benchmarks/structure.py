"""ModelMetrics of the package's structure: files, functions, classes, imports.

    python benchmarks/structure.py                    this tree
    python benchmarks/structure.py OLD . --markdown   several trees side by side, as a Markdown table

Imports are counted between modules as they stand in the source, those within functions and under TYPE_CHECKING too.
A circle is a set of modules each of which reaches every other one along imports.
"""

import argparse
import ast
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MOST_METHODS = 12
MOST_PARAMETERS = 7
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One module.

    Attributes:
        name: Dotted.
        tree: Its syntax tree.
        text: Its source.
    """

    name: str
    tree: ast.Module
    text: str


@dataclass
class Imports:
    """Imports of one module within the package.

    Attributes:
        at_load: Modules that are imported when it is loaded.
        later: Those imported within functions or for type checking.
    """

    at_load: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)


def read_modules(root: Path) -> dict[str, Module]:
    """Return the modules of the package below a folder by name."""
    found = {}
    for path in sorted((root / "compress").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, ast.parse(text), text)
    return found


def read_imports(modules: Mapping[str, Module]) -> dict[str, Imports]:
    """Return for each module what it imports of the package."""
    return {name: _imports_of(module, modules) for name, module in modules.items()}


def _imports_of(module: Module, modules: Mapping[str, Module]) -> Imports:
    found = Imports()

    def visit(node: ast.AST, later: bool) -> None:
        for child in ast.iter_child_nodes(node):
            is_checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("compress"):
                named = {f"{child.module}.{alias.name}" for alias in child.names}
                whole = named & modules.keys() or {str(child.module)} & modules.keys()
                (found.later if later else found.at_load).update(whole)
            elif isinstance(child, ast.Import):
                named = {alias.name for alias in child.names} & modules.keys()
                (found.later if later else found.at_load).update(named)
            else:
                visit(child, later or is_checking or isinstance(child, FUNCTIONS))

    visit(module.tree, False)
    found.later -= found.at_load
    return found


def circles(imports: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that reach each other along imports, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def connect(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(imports[name]):
            if other not in index:
                connect(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            place = stack.index(name)
            found.append(set(stack[place:]))
            del stack[place:]

    for name in sorted(imports):
        if name not in index:
            connect(name)
    return [one for one in found if len(one) > 1]


def _functions(modules: Mapping[str, Module]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, FUNCTIONS):
                yield node


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    named = [one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([one for one in named if one not in ("self", "cls")])


def _catches_all(modules: Mapping[str, Module]) -> int:
    return sum(
        isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name) and node.type.id == "Exception"
        for module in modules.values()
        for node in ast.walk(module.tree)
    )


def figures(root: Path) -> dict[str, str]:
    """Return every figure of a tree by its name."""
    modules = read_modules(root)
    imports = read_imports(modules)
    lengths = sorted(_body_lines(one) for one in _functions(modules))
    every = {name: one.at_load | one.later for name, one in imports.items()}
    importers = Counter(other for one in imports.values() for other in one.at_load | one.later)
    leaves = Counter(name.rpartition(".")[2] for name in modules if (root / Path(*name.split("."))).is_dir() is False)
    big = [
        node
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and sum(isinstance(part, FUNCTIONS) for part in node.body) > MOST_METHODS
    ]
    wide = [
        node
        for name, module in modules.items()
        if not name.startswith("compress.cli")
        for node in ast.walk(module.tree)
        if isinstance(node, FUNCTIONS) and _parameters(node) > MOST_PARAMETERS
    ]
    rooms = {
        (name.split(".")[1], other.split(".")[1])
        for name, one in imports.items()
        for other in one.at_load | one.later
        if name.count(".") and other.count(".") and name.split(".")[1] != other.split(".")[1]
    }
    report = [module for name, module in modules.items() if name.startswith("compress.report")]
    lines = sum(module.text.count("\n") for module in modules.values())
    at = {share: lengths[min(len(lengths) - 1, int(share * len(lengths)))] for share in (0.9, 0.99)}
    return {
        "files": f"{len(modules)}",
        "loose files on the top level": f"{sum(1 for _ in (root / 'compress').glob('*.py'))}",
        "lines": f"{lines:,}",
        "functions": f"{len(lengths):,}",
        "lines of a function (median, 90 %, 99 %, longest)": (
            f"{statistics.median(lengths):g}, {at[0.9]}, {at[0.99]}, {lengths[-1]}"
        ),
        f"classes of more than {MOST_METHODS} methods": f"{len(big)}",
        f"functions of more than {MOST_PARAMETERS} parameters, command line aside": f"{len(wide)}",
        "`except Exception`": f"{_catches_all(modules)}",
        "modules with one importer": f"{sum(count == 1 for count in importers.values())}",
        "repeated file names": f"{sum(count > 1 for count in leaves.values())}",
        "imports between modules": f"{sum(len(one.at_load | one.later) for one in imports.values()):,}",
        "imports between packages (pairs)": f"{len(rooms)}",
        "circles of imports": f"{len(circles({name: one.at_load for name, one in imports.items()}))}",
        "modules in circles, late imports counted": f"{sum(map(len, circles(every)))}",
        "`.get(` in report": f"{sum(module.text.count('.get(') for module in report)}",
    }


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="*", default=[Path(__file__).resolve().parents[1]])
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    columns = [figures(tree) for tree in arguments.trees]
    if arguments.markdown:
        print("| |" + " |" * len(columns) + "\n|---|" + "---|" * len(columns))
    for name in columns[0]:
        values = [column[name] for column in columns]
        print(f"| {name} | {' | '.join(values)} |" if arguments.markdown else f"{name:60} {'  '.join(values)}")


if __name__ == "__main__":
    main()
