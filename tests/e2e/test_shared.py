"""Published weights and a whole published data set, where they are at hand.

The environment variable COMPRESS_SHARED names a folder that holds

    data/networks/resnet20-12fca82f.th      the widely used CIFAR-10 ResNet-20, published top-1 91.73 %
    data/cifar10/cifar10_test.npz           all 10,000 test images, packed: q uint8 (3, N, 32, 32), y uint8 (N,)

Without it a folder `shared` beside the repository is tried; without that the tests are skipped.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smallrun
import yaml

from compress.config.load import load_pipeline
from compress.engine.runner import run

SHARED = Path(os.environ.get("COMPRESS_SHARED") or Path(__file__).parents[3] / "shared")
WEIGHTS = SHARED / "data" / "networks" / "resnet20-12fca82f.th"
IMAGES = SHARED / "data" / "cifar10" / "cifar10_test.npz"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(
        not (WEIGHTS.is_file() and IMAGES.is_file()),
        reason=f"{WEIGHTS.name} and {IMAGES.name} are not there: name their folder in COMPRESS_SHARED",
    ),
]


def unpack(path: Path) -> dict[str, np.ndarray]:
    """Undo the packing: running sums along rows and columns, then red and blue are differences to green."""
    with np.load(path) as packed:
        planes = np.cumsum(packed["q"], axis=-2, dtype=np.uint8)
        planes = np.cumsum(planes, axis=-1, dtype=np.uint8)
        green, red, blue = planes[0], planes[1] + planes[0], planes[2] + planes[0]
        return {"x": np.stack([red, green, blue], -1), "y": packed["y"].astype(np.int64)}


def test_published_resnet20_reaches_its_published_top1_as_an_onnx_file(tmp_path: Path) -> None:
    arrays = unpack(IMAGES)
    assert hashlib.sha256(arrays["x"].tobytes()).hexdigest().startswith("52a9dc125982c044")
    np.savez(tmp_path / "test.npz", **arrays)
    values: dict[str, Any] = yaml.safe_load((smallrun.ROOT / "pipelines" / "resnet20_cifar10.yaml").read_text("utf-8"))
    del values["data"]["array_folder_env"]
    source = {"arrays": "test.npz"}  # nothing is trained here, so the training source does not matter
    values["data"] |= {"train": source, "evaluation": source, "calibration": 64, "validation": 64}
    load = values["stages"][0] | {"weights": str(WEIGHTS)}
    load["model"]["factory"] = f"{smallrun.ROOT / 'models' / 'cifar_resnet' / 'model.py'}:resnet"
    verify = {"stage": "verify", "warmup": 2, "repeats": 20, "gates": {"max_drop": {"top1": 0.0}, "parity": 1e-3}}
    values["stages"] = [load, {"stage": "export"}, verify]
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    outcome = run(load_pipeline(tmp_path / "published.yaml", environ={}), tmp_path / "runs")

    assert outcome.verdict.passed
    for side in ("baseline", "slim"):
        assert outcome.report[side]["quality"]["top1"] == pytest.approx(0.9173, abs=0.0005)
        assert outcome.report[side]["macs"] == 40_551_040
