"""Conversion of ONNX files for ncnn, by the program of the package pnnx."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.catalog import missing_package
from compress.errors import ArtifactError
from compress.onnx_file.io import ONE_FILE_LIMIT_BYTES, load_onnx, save_onnx

LIMIT_S = 900.0
_FOREIGN = (".", "::")  # ncnn's own layers have plain names


@dataclass(frozen=True, slots=True)
class NcnnFiles:
    """Files of a network for ncnn.

    Attributes:
        param: Layers, as text.
        weights: Weights, float32.
    """

    param: Path
    weights: Path

    @classmethod
    def of(cls, path: Path, folder: Path) -> NcnnFiles:
        """Return the files in a folder that an ONNX file is converted into."""
        return cls(folder / f"{path.stem}.ncnn.param", folder / f"{path.stem}.ncnn.bin")

    def find_foreign_layers(self) -> list[str]:
        """Return the kinds of layers that ncnn does not have, such as "onnx::QuantizeLinear"."""
        lines = self.param.read_text(encoding="utf-8").splitlines()[2:]
        kinds = {line.split()[0] for line in lines if line.split()}
        return sorted(kind for kind in kinds if any(sign in kind for sign in _FOREIGN))


def convert_to_ncnn(path: Path, folder: Path, sizes: Sequence[Sequence[int]]) -> NcnnFiles:
    """Write the two files of a network, named after the ONNX file.

    Args:
        path: The .onnx file; external data lies beside it.
        folder: Existing folder for the two files.
        sizes: Sizes of each input, without the batch.

    Raises:
        PackageMissing: The package pnnx is missing.
        ArtifactError: pnnx cannot convert the file.
    """
    files = NcnnFiles.of(path, folder)
    shapes = ",".join(f"[{','.join(str(size) for size in (1, *one))}]" for one in sizes)
    with TemporaryDirectory(prefix="compress-pnnx-") as place:
        whole = load_onnx(path, weights=True)  # pnnx writes beside the file, and reads no small tensors of a second one
        save_onnx(whole, Path(place) / path.name, external=whole.ByteSize() > ONE_FILE_LIMIT_BYTES)
        command = [
            _program(), path.name, f"inputshape={shapes}", "fp16=0", "pnnxpy=", "pnnxonnx=", "ncnnpy=",
            f"ncnnparam={files.param.absolute()}", f"ncnnbin={files.weights.absolute()}",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, cwd=place, capture_output=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ArtifactError(f"pnnx must convert '{path}' within {LIMIT_S:g} s, it did not.") from error
        except OSError as error:
            raise ArtifactError(f"The program pnnx cannot be started: {error.strerror or error}.") from error
    if done.returncode or not files.param.is_file() or not files.weights.is_file():
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = said[-1] if said else f"it ended with code {done.returncode}"
        raise ArtifactError(f"pnnx cannot convert '{path}': {why}")
    return files


def _program() -> str:
    """Return the path of the program; its package imports torch, and is not imported."""
    spec = find_spec("pnnx")
    if spec is None or not spec.submodule_search_locations:
        raise missing_package(["pnnx"], "Conversion for ncnn")
    return str(Path(next(iter(spec.submodule_search_locations))) / ("pnnx.exe" if os.name == "nt" else "pnnx"))
