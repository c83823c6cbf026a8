"""How does a torch network become one ONNX file? The only caller of torch.onnx.export.

    module --torch.onnx.export--> candidate --onnxslim--> candidate --checked, replaced at once--> model.onnx

The file is written in a temporary folder beside its place and moved there when everything about it is checked.
"""

import io
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from compress.data.packing import draw
from compress.data.preprocessing import Preprocessing
from compress.errors import ExportFailed, InternalError, first_line, translated
from compress.exporting.constant_names import name_constants
from compress.exporting.rewrite import HALF_TOLERANCE, apply_rewrites, guard_padded_pools, in_half_precision
from compress.exporting.simplify import find_difference, simplify_onnx
from compress.model.adapter import real_inputs, wiring_of
from compress.model.artifacts import Signature, TensorSpec
from compress.model.modes import eval_mode
from compress.onnx_file.io import (
    CLASSES_KEY,
    PREPROCESSING_KEY,
    SIZES_KEY,
    at_sizes,
    default_opset,
    read_signature,
    save_onnx,
)

ONE_FILE_LIMIT_BYTES = 1_800_000_000  # protobuf ends at 2 GiB; the graph and its names need room too
_DECIDES = (
    "The network's code decides by the values of its input, which no graph of tensors can: a note of the load stage "
    "names the layer. torch.where computes both sides and takes one."
)
_EXPORTER_METADATA = re.compile(r"^(pkg\.|namespace$)")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written.

    Attributes:
        nodes_before: Nodes as torch exported them.
        nodes_after: Nodes in the file.
        simplified: Whether the file holds the graph that onnxslim made.
        simplify_note: Why it does not, or "".
        opset: Version of the default operator set.
        size_bytes: All files together.
        files: Their names, the .onnx file first.
        denormals_flushed: Weights too small for a normal float32 that were set to zero.
        rewrites: Rewrite -> places where it was applied.
    """

    nodes_before: int
    nodes_after: int
    simplified: bool
    simplify_note: str
    opset: int
    size_bytes: int
    files: tuple[str, ...]
    denormals_flushed: int
    rewrites: dict[str, int]


def exported_signature(
    signature: Signature, dynamic_batch: bool, open_axes: Mapping[int, str] | None = None
) -> Signature:
    """Return the signature that the file has: the first axis of every tensor is "batch", or 1 when it is fixed.

    Args:
        signature: Of the network.
        dynamic_batch: Whether the batch axis stays open.
        open_axes: Axis -> name of further open axes of the first input. How outputs follow from them is not known
            here: their sizes are those that belong to the network's own.
    """
    batch: int | str = "batch" if dynamic_batch else 1

    def specs(entries: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(entry, shape=(batch, *entry.shape[1:])) for entry in entries)

    first, *others = specs(signature.inputs)
    named = open_axes or {}
    opened = replace(first, shape=tuple(named.get(axis, size) for axis, size in enumerate(first.shape)))
    return Signature((opened, *others), specs(signature.outputs))


def export_onnx(
    module: nn.Module,
    signature: Signature,
    path: Path,
    *,
    opset: int,
    dynamic_batch: bool = True,
    simplify: bool = True,
    external_data: bool = False,
    preprocessing: Preprocessing | None = None,
    classes: tuple[str, ...] = (),
    rewrites: tuple[str, ...] = (),
    precision: str = "fp32",
    open_axes: Mapping[int, str] | None = None,
) -> ExportReport:
    """Write `module` as an ONNX file; a file that was there is replaced only when the new one passed every check.

    Args:
        module: Network on the CPU; its training flags are restored.
        signature: Names, shapes and dtypes of inputs and outputs; the first axis is the batch.
        path: The .onnx file to write. External data goes beside it as `<name>.data`.
        opset: Version of the default operator set that the file must have.
        dynamic_batch: Whether the batch axis stays open (named "batch"); otherwise it is 1.
        simplify: Whether onnxslim may rewrite the graph; its result is kept only when it computes the same.
        external_data: Whether weights go into a second file; above 1.8 GB they do in any case.
        preprocessing: Written into the file's metadata.
        classes: Written into the file's metadata.
        rewrites: Names in `REWRITES` to be applied wherever they fit.
        precision: "fp32", or "fp16" for weights and activations in half precision between float32 inputs and outputs.
        open_axes: Axis -> name ("height") of further axes of the first input that stay open.

    Raises:
        ExportFailed: torch or ONNX refused, the file is not what was asked for (opset, names, shapes), or the network
            does not bear half precision.
        InternalError: A rewrite changed what the network computes.
    """
    wanted = exported_signature(signature, dynamic_batch, open_axes)
    sizes = {name: int(signature.inputs[0].shape[axis]) for axis, name in (open_axes or {}).items()}
    model = _run_exporter(module, wanted, opset, sizes)
    wanted = _check_is_as_asked(model, wanted, opset, bool(sizes))
    nodes_before = len(model.graph.node)
    _write_metadata(model, preprocessing, classes, sizes)
    flushed = _flush_denormals(model)
    guard_padded_pools(model)
    external = external_data or _weight_bytes(model) > ONE_FILE_LIMIT_BYTES
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):  # of a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as folder:
        chosen = save_checked(model, Path(folder) / "exported" / path.name, external)
        note = "not asked for"
        if simplify:
            slim, note = simplify_onnx(chosen, wanted, external)
            if slim is not None:
                flushed += _flush_denormals(slim)
                guard_padded_pools(slim)
                model = slim
                chosen = save_checked(slim, Path(folder) / "simplified" / path.name, external)
        rewritten = ModelProto()
        rewritten.CopyFrom(model)
        places = apply_rewrites(rewritten, rewrites)
        if any(places.values()):
            plain, chosen = chosen, save_checked(rewritten, Path(folder) / "rewritten" / path.name, external)
            if difference := find_difference(plain, chosen, wanted):
                raise InternalError(f"Rewriting {', '.join(places)} changed the network: {difference}.")
            model = rewritten
        if precision == "fp16":
            full, model = chosen, in_half_precision(model)
            guard_padded_pools(model)
            chosen = save_checked(model, Path(folder) / "half" / path.name, external)
            if difference := find_difference(full, chosen, wanted, HALF_TOLERANCE):
                raise ExportFailed(
                    f"The network must compute nearly the same in fp16: {difference}.",
                    hint="Set deploy.precision: fp32.",
                )
        files = move_into_place(chosen, path)
    return ExportReport(
        nodes_before=nodes_before,
        nodes_after=len(model.graph.node),
        simplified=simplify and not note,
        simplify_note=note,
        opset=opset,
        size_bytes=sum(file.stat().st_size for file in files),
        files=tuple(file.name for file in files),
        denormals_flushed=flushed,
        rewrites=places,
    )


def _run_exporter(module: nn.Module, wanted: Signature, opset: int, sizes: Mapping[str, int]) -> ModelProto:
    dynamic = wanted.inputs[0].shape[0] == "batch"
    # torch.export takes sizes 0 and 1 for constants, so an open axis needs an example of 2
    examples = tuple(_example(spec, batch=2 if dynamic else 1) for spec in at_sizes(wanted, sizes).inputs)
    with (
        translated(
            lambda error: ExportFailed(
                f"torch could not export the network to ONNX (opset {opset}): {_reason(error)}",
                hint=_DECIDES if "data-dependent" in _reason(error) else _export_hint(dynamic, sizes),
            )
        ),
        eval_mode(module),
        real_inputs(module),
        torch.no_grad(),
        _quiet(),
    ):
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            opset_version=opset,
            input_names=[spec.name for spec in wanted.inputs],
            output_names=[spec.name for spec in wanted.outputs],
            dynamic_shapes=_dynamic_shapes(module, wanted),
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
        name_constants(model, module)
        return model


def _dynamic_shapes(module: nn.Module, wanted: Signature) -> tuple[object, ...] | None:
    """Return for each input which of its axes stay open, in the form that `forward` takes its inputs."""
    axes = {name: torch.export.Dim(name) for spec in wanted.inputs for name in spec.shape if isinstance(name, str)}
    if not axes:
        return None
    shapes = tuple(
        {axis: axes[name] for axis, name in enumerate(spec.shape) if isinstance(name, str)} for spec in wanted.inputs
    )
    return shapes if wiring_of(module) is None else (shapes,)  # an adapted network takes any number of arguments


def _export_hint(dynamic: bool, sizes: Mapping[str, int]) -> str | None:
    hints = ["dynamic_batch: false if the network's code depends on the batch size"] if dynamic else []
    hints += ["dynamic: [] if it depends on the size of the image"] if sizes else []
    return f"Set {', or '.join(hints)}." if hints else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings, log lines and graph dumps; what matters of them is checked on the file."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _example(spec: TensorSpec, batch: int) -> Tensor:
    sizes = [batch, *(size for size in spec.shape[1:] if isinstance(size, int))]
    if len(sizes) != len(spec.shape):
        raise ExportFailed(f"Input '{spec.name}' must have fixed sizes after the batch axis, got {spec.shape}.")
    return torch.from_numpy(draw(spec, sizes, np.random.default_rng(0)))


def _check_is_as_asked(model: ModelProto, wanted: Signature, opset: int, is_open: bool) -> Signature:
    """Return the file's signature: as wanted but for outputs whose sizes follow from open axes of the input."""
    got_opset = default_opset(model)
    if got_opset != opset:
        raise ExportFailed(f"The exported file must have opset {opset}, torch wrote opset {got_opset}.")
    got = read_signature(model)
    for kind, want, have in (
        ("inputs", wanted.inputs, got.inputs),
        ("outputs", wanted.outputs, got.outputs),
    ):
        followed = is_open and kind == "outputs" and _follow(want, have)
        if want != have and not followed:
            raise ExportFailed(
                f"The exported file must have the {kind} {_describe(want)}, torch wrote {_describe(have)}.",
                hint=_export_hint(True, {"height": 1} if is_open else {}),
            )
    return got


