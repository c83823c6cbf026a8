"""Slimming for INT8: quantisation alone, next to networks that are slimmed and quantised at the same latency.

    python benchmarks/int8_budgets.py --data FOLDER --out FOLDER                 all networks
    ... --only quickstart resnet20                                                 some of them
    ... --write docs/experiments/2026-11-30-int8-budgets.md                        puts the table between its markers

DATA holds `networks`, `cifar10` and `imagenet_sample`, as benchmarks/block_repair.py names the files in them. Rows:

    INT8 alone                   the baseline, quantised
    float, as fast               slimmed in float until it takes as long as INT8 alone
    INT8, widths by float time   slimmed by a float budget, then quantised; its budget is corrected once, so that the
                                 INT8 file takes about as long as the next row's
    INT8, widths by INT8 time    `deploy.precision: int8`
    INT8, trained for it         the same, with `quantization_aware`; only for networks that are trained

At the end the files of all rows are timed side by side with INT8 alone, one thread, batch 1. Results are kept in
OUT/int8.jsonl, and a network that is there is not measured again. Nothing is chosen on the evaluation images.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from block_repair import ROWS as UNLABELLED
from block_repair import unpack_images
from made import source_digest, write_marked
from rows import ROOT

from compress.cli.console import Console
from compress.config.load import Pipeline, load_pipeline
from compress.config.schema.task import DEFAULT_TASK
from compress.data.from_config import Splits
from compress.engine.runner import run
from compress.tasks.from_config import open_task
from compress.verification.measurement import Conditions, time_files

Record = dict[str, Any]
HEADER = ("| network | row | top-1 | latency, of INT8 alone | MACs kept | size (MB) |", "|---|---|---|---|---|---|")
CONDITIONS = Conditions(repeats=200)
ALONE, AS_FAST, BY_FLOAT, BY_INT8, TRAINED = (
    "INT8 alone", "float, as fast", "INT8, widths by float time", "INT8, widths by INT8 time", "INT8, trained for it",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        name: Of the network.
        words: First cell of its rows.
        kept: Share of the latency of INT8 alone.
        epochs: Of training; 0 for none.
        quantize: Settings of the stage `quantize`.
    """

    name: str
    words: str
    kept: float
    epochs: float
    quantize: Record

    def values(self, data: Path, out: Path) -> Record:
        """Return a pipeline with load, prune, perhaps finetune, export and verify."""
        if self.name == "mobilenet_v2":
            unpack_images(data, out / "images")
            row = next(row for row in UNLABELLED if row.name == "mobilenet_v2_0.7")
            return row.pipeline(data, out, has_blocks=False)
        file = {"quickstart": "quickstart.yaml", "resnet20": "resnet20_cifar10.yaml"}[self.name]
        weights = {"resnet20": [f"stages.load.weights={data / 'networks' / 'resnet20-12fca82f.th'}"]}
        values = load_pipeline(ROOT / "pipelines" / file, weights.get(self.name, [])).resolved
        kept = [plain(stage) for stage in values["stages"] if self.epochs or stage["stage"] != "finetune"]
        return {**plain(values), "stages": kept}

    def pipeline(self, row: str, kept: float, data: Path, out: Path) -> Pipeline:
        """Return the pipeline of a row with a latency budget."""
        values = self.values(data, out)
        stages: list[Record] = []
        for stage in values["stages"]:
            if stage["stage"] == "prune":
                stage |= {"target": {"latency": kept}}
            if stage["stage"] == "finetune":
                stage |= {"epochs": self.epochs, "quantization_aware": 0.5 if row == TRAINED else 0.0}
            if stage["stage"] == "verify":
                stage = {"stage": "verify", "gates": {"parity": 0.01}, "warmup": 1, "repeats": 5, "resources": None}
                stage |= {"robustness": None}
                stages += [] if row == AS_FAST else [{"stage": "quantize", **self.quantize}]
            stages.append(stage)
        slug = "".join(letter if letter.isalnum() else "-" for letter in row)
        values |= {
            "name": f"{self.name}-{slug}-{kept:.3f}", "stages": stages, "threads": 1,
            "deploy": {"precision": "int8" if row in (BY_INT8, TRAINED) else "fp32", "threads": 1, "batch_size": 1},
        }  # fmt: skip
        path = out / "pipelines" / f"{values['name']}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return load_pipeline(path, [])


NETWORKS = (
    Network("quickstart", "quickstart, 1 epoch", 0.6, 1, {}),
    Network("resnet20", "ResNet-20, CIFAR-10, 2 epochs", 0.85, 2, {}),
    Network("mobilenet_v2", "MobileNetV2, 500 ImageNet pictures, no training, unlabelled", 0.85, 0, {"images": 256}),
)


