"""Diagnosis of a classifier that gets too few images right: another order of classes, other usual preprocessing.

The images only explain a fault to the user; no choice of a run depends on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from compress.data.batches import evaluation_batches, fast_batch_size
from compress.data.preprocessing import Preprocessing
from compress.data.splits import Split
from compress.model.modes import eval_mode
from compress.search.validation import chance_warning
from compress.tasks.classification import Classification
from compress.training.evaluate import run

IMAGES = 400  # images that a baseline is judged by before a run
_BYTE = Preprocessing().scale
_ONE, _HALF = (1.0,), (0.5,)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GREY = ((0.1307,), (0.3081,))  # of MNIST
_LEAST_SHARE, _LEAST_GAIN, _SIGNIFICANCE = 0.6, 0.05, 0.001
_SHOWN = 4


@dataclass(frozen=True)
class Normalization:
    """Arithmetic half of a preprocessing.

    Attributes:
        scale: Factor of the uint8 values.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        channels: "RGB", "BGR" or "L".
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str

    @property
    def words(self) -> str:
        """Settings of `data.preprocessing` that differ from their defaults, mean and std always."""
        scale = "" if self.scale == _BYTE else f"scale {self.scale:g}, "
        order = ", channels BGR" if self.channels == "BGR" else ""
        return f"{scale}mean {_numbers(self.mean)}, std {_numbers(self.std)}{order}"


def usual_normalizations(is_grey: bool) -> list[Normalization]:
    """Return the normalisations that networks are usually trained with, ImageNet's or 0.5 first."""
    channels = "L" if is_grey else "RGB"
    shared = [(_BYTE, (0.0,), _ONE), (1.0, (0.0,), _ONE)]
    if is_grey:
        chosen = [(_BYTE, _HALF, _HALF), (_BYTE, *_GREY), *shared]
        return [Normalization(*values, channels) for values in chosen]
    found = [Normalization(_BYTE, *_IMAGENET, channels)]
    found += [Normalization(*values, channels) for values in ((_BYTE, _HALF, _HALF), *shared)]
    return [*found, *(replace(values, channels="BGR") for values in found[:1])]


def with_normalization(split: Split, values: Normalization) -> Split:
    """Return a split whose images are normalised in another way."""
    changed = replace(split.preprocessing, **vars(values))
    return replace(split, preprocessing=changed)


def describe_baseline(module: nn.Module, split: Split) -> list[str]:
    """Return warnings about a classifier that is at chance level, or whose classes have another order.

    Args:
        module: The network; its training flags are restored.
        split: Evaluation images; other tasks than classification have no warnings.
    """
    if not isinstance(split.task, Classification):
        return []
    predicted, labels = predict_classes(module, split)
    warning = chance_warning(float((predicted == labels).mean()), split)
    reason = describe_other_order(predicted, labels, split.source.classes)
    if warning is not None and reason is None:
        reason = describe_other_normalization(module, split)
    return [text for text in (warning, reason) if text is not None]


@torch.no_grad()
def predict_classes(module: nn.Module, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) predicted and (N,) labelled class indices."""
    predicted, labels = [], []
    with eval_mode(module):
        for images, targets in evaluation_batches(split, fast_batch_size(split), "task"):
            predicted.append(run(module, images).argmax(1).cpu().numpy())
            labels.append(np.asarray(targets))
    return np.concatenate(predicted), np.concatenate(labels)


def describe_other_order(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str | None:
    """Return a sentence if the labels fit the network's outputs far better in another order, else None.

    Args:
        predicted: (N,) predicted class indices.
        labels: (N,) class indices of the data.
        names: Class names of the data, or ().
    """
    from scipy.optimize import linear_sum_assignment  # scipy takes a second to import
    from scipy.stats import binomtest

    size = int(max(predicted.max(), labels.max())) + 1
    counts = np.zeros((size, size), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    rows, columns = linear_sum_assignment(2 * counts + np.eye(size, dtype=np.int64), maximize=True)  # ties: as it is
    before, after, images = int(np.trace(counts)), int(counts[rows, columns].sum()), len(labels)
    gain = (after - before) / images
    is_shown = binomtest(after, images, min(1.0, before / images), alternative="greater").pvalue <= _SIGNIFICANCE
    if after < _LEAST_SHARE * images or gain < _LEAST_GAIN or not is_shown:
        return None
    moved = [(row, column) for row, column in zip(rows, columns, strict=True) if row != column and counts[row, column]]
    shown = ", ".join(f"{_class_name(row, names)} as output {column}" for row, column in moved[:_SHOWN])
    more = f" and {len(moved) - _SHOWN} more" if len(moved) > _SHOWN else ""
    order = np.argsort(columns)  # output -> label
    named = [str(names[row]) for row in rows[order]] if size == len(names) else ["..."]
    return (
        f"The network probably has another order of classes: {after} of {images} images are right with "
        f"{shown}{more}, {before} as they are. Name the order of the training beside each folder: "
        f"classes: [{', '.join(named)}]."
    )


def describe_other_normalization(module: nn.Module, split: Split) -> str | None:
    """Return a sentence if the network is far better with another usual normalisation, else None."""
    own = split.preprocessing
    if own.channels not in ("RGB", "L") or split.read(np.zeros(1, np.int64)).dtype != np.uint8:
        return None
    right, images = count_right(module, split), len(split)
    best, most = None, right
    for values in usual_normalizations(own.channels == "L"):
        if (count := count_right(module, with_normalization(split, values))) > most:
            best, most = values, count
    if best is None or not is_shown_better(most, right, images):
        return None
    return (
        f"With {best.words} {most} of {images} images are right, {right} as they are: data.preprocessing is probably "
        "not that of the training."
    )


def count_right(module: nn.Module, split: Split) -> int:
    """Return the number of images that a classifier gets right."""
    predicted, labels = predict_classes(module, split)
    return int((predicted == labels).sum())


def is_shown_better(count: int, other: int, images: int) -> bool:
    """Return whether most images are right, and far more than another number, beyond noise.

    >>> is_shown_better(58, 20, 60), is_shown_better(58, 55, 60), is_shown_better(20, 0, 60)
    (True, False, False)
    """
    from scipy.stats import binomtest

    gain = (count - other) / images
    return (
        count >= _LEAST_SHARE * images
        and gain >= _LEAST_GAIN
        and bool(binomtest(count, images, other / images, alternative="greater").pvalue <= _SIGNIFICANCE)
    )


def _class_name(index: int, names: Sequence[str]) -> str:
    return f"'{names[index]}'" if index < len(names) else f"label {index}"


def _numbers(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"
