"""Does onnxslim's graph still compute the same? It is kept only if it does."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxslim

from compress.artifacts import Signature
from compress.cost.onnx_file import default_opset, first_line, load_onnx, read_signature, save_onnx

RELATIVE_TOLERANCE = 1e-4
ABSOLUTE_TOLERANCE = 1e-5
_TRIALS = 3


def simplify_onnx(path: Path, signature: Signature, external: bool) -> tuple[onnx.ModelProto | None, str]:
    """Rewrite a model with onnxslim and compare both on random input in ONNX Runtime.

    Args:
        path: The unsimplified model; it is not changed.
        signature: Its inputs and outputs.
        external: Whether the weights are too many for one file.

    Returns:
        The simplified model and "", or None and a sentence that says why the unsimplified one is to be kept.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            slim = onnxslim.slim(load_onnx(path, weights=True))
    except Exception as error:  # a rewriter of arbitrary graphs can fail in any way; the export stands without it
        return None, f"onnxslim failed: {first_line(error)}"
    original = load_onnx(path)
    if read_signature(slim) != signature or default_opset(slim) != default_opset(original):
        return None, "onnxslim changed the inputs, outputs or opset"
    del slim.metadata_props[:]
    slim.metadata_props.extend(original.metadata_props)
    slim.producer_name, slim.producer_version = original.producer_name, original.producer_version
    return (slim, "") if not (note := _difference(path, slim, signature, external)) else (None, note)


def _difference(path: Path, slim: onnx.ModelProto, signature: Signature, external: bool) -> str:
    """Return how the simplified model differs, "" when it does not."""
    slim_path = path.with_name(f"compared-{path.name}")
    try:
        save_onnx(slim, slim_path, external)
        first, second = (_session(file) for file in (path, slim_path))
        for seed in range(_TRIALS):
            inputs = _random_inputs(signature, seed)
            for spec, a, b in zip(signature.outputs, first.run(None, inputs), second.run(None, inputs), strict=True):
                scale = float(np.abs(a).max(initial=0.0))
                if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(b).all():
                    return f"output '{spec.name}' of the simplified graph has another shape or is not finite"
                if float(np.abs(a - b).max(initial=0.0)) > ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * scale:
                    return f"output '{spec.name}' of the simplified graph differs by {np.abs(a - b).max():.2g}"
    except OSError:  # a full disk says nothing about the graph
        raise
    except Exception as error:  # ONNX Runtime raises plain Exception subclasses of its own
        return f"the simplified graph could not be run: {first_line(error)}"
    return ""


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _random_inputs(signature: Signature, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    batches = {
        spec.name: tuple(size if isinstance(size, int) else seed + 1 for size in spec.shape)
        for spec in signature.inputs
    }
    return {spec.name: generator.standard_normal(batches[spec.name]).astype(spec.dtype) for spec in signature.inputs}