def plain(value: Any) -> Any:
    """Return values as they may stand in a pipeline file, without settings that are not given."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if one is not None}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def measure(network: Network, data: Path, out: Path) -> Record:
    """Run the pipelines of a network and return its rows."""
    console = Console()

    def made(row: str, kept: float) -> tuple[Record, Path, Path]:
        pipeline = network.pipeline(row, kept, data, out)
        run(pipeline, out / "runs", console)
        folder = out / "runs" / pipeline.config.name
        report, lock = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("report.json", "lock"))
        return report, folder / "model.onnx", out / "runs" / ".store" / lock["stages"][-2]["key"]

    by_int8, file, stored = made(BY_INT8, network.kept)
    int8_baseline, whole = stored / "int8_baseline.onnx", stored / "reference" / "baseline.onnx"
    config = load_pipeline(out / "pipelines" / f"{by_int8['name']}.yaml", []).config
    splits = Splits(config.data, open_task(DEFAULT_TASK))

    def ratio(path: Path) -> Any:
        files = {"file": path, "alone": int8_baseline}
        return time_files(files, splits.calibration, CONDITIONS, console).ratio

    files, reports = {BY_INT8: file}, {BY_INT8: by_int8}
    reports[AS_FAST], files[AS_FAST], _ = made(AS_FAST, min(0.98, 1 / ratio(whole).value))
    _, path, _ = made(BY_FLOAT, network.kept)
    corrected = network.kept * ratio(file).value / ratio(path).value
    reports[BY_FLOAT], files[BY_FLOAT], _ = made(BY_FLOAT, min(0.98, corrected))
    if network.epochs:
        reports[TRAINED], files[TRAINED], _ = made(TRAINED, network.kept)
    alone = next(check for check in by_int8["verdict"]["checks"] if check["name"] == "int8_alone")
    rows = {ALONE: {"top1": by_int8["slim"]["quality"]["top1"] - alone["value"], "ratio": None, "macs": 1.0,
                    "bytes": int8_baseline.stat().st_size}}  # fmt: skip
    for row, report in reports.items():
        found = ratio(files[row])
        rows[row] = {
            "top1": report["slim"]["quality"]["top1"],
            "ratio": [found.value, found.low, found.high],
            "macs": report["slim"]["macs"] / report["baseline"]["macs"],
            "bytes": files[row].stat().st_size,
        }
    speed = ratio(whole)
    rows["float baseline"] = {
        "top1": by_int8["baseline"]["quality"]["top1"], "macs": 1.0, "bytes": whole.stat().st_size,
        "ratio": [speed.value, speed.low, speed.high],
    }  # fmt: skip
    return {"network": network.name, "source": source_digest(), "made": date.today().isoformat(), "rows": rows}


def lines(network: Network, found: Record) -> Iterator[str]:
    """Yield the lines of the table."""
    for row in ("float baseline", ALONE, AS_FAST, BY_FLOAT, BY_INT8, TRAINED):
        values = found["rows"].get(row)
        if values is None:
            continue
        times = "1" if values["ratio"] is None else "{:.3f} ({:.3f} to {:.3f})".format(*values["ratio"])
        cells = (
            network.words, row, f"{100 * values['top1']:.2f} %", times, f"{values['macs']:.3f}",
            f"{values['bytes'] / 1e6:.2f}",
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse the command line, measure what is missing, print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[], choices=[network.name for network in NETWORKS])
    parser.add_argument("--no-run", action="store_true", help="table of what is measured")
    parser.add_argument("--write", type=Path, help="Markdown file with the markers")
    arguments = parser.parse_args()
    data, out = arguments.data.absolute(), arguments.out.absolute()
    results = out / "int8.jsonl"
    known: dict[str, Record] = {}
    if results.is_file():
        known = {one["network"]: one for one in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    for network in NETWORKS:
        is_wanted = not arguments.only or network.name in arguments.only
        if network.name in known or arguments.no_run or not is_wanted:
            continue
        known[network.name] = measure(network, data, out)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known[network.name]) + "\n")
        print("\n".join(lines(network, known[network.name])), flush=True)
    found = [line for network in NETWORKS if network.name in known for line in lines(network, known[network.name])]
    table = "\n".join([*HEADER, *found])
    print(table)
    if arguments.write is not None:
        sources = ", ".join(sorted({one["source"] for one in known.values()}))
        command = "python benchmarks/int8_budgets.py --data FOLDER --out FOLDER"
        write_marked(arguments.write, table, "int8-budgets", command, source=sources)


if __name__ == "__main__":
    main()
