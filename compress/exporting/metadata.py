"""Metadata of an exported file: preprocessing, classes, open axes and the version of this program."""

import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import onnx
from onnx import ModelProto

from compress.data.preprocessing import Preprocessing
from compress.onnx_file.io import CLASSES_KEY, PREPROCESSING_KEY, SIZES_KEY

_EXPORTER_METADATA = re.compile(r"^(pkg\.|namespace$)")


def write_metadata(
    model: ModelProto, preprocessing: Preprocessing | None, classes: tuple[str, ...], sizes: Mapping[str, int]
) -> None:
    """Replace the exporter's notes, such as stack traces with local paths, by metadata for users of the file.

    Args:
        model: Model, changed in place.
        preprocessing: Preprocessing of the images; None writes none.
        classes: Names of the classes.
        sizes: Name of each open axis -> the network's own size.
    """
    for value in (*model.graph.node, *model.graph.initializer, *model.graph.value_info, *model.graph.input,
                  *model.graph.output, model.graph):  # fmt: skip
        kept = [entry for entry in value.metadata_props if not _EXPORTER_METADATA.match(entry.key)]
        del value.metadata_props[:]
        value.metadata_props.extend(kept)
        value.ClearField("doc_string")
    model.producer_name = "compress"
    model.producer_version = _own_version()
    model.ClearField("doc_string")
    entries = {CLASSES_KEY: json.dumps(list(classes), ensure_ascii=False)}
    if preprocessing is not None:
        entries[PREPROCESSING_KEY] = json.dumps(preprocessing.to_dict())
    if sizes:
        entries[SIZES_KEY] = json.dumps(dict(sizes))
    onnx.helper.set_model_props(model, entries)


def _own_version() -> str:
    try:
        return version("compress")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
