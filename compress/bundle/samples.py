"""Sample images of a bundle, with the expected outputs of the model.

The images are spread evenly over the evaluation split. The outputs are those of the ONNX file in ONNX Runtime on a CPU
with one thread, so that the same run yields the same outputs on the same kind of machine.
"""

import io
from pathlib import Path

import numpy as np

from compress.bundle.check import build_archive, expected_name
from compress.data.splits import Split
from compress.errors import ConfigError
from compress.tasks.outputs import each
from compress.verification.quality import check_labels, classifier_width, classify, image_input, respond
from compress.verification.runtimes.onnxruntime import OnnxRuntime

_BATCH = 16


def make_samples(path: Path, evaluation: Split, count: int, is_classifier: bool = True) -> dict[str, np.ndarray]:
    """Return sample images with their inputs, expected outputs, and the labels of a classifier.

    Args:
        path: The .onnx file.
        evaluation: Evaluation split of at least one image.
        count: Number of images; all images of a smaller split. Rounded up to full batches for a fixed batch size.
        is_classifier: Whether the network has one output with a value for each class.

    Returns:
        images: (N, H, W, C) uint8, after resizing and cropping, or fitted into a letterbox.
        inputs: (N, ...) float32, inputs of the network.
        labels: (N,) int64 of a classifier.
        expected: (N, ...) float32, first output of the network; `expected_1` and so on for further outputs.

    Raises:
        ModelError, NonFinite: The network is no classifier, or fails on an image.
        DataError: A label is out of the network's range of classes.
    """
    with OnnxRuntime(path) as runtime:
        spec = image_input(runtime)
        if is_classifier:
            check_labels(evaluation, classifier_width(runtime))
        fixed = spec.shape[0] if isinstance(spec.shape[0], int) else None
        split = evaluation.first(count)
        positions = np.arange(len(split) if fixed is None else -(-len(split) // fixed) * fixed) % len(split)
        images = split.read(positions)
        inputs = split.preprocessing.normalize(images)
        step = fixed or _BATCH
        call = classify if is_classifier else respond
        outputs = [each(call(runtime, inputs[start : start + step])) for start in range(0, len(inputs), step)]
    return {
        "images": np.ascontiguousarray(images),
        "inputs": inputs,
        **({"labels": split.labels[positions]} if is_classifier else {}),
        **{expected_name(place): np.concatenate(parts) for place, parts in enumerate(zip(*outputs, strict=True))},
    }


def pack_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    """Return a reproducible .npz; numpy's own files contain the time.

    Raises:
        ConfigError: The arrays are too large.
    """
    members = {}
    for name, array in arrays.items():
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.ascontiguousarray(little), version=(1, 0), allow_pickle=False)
        members[f"{name}.npy"] = stream.getvalue()
    if sum(map(len, members.values())) > 2**30:
        raise ConfigError("Samples must take at most 1 GiB.", hint="Give a smaller number to --samples.")
    return build_archive(members)
