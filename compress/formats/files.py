"""Further formats of an exported file, for runtimes that read no ONNX files on a device.

    model.onnx
    formats/ncnn/        model.ncnn.param  model.ncnn.bin   source.json
    formats/litert/      model.tflite                       source.json
    formats/openvino/    model.xml  model.bin               source.json

`source.json` has the digests of all files and of the file that they were converted from, so that a runtime opens what
ships, and never something else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from compress.catalog import require_packages
from compress.errors import ArtifactError, ExportFailed, first_line, translated
from compress.formats import FOLDER
from compress.formats.litert import convert_to_litert
from compress.formats.ncnn import convert_to_ncnn
from compress.onnx_file.io import load_onnx, model_files, read_signature
from compress.storage.digest import add_digest, digest_file, digest_value, read_record
from compress.storage.files import write_atomic

SOURCE_FILE, SCHEMA = "source.json", 1


def write_formats(path: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Convert an ONNX file into further formats, each in a folder of its own beside the file.

    Args:
        path: The .onnx file; external data lies beside it.
        names: Names in `FORMATS`.

    Returns:
        Name -> names of the files.

    Raises:
        PackageMissing: The package of a format is missing.
        ExportFailed: The file cannot be converted.
    """
    written = {}
    for name in names:
        folder = path.parent / FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            FORMATS[name](path, folder)
        except ArtifactError as error:
            raise ExportFailed(f"The file cannot be converted into the format {name}: {error.message}") from error
        files = {file.name: digest_file(file) for file in sorted(folder.iterdir())}
        record = {"schema": SCHEMA, "source": _source_digest(path), "files": files}
        write_atomic(folder / SOURCE_FILE, json.dumps(add_digest(record), indent=1))
        written[name] = tuple(files)
    return written


def list_formats(path: Path) -> tuple[str, ...]:
    """Return the names of the formats beside an ONNX file."""
    return tuple(name for name in FORMATS if (path.parent / FOLDER / name / SOURCE_FILE).is_file())


def find_format(path: Path, name: str) -> Path | None:
    """Return the folder of a format of an ONNX file; None if it was not converted.

    Raises:
        ArtifactError: The files are damaged, or were converted from another file.
    """
    folder = path.parent / FOLDER / name
    if not (folder / SOURCE_FILE).is_file():
        return None
    record = read_record(folder / SOURCE_FILE)
    if record.get("source") != _source_digest(path):
        raise ArtifactError(
            f"'{folder}' must be converted from '{path}', it is of another file.",
            hint="Run the pipeline again, or delete the folder.",
        )
    for file, digest in dict(record.get("files") or {}).items():
        if digest_file(folder / Path(file).name) != digest:
            raise ArtifactError(f"'{folder / file}' must be the result of the conversion, it was damaged or edited.")
    return folder


def _source_digest(path: Path) -> str:
    return digest_value([digest_file(file) for file in model_files(path)])


def _to_ncnn(path: Path, folder: Path) -> None:
    sizes = [spec.shape[1:] for spec in read_signature(load_onnx(path)).inputs]
    convert_to_ncnn(path, folder, [[int(size) for size in shape] for shape in sizes])


def _to_openvino(path: Path, folder: Path) -> None:
    require_packages(["openvino"], "Format 'openvino'")
    import openvino

    with translated(lambda error: ArtifactError(f"OpenVINO cannot open '{path}': {first_line(error)}")):
        model = openvino.Core().read_model(path)
        openvino.save_model(model, folder / f"{path.stem}.xml", compress_to_fp16=False)


FORMATS: dict[str, Callable[[Path, Path], None]] = {
    "litert": convert_to_litert,
    "ncnn": _to_ncnn,
    "openvino": _to_openvino,
}
