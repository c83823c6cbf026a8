"""Which networks can be cut, exported and trusted? Makes docs/support.json and docs/support-matrix.md.

    python benchmarks/support_matrix.py --set torchvision --set timm            what is not in the results yet
    python benchmarks/support_matrix.py --set onnx --onnx-folder FOLDER         every .onnx file in it
    python benchmarks/support_matrix.py --set timm --only 'res*' --redo failed  those that failed, once more
    python benchmarks/support_matrix.py --table                                 docs/support-matrix.md from the results

Each network has a process of its own, with a time limit; its result is kept as soon as it is known, so that a run that
was ended goes on where it was. Networks have random weights. See benchmarks/support_trial.py for the steps.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from support_networks import SETS, Entry, listed
from support_table import render

from compress.storage.files import write_atomic

ROOT = Path(__file__).parents[1]
TRIAL = Path(__file__).with_name("support_trial.py")
PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxruntime-gpu", "onnxruntime", "torch-pruning")

Record = dict[str, Any]


class Results:
    """The file of results, written anew whenever one is added.

    Args:
        path: Of the JSON file; it need not exist.
        packages: Distributions whose versions are kept with the results.
    """

    def __init__(self, path: Path, packages: Sequence[str] = PACKAGES) -> None:
        self.path, self.packages = path, packages
        self._lock = threading.Lock()
        read = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self.records: dict[str, Record] = read.get("networks", {})

    def add(self, entry: Entry, record: Record) -> None:
        """Keep one network's result."""
        with self._lock:
            self.records[entry.key] = record
            values = {"environment": environment(self.packages), "networks": dict(sorted(self.records.items()))}
            write_atomic(self.path, json.dumps(values, indent=1) + "\n")


def environment(packages: Sequence[str] = PACKAGES) -> Record:
    """Return what the results were made with."""
    return {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count(),
            **{name: found for name in packages if (found := _version(name))}}  # fmt: skip


def wanted(entries: Sequence[Entry], records: dict[str, Record], only: Sequence[str], redo: str) -> list[Entry]:
    """Return the networks to be tried.

    Args:
        entries: All that are listed.
        records: Results that are there.
        only: Patterns, one of which a name must match; all by default.
        redo: "missing" for those without a result, "failed" for those that failed, too, "all".
    """
    chosen = [entry for entry in entries if not only or any(fnmatch(entry.name, pattern) for pattern in only)]
    return [
        entry
        for entry in chosen
        if redo == "all"
        or entry.key not in records
        or (redo == "failed" and bool(records[entry.key]["failures"]))
    ]  # fmt: skip


def try_apart(entry: Entry, limit_s: float, command: Sequence[str] = (sys.executable, str(TRIAL))) -> Record:
    """Try one network in a process of its own.

    Args:
        entry: Which.
        limit_s: Seconds after which it is ended.
        command: What is started, with the entry behind it.

    Returns:
        Its record; when the process ended early, what was known by then and that as a failure.
    """
    started, ended = time.perf_counter(), None
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *_import_path()])}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen([*command, json.dumps(entry.to_dict())], stdout=out, stderr=err, env=surroundings)
        try:
            code = process.wait(limit_s)
            ended = f"its process ended {f'with exit code {code}' if code >= 0 else f'by signal {-code}'}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"it did not end within {limit_s:.0f} s"
        out.seek(0)
        err.seek(0)
        lines, said = [json.loads(line) for line in out if line.endswith("\n")], err.read().strip().splitlines()
    record = merge(lines, ended, said)
    return {**record, "family": entry.family, "wall_s": round(time.perf_counter() - started, 1)}


def merge(lines: list[Record], ended: str, said: list[str]) -> Record:
    """Return the last record that a process printed, with a failure where it was not the whole one."""
    records = [line for line in lines if "seconds" in line]
    if records and records[-1].pop("is_done", False):
        return records[-1]
    record = records[-1] if records else {"seconds": {}, "cuts": [], "failures": []}
    step = lines[-1].get("step") or "export" if lines else "start"
    why = f": {said[-1]}" if said and "exit code" in ended else ""
    record["failures"].append({"step": step, "reason": ended + why})
    return record


def _import_path() -> list[str]:
    return [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def sentence(entry: Entry, record: Record) -> str:
    """Return a result in one line."""
    failures = "; ".join(f"{failure['step']}: {failure['reason']}" for failure in record["failures"])
    memory = f", {record['peak_memory_mb']} MB" if "peak_memory_mb" in record else ""
    return f"{entry.key}: {failures or 'passed'} ({record['wall_s']:.0f} s{memory})"


def main() -> None:
    """Parse the command line, try networks, keep the results, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", choices=SETS, default=[], dest="sets")
    parser.add_argument("--onnx-folder", type=Path)
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="of names; repeatable")
    parser.add_argument("--redo", choices=("missing", "failed", "all"), default="missing")
    parser.add_argument("--size", type=int, help="height and width for all, in place of their own")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="networks at a time, a thread each")
    parser.add_argument("--limit", type=float, default=1800.0, metavar="SECONDS", help="for one network")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "support.json")
    parser.add_argument("--table", action="store_true", help="write support-matrix.md beside the results")
    arguments = parser.parse_args()
    if "onnx" in arguments.sets and (arguments.onnx_folder is None or not arguments.onnx_folder.is_dir()):
        parser.error("--set onnx needs a folder: --onnx-folder FOLDER")
    if not arguments.sets and not arguments.table:
        parser.error("nothing to do: name a --set, or ask for the --table")
    results = Results(arguments.out)
    entries = [entry for name in arguments.sets for entry in listed(name, arguments.onnx_folder, arguments.size)]
    if arguments.sets and not entries:
        parser.error("there is no network in these sets")
    left = wanted(entries, results.records, arguments.only, arguments.redo)
    print(f"{len(left)} networks to try, {len(entries) - len(left)} not asked for or known already", flush=True)

    def work(entry: Entry) -> None:
        record = try_apart(entry, arguments.limit)
        results.add(entry, record)
        print(sentence(entry, record), flush=True)

    with ThreadPoolExecutor(arguments.jobs) as workers:
        list(workers.map(work, left))
    if arguments.table:
        values = json.loads(arguments.out.read_text("utf-8"))
        write_atomic(arguments.out.with_name("support-matrix.md"), render(values))


if __name__ == "__main__":
    main()
