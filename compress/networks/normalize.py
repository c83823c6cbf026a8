"""Normal form of a network for the stages: weights as in eval mode, plain layers.

    weight = g · v / |v|   (weight_norm, spectral_norm, any parametrisation) ──> a weight
    StdConv2d, ScaledStdConv2d, any own layer whose weight is computed from its parameters ──> nn.Conv2d, nn.Linear
    shortcuts that pad channels with zeros ──> convolutions with fixed weights (`pruning/shortcuts.py`)
    FrozenBatchNorm2d ──> FrozenNorm, an nn.BatchNorm2d that stays in eval mode and learns nothing
    SyncBatchNorm ──> the batch norm of one process

`load` does it after the weights are in, and each rebuild before any edit is replayed, so that the recipe and the saved
weights are those of plain layers. Structure follows from the code of the network alone, never from its weights.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook
from torch.overrides import TorchFunctionMode
from torchvision.ops import FrozenBatchNorm2d

from compress.errors import InternalError
from compress.model.adapter import flatten_outputs
from compress.model.modes import eval_mode, hooked
from compress.pruning.shortcuts import write_out_shortcuts

SAME_WITHIN = 1e-4  # of the largest output: folding computes in another order
_REMOVERS: dict[str, Callable[..., Any]] = {
    "torch.nn.utils.weight_norm.WeightNorm": remove_weight_norm,
    "torch.nn.utils.spectral_norm.SpectralNorm": remove_spectral_norm,
}
_PLAIN: dict[Any, type[nn.Module]] = {
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.linear: nn.Linear,
}

_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class FrozenNorm(nn.BatchNorm2d):
    """A batch norm that stays in eval mode whatever its network does; its scale and shift are not trained."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        """Stay in eval mode."""
        super().train(False)
        return self


class SamePaddedConv2d(nn.Conv2d):
    """A convolution that pads its input so that stride s gives ceil(size / s), as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad by the size of the input and convolve."""
        pads = []
        for size, kernel, stride, dilation in zip(
            reversed(x.shape[2:]),
            reversed(self.kernel_size),
            reversed(self.stride),
            reversed(self.dilation),
            strict=True,
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


_FORWARDS = {kind.forward for kind in _PLAIN.values()} | {SamePaddedConv2d.forward}


def prepare(module: nn.Module, example: Tensor) -> nn.Module:
    """Return the network in plain layers, its outputs unchanged; the same object where there is nothing to do.

    A network that changes from run to run cannot be compared; `load` refuses it with the reason.

    Args:
        module: In eval mode, on the CPU; changed in place.
        example: What it is called with.

    Raises:
        InternalError: The outputs changed.
    """
    steps: tuple[Callable[[nn.Module, Tensor], int], ...] = (
        _fold_parametrized,
        _fold_computed,
        _thaw,
        _part,
        write_out_shortcuts,
    )
    before = _tensors(module, example)
    if sum(step(module, example) for step in steps):
        after = _tensors(module, example)
        gap = _gap(before, after)
        if gap and not _gap(after, _tensors(module, example)):
            raise InternalError(f"Plain layers must give the same outputs, they differ by {gap:.3g}.")
    return module.eval()


def _gap(before: list[Tensor], after: list[Tensor]) -> float:
    """Return by how much outputs differ, 0 where it is no more than folding may change."""
    gaps = [
        (float((a - b).abs().max()), float(a.abs().max()))
        for a, b in zip(before, after, strict=True)
        if a.isfinite().all()
    ]
    return max((gap for gap, largest in gaps if not gap <= SAME_WITHIN * max(1e-3, largest)), default=0.0)


def _tensors(module: nn.Module, example: Tensor) -> list[Tensor]:
    with torch.no_grad(), eval_mode(module):
        return [value.double() for _, value in flatten_outputs(module(example))]


def _fold_parametrized(module: nn.Module, _: Tensor) -> int:
    """Replace parametrised tensors, by torch's hooks of old and by its parametrisations, by what they come to."""
    folded = 0
    for part in module.modules():
        if parametrize.is_parametrized(part):
            for name in list(part.parametrizations):  # type: ignore[arg-type]
                originals = list(part.parametrizations[name].parameters())  # type: ignore[index,union-attr]
                learns = any(original.requires_grad for original in originals)
                for original in originals:  # what needs no gradient would come out as a tensor that is no parameter
                    original.requires_grad_(True)
                parametrize.remove_parametrizations(part, name, leave_parametrized=True)
                getattr(part, name).requires_grad_(learns)
                folded += 1
        hooks: list[Any] = list(part._forward_pre_hooks.values())
        for hook in hooks:
            remove = _REMOVERS.get(f"{type(hook).__module__}.{type(hook).__name__}")
            if remove is not None:
                remove(part, hook.name)
                _forget_loading(part)
                folded += 1
    return folded


