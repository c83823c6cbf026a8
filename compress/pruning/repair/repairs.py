"""Repairs: recovery of accuracy after a cut without training.

least squares   refit each layer whose inputs changed so that it computes its former outputs from the kept channels
bias folding    add the mean of a layer's lost output to its bias, or to the batch norm behind it

Both visit the layers in the order of their calls, so that each layer also compensates the remaining errors of the
layers before it. The third repair, batch norm, is `compress.training.batch_norm.reestimate_batch_norm`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.data.batches import evaluation_batches
from compress.data.splits import Split
from compress.model.modes import eval_mode, hooked
from compress.model.tensors import find_shared
from compress.progress import Progress
from compress.pruning.groups import BATCH_NORMS
from compress.pruning.repair.least_squares import (
    RIDGE,
    GramSum,
    Places,
    input_rows,
    is_refittable,
    positions_needed,
)
from compress.pruning.repair.lockstep import Lockstep, call_order, following_norms, run_watched
from compress.pruning.repair.originals import OriginalOutputs, Sampled

_BATCH = 128
_PASS_BATCH = 32
_LIVE_BYTES = 2 * 10**9
_CLOSED = 0.05


@dataclass(frozen=True)
class Comparison:
    """A cut network and the network before the cut.

    Attributes:
        slim: The cut network; repairs change it in place.
        original: The network before the cut, with the same layer names.
        readers: Layers whose inputs changed with the cut.
        kept_outputs: Layer that lost outputs, too -> (n,) kept output channels of `original`.
        split: Images to compare on; labels are not used.
        closing: Layer -> the residual block that adds the layer's output, behind its norm, to the block's input. Such a
            layer also compensates the error of its block's input.
        means: Layer -> (n,) mean of each output in `original`; filled in by the repairs.
        most_images: Largest number of images of the split to fit layers to.
        outputs: Outputs of `original` from the repairs of its other cuts, and for them; None if there is one cut.
    """

    slim: nn.Module
    original: nn.Module
    readers: frozenset[str]
    kept_outputs: Mapping[str, Tensor]
    split: Split
    closing: Mapping[str, str] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    most_images: int = 512
    outputs: OriginalOutputs | None = None


def refit_readers(comparison: Comparison, progress: Progress) -> tuple[str, ...]:
    """Refit the layers whose inputs changed, in place and in the order of their calls.

    Each layer's weights become the ridge least-squares solution of "original output from slim input" on positions
    sampled from the images. Its constant part is added to the bias, or to the batch norm behind the layer. A layer that
    closes a residual block is fitted to the block's original sum. Memory is bounded: patches are extracted for one
    batch of images at a time, and the size of both networks' activations limits the number of images.

    Args:
        comparison: Convolutions without groups and linear layers in it are refitted.
        progress: Receives progress by layer.

    Returns:
        The layers that were refitted.

    Source: He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv:1707.06168, section
        3.1, the reconstruction step, and 3.3 for residual blocks.
    """
    slim, original = comparison.slim, comparison.original
    with torch.no_grad(), eval_mode(slim), eval_mode(original):
        batches = _batches(comparison)
        every = _readers(comparison, batches[0][:1])
        readers = {reader.name: reader for reader in every if is_refittable(reader.layer)}
        blocks = {comparison.closing[name]: readers[name] for name in readers if name in comparison.closing}
        stops = call_order(slim, [*readers, *blocks], batches[0][:1])
        missing: dict[str, list[Tensor]] = {}
        refitted = []
        with (
            progress.task("least squares", len(readers)) as task,
            Lockstep(slim, stops, batches) as ours,
            _originals(comparison, every, stops, readers, blocks, batches) as theirs,
        ):
            for stop in stops:
                reader = blocks.get(stop) or readers[stop]
                every_place = _places(reader, (reader.layer,), batches)
                seen = zip(every_place, ours.reach(stop), theirs(stop), strict=True)
                if stop in blocks:
                    missing[reader.name] = [
                        wanted.rows_of(places)[:, reader.kept] - places.rows_of(got) for places, (got,), wanted in seen
                    ]
                    continue
                if _refit(reader, seen, missing.pop(stop, None)):
                    refitted.append(stop)
                task.advance()
    return tuple(refitted)


def add_constant(layer: nn.Module, norm: nn.Module | None, constant: Tensor) -> None:
    """Add a constant, (outputs,), to a layer's output: to its bias, or off the running mean of the norm behind it."""
    if isinstance(getattr(layer, "bias", None), Tensor):
        layer.bias.add_(constant)  # type: ignore[union-attr,operator]
    elif norm is not None:
        norm.running_mean.sub_(constant)  # type: ignore[union-attr,operator]


