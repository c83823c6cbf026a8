"""Names of the layers of an imported network.

A weight with the name of a torch parameter names its layer ("layer1.0.conv1.weight"). Otherwise the layer is named
after the node, without the additions of exporters, or else after the node's output.
"""

import builtins
import keyword
import re
from collections.abc import Sequence

from torch import fx, nn

_MACHINE_MADE = re.compile(r"^(onnx::.*|\d+|val_\d+|_.*)$")
_MODULE_WEIGHT = re.compile(r"^([A-Za-z_][\w]*(?:\.[\w]+)*)\.(weight|weights|kernel|scale|gamma|slope|bias|beta)$")
_RESERVED = frozenset((*dir(fx.GraphModule), *vars(nn.Module()), *keyword.kwlist))
# names that the code of a traced network reads: `self`, modules, and names that torch.fx adds
_READ_BY_CODE = frozenset((*keyword.kwlist, *keyword.softkwlist, *dir(builtins), "self", "torch", "operator", "math",
                           "inf", "nan", "device", "NoneType", "fx_pytree", "pytree"))  # fmt: skip


class Names:
    """Registry of unique layer names: no name is a prefix of another one's path, or an attribute of a module."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, wanted: str) -> str:
        """Return the free name nearest to `wanted`."""
        base = clean(wanted)
        parts = base.split(".")
        if any(".".join(parts[:end]) in self._taken for end in range(1, len(parts))):
            base = "_".join(parts)  # a layer has no layers within it
        name, number = base, 2
        while name in self._taken or any(other.startswith(f"{name}.") for other in self._taken):
            name, number = f"{base}_{number}", number + 1
        self._taken.add(name)
        return name


def layer_name(weights: Sequence[str], node: str, operator: str, output: str) -> str:
    """Return the name of a layer.

    Args:
        weights: Names of the layer's weights in the file.
        node: Name of the layer's node, may be "".
        operator: Operator of the node, such as "Conv".
        output: Name of the node's first output.

    >>> layer_name(["base_net.0.0.weight"], "", "Conv", "245")
    'base_net.0.0'
    >>> layer_name(["onnx::Conv_1"], "/layer1/layer1.0/conv1/Conv", "Conv", "x")
    'layer1.0.conv1'
    >>> layer_name(["onnx::Conv_1"], "Conv_3", "Conv", "x")
    'Conv_3'
    >>> layer_name(["12", "13"], "", "Conv", "245")
    'Conv_245'
    """
    for match in map(_MODULE_WEIGHT.match, weights):
        if match:
            return match[1]
    if node:
        return _scope(node, operator)
    return f"{operator}_{output}"


def value_name(name: str, default: str) -> str:
    """Return the name of a constant: the name in the file, or `default` where that name was generated."""
    return default if _MACHINE_MADE.match(name) or not name else name


def argument_names(names: Sequence[str]) -> list[str]:
    """Return a unique argument name of `forward` for each input of a file.

    >>> argument_names(["image", "in", "self", "1", "a.b", "a_b"])
    ['image', 'in_', 'self_', 'input_1', 'a_b_', 'a_b']
    """
    found: list[str] = []
    for name in names:
        base = clean(name).replace(".", "_")
        base = base if base.isidentifier() else f"input_{base}"
        taken = {*found, *_READ_BY_CODE, *(other for other in names if other != name)}
        while base in taken:
            base += "_"
        found.append(base)
    return found


def clean(name: str) -> str:
    """Return a dotted path whose parts can be attributes of a module.

    >>> clean("block 1/conv:0")
    'block_1_conv_0'
    >>> clean("train.3")
    'train_.3'
    """
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII) for part in name.split(".")]
    parts = [part for part in parts if part] or ["value"]
    return ".".join(f"{part}_" if part in _RESERVED else part for part in parts)


def _scope(node: str, operator: str) -> str:
    """Return the path of a module out of a node's name such as "/layer1/layer1.0/conv1/Conv"."""
    parts = [part for part in node.split("/") if part]
    if len(parts) > 1 and parts[-1].split("_")[0] == operator:
        parts = parts[:-1]
    kept = [
        part for part, following in zip(parts, [*parts[1:], ""], strict=True) if not following.startswith(f"{part}.")
    ]
    return ".".join(kept) or node
