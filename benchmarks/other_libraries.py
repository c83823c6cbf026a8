"""Support of networks of other libraries. Makes docs/other-libraries.json and docs/other-libraries.md.

    python benchmarks/other_libraries.py                          all networks without a result, then the page
    python benchmarks/other_libraries.py --library monai          those of one library
    python benchmarks/other_libraries.py --only 'yolo*' --redo failed
    python benchmarks/other_libraries.py --table                  the page only

The networks are in library_networks.yaml. Those whose library is not installed are left out. Each has a process of its
own (forked, so that torch is imported once) and goes through the steps of support_trial.py, with an export at the
second cut only.
"""

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import support_trial
import torch
from support_matrix import PACKAGES, ROOT, Results, merge, sentence, wanted
from support_networks import Entry, libraries, listed_of_library
from support_table import largest, normalised, number, table, uncut

from compress.pruning.tracing.record import OUTPUTS
from compress.storage.files import write_atomic

Record = Mapping[str, Any]
RESULTS = ROOT / "docs" / "other-libraries.json"
HEAD = """# Networks of other libraries

`python benchmarks/other_libraries.py` makes this page. compress imports none of these libraries: a pipeline names the
factory of its network, as [`model.factory`](networks.md) does here. The page of torchvision, timm and ONNX files is the
[support matrix](support-matrix.md).

Each network has random weights and varied batch-norm statistics. It is inspected and cut to 0.7 and to 0.4 of its MACs.
Both slim networks are compared with the baseline with masked channels. The smaller one is exported to ONNX, compared
with its file in ONNX Runtime, and rebuilt from its recipe and saved weights. A network has *passed* if all of it went
well. It is *refused* if compress states a reason before anything wrong is written. Everything else has *failed*.

- *groups*: prunable channel groups of all
- *least*: share of the MACs at the least widths within the default limits
- *cut* and *parity*: largest difference relative to the largest output value
"""
COLUMNS = ("network", "family", "input", "MMACs", "M params", "groups", "least", "reached", "cut", "parity", "result")


def verdict(record: Record) -> str:
    """Return "passed", "refused" or "failed"."""
    failures = record["failures"]
    if not failures:
        return "passed"
    return "refused" if all(failure.get("refused") for failure in failures) else "failed"


