"""MACs and params of a torch network, counted while it runs.

Multiply-accumulates are counted for one image, operation by operation, as PyTorch's dispatcher carries them out:
convolutions, matrix products, attention and recurrent layers. Biases, norms, activations, pooling and products without
a sum are not counted. `onnx_file/counting.py` counts an ONNX file by other means; the two counts must agree.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.model.modes import eval_mode, plain_operations, running_paths
from compress.onnx_file.counting import is_fixed_weight

Sized = tuple[Tensor, int]  # a tensor and one of its axes


@dataclass(frozen=True, slots=True)
class Product:
    """Sums of products that one operation computes.

    Attributes:
        macs: Multiply-accumulates.
        operands: The two tensors that are multiplied; weights come last.
        axes: (tensor, dimension) pairs; `macs` is a constant times the product of these sizes.
    """

    macs: int
    operands: tuple[Tensor, Tensor]
    axes: tuple[Sized, ...]


def find_products(name: str, arguments: Mapping[str, Any], result: Any) -> tuple[Product, ...]:
    """Return the products that an operation computes; none for an operation that is not counted.

    Args:
        name: PyTorch's name of the operation without namespace: "convolution", "addmm".
        arguments: Arguments by their names in the operation's schema.
        result: Return value of the operation.
    """
    count = _COUNTS.get(name)
    return () if count is None else tuple(count(arguments, result))


def is_depthwise_call(groups: int, inputs: int) -> bool:
    """Return whether a convolution reads each channel on its own."""
    return groups > 1 and groups == inputs


def _convolution(arguments: Mapping[str, Any], result: Tensor) -> Iterator[Product]:
    image, weight = arguments["input"], arguments["weight"]
    transposed, groups = bool(arguments["transposed"]), int(arguments["groups"])
    positions = image if transposed else result
    axes: tuple[Sized, ...] = ((result, 1), (image, 1))
    if is_depthwise_call(groups, image.shape[1]) and (not transposed or groups == result.shape[1]):
        axes = axes[:1]  # the number of groups follows the channels
    yield Product(positions.numel() * weight[0].numel(), (image, weight), axes)


def _deformable(arguments: Mapping[str, Any], result: Tensor) -> Iterator[Product]:
    image, weight = arguments["input"], arguments["weight"]
    yield Product(result.numel() * weight[0].numel(), (image, weight), ((result, 1), (image, 1)))


def _matrices(first: str, second: str) -> Callable[[Mapping[str, Any], Any], Iterator[Product]]:
    """Return the count of (..., M, K) @ (..., K, N), either of which may be a vector."""

    def count(arguments: Mapping[str, Any], result: Any) -> Iterator[Product]:
        left, right = arguments[first], arguments[second]
        columns = right.shape[-1] if right.ndim > 1 else 1
        axes = [(left, axis) for axis in range(left.ndim)]
        if right.ndim > 1:
            axes.append((result, result.ndim - 1))
        yield Product(left.numel() * columns, (left, right), tuple(axes))

    return count


def _attention(arguments: Mapping[str, Any], result: Any) -> Iterator[Product]:
    """Count attention of (B, H, L, E) queries, (B, H, S, E) keys and (B, H, S, V) values."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    pairs, places = query.numel() // query.shape[-1], key.shape[-2]
    rows = tuple((query, axis) for axis in range(3))
    yield Product(pairs * places * query.shape[-1], (query, key), (*rows, (query, 3), (key, 2)))
    yield Product(pairs * places * value.shape[-1], (query, value), (*rows, (key, 2), (value, 3)))


def _recurrent(arguments: Mapping[str, Any], result: Any) -> Iterator[Product]:
    """Count one direction of one layer over (T, N, I) inputs; each step multiplies the hidden state anew."""
    inputs, from_input, from_hidden = arguments["input"], arguments["weight0"], arguments["weight1"]
    steps, images = inputs.shape[:2]
    yield Product(steps * images * from_input.numel(), (inputs, from_input), ((inputs, 2), (from_input, 0)))
    for _ in range(steps):
        yield Product(images * from_hidden.numel(), (inputs, from_hidden), ((from_hidden, 0), (from_hidden, 1)))


def _bilinear(arguments: Mapping[str, Any], result: Any) -> Iterator[Product]:
    """Count (N, I), (O, I, J) and (N, J) to (N, O), the form that `torch.nn.functional.bilinear` calls."""
    left, weight, right = (arguments[name] for name in ("i1", "i2", "i3"))
    if (arguments["expand1"], arguments["expand2"], arguments["sumdim"]) != ([1, 3], [0], [2, 3]):
        return
    rows, (outputs, _, columns) = left.shape[0], weight.shape
    yield Product(rows * weight.numel(), (left, weight), ((left, 0), (weight, 0), (left, 1), (right, 1)))
    yield Product(rows * outputs * columns, (left, right), ((left, 0), (weight, 0), (right, 1)))


