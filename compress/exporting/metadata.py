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
    """Replace the exporter's notes, stack traces with paths of the machine, by metadata for users of the file.

    Args:
        model: Changed in place.
        preprocessing: Of the images; None writes none.
        classes: Names of the classes.
        sizes: The network's own size of each open axis, by the axis' name.
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