def fold_means(comparison: Comparison, progress: Progress) -> tuple[str, ...]:
    """Restore in place the mean output of each layer whose inputs changed, in its bias or the batch norm behind it.

    A layer without padding compensates a constant removed channel exactly. At padded borders, where the channel was not
    constant to the layer, it is compensated on average only.

    Args:
        comparison: Layers with a bias, or with a batch norm behind them, are adjusted.
        progress: Receives progress by layer.

    Returns:
        The layers that were adjusted.
    """
    slim, original = comparison.slim, comparison.original
    with torch.no_grad(), eval_mode(slim), eval_mode(original):
        batches = _batches(comparison)
        readers = [reader for reader in _readers(comparison, batches[0][:1]) if reader.has_intercept]
        names = tuple(reader.name for reader in readers)
        if not comparison.means.keys() >= set(names):
            with _known_means(comparison, names, batches), progress.task("mean outputs", len(batches)) as task:
                for images in batches:
                    original(images)
                    task.advance()
        with (
            progress.task("bias folding", len(readers)) as task,
            Lockstep(slim, names, batches, after=names) as ours,
        ):
            for reader in readers:
                mean = _Mean(reader.layer)
                for _, output in ours.reach(reader.name):
                    mean.add(output)
                shift = reader.wanted(comparison.means[reader.name][None])[0] - mean.value
                reader.shift(shift)
                # the outputs that the passes wait with were computed before the bias changed; a norm comes after them
                ours.shift = shift if reader.has_bias else None
                task.advance()
    return names


@dataclass(frozen=True)
class _Reader:
    """A layer whose inputs changed with the cut.

    Attributes:
        name: Module path.
        layer: The layer in the cut network.
        norm: The batch norm behind the layer in the cut network, if any.
        kept: (outputs,) indices of the baseline's outputs that are kept.
        stretch: (outputs,) ratio of the norm's running deviations, cut network over original.
        moved: (outputs,) running mean of the norm, less `stretch` times the baseline's.
    """

    name: str
    layer: nn.Module
    norm: nn.Module | None
    kept: Tensor
    stretch: Tensor
    moved: Tensor

    @property
    def has_bias(self) -> bool:
        """Return whether the layer itself has a bias for constants."""
        return isinstance(getattr(self.layer, "bias", None), Tensor)

    @property
    def has_intercept(self) -> bool:
        """Return whether a constant can be added to the layer's output."""
        return self.has_bias or self.norm is not None

    @property
    def scale(self) -> Tensor:
        """(outputs,) change of the layer's output for 1 more behind its norm; 0 where the norm's gain is nearly 0."""
        if self.norm is None or not isinstance(self.norm.weight, Tensor):
            return torch.ones(1)
        gain = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()  # type: ignore[operator]
        is_open = gain.abs() > _CLOSED * gain.abs().max()
        return torch.where(is_open, 1 / torch.where(is_open, gain, torch.ones_like(gain)), torch.zeros_like(gain))

    def wanted(self, outputs: Tensor) -> Tensor:
        """Return the target outputs of the layer for `outputs` of the original, both (rows, outputs)."""
        return outputs[:, self.kept] * self.stretch + self.moved

    def shift(self, constant: Tensor) -> None:
        """Add a constant, (outputs,), to the layer's output."""
        add_constant(self.layer, self.norm, constant)


def _batches(comparison: Comparison) -> list[Tensor]:
    """Return the images to fit to, as many as fit into memory, in batches of one pass each."""
    split = comparison.split
    example = next(evaluation_batches(split.first(1), 1, "nothing"))[0]
    room = _LIVE_BYTES // (2 * _live_bytes(comparison.original, example))
    count = max(min(len(split), comparison.most_images, room), 1)
    return [images for images, _ in evaluation_batches(split.first(count), min(_PASS_BATCH, count), "nothing")]


def _readers(comparison: Comparison, example: Tensor) -> list[_Reader]:
    """Return the layers to adjust, in the order of their calls, without those that share parameters with others."""
    slim, original = comparison.slim, comparison.original
    norms = following_norms(slim, BATCH_NORMS, example)
    found = []
    for name in call_order(slim, comparison.readers - find_shared(slim).keys(), example):
        layer, norm, stretch, moved = slim.get_submodule(name), None, torch.ones(1), torch.zeros(1)
        kept = comparison.kept_outputs.get(name)
        if kept is None:
            whole = original.get_submodule(name)
            kept = torch.arange(int(getattr(whole, "out_features", 0) or getattr(whole, "out_channels", 0)))
        if name in norms and isinstance(mean := slim.get_submodule(norms[name]).running_mean, Tensor):
            norm, before = slim.get_submodule(norms[name]), original.get_submodule(norms[name])
            variances = norm.running_var, before.running_var[kept]  # type: ignore[index]
            stretch = ((variances[0] + norm.eps) / (variances[1] + before.eps)).sqrt()  # type: ignore[operator]
            moved = mean - stretch * before.running_mean[kept]  # type: ignore[index]
        found.append(_Reader(name, layer, norm, kept, stretch, moved))
    return found


