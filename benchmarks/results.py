"""Make the result table of the README by running pipelines.

    python benchmarks/results.py                                      the quickstart and the ResNet-20 in milliseconds
    python benchmarks/results.py pipelines/quickstart.yaml            one of them
    python benchmarks/results.py --write README.md                    puts the table between its markers, with a mark

Runs are kept in a folder named after the digest of the package's source, so that a table never shows a run of another
source. Every value is read from a run's report.json: MACs and size of the file, top-1 of the ONNX file over the whole
evaluation split, latency of slim and baseline interleaved in one run. The CIFAR pipelines read arrays from the folder
that CIFAR10_ARRAYS names, or download them.
"""

import argparse
from pathlib import Path
from typing import Any

from made import source_digest, write_marked

from compress.cli.console import Console
from compress.config.load import load_pipeline
from compress.engine.runner import run

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = ("quickstart.yaml", "resnet20_latency.yaml")
HEADER = (
    "| pipeline | MACs | params | file | top-1 | latency p50 | verdict |",
    "|---|---|---|---|---|---|---|",
)


def row(report: dict[str, Any]) -> str:
    """Return one table row; a figure that was not measured is a dash."""
    before, after = report["baseline"], report["slim"]
    if not before or not after:
        return f"| {report['name']} | – | – | – | – | – | failed |"
    fewer = {key: f"{before[key] / after[key]:.2f}× fewer" for key in ("macs", "params")}
    size = f"{before['size_bytes'] / 1e6:.2f} → {after['size_bytes'] / 1e6:.2f} MB"
    quality = f"{100 * before['quality']['top1']:.2f} → {100 * after['quality']['top1']:.2f} %"
    old, new = before["latency_ms"]["p50"], after["latency_ms"]["p50"]
    latency = f"{old:.3f} → {new:.3f} ms ({old / new:.2f}×)"
    verdict = "passed" if report["verdict"]["passed"] else "failed"
    return f"| {report['name']} | {fewer['macs']} | {fewer['params']} | {size} | {quality} | {latency} | {verdict} |"


def conditions(report: dict[str, Any]) -> str:
    """Return where the latency was measured."""
    latency, machine = report["details"]["latency"], report["environment"]
    return (
        f"ONNX Runtime {machine['versions'].get('onnxruntime-gpu') or machine['versions'].get('onnxruntime')}, "
        f"{latency['provider']}, {latency['threads']} thread(s), batch {latency['batch_size']}, "
        f"{machine['cpu']}, {machine['cores']} cores"
    )


def write_between_markers(path: Path, text: str, name: str = "results") -> None:
    """Replace what stands between the markers of that name in a Markdown file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> None:
    """Parse the command line, run what is missing, print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="*", type=Path, default=[ROOT / "pipelines" / name for name in PIPELINES])
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--write", type=Path, help="Markdown file with the markers")
    arguments = parser.parse_args()

    folder = arguments.runs_dir / f"results-{source_digest()}"
    reports = [run(load_pipeline(path), folder, Console()).report for path in arguments.pipelines]
    places = sorted({conditions(report) for report in reports if report["slim"]})
    table = "\n".join([*HEADER, *(row(report) for report in reports), "", f"Measured with {'; '.join(places)}."])
    if arguments.write is not None:
        command = " ".join(
            ["python benchmarks/results.py", *(f"pipelines/{path.name}" for path in arguments.pipelines)]
        )
        write_marked(arguments.write, table, "results", command)
    print(table)


if __name__ == "__main__":
    main()
