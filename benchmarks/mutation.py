"""Mutation testing: share of small changes to the code that the tests notice, by package, and the changes they miss.

    python benchmarks/mutation.py [PACKAGE ...] [--sample 200] [--children 2] [--folder build/mutation]
    python benchmarks/mutation.py [PACKAGE ...] --again           tests those missed once more, after tests were added
    python benchmarks/mutation.py --report

It needs mutmut 3 (`pip install 'mutmut>=3.8,<4'`), which forks one process a mutant after the tests were imported once.
Each package is mutated in a copy of the tracked files, with the tests that are fast for it. What was decided is kept in
that copy: the same command goes on where it was stopped, and a changed function is tested anew. --report prints the
table of what is there. Survivors that change nothing are named in `EQUIVALENT` with the reason, and do not count.

All mutants take hours. --sample takes so many of each package by chance (the same ones each time, as long as code and
--seed are the same), and the score then has the 95 % interval of a share that was sampled (Wilson). Where tests were
written for the mutants of one sample, its score says too much: take another --seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binomtest

from compress.cli.console import Console

ROOT = Path(__file__).resolve().parents[1]
NOTICED, MISSED = ("killed", "timeout", "suspicious", "segfault", "caught by type check"), ("survived", "no tests")
COPIED = ("models", "pipelines", "benchmarks", "docs", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile")
OF_THE_TEXT = "tests/verification/test_latency.py::test_the_check_of_a_bundle_holds_the_same_arithmetic_word_for_word"
# functions called while the package is imported: mutmut chooses a mutant after that, so theirs are never carried out
AT_IMPORT = tuple(
    f"compress.cost.{name}__mutmut"
    for name in ("onnx_products.x__convolution", "onnx_products.x__product", "products.x__matrices")
)
EQUIVALENT: dict[str, str] = {  # name of a mutant -> why it changes nothing
    "compress.pruning.ranking.elimination.x_removal_order__mutmut_37": "NumPy knows sorting kinds by first letter",
    "compress.pruning.ranking.elimination.x_removal_order__mutmut_55": "int64 is NumPy's own choice for whole numbers",
    "compress.pruning.ranking.elimination.x_removal_order__mutmut_57": "int64 is NumPy's own choice for whole numbers",
    "compress.verification.metrics.x_paired_drop__mutmut_25": "it is cut off at 1 further on",
    "compress.onnx_file.counting.x_observe_shapes__mutmut_26": "the outputs asked for are all outputs, in their order",
    "compress.onnx_file.node_macs.x_einsum_macs__mutmut_12": "the number of operands was compared by `_indices`",
    "compress.onnx_file.node_macs.x_einsum_macs__mutmut_20": "axes are compared again further on",
}


@dataclass(frozen=True)
class Package:
    """What is mutated, and what must notice.

    Attributes:
        files: Patterns of source files.
        tests: Test files, the fast ones.
    """

    files: tuple[str, ...]
    tests: tuple[str, ...]


PACKAGES = {
    "store": Package(("compress/storage/store.py",), ("unit/test_store.py",)),
    "allocation": Package(
        ("compress/allocation/*.py",),
        (
            "properties/test_knapsack.py",
            "properties/test_widths.py",
            "unit/test_allocation_knapsack.py",
            "unit/test_allocation_problem.py",
            "unit/test_allocation_widths.py",
            "unit/test_sensitivity.py",
        ),
    ),
    "statistics": Package(
        tuple(
            f"compress/verification/{name}.py"
            for name in ("blocks", "calibration", "jackknife", "judging", "latency", "measured", "metrics", "quantized")
        ),
        (
            "unit/test_blocks.py",
            "unit/test_calibration.py",
            "unit/test_jackknife.py",
            "unit/test_judging.py",
            "unit/test_latency.py",
            "unit/test_measured.py",
            "unit/test_metrics.py",
            "unit/test_paired.py",
            "unit/test_statistics.py",
        ),
    ),
    "cost": Package(
        ("compress/cost/*.py",),
        (
            "unit/test_cost_values.py",
            "unit/test_costs.py",
            "unit/test_foreign_files.py",
            "unit/test_graph.py",
            "unit/test_latency_table.py",
            "unit/test_macs.py",
            "unit/test_odd_onnx_files.py",
            "unit/test_onnx_file.py",
            "unit/test_onnx_graph.py",
            "unit/test_onnx_products.py",
            "unit/test_strange_graphs.py",
            "unit/test_tied_weights.py",
            "unit/test_variants.py",
        ),
    ),
    "repair": Package(
        ("compress/pruning/repair/originals.py", "compress/pruning/repair/repairs.py"),
        ("unit/test_originals.py", "unit/test_regression.py", "unit/test_repair.py", "unit/test_repair_values.py"),
    ),
    "elimination": Package(
        ("compress/pruning/ranking/downdates.py", "compress/pruning/ranking/elimination.py"),
        ("unit/test_downdates.py", "unit/test_elimination.py", "unit/test_elimination_values.py"),
    ),
}


def prepare(name: str, folder: Path) -> Path:
    """Bring the copy of a package up to date; return its folder. Files that did not change keep their times."""
    package, target = PACKAGES[name], folder / name
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for path in filter(None, listed.split("\0")):
        source, copy = ROOT / path, target / path
        if source.is_file() and not (copy.is_file() and copy.read_bytes() == source.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    settings = {
        "source_paths": ["compress"],
        "only_mutate": list(package.files),
        "timeout_multiplier": 4.0,  # of twice what the tests take; most mutants that hang would hang for minutes
        "also_copy": [one for one in COPIED if (ROOT / one).exists()],
        "pytest_add_cli_args_test_selection": [f"tests/{test}" for test in package.tests],
        "pytest_add_cli_args": [
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-o",
            "addopts=--import-mode=importlib",
            "--deselect",
            OF_THE_TEXT,
        ],
    }
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (target / "pyproject.toml").write_text(f"{pyproject}\n[tool.mutmut]\n{text}\n", encoding="utf-8")
    return target


def run(name: str, folder: Path, options: argparse.Namespace, console: Console) -> int:
    """Mutate one package and test its mutants, some of them, or those missed; return the exit status of mutmut."""
    target, children, sample, seed = prepare(name, folder), options.children, options.sample, options.seed
    console.say(f"{name}: progress is in {target / 'mutmut.log'}")
    (target / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)  # which tests call what may have changed
    if options.again:
        missed = [one for one, status in read_results(name, folder) if status in MISSED and one not in EQUIVALENT]
        return run_mutmut(target, missed, children, console) if missed else 0
    if sample is None:
        return run_mutmut(target, [], children, console)
    # mutmut makes the mutants before it looks for those named; that none has this name is what is wanted
    if not list(read_results(name, folder)):
        run_mutmut(target, ["compress.no_such_mutant"], children)
    results = dict(read_results(name, folder))
    open_ones = [one for one in drawn(results, sample, seed) if results[one] == "not checked"]
    return run_mutmut(target, open_ones, children, console) if open_ones else 0


def run_mutmut(target: Path, mutants: Sequence[str], children: int, console: Console | None = None) -> int:
    """Run mutmut in the copy of a package for all mutants, or for those named; return its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(children), *mutants]
    with (target / "mutmut.log").open("w", encoding="utf-8") as log:
        status = subprocess.run(command, cwd=target, env=environment, stdout=log, stderr=log, check=False).returncode
    if status and console is not None:
        text = (target / "mutmut.log").read_text(encoding="utf-8", errors="replace")
        console.say("\n".join(text.replace("\r", "\n").splitlines()[-20:]))
    return status


