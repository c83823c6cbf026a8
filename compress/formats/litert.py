"""Conversion of ONNX files for LiteRT, formerly TensorFlow Lite, by the package litert-torch.

    model.onnx  --imported as a torch network-->  torch.export  --litert-torch-->  model.tflite

The conversion runs in a process of its own: `python -m compress.formats.litert SOURCE.onnx TARGET.tflite`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from compress.catalog import require_packages
from compress.errors import ArtifactError, CompressError, first_line, translated
from compress.onnx_file.io import is_quantized, load_onnx, read_signature

LIMIT_S = 1800.0
PACKAGE = "litert_torch"
_PREFIX = "compress: "


def convert_to_litert(path: Path, folder: Path) -> None:
    """Write an ONNX file as a .tflite file of the same name, for one image at a time, in float32.

    Args:
        path: The .onnx file with inputs of fixed size but for the batch; external data lies beside it.
        folder: Existing folder for the file.

    Raises:
        PackageMissing: The package litert-torch is missing.
        ArtifactError: The file cannot be converted.
    """
    require_packages([PACKAGE], "Conversion for LiteRT")
    target = folder / f"{path.stem}.tflite"
    command = [sys.executable, "-m", __name__, str(path.absolute()), str(target.absolute())]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(one for one in (root, os.environ.get("PYTHONPATH", "")) if one)
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(f"litert-torch must convert '{path}' within {LIMIT_S:g} s, it did not.") from error
    if done.returncode or not target.is_file():
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        stated = [line.removeprefix(_PREFIX) for line in lines if line.startswith(_PREFIX)]
        why = (stated or lines or [f"its process ended with exit code {done.returncode}"])[-1]
        raise ArtifactError(f"litert-torch cannot convert '{path}': {why}")


def _convert(source: Path, target: Path) -> None:
    """Convert a file in this process.

    Raises:
        ArtifactError: The file cannot be converted.
        ModelError: It has operators that cannot be imported.
    """
    model = load_onnx(source)
    if is_quantized(model):
        raise ArtifactError("it must be a float file, it is quantized.")
    sizes = [spec.shape[1:] for spec in read_signature(model).inputs]
    if any(isinstance(size, str) for shape in sizes for size in shape):
        raise ArtifactError("its inputs must have fixed sizes but for the batch.")
    import litert_torch  # type: ignore[import-not-found]  # seconds, and an extra
    import torch

    from compress.onnx_import.importer import import_onnx

    module = import_onnx(source)
    images = tuple(torch.zeros(1, *(int(size) for size in shape)) for shape in sizes)
    with translated(lambda error: ArtifactError(first_line(error))):
        litert_torch.convert(module.eval(), images).export(str(target))


def _main() -> int:
    try:
        _convert(*map(Path, sys.argv[1:3]))
    except CompressError as error:
        print(f"{_PREFIX}{error.message.splitlines()[0]}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