def _forget_loading(layer: nn.Module) -> None:
    """Drop the hook by which spectral_norm has its own names loaded: torch's own removal does not find it any more."""
    for key, hook in list(layer._load_state_dict_pre_hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del layer._load_state_dict_pre_hooks[key]


def _fold_computed(module: nn.Module, example: Tensor) -> int:
    """Replace convolution and linear layers with a forward of their own by plain ones, where one weight says it all."""
    own = [
        part
        for part in module.modules()
        if isinstance(part, tuple(_PLAIN.values())) and type(part).forward not in _FORWARDS
    ]
    if not own:
        return 0
    calls: dict[nn.Module, list[_Call]] = {part: [] for part in own}
    with hooked(
        before=[(part, _listen(calls[part])) for part in own],
        after=[(part, _remember(calls[part])) for part in own],
        always_call=True,
    ):
        _tensors(module, example)
    plain = {part: layer for part in own if (layer := _plain_layer(part, calls[part])) is not None}
    for part, layer in plain.items():
        _replace(module, part, layer)
    return len(plain)


class _Call(TorchFunctionMode):
    """One call of a layer: what it was given, what it gave, and the operators of the kinds in `_PLAIN` in it."""

    def __init__(self, given: Tensor | None) -> None:
        super().__init__()
        self.given, self.gave = given, given
        self.used: list[tuple[Any, Tensor, Tensor | None]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _PLAIN:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            self.used.append((function, named["weight"], named.get("bias")))
        return function(*args, **(kwargs or {}))


def _listen(calls: list[_Call]) -> Callable[..., None]:
    def start(_: nn.Module, inputs: tuple[object, ...]) -> None:
        first = inputs[0] if inputs else None
        calls.append(_Call(first.clone() if isinstance(first, Tensor) else None))  # what follows may work in place
        calls[-1].__enter__()  # type: ignore[no-untyped-call]

    return start


def _remember(calls: list[_Call]) -> Callable[..., None]:
    def stop(_: nn.Module, _inputs: tuple[Tensor, ...], output: object) -> None:
        calls[-1].__exit__(None, None, None)  # type: ignore[no-untyped-call]
        calls[-1].gave = output.clone() if isinstance(output, Tensor) else None  # None: it is no plain layer

    return stop


def _plain_layer(layer: Any, calls: list[_Call]) -> nn.Module | None:
    """Return the plain layer that computes the same as a layer did in its calls, or None."""
    if not calls or any(len(call.used) != 1 or call.given is None for call in calls):
        return None
    function, weight, bias = calls[0].used[0]
    kind = _PLAIN[function]
    if weight is layer.weight or not isinstance(layer, kind) or weight.shape != layer.weight.shape:
        return None
    for candidate in (kind, SamePaddedConv2d) if kind is nn.Conv2d else (kind,):
        plain = _with(candidate, layer, weight, bias)
        if all(_agree(plain, layer, call) for call in calls):
            return plain.eval()
    return None


def _with(kind: type[nn.Module], layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    if kind is nn.Linear:
        plain: Any = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    else:
        plain = kind(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                     layer.dilation, layer.groups, bias is not None, layer.padding_mode, device="meta")  # fmt: skip
    plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=layer.weight.requires_grad)
    return plain  # type: ignore[no-any-return]


def _agree(plain: nn.Module, layer: nn.Module, call: _Call) -> bool:
    """Return whether both give the same for the layer's input and for noise: its weight may depend on its input.

    What it was given may hold NaN, as a network that divides by its input's norm has for the zeros of a rebuild.
    """
    assert call.given is not None
    noise = torch.randn(call.given.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = ((plain(call.given), call.gave), (plain(noise), layer(noise)))
    return all(
        isinstance(wanted, Tensor)
        and got.shape == wanted.shape
        and torch.allclose(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
        for got, wanted in pairs
    )


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a layer in the place of another, under each name that it has."""
    for parent in list(module.modules()):
        for key, child in list(parent._modules.items()):  # named_children leaves a second name out
            if child is old:
                setattr(parent, key, new)


def _thaw(module: nn.Module, _: Tensor) -> int:
    """Replace torchvision's frozen batch norms, which no other code takes for batch norms, by `FrozenNorm`."""
    frozen = [part for part in module.modules() if isinstance(part, FrozenBatchNorm2d)]
    for part in frozen:
        norm = FrozenNorm(part.weight.numel(), eps=part.eps)
        norm.load_state_dict(part.state_dict(), strict=False)
        _replace(module, part, norm.requires_grad_(False).eval())
    return len(frozen)


def _part(module: nn.Module, example: Tensor) -> int:
    """Replace batch norms that share their statistics with other processes by those of one process."""
    shared = [part for part in module.modules() if isinstance(part, nn.SyncBatchNorm)]
    axes: dict[nn.Module, int] = {}
    if shared:
        with hooked(before=[(part, lambda norm, inputs: axes.update({norm: inputs[0].ndim})) for part in shared]):
            _tensors(module, example)
    for part in (part for part in shared if part in axes):
        norm = _NORMS[axes[part]](part.num_features, part.eps, part.momentum, part.affine, part.track_running_stats)
        norm.load_state_dict(part.state_dict())
        for own, theirs in zip(norm.parameters(), part.parameters(), strict=True):
            own.requires_grad_(theirs.requires_grad)
        _replace(module, part, norm.eval())
    return len(shared)
