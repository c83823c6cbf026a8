"""The example in a bundle's README turns images into the network's input as the pipeline does."""

import itertools
from typing import Any

import numpy as np
import pytest

from compress.data.preprocessing import Preprocessing
from compress.handoff.readme import example

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
