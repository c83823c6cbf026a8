"""Table of the operators that can be imported; importing this module registers them."""

from compress.onnx_import.operation import OPERATORS
from compress.onnx_import.operators import elementwise, layers, pooling, reducing, resizing, selecting, shaping

__all__ = ["OPERATORS", "elementwise", "layers", "pooling", "reducing", "resizing", "selecting", "shaping"]
