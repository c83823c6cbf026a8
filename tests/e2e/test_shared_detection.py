"""A published detector has the precision that its author's file was measured to have, by the user's postprocess.

Files under the folder that `test_shared.py` describes: data/detection/FastestDet.onnx, fastestdet_coco.pth (the same
weights), and coco128.zip with 128 pictures and their boxes. Another scorer measured an AP50 of 32.08 % and an AP of
18.03 % on them.
"""

import os
from pathlib import Path

import fastestdet
import numpy as np
import pytest
import torch

from compress.checkpoint.rebuild import load_strict, read_weights
from compress.config.schema.verify import GatesFile
from compress.data.from_config import open_split
from compress.data.preprocessing import Preprocessing
from compress.pruning.trial import find_cuttable
from compress.tasks.from_config import open_task
from compress.verification.quality import predict
from compress.verification.runtimes.onnxruntime import OnnxRuntime

SHARED = Path(os.environ.get("COMPRESS_SHARED") or Path(__file__).parents[3] / "shared")
FOLDER = SHARED / "data" / "detection"
FILE, WEIGHTS, ARCHIVE = (FOLDER / name for name in ("FastestDet.onnx", "fastestdet_coco.pth", "coco128.zip"))

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(
        not all(path.is_file() for path in (FILE, WEIGHTS, ARCHIVE)),
        reason="the published detector and its pictures are not there: name their folder in COMPRESS_SHARED",
    ),
]


def test_the_published_weights_in_a_network_of_ones_own_give_what_the_authors_file_gives() -> None:
    network = fastestdet.FastestDet().eval()
    load_strict(network, read_weights(WEIGHTS, network.state_dict()), WEIGHTS.name)
    images = torch.rand(1, 3, fastestdet.SIDE, fastestdet.SIDE, generator=torch.Generator().manual_seed(0))
    with OnnxRuntime(FILE) as runtime, torch.no_grad():
        (wanted,) = runtime.run({runtime.signature.inputs[0].name: images.numpy()}).values()
        assert np.abs(network(images).numpy() - wanted).max() < 1e-4
    groups, _ = find_cuttable(network, images)
    assert {"backbone.first_conv.0", "SPP.Conv1x1.conv1x1.0"} <= set(groups)


def test_a_published_detector_has_its_precision() -> None:
    here = fastestdet.__file__
    given = GatesFile.model_validate(
        {
            "task": {"name": "detection", "postprocess": f"{here}:decode"},
            "evaluation": {"own": f"{here}:Coco128", "kwargs": {"archive": str(ARCHIVE)}},
        }
    )
    assert given.evaluation is not None
    split = open_split("evaluation", given.evaluation, Preprocessing(channels="BGR"), open_task(given.task))
    targets = split.read_targets(np.arange(len(split)))
    assert sum(len(target["labels"]) for target in targets) == 929
    with OnnxRuntime(FILE) as runtime:
        found = predict(runtime, split)
    assert found.metrics["map50"] == pytest.approx(0.3208, abs=0.005)
    assert found.metrics["map"] == pytest.approx(0.1803, abs=0.01)