def drawn(names: Iterable[str], sample: int | None, seed: int) -> list[str]:
    """Return the mutants to test: all, or so many drawn by chance; the same ones for the same names and seed."""
    every = sorted(names)
    if sample is None or sample >= len(every):
        return every
    return sorted(random.Random(seed).sample(every, sample))


def interval_of(part: int, whole: int) -> str:
    """Return the 95 % interval (Wilson) of a share of which a sample was seen, as text.

    >>> interval_of(90, 100)
    '82.6% to 94.5%'
    """
    found = binomtest(part, whole).proportion_ci(method="wilson")
    return f"{found.low:.1%} to {found.high:.1%}"


def read_results(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and status of each mutant of a package that can be tested, as far as they are decided or not."""
    command = [sys.executable, "-m", "mutmut", "results", "--all", "true"]
    done = subprocess.run(command, cwd=folder / name, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        mutant, found, status = line.strip().rpartition(": ")
        if found and not mutant.startswith(AT_IMPORT):
            yield mutant, status


def report(names: Sequence[str], folder: Path, sample: int | None, seed: int, console: Console) -> None:
    """Print the table, and the survivors of each package."""
    columns = ("package", "mutants", "tested", "noticed", "missed", "equivalent", "score", "95 % interval")
    console.say(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    survivors: dict[str, list[str]] = {}
    for name in names:
        if not (folder / name / "mutants").is_dir():
            continue
        every = dict(read_results(name, folder))
        results = {one: every[one] for one in drawn(every, sample, seed)}
        survivors[name] = [one for one, status in results.items() if status in MISSED and one not in EQUIVALENT]
        counts = Counter(results.values())
        noticed, missed = sum(counts[status] for status in NOTICED), len(survivors[name])
        equivalent = sum(status in MISSED and one in EQUIVALENT for one, status in results.items())
        score, interval, tested = "", "", noticed + missed
        if tested:
            score, is_whole = f"{noticed / tested:.1%}", tested + equivalent == len(every)
            interval = "all were tested" if is_whole else interval_of(noticed, tested)
        cells = (name, len(every), tested + equivalent, noticed, missed, equivalent, score, interval)
        console.say(f"| {' | '.join(map(str, cells))} |")
    console.say(f"\nLeft out, because they run while the package is imported: {', '.join(AT_IMPORT)}")
    for name, those in survivors.items():
        console.say(f"\n{name}: {len(those)} missed (`cd {folder / name} && python -m mutmut show NAME` shows one)")
        for one in those:
            console.say(f"  {one}")


def main() -> None:
    """Parse the command line, run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=", ".join(PACKAGES))
    parser.add_argument("--sample", type=int, help="mutants of each package, drawn by chance; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; another one after tests were added for it")
    parser.add_argument("--children", type=int, default=os.cpu_count() or 1, help="mutants at a time (%(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutation")
    parser.add_argument("--again", action="store_true", help="test those missed once more")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args()
    unknown = sorted(set(options.packages) - set(PACKAGES))
    if unknown:
        parser.error(f"no such package: {', '.join(unknown)}; there are {', '.join(PACKAGES)}")
    names, status, console = options.packages or list(PACKAGES), 0, Console()
    if not options.report:
        for name in names:
            status = run(name, options.folder, options, console) or status
    report(names, options.folder, options.sample, options.seed, console)
    sys.exit(1 if status else 0)


if __name__ == "__main__":
    main()