_COUNTS: dict[str, Callable[[Mapping[str, Any], Any], Iterator[Product]]] = {
    "convolution": _convolution,
    "deform_conv2d": _deformable,
    "mm": _matrices("self", "mat2"),
    "addmm": _matrices("mat1", "mat2"),
    "bmm": _matrices("self", "mat2"),
    "baddbmm": _matrices("batch1", "batch2"),
    "addbmm": _matrices("batch1", "batch2"),
    "mv": _matrices("self", "vec"),
    "addmv": _matrices("mat", "vec"),
    "dot": _matrices("self", "tensor"),
    "vdot": _matrices("self", "other"),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "mkldnn_rnn_layer": _recurrent,
    "_trilinear": _bilinear,
}


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
COUNTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
_LISTED = (*COUNTED, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)
# operations that read only shape and dtype of their tensors, never the values
_CREATE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
           "new_full", "new_empty", "new_empty_strided")  # fmt: skip


@dataclass
class Counts:
    """Multiplications of one run of a network.

    Attributes:
        macs: Module path -> multiply-accumulates of its own code, without its submodules, in definition order. "" is
            the network's own forward pass.
        constant_macs: MACs of products that do not depend on the input: an exporter may compute them beforehand.
        weights: Scalars of the constant operands of all products that depend on the input; an operand used twice
            counts twice.
        constant_weights: Scalars of the constant operands of products that do not depend on the input.
    """

    macs: dict[str, int] = field(default_factory=dict)
    constant_macs: int = 0
    weights: int = 0
    constant_weights: int = 0


def count_macs(module: nn.Module, example: Tensor) -> int:
    """Return the MACs of one image.

    Args:
        module: Any network.
        example: One input, (1, C, H, W).
    """
    return sum(layer_macs(module, example).values())


def layer_macs(module: nn.Module, example: Tensor) -> dict[str, int]:
    """Return MACs for one image by module path, in definition order; a layer used twice counts twice.

    Products in a module's own code, outside of its submodules, count for the module: "" is the network itself. Layers
    with weights are listed even where they multiply nothing.

    Args:
        module: Any network; its training flags and buffers do not change.
        example: One input, (1, C, H, W).
    """
    return count_products(module, example).macs


def count_layer_weights(module: nn.Module, example: Tensor) -> int:
    """Return the scalars that one image is multiplied by: kernels without biases; a layer used twice counts twice.

    Args:
        module: Any network; its training flags and buffers do not change.
        example: One input, (1, C, H, W).
    """
    return count_products(module, example).weights


def count_products(module: nn.Module, example: Tensor) -> Counts:
    """Run one image through a network and count its products.

    Args:
        module: Any network; its training flags and buffers do not change.
        example: One input, (1, C, H, W).
    """
    with torch.no_grad(), eval_mode(module), plain_operations(module), running_paths(module) as paths:
        counter = _Counter(module, example, paths)
        with counter:
            module(example)
    found = counter.counts
    listed = {name for name, part in module.named_modules() if isinstance(part, _LISTED)}
    order = [name for name, _ in module.named_modules() if name in listed or name in found.macs]
    found.macs = {name: found.macs.get(name, 0) for name in order}
    return found


def counts_agree(of_file: int, of_network: int, of_constants: int) -> bool:
    """Return whether a file computes as much as a network, except for products of constants computed beforehand.

    Args:
        of_file: MACs or weights of the ONNX file.
        of_network: The same count of the torch network.
        of_constants: Part of `of_network` in products that do not depend on the input.
    """
    return of_network - of_constants <= of_file <= of_network


def count_params(module: nn.Module) -> int:
    """Return the number of scalars in parameters, trainable or frozen; shared parameters count once."""
    return sum(parameter.numel() for parameter in module.parameters())


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counter of the products of every operation that runs.

    Args:
        module: The network.
        example: Input of the network.
        paths: Paths of the modules whose code is running, innermost last.
    """

    def __init__(self, module: nn.Module, example: Tensor, paths: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self._paths = paths
        self._fixed = {id(buffer) for name, buffer in module.named_buffers() if is_fixed_weight(name)}
        self._follows: dict[int, StorageWeakRef] = {}  # storages whose values depend on the input's
        self._note(example)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name.split("::")[-1]
        names = [argument.name for argument in operation._schema.arguments]
        arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
        for product in find_products(name, arguments, result):
            self._add(product)
        if name not in _CREATE and any(map(self._is_followed, tree_leaves((args, kwargs)))):
            for value in tree_leaves(result):
                self._note(value)
        return result

    def _add(self, product: Product) -> None:
        if any(id(operand) in self._fixed for operand in product.operands):
            return
        counts, path = self.counts, self._paths[-1]
        counts.macs[path] = counts.macs.get(path, 0) + product.macs
        constants = [operand for operand in product.operands if not self._is_followed(operand)]
        if len(constants) == len(product.operands):
            counts.constant_macs += product.macs
            counts.constant_weights += _own_scalars(constants[-1])
        else:
            counts.weights += sum(map(_own_scalars, constants))

    def _note(self, value: object) -> None:
        if isinstance(value, Tensor) and value.layout is torch.strided:
            storage = value.untyped_storage()
            self._follows[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def _is_followed(self, value: object) -> bool:
        is_plain = isinstance(value, Tensor) and value.layout is torch.strided
        return is_plain and value.untyped_storage()._cdata in self._follows  # type: ignore[attr-defined]


def _own_scalars(value: Tensor) -> int:
    """Return the number of scalars of a tensor; scalars repeated along an axis count once."""
    count = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        count *= size if stride else 1
    return count
