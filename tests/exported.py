"""The tiny networks as ONNX files: each is exported once in a test run, and only when a test needs it."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import nets

from compress.data.preprocessing import Preprocessing
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Signature, TensorSpec
from compress.model.stage_records import ExportRecord

SIGNATURE = Signature((TensorSpec("image", ("batch", 3, 16, 16)),), (TensorSpec("logits", ("batch", 4)),))
PREPROCESSING = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
CLASSES = ("cat", "dog", "naïve", "ship")


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="compress-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def exported_with_report(name: str) -> tuple[Path, ExportRecord]:
    """Export a tiny network; tests must not change the file."""
    path = _folder() / f"{name}.onnx"
    report = export_onnx(
        nets.build(name), SIGNATURE, path, ExportSettings(opset=18), preprocessing=PREPROCESSING, classes=CLASSES
    )
    return path, report


def exported(name: str) -> Path:
    """Return the ONNX file of a tiny network; tests must not change it."""
    return exported_with_report(name)[0]
