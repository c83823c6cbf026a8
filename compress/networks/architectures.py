"""Architecture of a checkpoint: the torchvision network whose parameters have its names and shapes."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from compress.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]
CHECKPOINTS = (".pt", ".pth", ".th", ".ckpt", ".safetensors", ".bin", ".tar")
_FAMILIES = {  # names of parameters -> torchvision networks that have them
    r"layer1\.0\.conv1\.weight": r"resnet|resnext",
    r"features\.conv0\.weight": r"densenet",
    r"features\.0\.0\.weight": r"mobilenet|efficientnet|mnasnet|convnext",
    r"features\.0\.weight": r"vgg|alexnet|squeezenet",
    r"stem\.0\.weight": r"regnet",
    r"conv1\.0\.weight": r"shufflenet",
    r"layers\.0\.weight": r"mnasnet",
    r"conv1\.conv\.weight": r"googlenet",
    r"Conv2d_1a_3x3\.conv\.weight": r"inception",
}
_HEADS = r"(^|\.)(fc|classifier|heads?|linear)\."
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_SHOWN = 3


def count_outputs(shapes: Shapes) -> int | None:
    """Return the outputs of the last layer: the first axis of the last weight of two axes, or of a 1 x 1 kernel.

    The layer is one named as a head where there is any, since some files sort their names.
    """
    found = [name for name, shape in shapes.items() if name.endswith("weight") and _is_last(shape)]
    heads = sorted((name for name in found if re.search(_HEADS, name)), key=_by_number)
    weights = [name for name, shape in shapes.items() if name.endswith("weight") and len(shape) in (2, 4)]
    if heads:
        return shapes[heads[-1]][0]
    return shapes[weights[-1]][0] if weights and weights[-1] in found else None


def _is_last(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def find_architecture(shapes: Shapes, classes: int | None) -> str:
    """Return the torchvision network whose parameters have these names and shapes.

    Args:
        shapes: Name -> shape of a state dict; a common prefix of the names is ignored.
        classes: Outputs of the last layer.

    Raises:
        ModelError: No such network exists; the message names the nearest one.
    """
    nearest: tuple[str, list[str]] | None = None
    for name, prefix in _candidates(shapes):
        own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        other = _differences(name, own, classes)
        if other == []:
            return name
        if other is not None and (nearest is None or len(other) < len(nearest[1])):
            nearest = name, other
    first = next(iter(shapes), "")
    found = f"No network of torchvision has the layers of this checkpoint ({len(shapes)} tensors, such as '{first}')."
    if nearest is not None:
        more = f" and {len(nearest[1]) - _SHOWN} more" if len(nearest[1]) > _SHOWN else ""
        found += f" The nearest is {nearest[0]}, which differs in {', '.join(nearest[1][:_SHOWN])}{more}."
    raise ModelError(
        found,
        hint="Name the network besides its weights: file.py:build (a function of yours), resnet18 (torchvision) or "
        "timm:NAME, with --weights FILE.",
    )


def _candidates(shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Yield the networks of fitting families, and the prefix that the file puts before their names."""
    from torchvision import models  # heavy

    for pattern, family in _FAMILIES.items():
        expected = re.compile(rf"^(.*\.)?{pattern}$")
        match = next((found for name in shapes if (found := expected.match(name))), None)
        if match is not None:
            names = (name for name in models.list_models(module=models) if re.search(family, name))
            yield from ((name, match[1] or "") for name in names)


def _differences(name: str, given: Shapes, classes: int | None) -> list[str] | None:
    """Return the tensors whose shapes are not those of a network; None if names differ, too."""
    expected = _expected_shapes(name, classes)
    given = {key: shape for key, shape in given.items() if not key.startswith(_AUXILIARY)}
    if set(given) != set(expected):
        return None
    return [f"{key} {given[key]} in place of {shape}" for key, shape in expected.items() if given[key] != shape]


def _expected_shapes(name: str, classes: int | None) -> Shapes:
    import torch
    from torchvision import models

    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    try:
        with torch.device("meta"):
            expected = models.get_model(name, weights=None, **options).state_dict()
    except NotImplementedError:  # a constructor that computes with tensors
        expected = models.get_model(name, weights=None, **options).state_dict()
    return {key: tuple(value.shape) for key, value in expected.items()}
