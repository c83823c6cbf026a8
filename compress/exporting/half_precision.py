"""How is a graph written in half precision? Weights and activations in float16, inputs and outputs as they were.

Providers with float16 kernels (CUDA, TensorRT) then read half the bytes; a processor without them casts back and forth.
"""

import numpy as np
import onnx_ir as ir
from onnx import ModelProto, TensorProto, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from compress.errors import ExportFailed
from compress.onnx_file.io import first_line

HALF_TOLERANCE = 0.05  # of the largest output; ten layers of rounding to 11 bits give some thousandths

_LARGEST = float(np.finfo(np.float16).max)


def in_half_precision(model: ModelProto) -> ModelProto:
    """Return a float16 copy of a float32 model; its inputs and outputs stay float32.

    Args:
        model: With its weights; it is not changed.

    Raises:
        ExportFailed: A weight lies outside of float16, or the graph cannot be converted.
    """
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))
            if not largest <= _LARGEST:
                raise ExportFailed(
                    f"Weights must be at most {_LARGEST:.0f} for fp16, '{tensor.name}' has {largest:.3g}.",
                    hint="Set deploy.precision: fp32.",
                )
    copy = ModelProto()
    copy.CopyFrom(model)
    try:
        half = ir.from_proto(convert_float_to_float16(copy, keep_io_types=True))
        half.graph.sort()  # the converter puts its casts last
        return ir.to_proto(half)
    except Exception as error:  # a converter of arbitrary graphs can fail in any way
        raise ExportFailed(f"The graph could not be written in fp16: {first_line(error)}") from error
