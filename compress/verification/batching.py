"""Dependence of a file's outputs on the other images of a batch, and the batch size that quality is measured at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.data.splits import Split
from compress.errors import ModelError, NonFinite
from compress.model.artifacts import CheckResult
from compress.onnx_file.io import is_half, is_quantized, load_onnx
from compress.tasks.outputs import each
from compress.verification.measurement import Conditions, evaluation_batch
from compress.verification.quality import first_images, image_input, respond
from compress.verification.runtimes.base import Runtime
from compress.verification.samples import fixed_batch

BATCH_INDEPENDENT = "batch_independent"
_IMAGES = 4
_WITHIN, _ROUNDED_WITHIN = 1e-3, 0.05  # of the largest output; the latter where values of the file are rounded


def batch_difference(session: Runtime, split: Split) -> float | None:
    """Return the largest difference of an output between an image alone and in a batch, relative to the largest output.

    With a fixed batch size, copies of the image fill up its batch.

    Args:
        session: Open runtime of the file.
        split: Source of the images; at most the first four are compared.

    Returns:
        None for a batch of one, or a split of one image: nothing can be compared.

    Raises:
        ModelError, NonFinite: The file fails on the images.
    """
    images = first_images(split, fixed_batch(session) or _IMAGES)
    if len(images) < 2:
        return None
    together = each(respond(session, images))
    differences = [0.0]
    for place in range(min(len(images), _IMAGES)):
        alone = each(respond(session, images[place : place + 1]))
        for one, all_ in zip(alone, together, strict=True):
            apart = np.abs(one[0].astype(np.float64) - all_[place]).max(initial=0.0)
            differences.append(float(apart / (np.abs(all_.astype(np.float64)).max(initial=0.0) or 1.0)))
    return max(differences)


def largest_difference(path: Path) -> float:
    """Return the relative difference up to which two outputs of a file count as equal."""
    model = load_onnx(path)
    return _ROUNDED_WITHIN if is_half(model) or is_quantized(model) else _WITHIN


def quality_batch(session: Runtime, path: Path, split: Split, conditions: Conditions) -> int:
    """Return the batch size for measuring quality: the deployed one where outputs depend on the batch.

    Args:
        session: Open runtime of the file.
        path: The .onnx file.
        split: Images for the comparison.
        conditions: Conditions of deployment, with its batch size.
    """
    try:
        difference = batch_difference(session, split)
    except (ModelError, NonFinite):  # reported where quality is measured
        difference = None
    if difference is not None and difference > largest_difference(path):
        return conditions.batch_size
    return evaluation_batch(image_input(session))


def check_batch(session: Runtime, path: Path, split: Split, conditions: Conditions) -> CheckResult:
    """Check that the outputs for an image do not depend on the other images of its batch.

    Args:
        session: Open runtime of the file.
        path: The .onnx file.
        split: Images for the comparison.
        conditions: Conditions of deployment; a dependence passes where the deployed batch size is 1.
    """
    limit = largest_difference(path)
    try:
        difference = batch_difference(session, split)
    except (ModelError, NonFinite) as error:
        return CheckResult(BATCH_INDEPENDENT, "skipped", None, limit, "", error.message)
    if difference is None:
        return CheckResult(BATCH_INDEPENDENT, "skipped", None, limit, "", "there is one image in a batch, or in all")
    if difference <= limit:
        return CheckResult(BATCH_INDEPENDENT, "pass", difference, limit, "", "images alone and in a batch")
    if conditions.batch_size == 1:
        detail = "outputs depend on the other images of a batch; quality is measured on one at a time, as in deployment"
        return CheckResult(BATCH_INDEPENDENT, "pass", difference, limit, "", detail)
    detail = f"outputs depend on which images come together in a batch of {conditions.batch_size}"
    return CheckResult(BATCH_INDEPENDENT, "fail", difference, limit, "", detail)
