"""What a bundle says of its model is so: the example preprocesses as the pipeline, checks are counted by their file."""

import itertools
from typing import Any

import numpy as np
import onnx
import pytest

from compress.bundle.describe import name_precision, without_folders
from compress.bundle.readme import count_checks, example
from compress.data.preprocessing import Preprocessing
from compress.report.model import Check

COLOURED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def lines_of(preprocessing: Preprocessing, batch: int | str = "batch") -> list[str]:
    signature = {
        "inputs": [{"name": "images", "shape": [batch, 3, 8, 6], "dtype": "float32"}],
        "outputs": [{"name": "logits", "shape": [batch, 4], "dtype": "float32"}],
    }
    return example({"preprocessing": preprocessing.to_dict(), "signature": signature}).splitlines()


class Session:
    """Remembers what it is given."""

    given: np.ndarray

    def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert (outputs, list(inputs)) == (["logits"], ["images"])
        Session.given = inputs["images"]
        return [np.zeros((len(inputs["images"]), 4))]


@pytest.mark.parametrize(
    ("layout", "channels", "values"),
    [
        *itertools.product(("NCHW", "NHWC"), ("RGB", "BGR"), (COLOURED, {"mean": (0.5,), "std": (0.25,)})),
        ("NCHW", "L", {"mean": (0.1307,), "std": (0.3081,), "scale": 1.0}),
        ("NHWC", "L", {}),
    ],
)
def test_the_example_preprocesses_as_the_pipeline(layout: str, channels: str, values: dict[str, Any]) -> None:
    preprocessing = Preprocessing(layout=layout, channels=channels, **values)
    shape = (3, 8, 6, 1 if channels == "L" else 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    lines = lines_of(preprocessing)
    assert len(lines) == 5
    exec("\n".join(lines[2:3] + lines[4:]), {"np": np, "images": images, "session": Session()})
    assert Session.given.dtype == np.float32
    np.testing.assert_array_equal(Session.given, preprocessing.normalize(images))


def test_the_example_takes_as_many_images_as_a_fixed_batch() -> None:
    assert '["images"][:4]  #' in lines_of(Preprocessing(), batch=4)[1]
    assert '["images"]  #' in lines_of(Preprocessing())[1]


def test_checks_are_counted_by_the_file_that_they_were_made_on() -> None:
    names = ("structure", "macs_agree", "weights_agree", "parity", "parity_edges", "baseline_agrees")
    checks = [Check(name=name, status="pass") for name in names]
    skipped = [Check(name="reference_evaluator", status="skipped")]
    assert count_checks(checks + skipped) == "5 checks on this file, 1 on the baseline"
    checks += [Check(name="quantized_agreement", status="pass")]
    assert count_checks(checks + skipped) == (
        "2 checks on this file, 4 on the float file that it was quantised from, 1 on the baseline"
    )
    assert count_checks(checks[:1]) == "1 check on this file"


def test_a_file_is_called_after_the_coarsest_precision_in_it() -> None:
    def model(dtype: type, *operators: str) -> onnx.ModelProto:
        weights = onnx.numpy_helper.from_array(np.zeros(2, dtype), "w")
        nodes = [onnx.helper.make_node(name, ["x"], ["y"]) for name in operators]
        return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], [weights]))

    assert name_precision(model(np.float32, "Conv")) == "fp32"
    assert name_precision(model(np.float16, "Conv")) == "fp16"
    assert name_precision(model(np.float16, "Conv", "QuantizeLinear")) == "int8"


@pytest.mark.parametrize(
    ("said", "cut"),
    [
        ("Unable to open: /home/me/x/model.onnx. This and/or that", "Unable to open: model.onnx. This and/or that"),
        ("'/home/a b/net.onnx' and '/srv/net.onnx' must be", "'net.onnx' and 'net.onnx' must be"),
        ("C:\\Users\\me\\net.onnx; 'D:/a b/net.onnx'", "net.onnx; 'net.onnx'"),
        ("failed:/src/me/a.cc, data:/srv/me/a.npz", "failed:a.cc, data:a.npz"),
        ("file:///home/me/net.onnx", "file://net.onnx"),
        ("\\\\server\\share\\net.onnx", "net.onnx"),
        ("https://host/a/net.onnx, 3 images/s, 1/2, +/- 2", "https://host/a/net.onnx, 3 images/s, 1/2, +/- 2"),
    ],
)
def test_paths_in_sentences_are_cut(said: str, cut: str) -> None:
    assert without_folders({"checks": [{"detail": said, "value": None}]}, is_text=True) == {
        "checks": [{"detail": cut, "value": None}]
    }
