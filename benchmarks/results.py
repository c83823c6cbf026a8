"""Result table of the README: five pipelines, run and measured.

    python benchmarks/results.py --weights resnet56_latency=FILE      all five; FILE: published ResNet-56 (resnet56.th)
    python benchmarks/results.py pipelines/quickstart.yaml            one of them
    ... --write README.md                                             puts the table between its markers, with a mark

Four pipelines need only their data: their weights are in the repository. ResNet-56 needs the widely published weights.
A pipeline whose weights are missing is refused before anything is measured.

Runs are kept in a folder named after the digest of the package's source, so that a table never shows a run of another
source. Every value is read from a run's report.json: MACs and size of the file, top-1 of the ONNX file over the whole
evaluation split, latency of slim and baseline interleaved in one run. The CIFAR pipelines read arrays from the folder
that CIFAR10_ARRAYS names, or download them.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from made import source_digest, write_marked

from compress.cli.console import Console
from compress.config.load import Pipeline, load_pipeline
from compress.engine.runner import run

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = (
    "quickstart.yaml",  # channels by MACs
    "quickstart_int8.yaml",  # and INT8
    "resnet20_latency.yaml",  # channels and blocks by milliseconds
    "resnet20_low_rank.yaml",  # ranks by MACs
    "resnet56_latency.yaml",  # channels and blocks by milliseconds, published weights
)
HEADER = (
    "| pipeline | MACs | params | file | top-1 | latency p50 | verdict |",
    "|---|---|---|---|---|---|---|",
)


def row(report: dict[str, Any]) -> str:
    """Return one table row; a value that was not measured is a dash."""
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


def weights_of(given: Sequence[str]) -> dict[str, str]:
    """Return pipeline name -> absolute path of its weights, from NAME=FILE.

    Raises:
        ValueError: An entry has no name or no file.
    """
    named = {}
    for entry in given:
        name, _, file = entry.partition("=")
        if not name or not Path(file).is_file():
            raise ValueError(f"--weights must be PIPELINE=FILE with an existing file, got '{entry}'.")
        named[name] = str(Path(file).resolve())
    return named


def load(path: Path, weights: Mapping[str, str]) -> Pipeline:
    """Return a pipeline with its own weights or the given ones.

    Raises:
        ValueError: The file of its weights is missing.
    """
    given = weights.get(path.stem)
    pipeline = load_pipeline(path, [] if given is None else [f"stages.load.weights={given}"])
    file = Path(pipeline.resolved["stages"][0]["weights"])
    if not file.is_file():
        raise ValueError(f"{path.name} needs weights, '{file}' does not exist. Hint: --weights {path.stem}=FILE")
    return pipeline


def main() -> None:
    """Parse the command line, run the missing pipelines, print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="*", type=Path, default=[ROOT / "pipelines" / name for name in PIPELINES])
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--weights", action="append", default=[], metavar="PIPELINE=FILE", help="published weights")
    parser.add_argument("--write", type=Path, help="Markdown file with the markers")
    arguments = parser.parse_args()
    try:
        weights = weights_of(arguments.weights)
        pipelines = [load(path, weights) for path in arguments.pipelines]
    except ValueError as error:
        parser.error(str(error))

    folder = arguments.runs_dir / f"results-{source_digest()}"
    reports = [run(pipeline, folder, Console()).report for pipeline in pipelines]
    places = sorted({conditions(report) for report in reports if report["slim"]})
    table = "\n".join([*HEADER, *(row(report) for report in reports), "", f"Measured with {'; '.join(places)}."])
    if arguments.write is not None:
        names = [f"pipelines/{path.name}" for path in arguments.pipelines]
        command = " ".join(["python benchmarks/results.py", *(names if len(names) < len(PIPELINES) else ())])
        write_marked(arguments.write, table, "results", command)
    print(table)


if __name__ == "__main__":
    main()
