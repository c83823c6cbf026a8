"""Export of a torch network to one ONNX file; the only caller of torch.onnx.export.

    module --torch.onnx.export--> candidate --onnxslim--> candidate --checked, replaced at once--> model.onnx

The file is written in a temporary folder beside its target and moved to it after all checks.
"""

import io
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
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
from compress.exporting.metadata import write_metadata
from compress.exporting.rewrite import HALF_TOLERANCE, apply_rewrites, guard_padded_pools, in_half_precision
from compress.exporting.settings import ExportSettings, exported_signature
from compress.exporting.simplify import find_difference, simplify_onnx
from compress.model.adapter import real_inputs, wiring_of
from compress.model.artifacts import Signature, TensorSpec
from compress.model.modes import eval_mode
from compress.model.stage_records import ExportRecord
from compress.onnx_file.io import (
    ONE_FILE_LIMIT_BYTES,
    at_sizes,
    default_opset,
    read_signature,
    save_onnx,
)

_DECIDES = (
    "The network's code decides by the values of its input, which no graph of tensors can: a note of the load stage "
    "names the layer. torch.where computes both sides and takes one."
)
_COMPLEX = (
    "torch exports no complex numbers. Give the network the spectrogram, and compute Fourier transforms outside of it."
)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def export_onnx(
    module: nn.Module,
    signature: Signature,
    path: Path,
    settings: ExportSettings,
    preprocessing: Preprocessing | None = None,
    classes: tuple[str, ...] = (),
) -> ExportRecord:
    """Write `module` as an ONNX file; an existing file is replaced only when the new one passed every check.

    Args:
        module: Network on the CPU; its training flags are restored.
        signature: Names, shapes and dtypes of inputs and outputs; the first axis is the batch.
        path: The .onnx file to write. External data is written beside it as `<name>.data`.
        settings: Opset, open axes, rewrites, precision.
        preprocessing: Preprocessing of images, for the file's metadata.
        classes: Class names, for the file's metadata.

    Raises:
        ExportFailed: torch or ONNX failed, the file does not have the requested opset, names or shapes, or half
            precision changes the outputs too much.
        InternalError: A rewrite changed the outputs of the network.
    """
    wanted = exported_signature(signature, settings.dynamic_batch, settings.open_axes)
    sizes = settings.sizes(signature)
    model = run_exporter(module, wanted, settings.opset, sizes)
    wanted = _check_is_as_asked(model, wanted, settings.opset, bool(sizes))
    nodes_before = len(model.graph.node)
    write_metadata(model, preprocessing, classes, sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):  # of a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as folder:
        draft = _Draft(model, wanted, Path(folder), path.name, settings.external_data)
        note = draft.simplify() if settings.simplify else "not asked for"
        places = draft.rewrite(settings.rewrites)
        if settings.precision == "fp16":
            draft.halve()
        files = move_into_place(draft.path, path)
    return ExportRecord(
        nodes_before=nodes_before,
        nodes_after=len(draft.model.graph.node),
        simplified=settings.simplify and not note,
        simplify_note=note,
        opset=settings.opset,
        size_bytes=sum(file.stat().st_size for file in files),
        files=tuple(file.name for file in files),
        denormals_flushed=draft.flushed,
        rewrites=places,
    )


class _Draft:
    """Draft of the final file; each step writes a new file, which passes ONNX's checker.

    Args:
        model: Model from torch's exporter, with metadata.
        signature: Inputs and outputs of the model.
        folder: Temporary folder.
        name: File name.
        external: True writes weights into a second file.

    Attributes:
        model: Model after the last step.
        path: File of the last step.
        flushed: Number of denormal weights that were set to zero.
    """

    def __init__(self, model: ModelProto, signature: Signature, folder: Path, name: str, external: bool) -> None:
        self._signature, self._folder, self._name = signature, folder, name
        self._external = external or _weight_bytes(model) > ONE_FILE_LIMIT_BYTES
        self.flushed = _flush_denormals(model)
        guard_padded_pools(model)
        self._save(model, "exported")

    def simplify(self) -> str:
        """Use onnxslim's graph where its outputs are the same; return the reason why it is not used, or ""."""
        slim, note = simplify_onnx(self.path, self._signature, self._external)
        if slim is not None:
            self.flushed += _flush_denormals(slim)
            guard_padded_pools(slim)
            self._save(slim, "simplified")
        return note

    def rewrite(self, names: tuple[str, ...]) -> dict[str, int]:
        """Apply rewrites wherever they fit; return name -> number of times it was applied."""
        rewritten, before = ModelProto(), self.path
        rewritten.CopyFrom(self.model)
        places = apply_rewrites(rewritten, names)
        if any(places.values()):
            self._save(rewritten, "rewritten")
            if difference := find_difference(before, self.path, self._signature):
                raise InternalError(f"Rewriting {', '.join(places)} changed the network: {difference}.")
        return places

    def halve(self) -> None:
        """Convert weights and activations to half precision."""
        full, half = self.path, in_half_precision(self.model)
        guard_padded_pools(half)
        self._save(half, "half")
        if difference := find_difference(full, self.path, self._signature, HALF_TOLERANCE):
            raise ExportFailed(
                f"The network must compute nearly the same in fp16: {difference}.",
                hint="Set deploy.precision: fp32.",
            )

    def _save(self, model: ModelProto, step: str) -> None:
        self.model, self.path = model, save_checked(model, self._folder / step / self._name, self._external)


