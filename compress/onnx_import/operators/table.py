"""Which operators can be built from a file? Importing this declares them all."""

from compress.onnx_import.operation import OPERATORS
from compress.onnx_import.operators import elementwise, layers, pooling, reducing, resizing, selecting, shaping

__all__ = ["OPERATORS", "elementwise", "layers", "pooling", "reducing", "resizing", "selecting", "shaping"]
