"""Element-wise operators: arithmetic, comparisons, activations."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor

from compress.onnx_import.operation import Operation, Result, operator
from compress.onnx_import.values import Computed, Fixed, Refused

_UNARY: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsInf": torch.isinf,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
_BINARY: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
_NEEDS_TENSORS = ("And", "Or", "Xor")
_FOLDED: dict[str, Callable[..., Tensor]] = {"Max": torch.maximum, "Min": torch.minimum, "Sum": torch.add}


@operator(*_UNARY)
def build_unary(op: Operation) -> Result:
    """Build a function of one tensor without settings."""
    return op.call(_UNARY[op.kind], op.image())


@operator(*_BINARY)
def build_binary(op: Operation) -> Result:
    """Build a function of two tensors, which are broadcast."""
    if op.kind in _NEEDS_TENSORS:
        return op.call(_BINARY[op.kind], op.image(0), op.image(1))
    first, second = op.operand(0), op.operand(1)
    if not isinstance(first, Computed) and op.kind not in ("Add", "Mul", "Pow"):
        first = op.image(0)  # torch wants a tensor first
    if isinstance(first, (int, float)) and op.kind in ("Add", "Mul"):
        first, second = second, first
    return op.call(_BINARY[op.kind], first, second)


@operator("Div")
def build_division(op: Operation) -> Result:
    """Build a division; integer division rounds towards 0."""
    first, second = op.image(0), op.operand(1)
    whole = not first.probes[0].is_floating_point() and (
        not second.probes[0].is_floating_point() if isinstance(second, Computed) else isinstance(second, int)
    )
    if whole:
        return op.call(torch.div, first, second, rounding_mode="trunc")
    return op.call(torch.div, first, second)


@operator("Mod")
def build_modulus(op: Operation) -> Result:
    """Build a remainder with the sign of the divisor, or of the dividend (fmod)."""
    function = torch.fmod if op.attribute("fmod", 0) else torch.remainder
    return op.call(function, op.image(0), op.operand(1))


@operator(*_FOLDED, "Mean")
def build_folded(op: Operation) -> Result:
    """Build a function of any number of tensors."""
    function = _FOLDED.get(op.kind, torch.add)
    found = op.image(0)
    for index in range(1, len(op.inputs)):
        found = op.call(function, found, op.image(index))
    return op.call(torch.div, found, len(op.inputs)) if op.kind == "Mean" else found


@operator("Clip")
def build_clip(op: Operation) -> Result:
    """Build torch.clamp, or ReLU6 for limits 0 and 6."""
    low, high = op.scalar("min", 1), op.scalar("max", 2)
    low = None if low is None or np.isneginf(low) else low
    high = None if high is None or np.isposinf(high) else high
    if low is None and high is None:
        return op.image()
    if (low, high) == (0, 6):
        return op.call(F.relu6, op.image())
    return op.call(torch.clamp, op.image(), min=low, max=high)


@operator("LeakyRelu")
def build_leaky_relu(op: Operation) -> Result:
    """Build a ReLU with a slope below 0."""
    return op.call(F.leaky_relu, op.image(), op.attribute("alpha", 0.01))


@operator("ThresholdedRelu")
def build_thresholded_relu(op: Operation) -> Result:
    """Build a threshold: x above alpha, else 0."""
    return op.call(F.threshold, op.image(), op.attribute("alpha", 1.0), 0.0)


@operator("Shrink")
def build_shrink(op: Operation) -> Result:
    """Build a shrinkage of numbers towards 0."""
    limit, bias, image = op.attribute("lambd", 0.5), op.attribute("bias", 0.0), op.image()
    below = op.call(torch.add, image, bias)
    above = op.call(torch.sub, image, bias)
    middle = op.call(torch.mul, image, 0.0)
    outer = op.call(torch.where, op.call(torch.lt, image, -limit), below, middle)
    return op.call(torch.where, op.call(torch.gt, image, limit), above, outer)


@operator("Elu")
def build_elu(op: Operation) -> Result:
    """Build an exponential linear unit."""
    return op.call(F.elu, op.image(), op.attribute("alpha", 1.0))


@operator("Celu")
def build_celu(op: Operation) -> Result:
    """Build a continuously differentiable exponential linear unit."""
    return op.call(F.celu, op.image(), op.attribute("alpha", 1.0))


@operator("Selu")
def build_selu(op: Operation) -> Result:
    """Build a scaled exponential linear unit: F.selu, or an ELU with other constants."""
    alpha, gamma = op.attribute("alpha", 1.67326319217681884765625), op.attribute("gamma", 1.05070102214813232421875)
    if math.isclose(alpha, 1.6732632, rel_tol=1e-6) and math.isclose(gamma, 1.0507010, rel_tol=1e-6):
        return op.call(F.selu, op.image())
    return op.call(torch.mul, op.call(F.elu, op.image(), alpha), gamma)


@operator("Gelu")
def build_gelu(op: Operation) -> Result:
    """Build a Gaussian error linear unit."""
    return op.call(F.gelu, op.image(), approximate=_text(op.attribute("approximate", "none")))


@operator("HardSigmoid")
def build_hard_sigmoid(op: Operation) -> Result:
    """Build a hard sigmoid: a line clamped to [0, 1]."""
    alpha, beta = op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return op.call(F.hardsigmoid, op.image())
    line = op.call(torch.add, op.call(torch.mul, op.image(), alpha), beta)
    return op.call(torch.clamp, line, min=0.0, max=1.0)


@operator("HardSwish")
def build_hard_swish(op: Operation) -> Result:
    """Build x times a hard sigmoid."""
    return op.call(F.hardswish, op.image())


@operator("Swish")
def build_swish(op: Operation) -> Result:
    """Build x times the sigmoid of alpha x."""
    alpha, image = op.attribute("alpha", 1.0), op.image()
    if alpha == 1.0:
        return op.call(F.silu, image)
    return op.call(torch.mul, image, op.call(torch.sigmoid, op.call(torch.mul, image, alpha)))


@operator("Where")
def build_choice(op: Operation) -> Result:
    """Build a choice between two tensors."""
    return op.call(torch.where, op.image(0), op.image(1), op.image(2))


@operator("Cast", "CastLike")
def build_cast(op: Operation) -> Result:
    """Build a change of dtype; every floating-point type of the file becomes float32."""
    if op.kind == "CastLike":
        like = op.inputs[1]
        numpy_type = like.arrays[0].dtype if isinstance(like, Fixed) else None
        dtype = like.probes[0].dtype if isinstance(like, Computed) else _torch_type(np.dtype(numpy_type))
    else:
        dtype = _torch_type(np.dtype(helper.tensor_dtype_to_np_dtype(op.attribute("to", 1))))
    image = op.image()
    return image if image.probes[0].dtype == dtype else op.call(torch.Tensor.to, image, dtype)


@operator("Identity", "Dropout")
def build_identity(op: Operation) -> Result:
    """Return the input; Dropout in inference mode is an identity."""
    if op.kind == "Dropout" and op.has(2) and bool(op.array(2)):
        raise Refused("is in training mode")
    return op.image()


def _torch_type(dtype: np.dtype[Any]) -> torch.dtype:
    if dtype.kind == "f" or dtype.name == "bfloat16":
        return torch.float32
    try:
        return torch.from_numpy(np.zeros(1, dtype)).dtype
    except TypeError as error:
        raise Refused(f"casts to {dtype}, which torch does not have") from error


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