def run_exporter(module: nn.Module, wanted: Signature, opset: int, sizes: Mapping[str, int]) -> ModelProto:
    """Return the graph that torch's exporter makes of a network, unchecked.

    Args:
        module: Network on the CPU; its training flags are restored.
        wanted: Inputs and outputs of the graph.
        opset: Version of the default operator set.
        sizes: Size of each open axis in the example that the exporter runs.

    Raises:
        ExportFailed: The exporter fails.
    """
    dynamic = wanted.inputs[0].shape[0] == "batch"
    # torch.export takes sizes 0 and 1 for constants, so an open axis needs an example of 2
    examples = tuple(_example(spec, batch=2 if dynamic else 1) for spec in at_sizes(wanted, sizes).inputs)
    with (
        translated(
            lambda error: ExportFailed(
                f"torch could not export the network to ONNX (opset {opset}): {_reason(error)}",
                hint=_refusal_hint(_reason(error)) or _export_hint(dynamic, sizes),
            )
        ),
        eval_mode(module),
        real_inputs(module),
        torch.no_grad(),
        _quiet(),
        _printable(module),
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


@contextmanager
def _printable(module: nn.Module) -> Iterator[None]:
    """Print a network whose own `__repr__` raises by its class within the context: the exporter prints it."""
    kind = type(module)
    if _prints(module):
        yield
        return
    own = kind.__dict__.get("__repr__")
    kind.__repr__ = object.__repr__  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del kind.__repr__
        else:
            kind.__repr__ = own  # type: ignore[method-assign]


def _prints(module: nn.Module) -> bool:
    try:
        repr(module)
    except Exception:  # the user's code
        return False
    return True


def _dynamic_shapes(module: nn.Module, wanted: Signature) -> tuple[object, ...] | None:
    """Return the open axes of each input, in the structure of the arguments of `forward`."""
    axes = {name: torch.export.Dim(name) for spec in wanted.inputs for name in spec.shape if isinstance(name, str)}
    if not axes:
        return None
    shapes = tuple(
        {axis: axes[name] for axis, name in enumerate(spec.shape) if isinstance(name, str)} for spec in wanted.inputs
    )
    return shapes if wiring_of(module) is None else (shapes,)  # an adapted network takes any number of arguments


def _refusal_hint(reason: str) -> str | None:
    return _DECIDES if "data-dependent" in reason else _COMPLEX if "complex" in reason else None


def _export_hint(dynamic: bool, sizes: Mapping[str, int]) -> str | None:
    hints = ["dynamic_batch: false if the network's code depends on the batch size"] if dynamic else []
    hints += ["dynamic: [] if it depends on the size of the image"] if sizes else []
    return f"Set {', or '.join(hints)}." if hints else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings, log lines and graph dumps; the file itself is checked."""
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


def _fixed_axes(want: Sequence[TensorSpec], have: Sequence[TensorSpec]) -> str:
    pairs = [pair for a, b in zip(want, have, strict=False) for pair in zip(a.shape, b.shape, strict=False)]
    fixed = dict.fromkeys(str(asked) for asked, found in pairs if isinstance(asked, str) and isinstance(found, int))
    return f": the network's code fixes the size of {', '.join(fixed)}" if fixed else ""


def _check_is_as_asked(model: ModelProto, wanted: Signature, opset: int, is_open: bool) -> Signature:
    """Return the file's signature; only sizes of outputs that depend on open input axes may differ from `wanted`."""
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
                f"The exported file must have the {kind} {_describe(want)}, torch wrote {_describe(have)}"
                f"{_fixed_axes(want, have)}.",
                hint=_export_hint(True, {"height": 1} if is_open else {}),
            )
    return got


def _follow(want: tuple[TensorSpec, ...], have: tuple[TensorSpec, ...]) -> bool:
    """Return whether outputs equal the wanted ones except for sizes that are open."""
    return len(want) == len(have) and all(
        a.name == b.name
        and a.dtype == b.dtype
        and len(a.shape) == len(b.shape)
        and all(isinstance(got, str) or size == got for size, got in zip(a.shape, b.shape, strict=True))
        for a, b in zip(want, have, strict=True)
    )


def _describe(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{s.name} {s.dtype} ({', '.join(map(str, s.shape))})" for s in specs) or "none"


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
    """Write a model into a new folder of its own and run ONNX's checker on the file."""
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
    """Move a finished model to its target path; an .onnx file never lies beside the weights of another model."""
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
    """Return the message of the root cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _ANSI.sub("", first_line(error))
