"""What becomes of trained ONNX files that are imported, slimmed without labels and verified? Makes a table.

    python benchmarks/onnx_files.py --data FOLDER --out FOLDER                 all of them, one after the other
    ... --only resnet20_0.7 --only rfb_320_0.7                                 some of them
    ... --write FILE.md                                                          puts the table between its markers

DATA holds `networks`, `detection`, `cifar10` and `imagenet_sample`, as benchmarks/onnx_cases.py names the files in
them. OUT gets the images, the ONNX files that torch's exporter makes, a pipeline for each row, logs and runs. Each row
is `compress run` in a process of its own, and `compress verify` on labels where there are some. What is finished is
not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from onnx_cases import CASES, Case, unpack_images
from results import conditions, write_between_markers

ROOT = Path(__file__).resolve().parents[1]
HEADER = (
    "| file | import error | MACs | p50 latency | next to the original | with labels | verdict | exit code |",
    "|---|---|---|---|---|---|---|---|",
)
SHOWN = {"top1": "top-1", "map50": "AP50"}
Record = dict[str, Any]


def measure(case: Case, data: Path, out: Path) -> Record:
    """Run a case's pipeline and verify its file on labels, each in a process of its own.

    Returns:
        The `exit_code` of the run, its `report`, and the verdict on labels, `labelled`; None for what there is not.
    """
    for name in ("files", "pipelines", "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    file = case.write_file(data, out / "files")
    pipeline, folder = out / "pipelines" / f"{case.name}.yaml", out / "runs" / case.name
    pipeline.write_text(yaml.safe_dump(case.pipeline(file, out / "images"), sort_keys=False), encoding="utf-8")
    code = command(out / "logs" / f"{case.name}.txt", "run", pipeline, "--runs-dir", out / "runs")
    report = read_json(folder / "report.json")
    labelled = None
    if case.labelled is not None and report is not None and report["slim"]:
        gates, verdict = (out / "pipelines" / f"{case.name}.labels.{kind}" for kind in ("yaml", "json"))
        gates.write_text(yaml.safe_dump(case.with_labels(out / "images"), sort_keys=False), encoding="utf-8")
        log = out / "logs" / f"{case.name}.labels.txt"
        command(log, "verify", folder / "model.onnx", "--against", file, "--gates", gates, "--json", verdict)
        labelled = read_json(verdict)
    return {"exit_code": code, "report": report, "labelled": labelled}


def command(log: Path, *arguments: Any) -> int:
    """Call `compress` in a process with one thread, what it says going into a log; return its exit code."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w", encoding="utf-8") as said:
        words = [sys.executable, "-m", "compress", *map(str, arguments)]
        return subprocess.run(words, stdout=said, stderr=subprocess.STDOUT, env=surroundings, check=False).returncode


def read_json(path: Path) -> Any:
    """Return what a file holds; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def row(case: Case, found: Record) -> str:
    """Return one row of the table; what was not measured is a dash."""
    report = found["report"]
    if report is None or not report["slim"]:
        return f"| {case.name} | – | – | – | – | – | – | {found['exit_code']} |"
    before, after = report["baseline"], report["slim"]
    error = report["stages"][0]["record"]["import_error"]
    macs = f"{before['macs'] / 1e6:.1f} → {after['macs'] / 1e6:.1f} M ({after['macs'] / before['macs']:.2f})"
    old, new = before["latency_ms"]["p50"], after["latency_ms"]["p50"]
    latency = f"{old:.2f} → {new:.2f} ms ({new / old:.2f})"
    verdict = "passed" if report["verdict"]["passed"] else "failed"
    cells = (
        case.name, f"{error:.0e}", macs, latency, _beside(after["quality"]), _labelled(case, found["labelled"]),
        verdict, found["exit_code"],
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _beside(quality: Record) -> str:
    """Return how near the outputs are to the original's."""
    said = [f"agreement {quality['agreement']:.1%}"] if "agreement" in quality else []
    return ", ".join([*said, f"distance {quality['distance']:.3f}"])


def _labelled(case: Case, verdict: Record | None) -> str:
    if case.labelled is None:
        return "–"
    if verdict is None or not verdict["slim"] or not verdict["baseline"]:
        return "not measured"
    old, new = (verdict[side]["quality"][case.labelled] for side in ("baseline", "slim"))
    return f"{SHOWN[case.labelled]} {100 * old:.2f} → {100 * new:.2f} %"


def table(cases: Sequence[Case], found: Sequence[Record]) -> str:
    """Return the table, and where latency was measured."""
    reports = [one["report"] for one in found if one["report"] is not None and one["report"]["slim"]]
    places = sorted({conditions(report) for report in reports})
    rows = [row(case, one) for case, one in zip(cases, found, strict=True)]
    return "\n".join([*HEADER, *rows, *(["", f"Measured with {'; '.join(places)}."] if places else [])])


def main() -> None:
    """Parse the command line, run what is missing, print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], choices=[case.name for case in CASES])
    parser.add_argument("--write", type=Path, help="Markdown file with the markers")
    arguments = parser.parse_args()
    data, out = arguments.data.absolute(), arguments.out.absolute()
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]
    unpack_images(data, out / "images")
    found = []
    for case in cases:
        found.append(measure(case, data, out))
        print(row(case, found[-1]), flush=True)
    if arguments.write is not None:
        write_between_markers(arguments.write, table(cases, found), "onnx-files")


if __name__ == "__main__":
    main()