def render(values: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        values: Contents of `other-libraries.json`.
    """
    known: dict[str, dict[str, Record]] = defaultdict(dict)
    for key, record in values["networks"].items():
        library, _, name = key.partition("/")
        known[library][name] = record
    found = {name: value for name, value in values["environment"].items() if name != "cores"}
    stated = {package for packages in libraries().values() for package in packages}
    others = ", ".join(f"{name} {value}" for name, value in found.items() if name not in stated)
    parts = [HEAD, f"Made with {others}.", "## Summary", _summary(known, found)]
    parts += ["## Refused and failed", _failures(known)]
    parts += ["## Channel groups that are not prunable", uncut(known)]
    for library, records in known.items():
        parts += [f"## {library}", table(COLUMNS, [_row(name, record) for name, record in records.items()])]
    return "\n\n".join(parts) + "\n"


def _summary(known: Mapping[str, Mapping[str, Record]], found: Mapping[str, str]) -> str:
    rows = []
    for library, records in known.items():
        packages = libraries()[library]
        verdicts = [verdict(record) for record in records.values()]
        versions = ", ".join(found.get(package, "") for package in packages[:1])
        rows.append((library, versions, *(str(verdicts.count(one)) for one in ("passed", "refused", "failed"))))
    total = [str(sum(int(row[place]) for row in rows)) for place in (2, 3, 4)]
    return table(("library", "version", "passed", "refused", "failed"), [*rows, ("all", "", *total)])


def _failures(known: Mapping[str, Mapping[str, Record]]) -> str:
    rows = [
        (f"{library}/{name}", verdict({"failures": [failure]}), failure["step"], _plain(failure["reason"])
         + _hint(failure) + _why_few(record, failure))
        for library, records in known.items()
        for name, record in records.items()
        for failure in record["failures"]
    ]  # fmt: skip
    return table(("network", "result", "step", "reason"), rows) if rows else "None."


def _hint(failure: Record) -> str:
    return f" Hint: {_plain(failure['hint'])}" if "hint" in failure and failure["step"] != "cut" else ""


def _why_few(record: Record, failure: Record) -> str:
    """Return the reasons against the groups that are not prunable, where too few are."""
    causes: dict[str, int] = defaultdict(int)
    for reason, count in record.get("uncut", {}).items():
        if reason != OUTPUTS:
            causes[normalised(reason)] += count
    if failure["step"] not in ("inspect", "cut") or not failure.get("refused") or not causes:
        return ""
    most = sorted(causes.items(), key=lambda item: -item[1])[:3]
    total = record["groups"] + sum(record["uncut"].values())
    shown = "; ".join(f"`{reason}` ({count})" for reason, count in most)
    return f" {sum(causes.values())} of {total} channel groups are not prunable: {shown}"


def _plain(reason: str) -> str:
    """Return a reason on one line, as code, without the paths of one machine."""
    text = re.sub(r"/[^\s'\"]*/((?:site-packages/)?[\w.-]+/[\w.-]+\.py)", r"\1", " ".join(reason.split()))
    return f"`{text.replace('`', chr(39))}`"


def _row(name: str, record: Record) -> Sequence[str]:
    cuts, uncut = record["cuts"], sum(record.get("uncut", {}).values())
    return (
        name,
        record["family"],
        " x ".join(map(str, record.get("input", []))),
        number(record, "macs", 1e6, ".1f"),
        number(record, "params", 1e6, ".2f"),
        f"{record['groups']} of {record['groups'] + uncut}" if "groups" in record else "",
        number(record, "least_share", 1, ".2f"),
        ", ".join(f"{cut['reached']:.2f}" for cut in cuts if "reached" in cut),
        largest(cuts, "difference"),
        largest(cuts, "parity"),
        verdict(record),
    )


def try_forked(entry: Entry, limit_s: float) -> dict[str, Any]:
    """Try one network in a copy of this process.

    Args:
        entry: Network to try.
        limit_s: Seconds after which the copy is ended.

    Returns:
        Its record; if the process ended early, what was known by then and that as a failure.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lines, output = Path(folder) / "lines", Path(folder) / "output"
        lines.touch()
        process = multiprocessing.get_context("fork").Process(target=_try_here, args=(entry, lines, output))
        process.start()
        process.join(limit_s)
        ended = f"its process ended with exit code {process.exitcode}"
        if process.exitcode is None:
            process.kill()
            process.join()
            ended = f"it did not end within {limit_s:.0f} s"
        said = output.read_text("utf-8", errors="replace").strip().splitlines() if output.is_file() else []
        known = [json.loads(line) for line in lines.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return {
        **merge(known, ended, said), "family": entry.family, "wall_s": round(time.perf_counter() - started, 1)
    }  # fmt: skip


def _try_here(entry: Entry, lines: Path, output: Path) -> None:
    """Try a network; write what is known to `lines`, and what libraries print to `output`."""
    written = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(written, 1)
    os.dup2(written, 2)
    warnings.simplefilter("ignore")
    with lines.open("a", encoding="utf-8", buffering=1) as file:

        def say(record: Record) -> None:
            file.write(json.dumps(record) + "\n")

        say({**support_trial.try_network(entry, say), "is_done": True})


def _is_installed(library: str) -> bool:
    try:
        return all(bool(version(package)) for package in libraries()[library])
    except PackageNotFoundError:
        return False


def _packages() -> tuple[str, ...]:
    return tuple(dict.fromkeys([*PACKAGES, *(package for names in libraries().values() for package in names)]))


def main() -> None:
    """Parse the command line, try networks, keep the results, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="append", choices=tuple(libraries()), default=[], dest="libraries")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="of names; repeatable")
    parser.add_argument("--redo", choices=("missing", "failed", "all"), default="missing")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for one network")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the page from the results, and try nothing")
    arguments = parser.parse_args()
    results = Results(arguments.out, _packages())
    listed = {entry.key for library in libraries() for entry in listed_of_library(library)}
    results.records = {key: record for key, record in results.records.items() if key in listed}
    torch.set_num_threads(1)
    if not arguments.table:
        _try_all(arguments, results)
    page = render(json.loads(arguments.out.read_text("utf-8")))
    write_atomic(arguments.out.with_suffix(".md"), page)


def _try_all(arguments: argparse.Namespace, results: Results) -> None:
    entries: list[Entry] = []
    for library in arguments.libraries or libraries():
        if _is_installed(library):
            entries += listed_of_library(library)
        else:
            print(f"{library}: not installed. Hint: pip install {' '.join(libraries()[library])}", flush=True)
    for entry in wanted(entries, results.records, arguments.only, arguments.redo):
        record = try_forked(entry, arguments.limit)
        results.add(entry, record)
        print(sentence(entry, record), flush=True)


if __name__ == "__main__":
    main()
