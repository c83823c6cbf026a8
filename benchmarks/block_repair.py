"""Accuracy without training: repairs in closed form alone, and with block reconstruction behind them.

    python benchmarks/block_repair.py --data FOLDER --out FOLDER                 all rows
    ... --only resnet20 fastestdet_0.8                                             some of them
    ... --write docs/experiments/2026-11-30-block-repair.md                        puts the table between its markers

DATA holds `networks`, `detection`, `cifar10` and `imagenet_sample`, as benchmarks/onnx_cases.py names the files in
them. Each row is one pipeline, run twice in a process of its own with one thread: with the repairs in closed form,
and with `repair: blocks`. The cut is the same. No row sees labels before the file is measured; widths, repairs and
blocks are chosen by agreement with the original. Seconds are processor time, the difference of the two runs.
Results are kept in OUT/results.jsonl, and a row that is there is not measured again.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from made import source_digest, write_marked
from onnx_cases import DETECTION, FACES, FASTEST, IMAGENET, MOBILE, read_cifar
from onnx_networks import NETWORKS, ROOT, write_onnx
from PIL import Image

SHOWN = {"top1": "top-1", "map50": "AP50", "distance": "distance", "miou": "mIoU", "agreement": "agreement"}
HEADER = (
    "| network, images of the repair | MACs | figure | original | repairs in closed form | with blocks | CPU seconds |",
    "|---|---|---|---|---|---|---|",
)
SHORT = {"steps": 150, "batch_size": 16}
CLOSED = ("scaling", "least_squares", "bias_folding", "batch_norm")
Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One network and budget.

    Attributes:
        name: Of the row.
        model: Section `model` of `load`, or the name in `NETWORKS`, or an ONNX file below the data.
        macs: Kept share.
        images: Source of the images that are seen, and of those that are measured, below OUT/images.
        preprocessing: As in a pipeline.
        metric: Figure of the table.
        task: Of the pipeline.
        counts: Images of calibration and validation.
        words: First cell of the row.
        weights: Of a factory, below the data.
        repair: Settings of `block_repair`.
    """

    name: str
    model: Any
    macs: float
    images: tuple[Record, Record]
    preprocessing: Record
    metric: str
    words: str
    task: Any = "classification"
    counts: tuple[int, int] = (1000, 2000)
    weights: str | None = None
    repair: Record = field(default_factory=dict)

    def pipeline(self, data: Path, out: Path, has_blocks: bool) -> Record:
        """Return the pipeline."""
        seen, measured = ({key: _place(value, out) for key, value in one.items()} for one in self.images)
        model, weights = self.model, self.weights
        if isinstance(model, str):
            (out / "files").mkdir(parents=True, exist_ok=True)
            file = data / model
            if model in NETWORKS:
                file = write_onnx(model, data / "networks", out / "files" / f"{model}.onnx")
            model = {"onnx": str(file)}
        load: Record = {"stage": "load", "model": model}
        if weights is not None:
            load["weights"] = str(data / weights)
        prune: Record = {"stage": "prune", "target": {"macs": self.macs}, "score_images": min(512, self.counts[0])}
        prune["repair"] = [*CLOSED, *(["blocks"] if has_blocks else [])]
        if has_blocks and self.repair:
            prune["block_repair"] = self.repair
        section = {"train": seen, "evaluation": measured, "calibration": self.counts[0], "validation": self.counts[1]}
        verify = {"stage": "verify", "gates": {"parity": 0.01}, "resources": None, "robustness": None, "repeats": 20}
        name = f"{self.name}-{'blocks' if has_blocks else 'closed'}"
        stages = [load, prune, {"stage": "export"}, verify]
        return {
            "name": name, "task": self.task, "threads": 1,
            "data": {**section, "preprocessing": self.preprocessing}, "stages": stages,
        }  # fmt: skip


def _place(value: str, out: Path) -> str:
    return str(out / "images" / value)


def _cifar(depth: int, macs: float) -> Row:
    model = {"factory": f"{ROOT / 'models' / 'cifar_resnet' / 'model.py'}:resnet", "kwargs": {"depth": depth}}
    weights = {20: "networks/resnet20-12fca82f.th", 56: "networks/resnet56-4bfd9763.th"}[depth]
    images = ({"unlabelled": "cifar_train.npy"}, {"arrays": "cifar_test.npz"})
    return Row(
        f"resnet{depth}", model, macs, images, IMAGENET, "top1",
        f"ResNet-{depth}, CIFAR-10, 50,000 unlabelled images", weights=weights,
    )  # fmt: skip


def _boxes(macs: float, crops: bool) -> Row:
    seen = {"unlabelled": "imagenet_half" if crops else "coco_half"}
    words = "500 ImageNet crops" if crops else "64 pictures of COCO"
    name = f"fastestdet_{macs:g}_{'crops' if crops else 'coco'}"
    counts = (256, 128) if crops else (32, 16)
    return Row(
        name, "detection/FastestDet.onnx", macs, (seen, {"yolo": "coco_rest", "images": "coco_rest"}), FASTEST,
        "map50", f"FastestDet, {words}", DETECTION, counts,
    )  # fmt: skip