def _live_bytes(network: nn.Module, example: Tensor) -> int:
    """Return roughly the bytes of one image's activations while a pass waits: twice one layer's inputs and output."""
    most = 0

    def watch(_part: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal most
        tensors = [value for value in (*inputs, output) if isinstance(value, Tensor)]
        most = max(most, 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    run_watched(network, example, {part: watch for part in network.modules() if not any(part.children())})
    return max(most, 1)


@contextmanager
def _originals(
    comparison: Comparison,
    every: Sequence[_Reader],
    stops: Sequence[str],
    readers: Mapping[str, _Reader],
    blocks: Mapping[str, _Reader],
    batches: Sequence[Tensor],
) -> Iterator[Callable[[str], Iterable[Sampled]]]:
    """Yield a function from each stop in turn to the outputs of the original by batch, and fill in their means."""
    original, known, sizes = comparison.original, comparison.outputs, [len(images) for images in batches]
    if known is not None and known.has(stops, sizes):
        yield known.get
        return

    def sampled(stop: str) -> Iterator[Sampled]:
        reader = blocks.get(stop) or readers[stop]
        places = _places(reader, (reader.layer, original.get_submodule(reader.name)), batches)
        samples = []
        for place, tensors in zip(places, passes.reach(stop), strict=True):
            one = Sampled.of(tensors[0], tensors[-1], place)
            if known is not None:
                samples.append(one)
            yield one
        if known is not None:
            known.add(stop, samples, sizes)

    with (
        _known_means(comparison, [reader.name for reader in every], batches),
        Lockstep(original, stops, batches, after=readers) as passes,
    ):
        yield sampled


def _places(reader: _Reader, layers: Iterable[nn.Module], batches: Sequence[Tensor]) -> list[Places]:
    """Return the sample of positions for each batch, enough for all of the layers."""
    unknowns = max(int(layer.weight[0].numel()) for layer in layers) + reader.has_intercept  # type: ignore[union-attr,index,operator]
    needed = positions_needed(unknowns, sum(map(len, batches)))
    return [Places(needed, number) for number in range(len(batches))]


def _refit(
    reader: _Reader,
    seen: Iterable[tuple[Places, tuple[Tensor, ...], Sampled]],
    missing: Sequence[Tensor] | None,
) -> bool:
    """Refit one layer if its inputs changed, and return whether it was refitted.

    Args:
        reader: The layer.
        seen: Positions, input of the layer, and input and output of the baseline's layer, batch by batch.
        missing: For each batch, (rows, outputs) missing part of the block's sum that the layer closes; None if it
            closes none.
    """
    layer = reader.layer
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    old = layer.weight.flatten(1).T
    if reader.has_intercept:
        old = torch.cat([old, torch.zeros(1, len(reader.kept)) if layer.bias is None else layer.bias[None]])
    unknowns, outputs = old.shape
    grams = GramSum(unknowns)
    cross = torch.zeros(unknowns, outputs, dtype=torch.float64)
    has_changed = False
    for number, (places, (inputs,), before) in enumerate(seen):
        has_changed |= not before.equals_input(inputs)
        x = input_rows(layer, inputs, before.map_shape, places)
        if reader.has_intercept:
            x = torch.cat([x, torch.ones(len(x), 1)], 1)
        wanted = reader.wanted(before.rows_of(places))
        if missing is not None:
            has_changed |= bool(missing[number].any())
            wanted = wanted + missing[number] * reader.scale
        grams.add(x)
        cross += x.T @ wanted
    if not has_changed:
        return False
    gram = grams.matrix()
    ridge = RIDGE * gram.diagonal().mean()
    gram.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(gram)
    solution = torch.cholesky_solve(cross + ridge * old.double(), factor).float()
    if int(info) != 0 or not solution.isfinite().all():  # all inputs are zero
        return False
    if reader.has_intercept:
        reader.shift(solution[-1] - old[-1])
        solution = solution[:-1]
    layer.weight.copy_(solution.T.reshape(layer.weight.shape))
    return True


class _Mean:
    """The mean of each output of a layer over all images and positions, added up batch by batch."""

    def __init__(self, layer: nn.Module) -> None:
        self._is_linear = isinstance(layer, nn.Linear)
        self._total, self._count = torch.zeros(1, dtype=torch.float64), 0
        self.images = 0

    def add(self, output: Tensor) -> None:
        """Add the layer's output for a batch."""
        channels = output.ndim - 1 if self._is_linear else 1
        others = [axis for axis in range(output.ndim) if axis != channels]
        self._total = self._total + output.sum(others, dtype=torch.float64)
        self._count += output.numel() // output.shape[channels]
        self.images += len(output)

    @property
    def value(self) -> Tensor:
        """(outputs,) float32."""
        return (self._total / self._count).float()


@contextmanager
def _known_means(comparison: Comparison, names: Iterable[str], batches: Iterable[Tensor]) -> Iterator[None]:
    """Fill in the means of the baseline's layers that see each of the images once within the context."""
    means = {name: _Mean(comparison.original.get_submodule(name)) for name in names}

    def watch(mean: _Mean):  # type: ignore[no-untyped-def]
        return lambda _layer, _inputs, output: mean.add(output)

    with hooked(after=[(comparison.original.get_submodule(name), watch(mean)) for name, mean in means.items()]):
        yield
    images = sum(map(len, batches))
    comparison.means.update({name: mean.value for name, mean in means.items() if mean.images == images})
