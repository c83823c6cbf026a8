"""Which ONNX files are slimmed without labels, on which images, and what are they then held to?

Images come out of the archives once. Those that are trained on, scored on and chosen by have no labels; where labels
are there, they are of other images, and only `compress verify` reads them, when everything is done.
"""

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx_networks import NETWORKS, ROOT, write_onnx

CIFAR_EVERY = 10  # of 50,000 training images
HELD_OUT = 5  # every fifth picture
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
RAW = {"scale": 1.0}
MOBILE = {"scale": 1.0, "mean": [128.0], "std": [128.0], "crop": [224, 224]}
FACES = {"scale": 1.0, "mean": [127.0], "std": [128.0], "resize": [240, 320]}
FASTEST = {"channels": "BGR", "resize": [352, 352]}
DETECTION = {"own": f"{ROOT / 'tests' / 'fastestdet.py'}:FastestDetection"}
TRAINING = {
    "cifar": {
        "epochs": 2,
        "augmentation": {"crop_padding": 4, "flip": True},
    },
    "imagenet": {"epochs": 2, "batch_size": 32, "learning_rate": 0.005},
    "distance": {"epochs": 2, "batch_size": 32, "optimizer": "adamw", "learning_rate": 0.0005},
}


@dataclass(frozen=True)
class Case:
    """One file, one budget.

    Attributes:
        name: Of the run.
        network: Name in `NETWORKS`, or the path of a file below the data.
        images: "cifar", "imagenet" or "coco".
        preprocessing: As in a pipeline.
        macs: Share of the MACs that is kept.
        gates: Of `verify`, on images without labels.
        task: What the network is for.
        labelled: The figure that labels allow for, where there are labels.
        training: Settings of `finetune` in the place of those of its kind of images.
    """

    name: str
    network: str
    images: str
    preprocessing: Mapping[str, Any]
    macs: float
    gates: Mapping[str, Any]
    task: Any = "classification"
    labelled: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def pipeline(self, file: Path, images: Path) -> dict[str, Any]:
        """Return the pipeline, label-free from beginning to end.

        Args:
            file: The ONNX file.
            images: Folder that `unpack_images` filled.
        """
        is_cifar = self.images == "cifar"
        seen = images / ("cifar_train.npy" if is_cifar else "imagenet_train")
        measured = {"cifar": "cifar_evaluation.npy", "imagenet": "imagenet_evaluation", "coco": "coco"}[self.images]
        taken, validation = (500, 500) if is_cifar else (256, 128)
        kind = self.images if self.task == "classification" else "distance"
        data = {
            "train": {"unlabelled": str(seen)},
            "evaluation": {"unlabelled": str(images / measured)},
            "calibration": taken,
            "validation": validation,
            "preprocessing": dict(self.preprocessing),
        }
        stages = [
            {"stage": "load", "model": {"onnx": str(file)}},
            {"stage": "prune", "target": {"macs": self.macs}, "score_images": taken},
            {"stage": "finetune", **TRAINING[kind], **self.training},
            {"stage": "export"},
            {"stage": "verify", "gates": dict(self.gates)},
        ]
        return {"name": self.name, "task": self.task, "threads": 1, "data": data, "stages": stages}

    def with_labels(self, images: Path) -> dict[str, Any]:
        """Return a file of gates for `compress verify`, which measures the figure that labels allow for."""
        if self.images == "cifar":
            source: dict[str, Any] = {"arrays": str(images / "cifar_test.npz")}
        else:
            source = {"yolo": str(images / "coco"), "images": str(images / "coco")}
        return {
            "task": self.task,
            "evaluation": source,
            "preprocessing": dict(self.preprocessing),
            "resources": None,
            "repeats": 20,
        }

    def write_file(self, data: Path, folder: Path) -> Path:
        """Return the ONNX file: the published one, or one that torch's exporter writes into a folder."""
        if self.network in NETWORKS:
            return write_onnx(self.network, data / "networks", folder / f"{self.network}.onnx")
        return data / self.network


def _cifar(network: str, preprocessing: Mapping[str, Any], macs: float, agreement: float, **training: Any) -> Case:
    gates, name = {"min": {"agreement": agreement}}, f"{network}_{macs:g}"
    return Case(name, network, "cifar", preprocessing, macs, gates, labelled="top1", training=training)


def _faces(macs: float, distance: float) -> Case:
    gates = {"max": {"distance": distance}}
    return Case(f"rfb_320_{macs:g}", "networks/version-RFB-320.onnx", "imagenet", FACES, macs, gates, "embedding")


def _boxes(macs: float, distance: float) -> Case:
    gates = {"max": {"distance": distance}}
    name = f"fastestdet_{macs:g}"
    training = {"epochs": 20, "batch_size": 8, "augmentation": {"crop_padding": 32, "flip": True}}
    return Case(name, "detection/FastestDet.onnx", "coco", FASTEST, macs, gates, DETECTION, "map50", training)


CASES = (
    _cifar("mlperf_tiny_resnet8", RAW, 0.7, 0.85, learning_rate=0.002),
    _cifar("resnet20", IMAGENET, 0.7, 0.9),
    _boxes(0.7, 1.0),
    _boxes(0.9, 1.0),
    _faces(0.7, 0.05),
    _cifar("resnet56", IMAGENET, 0.7, 0.9),
    Case("mobilenet_v2_0.7", "mobilenet_v2", "imagenet", MOBILE, 0.7, {"min": {"agreement": 0.8}}),
    _cifar("resnet20", IMAGENET, 0.5, 0.85),
    _faces(0.5, 0.05),
    _cifar("resnet56", IMAGENET, 0.5, 0.85),
)


def unpack_images(data: Path, folder: Path) -> None:
    """Write the images into a folder, once.

    Args:
        data: With `cifar10`, `imagenet_sample` and `detection`.
        folder: Is filled with arrays and folders of pictures.
    """
    if folder.is_dir():
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    train, test = (read_cifar(data / "cifar10" / f"cifar10_{half}.npz") for half in ("train", "test"))
    np.save(part / "cifar_train.npy", train[0][::CIFAR_EVERY])
    np.save(part / "cifar_evaluation.npy", test[0][::HELD_OUT])
    np.savez(part / "cifar_test.npz", x=test[0], y=test[1])
    with zipfile.ZipFile(data / "imagenet_sample" / "imagenet_crops256_q90.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        for place, name in enumerate(names):
            half = "imagenet_evaluation" if place % HELD_OUT == 0 else "imagenet_train"
            archive.extract(name, part / half)
    with zipfile.ZipFile(data / "detection" / "coco128.zip") as archive:
        archive.extractall(part / "coco")
    part.rename(folder)


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 32, 32, 3) uint8 and labels (N,) of a packed half.

    Pixels are differences along columns and rows, red and blue those to green; all modulo 256.
    """
    with np.load(path) as packed:
        red, blue = 1, 2
        planes = packed["q"].cumsum(-2, dtype=np.uint8).cumsum(-1, dtype=np.uint8)
        planes[[red, blue]] += planes[0]
        return planes[[red, 0, blue]].transpose(1, 2, 3, 0), packed["y"].astype(np.int64)
