"""Normal form of a network: plain layers with their weights of evaluation mode.

    weight = g · v / |v|   (weight_norm, spectral_norm, any parametrisation) ──> a weight
    StdConv2d, ScaledStdConv2d, user layers with a weight computed from parameters ──> nn.Conv2d, nn.Linear
    shortcuts that pad channels with zeros ──> convolutions with fixed weights (`pruning/shortcuts.py`)
    FrozenBatchNorm2d ──> FrozenNorm, an nn.BatchNorm2d that stays in eval mode and is not trained
    SyncBatchNorm ──> the batch norm of one process

The stage `load` normalises after it has loaded the weights; a rebuild from a recipe normalises before it replays the
edits. So the recipe and the saved
weights refer to plain layers. The structure depends only on the code of the network, never on its weights.
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

SAME_WITHIN = 1e-4  # relative to the largest output; folded weights round differently
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
    """A batch norm that always stays in eval mode, and whose scale and shift are not trained."""

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
    """Return the network in plain layers, with the same outputs; the same object if nothing has to change.

    Outputs that change from run to run cannot be compared; `load` refuses such a network with the reason.

    Args:
        module: Network in eval mode, on the CPU; changed in place.
        example: Input of the network.

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
    """Return the difference of outputs; 0 if it is within the tolerance of folding."""
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
    """Replace tensors that torch's parametrisations or older hooks compute by their values."""
    folded = 0
    for part in module.modules():
        if parametrize.is_parametrized(part):
            for name in list(part.parametrizations):  # type: ignore[arg-type]
                originals = list(part.parametrizations[name].parameters())  # type: ignore[index,union-attr]
                learns = any(original.requires_grad for original in originals)
                for original in originals:  # without gradient, torch would leave a plain tensor in place of a parameter
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
    """Remove spectral_norm's hook for loading state dicts, which torch's own removal no longer finds."""
    for key, hook in list(layer._load_state_dict_pre_hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del layer._load_state_dict_pre_hooks[key]


def _fold_computed(module: nn.Module, example: Tensor) -> int:
    """Replace user-defined convolution and linear layers by plain ones, where a fixed weight computes the same."""
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
    """One call of a layer: its input, its output, and its operators of the kinds in `_PLAIN`."""

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
        calls.append(_Call(first.clone() if isinstance(first, Tensor) else None))  # may change in place later
        calls[-1].__enter__()  # type: ignore[no-untyped-call]

    return start


def _remember(calls: list[_Call]) -> Callable[..., None]:
    def stop(_: nn.Module, _inputs: tuple[Tensor, ...], output: object) -> None:
        calls[-1].__exit__(None, None, None)  # type: ignore[no-untyped-call]
        calls[-1].gave = output.clone() if isinstance(output, Tensor) else None  # None: the layer is not plain

    return stop


def _plain_layer(layer: Any, calls: list[_Call]) -> nn.Module | None:
    """Return the plain layer that has the same outputs as a layer in its calls, or None."""
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
    """Return whether both layers agree on the layer's input and on noise: its weight may depend on its input.

    The input may hold NaN: a rebuild runs on zeros, and some networks divide by the norm of their input.
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
    """Replace a layer by another one, under each name that the layer has."""
    for parent in list(module.modules()):
        for key, child in list(parent._modules.items()):  # named_children omits a second name
            if child is old:
                setattr(parent, key, new)


def _thaw(module: nn.Module, _: Tensor) -> int:
    """Replace torchvision's frozen batch norms, which are no batch norms by class, by `FrozenNorm`."""
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
