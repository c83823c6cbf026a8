"""Recipe: the structural edits that turn the baseline into the slim network. Data only.

    recipe = [RemoveBlock, RemoveChannels, Factorize, ...]      in the order they were made

Indices of an edit refer to the network after all earlier edits.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from compress.errors import ArtifactError

RECIPE_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class RemoveChannels:
    """Remove channels from channel groups, all in one graph.

    Attributes:
        removed: For each group, by the name of its first layer, the sorted indices of the removed channels.
    """

    kind: ClassVar[str] = "remove_channels"
    removed: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Narrow(RemoveChannels):
    """Narrow a network to the widths of the state dict that `load` read; made by `load`, so also in the baseline.

    Attributes:
        removed: As in `RemoveChannels`. The indices have no meaning: all weights are loaded afterwards.
    """

    kind: ClassVar[str] = "narrow"


@dataclass(frozen=True, slots=True)
class RemoveUnread:
    """Remove modules that no output reads; made by `load`, so that the baseline lacks them as well.

    Attributes:
        modules: Module paths.
    """

    kind: ClassVar[str] = "remove_unread"
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RemoveBlock:
    """Replace a residual block by the identity.

    Attributes:
        block: Module path of the block.
    """

    kind: ClassVar[str] = "remove_block"
    block: str


@dataclass(frozen=True, slots=True)
class MergeBlock:
    """Replace a block by one convolution with a bias, `BLOCK.merged`, and perhaps a ReLU behind it.

    Attributes:
        block: Module path of the block.
        inputs: Number of input channels.
        outputs: Number of output channels.
        kernel: Odd side length of the kernel; the padding keeps the size of the map, up to the stride.
        stride: Stride of the block.
        activation: "relu" or "none".
    """

    kind: ClassVar[str] = "merge_block"
    block: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    activation: str


@dataclass(frozen=True, slots=True)
class Factorize:
    """Replace a convolution or linear layer by a chain of smaller ones.

    Attributes:
        layer: Module path of the layer.
        scheme: "nc", "vh", "tucker2" or "svd"; "nc2" or "nc4" for "nc" with the input channels in 2 or 4 groups.
        ranks: One rank, that of each convolution group; two (in, out) for "tucker2".
    """

    kind: ClassVar[str] = "factorize"
    layer: str
    scheme: str
    ranks: tuple[int, ...]


Edit = RemoveUnread | Narrow | RemoveChannels | RemoveBlock | MergeBlock | Factorize
_EDITS: dict[str, type[Edit]] = {
    edit.kind: edit for edit in (RemoveUnread, Narrow, RemoveChannels, RemoveBlock, MergeBlock, Factorize)
}
_NUMBERS = ("inputs", "outputs", "kernel", "stride")
_OF_BASELINE = (RemoveUnread, Narrow)


@dataclass(frozen=True, slots=True)
class Recipe:
    """An ordered list of edits.

    >>> recipe = Recipe().then(RemoveBlock("layer1.1")).then(Factorize("fc", "svd", (8,)))
    >>> Recipe.from_json(recipe.to_json()) == recipe
    True
    """

    edits: tuple[Edit, ...] = ()

    def then(self, *edits: Edit) -> "Recipe":
        """Return this recipe with more edits at its end."""
        return Recipe((*self.edits, *edits))

    @property
    def of_baseline(self) -> "Recipe":
        """The edits that `load` made, which the baseline has as well."""
        return Recipe(tuple(edit for edit in self.edits if isinstance(edit, _OF_BASELINE)))

    @property
    def after_baseline(self) -> "Recipe":
        """The edits that turn the baseline into the present network."""
        return Recipe(tuple(edit for edit in self.edits if not isinstance(edit, _OF_BASELINE)))

    @property
    def is_baseline(self) -> bool:
        """Return whether all edits are those of the baseline."""
        return self == self.of_baseline

    def to_json(self) -> str:
        """Return stable JSON text."""
        edits = [{"edit": edit.kind, **asdict(edit)} for edit in self.edits]
        return json.dumps({"schema": RECIPE_SCHEMA, "edits": edits}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Parse `to_json` text.

        Raises:
            ArtifactError: The text is no recipe of this schema.
        """
        try:
            data = json.loads(text)
            if data["schema"] != RECIPE_SCHEMA:
                raise ArtifactError(f"The recipe must have schema {RECIPE_SCHEMA}, got {data['schema']}.")
            return cls(tuple(_parse_edit(entry) for entry in data["edits"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"The recipe must be a list of known edits: {error!r}") from error


def _parse_edit(entry: dict[str, Any]) -> Edit:
    values = dict(entry)
    edit = _EDITS[values.pop("edit")]
    for key, value in values.items():
        if key == "removed":
            values[key] = {name: _whole_numbers(indices) for name, indices in value.items()}
        elif key == "ranks":
            values[key] = _whole_numbers(value)
        elif key == "modules":
            values[key] = _names(value)
        elif key in _NUMBERS:
            (values[key],) = _whole_numbers([value])
        elif not isinstance(value, str):
            raise TypeError(f"{key} must be text, got {value!r}")
    return edit(**values)


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"names must be listed, got {values!r}")
    return tuple(values)


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"whole numbers must be listed, got {values!r}")
    return tuple(values)
