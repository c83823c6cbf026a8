"""Simplification by onnxslim, kept only if the outputs stay the same."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxslim

from compress.data.packing import draw
from compress.errors import attempt, first_line
from compress.model.artifacts import Signature
from compress.onnx_file.io import at_sizes, default_opset, load_onnx, read_signature, read_sizes, save_onnx

RELATIVE_TOLERANCE = 1e-4
ABSOLUTE_TOLERANCE = 1e-5
_TRIALS = 3


def simplify_onnx(path: Path, signature: Signature, external: bool) -> tuple[onnx.ModelProto | None, str]:
    """Rewrite a model with onnxslim and compare both on random input in ONNX Runtime.

    Args:
        path: The unsimplified model; it is not changed.
        signature: Inputs and outputs of the model.
        external: Whether weights are written into a second file.

    Returns:
        The simplified model and "", or None and the reason why the unsimplified model is kept.
    """
    failures: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        slim = attempt(  # a rewriter of arbitrary graphs can fail in any way; the export stands without it
            # tied, equal constants of different layers could not be cut apart
            lambda: onnxslim.slim(load_onnx(path, weights=True), skip_optimizations=["weight_tying"]),
            lambda error: failures.append(f"onnxslim failed: {first_line(error)}"),
        )
    if slim is None:
        return None, failures[0]
    original = load_onnx(path)
    if read_signature(slim) != signature or default_opset(slim) != default_opset(original):
        return None, "onnxslim changed the inputs, outputs or opset"
    del slim.metadata_props[:]
    slim.metadata_props.extend(original.metadata_props)
    slim.producer_name, slim.producer_version = original.producer_name, original.producer_version
    slim_path = path.with_name(f"compared-{path.name}")
    save_onnx(slim, slim_path, external)
    return (slim, "") if not (note := find_difference(path, slim_path, signature)) else (None, note)


def find_difference(path: Path, rewritten: Path, signature: Signature, tolerance: float = RELATIVE_TOLERANCE) -> str:
    """Return a description of the difference between a rewritten model and its original on random input, or "".

    Args:
        path: The original model.
        rewritten: The rewritten model.
        signature: Inputs and outputs of both.
        tolerance: Largest allowed difference of an output, relative to its largest absolute value.
    """
    return attempt(
        lambda: _compared(path, rewritten, signature, tolerance),
        lambda error: f"the rewritten graph could not be run: {first_line(error)}",
        OSError,  # not an error of the graph, such as a full disk
    )


def _compared(path: Path, rewritten: Path, signature: Signature, tolerance: float) -> str:
    first, second = (_session(file) for file in (path, rewritten))
    sizes = read_sizes(load_onnx(path))
    for seed in range(_TRIALS):
        inputs = _random_inputs(at_sizes(signature, {name: size + 32 * seed for name, size in sizes.items()}), seed)
        for spec, a, b in zip(signature.outputs, first.run(None, inputs), second.run(None, inputs), strict=True):
            scale = float(np.abs(a).max(initial=0.0))
            if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(b).all():
                return f"output '{spec.name}' of the rewritten graph has another shape or is not finite"
            if float(np.abs(a - b).max(initial=0.0)) > ABSOLUTE_TOLERANCE + tolerance * scale:
                return f"output '{spec.name}' of the rewritten graph differs by {np.abs(a - b).max():.2g}"
    return ""


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _random_inputs(signature: Signature, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        spec.name: draw(spec, [size if isinstance(size, int) else seed + 1 for size in spec.shape], generator)
        for spec in signature.inputs
    }
