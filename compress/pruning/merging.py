"""Merging: a block of several convolutions is replaced by one convolution, fitted in closed form.

    x -> 1x1 -> ReLU6 -> depthwise 3x3 -> ReLU6 -> 1x1 -> + x        becomes        x -> 3x3

The convolution is the least-squares solution of "output of the original block from the input in the present network".
A fused chain without its activations is one of the candidates of that regression, so the fit is at least as good at
the positions that it samples, up to the ridge.

Source: Kim et al. 2024, "LayerMerge: Neural Network Depth Compression through Layer Pruning and Merging",
    arXiv:2406.12837, for the merging of layers; there kernels are fused, and trained afterwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.cost.macs import CONVOLUTIONS, layer_macs
from compress.model.modes import eval_mode, hooked
from compress.model.recipe import MergeBlock
from compress.model.tensors import find_shared
from compress.progress import Progress
from compress.pruning.repair.least_squares import RIDGE, GramSum, Places, positions_needed, regression_rows
from compress.pruning.surgery import merged_layer

MOST_CONVOLUTIONS = 5
LEAST_SAVING = 0.1


@dataclass(frozen=True)
class Mergeable:
    """A block that one convolution can replace.

    Attributes:
        edit: The replacement.
        saved_macs: Difference of the MACs, for one input.
    """

    edit: MergeBlock
    saved_macs: int


def find_mergeable_blocks(module: nn.Module, example: Tensor) -> dict[str, Mergeable]:
    """Return block -> how it can be merged, in definition order.

    A block is a module with two to `MOST_CONVOLUTIONS` convolutions. It is called once, with one feature map that is
    not given by name, and returns one of the same size or, with stride 2, of half the size. Merging saves at least
    `LEAST_SAVING` of its MACs. Blocks within a block are left out, as are plain containers of blocks.

    Args:
        module: Any network; left unchanged.
        example: One input, (1, C, H, W).
    """
    maps = _feature_maps(module, example)
    shared = find_shared(module)
    macs = layer_macs(module, example)
    found: dict[str, Mergeable] = {}
    for name, part in module.named_modules():
        if name not in maps or any(name.startswith(f"{other}.") for other in found):
            continue
        if any(other == name or other.startswith(f"{name}.") for other in shared) or not _is_block(part):
            continue
        edit = _edit(name, part, *maps[name])
        if edit is None:
            continue
        height, width = maps[name][1].shape[2:]
        merged = edit.inputs * edit.outputs * edit.kernel**2 * height * width
        whole = sum(count for layer, count in macs.items() if layer.startswith(f"{name}."))
        if merged <= (1 - LEAST_SAVING) * whole:
            found[name] = Mergeable(edit, whole - merged)
    return found


def fit_merged(
    original: nn.Module,
    present: nn.Module,
    edits: Sequence[MergeBlock],
    batches: Sequence[Tensor],
    progress: Progress,
) -> dict[str, dict[str, Tensor]]:
    """Return block -> weight and bias of its convolution, each as if it were the only block merged.

    Args:
        original: The network whose blocks are imitated; left unchanged.
        present: The same network, perhaps with other blocks removed or merged before; left unchanged.
        edits: Blocks that both networks have.
        batches: Network inputs, (N, ...) each.
        progress: Receives progress by batch.
    """
    fits = {edit.block: _Fit(edit, sum(map(len, batches)), len(batches)) for edit in edits}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def take_input(name: str):  # type: ignore[no-untyped-def]
        return lambda _part, given: inputs.__setitem__(name, given[0].clone())

    def take_output(name: str):  # type: ignore[no-untyped-def]
        return lambda _part, _given, output: outputs.__setitem__(name, output.clone())

    with (
        torch.no_grad(), eval_mode(original), eval_mode(present),
        hooked(before=[(present.get_submodule(name), take_input(name)) for name in fits]),
        hooked(after=[(original.get_submodule(name), take_output(name)) for name in fits]),
        progress.task("merged blocks", len(batches)) as task,
    ):  # fmt: skip
        for number, images in enumerate(batches):
            present(images)
            original(images)
            for name, fit in fits.items():
                fit.add(inputs[name], outputs[name], number)
            task.advance()
    return {name: fit.solve() for name, fit in fits.items()}


def merged_output(edit: MergeBlock, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Return the output of a merged block, (N, outputs, H, W)."""
    output = F.conv2d(inputs, weights["weight"], weights["bias"], edit.stride, edit.kernel // 2)
    return output.relu() if edit.activation == "relu" else output


def load_merged(module: nn.Module, block: str, weights: Mapping[str, Tensor]) -> None:
    """Set the weights of a merged block, in place."""
    with torch.no_grad():
        layer = module.get_submodule(f"{block}.merged")
        for name, values in weights.items():
            layer.get_parameter(name).copy_(values)


class _Fit:
    """Regression of one block's outputs on its inputs, added up batch by batch."""

    def __init__(self, edit: MergeBlock, images: int, batches: int) -> None:
        self._layer = merged_layer(edit)
        unknowns = self._layer.weight[0].numel() + 1
        self._grams = GramSum(unknowns)
        self._cross = torch.zeros(unknowns, edit.outputs, dtype=torch.float64)
        self._places = [Places(positions_needed(unknowns, images), number) for number in range(batches)]

    def add(self, inputs: Tensor, outputs: Tensor, number: int) -> None:
        rows, wanted = regression_rows(self._layer, inputs, outputs, self._places[number])
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        self._grams.add(rows)
        self._cross += rows.T @ wanted

    def solve(self) -> dict[str, Tensor]:
        gram = self._grams.matrix()
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        solution = torch.linalg.solve(gram, self._cross).float()
        return {"weight": solution[:-1].T.reshape(self._layer.weight.shape).contiguous(), "bias": solution[-1].clone()}


def _feature_maps(module: nn.Module, example: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return module path -> input and output, of modules called once with one feature map that return one."""
    calls: dict[str, list[tuple[Tensor, Tensor] | None]] = {}

    def watch(name: str):  # type: ignore[no-untyped-def]
        def hook(_part: nn.Module, inputs: tuple[object, ...], keywords: dict[str, object], output: object) -> None:
            given = inputs[0] if len(inputs) == 1 and not keywords else None  # the replacement has no such keyword
            is_map = isinstance(given, Tensor) and isinstance(output, Tensor) and given.ndim == output.ndim == 4
            pair = (given.clone(), output.clone()) if is_map else None  # type: ignore[union-attr,attr-defined]
            calls.setdefault(name, []).append(pair)

        return hook

    parts = [(part, watch(name)) for name, part in module.named_modules() if name and _count(part) > 1]
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))  # signs tell a ReLU at the end
    with hooked(after=parts, with_kwargs=True), torch.no_grad(), eval_mode(module):
        module(noise.to(example.dtype))
    return {name: pairs[0] for name, pairs in calls.items() if len(pairs) == 1 and pairs[0] is not None}


def _count(part: nn.Module) -> int:
    return sum(isinstance(child, CONVOLUTIONS) for child in part.modules())


def _is_block(part: nn.Module) -> bool:
    """Return whether a module has two to `MOST_CONVOLUTIONS` convolutions, all over images, and contains no block."""
    layers = [child for child in part.modules() if isinstance(child, CONVOLUTIONS)]
    if not 2 <= len(layers) <= MOST_CONVOLUTIONS or not all(isinstance(one, nn.Conv2d) for one in layers):
        return False
    return not (isinstance(part, nn.Sequential) and any(_count(child) > 1 for child in part))


def _edit(name: str, part: nn.Module, given: Tensor, output: Tensor) -> MergeBlock | None:
    """Return the replacement of a block; None if no convolution has outputs of its size."""
    sizes = [one for child in part.modules() if isinstance(child, nn.Conv2d) for one in child.kernel_size]
    kernel = max(sizes) | 1
    for stride in (1, 2):
        if tuple(output.shape[2:]) == tuple(-(-size // stride) for size in given.shape[2:]):
            activation = "relu" if bool((output >= 0).all()) else "none"
            return MergeBlock(name, int(given.shape[1]), int(output.shape[1]), kernel, stride, activation)
    return None