ROWS = (
    _cifar(20, 0.508),
    _cifar(56, 0.5),
    Row("mobilenet_v2_0.7", "mobilenet_v2", 0.7, ({"unlabelled": "imagenet_half"}, {"arrays": "imagenet_rest.npz"}),
        MOBILE, "top1", "MobileNetV2, 500 ImageNet pictures, 150 steps of 16", counts=(300, 150), repair=SHORT),
    _boxes(0.9, True),
    _boxes(0.8, True),
    _boxes(0.7, True),
    _boxes(0.8, False),
    _boxes(0.7, False),
    Row("rfb_320_0.7", "networks/version-RFB-320.onnx", 0.7,
        ({"unlabelled": "imagenet_half"}, {"unlabelled": "imagenet_rest"}), FACES, "distance",
        "RFB-320 (faces), 500 ImageNet pictures, 150 steps of 16", "embedding", (256, 128), repair=SHORT),
)  # fmt: skip


def unpack_images(data: Path, folder: Path) -> None:
    """Write the images into a folder, once: halves of the pictures without labels, the rest with labels."""
    if folder.is_dir():
        return
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    train, test = (read_cifar(data / "cifar10" / f"cifar10_{half}.npz") for half in ("train", "test"))
    np.save(part / "cifar_train.npy", train[0])
    np.savez(part / "cifar_test.npz", x=test[0], y=test[1])
    with zipfile.ZipFile(data / "imagenet_sample" / "imagenet_crops256_q90.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        for place, name in enumerate(names):
            archive.extract(name, part / ("imagenet_rest" if place % 2 else "imagenet_half"))
        rest = names[1::2]
        pictures = [np.asarray(Image.open(part / "imagenet_rest" / name).convert("RGB")) for name in rest]
        np.savez(
            part / "imagenet_rest.npz", x=np.stack(pictures), y=np.array([1 + int(name[:3]) for name in rest])
        )  # 0 is the background
    with zipfile.ZipFile(data / "detection" / "coco128.zip") as archive:
        pictures_of_coco = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        for place, name in enumerate(pictures_of_coco):
            target = part / ("coco_rest" if place % 2 else "coco_half")
            archive.extract(name, target)
            if place % 2 and name.replace(".jpg", ".txt") in archive.namelist():
                archive.extract(name.replace(".jpg", ".txt"), target)
    part.rename(folder)


def measure(row: Row, data: Path, out: Path) -> Record:
    """Run both pipelines and return what the table needs."""
    found: Record = {"row": row.name, "source": source_digest(), "made": date.today().isoformat()}
    for kind in ("closed", "blocks"):
        values = row.pipeline(data, out, kind == "blocks")
        file = out / "pipelines" / f"{values['name']}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "compress", "run", str(file), "--runs-dir", str(out / "runs")]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        log = out / "logs" / f"{values['name']}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as said:
            subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, env=environ, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads((out / "runs" / values["name"] / "report.json").read_text(encoding="utf-8"))
        prune = next(stage for stage in report["stages"] if stage["stage"] == "prune")
        found[kind] = {
            "seconds": after.ru_utime - before.ru_utime,
            "figure": report["slim"]["quality"][row.metric],
            "repairs": prune["record"]["repairs"],
        }
        found |= {
            "original": report["baseline"]["quality"][row.metric],
            "macs": report["slim"]["macs"] / report["baseline"]["macs"],
        }
    return found


def line(row: Row, found: Record) -> str:
    """Return one row of the table."""
    is_share = row.metric != "distance"

    def show(value: float) -> str:
        return f"{100 * value:.1f} %" if is_share else f"{value:.4f}"

    seconds = found["blocks"]["seconds"] - found["closed"]["seconds"]
    cells = (
        row.words, f"{found['macs']:.3f}", SHOWN[row.metric], show(found["original"]),
        show(found["closed"]["figure"]), show(found["blocks"]["figure"]), f"{seconds:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse the command line, run what is missing, print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[], choices=[row.name for row in ROWS])
    parser.add_argument("--no-run", action="store_true", help="table of what is measured")
    parser.add_argument("--write", type=Path, help="Markdown file with the markers")
    arguments = parser.parse_args()
    data, out = arguments.data.absolute(), arguments.out.absolute()
    results = out / "results.jsonl"
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    known = {found["row"]: found for found in map(json.loads, lines)}
    for row in ROWS:
        if row.name in known or arguments.no_run or (arguments.only and row.name not in arguments.only):
            continue
        unpack_images(data, out / "images")
        known[row.name] = measure(row, data, out)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known[row.name]) + "\n")
        print(line(row, known[row.name]), flush=True)
    table = "\n".join([*HEADER, *(line(row, known[row.name]) for row in ROWS if row.name in known)])
    print(table)
    if arguments.write is not None:
        sources = ", ".join(sorted({found["source"] for found in known.values()}))
        command = "python benchmarks/block_repair.py --data FOLDER --out FOLDER"
        write_marked(arguments.write, table, "block-repair", command, source=sources)


if __name__ == "__main__":
    main()
