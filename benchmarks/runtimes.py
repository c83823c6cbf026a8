"""Metric, parity and milliseconds of pipelines' files in each runtime, and speed-up over the baseline there.

    python benchmarks/runtimes.py                                    the pipelines with embedded data
    python benchmarks/runtimes.py pipelines/resnet20_cifar10.yaml    others, with data of their own
    ... --write docs/verification.md       puts the table between its markers

Each pipeline runs once; its file is then verified with each runtime as the target, on the whole evaluation split, with
blocks of calls of baseline and slim file in turn. A runtime that is not installed has no row.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from made import write_marked
from rows import ROOT, Row, measure

from compress.catalog import RUNTIME_PACKAGES
from compress.cli.console import Console
from compress.config.schema.verify import DeployConfig
from compress.cost.conditions import deploy_conditions
from compress.engine.keys import package_version

EMBEDDED = ("quickstart", "detection_shapes", "segmentation_shapes")
RUNTIMES = {"onnxruntime": "CPUExecutionProvider", "openvino": "CPU", "ncnn": "CPU", "litert": "CPU"}


def installed() -> list[str]:
    """Return the runtimes whose packages are installed."""
    return [name for name in RUNTIMES if all(package_version(one) for one in RUNTIME_PACKAGES.get(name, ()))]


def overrides(runtime: str) -> tuple[str, ...]:
    """Return the settings that make a runtime the target of `verify`, and leave out what is the same everywhere."""
    target = (f"stages.verify.runtime={runtime}", f"stages.verify.provider={RUNTIMES[runtime]}")
    return (
        *target,
        "stages.verify.robustness=null",
        "stages.verify.resources=null",
        "stages.verify.gates={parity: 0.001}",
    )


def line(pipeline: str, runtime: str, report: Any) -> str:
    """Return the row of a report, or of the message of a run that was refused."""
    version = deploy_conditions(DeployConfig(runtime=runtime, provider=RUNTIMES[runtime])).runtime
    head = f"| {pipeline} | {version} |"
    if isinstance(report, str):
        return f"{head} – | – | – | – | {report} |"
    slim, baseline, details = report["slim"], report["baseline"], report["details"]
    metric = (details["quality"].get("metric") or {}).get("name", "top1")
    checks = {check["name"]: check for check in report["verdict"]["checks"]}
    values = [f"{one['quality'][metric]:.4f}" for one in (baseline, slim)]
    parity = checks["parity"]["value"]
    times = [f"{one['latency_ms']['p50']:.3f}" for one in (baseline, slim)]
    return (
        f"{head} {metric} {values[0]} → {values[1]} | {parity:.1e} | {times[0]} → {times[1]} | "
        f"{1 / details['latency']['ratio']['value']:.2f}× | |"
    )


def table(rows: Sequence[str]) -> str:
    """Return the Markdown table."""
    head = "| pipeline | runtime | metric | parity with torch | ms, baseline → slim | speed-up | refused |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def main() -> None:
    """Parse the command line, run what is missing, print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="*", type=Path)
    parser.add_argument("--runtimes", nargs="+", choices=sorted(RUNTIMES), default=installed())
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--write", type=Path, help="Markdown file with the markers `runtimes`")
    arguments = parser.parse_args()
    pipelines = arguments.pipelines or [ROOT / "pipelines" / f"{name}.yaml" for name in EMBEDDED]
    console, rows = Console(), []
    for pipeline in pipelines:
        for runtime in arguments.runtimes:
            row = Row(runtime, overrides(runtime))
            report = measure("runtimes", pipeline, row, arguments.overrides, 0, arguments.runs_dir, console)
            rows.append(line(pipeline.stem, runtime, report))
            console.note(rows[-1])
    text = table(rows)
    if arguments.write is not None:
        names = " ".join(f"{one}" for one in arguments.pipelines)
        write_marked(arguments.write, text, "runtimes", f"python benchmarks/runtimes.py {names}".strip())
    print(text)


if __name__ == "__main__":
    main()