def _follow(want: tuple[TensorSpec, ...], have: tuple[TensorSpec, ...]) -> bool:
    """Whether outputs are as wanted where their sizes are fixed."""
    return len(want) == len(have) and all(
        a.name == b.name
        and a.dtype == b.dtype
        and len(a.shape) == len(b.shape)
        and all(isinstance(got, str) or size == got for size, got in zip(a.shape, b.shape, strict=True))
        for a, b in zip(want, have, strict=True)
    )


def _describe(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{s.name} {s.dtype} ({', '.join(map(str, s.shape))})" for s in specs) or "none"


def _write_metadata(
    model: ModelProto, preprocessing: Preprocessing | None, classes: tuple[str, ...], sizes: Mapping[str, int]
) -> None:
    """Replace the exporter's notes (stack traces, with paths of the machine) by what a user of the file needs."""
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


def _flush_denormals(model: ModelProto) -> int:
    """Set float32 weights below the smallest normal number to 0 in place; they make a CPU 5 to 10 times slower."""
    flushed = 0
    tiny = np.finfo(np.float32).tiny
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        denormal = (values != 0) & (np.abs(values) < tiny)
        if denormal.any():
            flushed += int(denormal.sum())
            tensor.CopyFrom(numpy_helper.from_array(np.where(denormal, np.float32(0), values), tensor.name))
    return flushed


def _weight_bytes(model: ModelProto) -> int:
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)


def save_checked(model: ModelProto, path: Path, external: bool) -> Path:
    """Write a model into a folder of its own and run ONNX's checker over what was written."""
    path.parent.mkdir()
    with translated(_not_saved):
        save_onnx(model, path, external)
        onnx.checker.check_model(path, full_check=True)
    return path


def _not_saved(error: Exception) -> ExportFailed:
    if isinstance(error, OSError):
        return ExportFailed(f"The ONNX file must be writable: {error}")
    return ExportFailed(f"The exported ONNX file is not valid: {first_line(error)}")


def move_into_place(source: Path, path: Path) -> tuple[Path, ...]:
    """Move a finished model to its place; at no moment does an .onnx file lie beside weights of another one."""
    data = source.with_name(f"{source.name}.data")
    target_data = path.with_name(f"{path.name}.data")
    if not data.is_file():
        os.replace(source, path)
        target_data.unlink(missing_ok=True)
        return (path,)
    path.unlink(missing_ok=True)
    shutil.move(data, target_data)
    os.replace(source, path)
    return path, target_data


def _reason(error: BaseException) -> str:
    """Return what went wrong at the root of a chain of errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _ANSI.sub("", first_line(error))
