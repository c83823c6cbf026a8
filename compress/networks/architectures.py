"""Architecture of a checkpoint: the torchvision network whose parameters have its names and shapes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from compress.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]
CHECKPOINTS = (".pt", ".pth", ".th", ".ckpt", ".safetensors", ".bin", ".tar")
_FAMILIES = {  # names of parameters -> torchvision networks that have them
    r"^layer1\.0\.conv1\.weight$": r"resnet|resnext",
    r"^features\.conv0\.weight$": r"densenet",
    r"^features\.0\.0\.weight$": r"mobilenet|efficientnet|mnasnet|convnext",
    r"^features\.0\.weight$": r"vgg|alexnet|squeezenet",
    r"^stem\.0\.weight$": r"regnet",
    r"^conv1\.0\.weight$": r"shufflenet",
    r"^layers\.0\.weight$": r"mnasnet",
    r"^conv1\.conv\.weight$": r"googlenet",
    r"^Conv2d_1a_3x3\.conv\.weight$": r"inception",
}


def count_outputs(shapes: Shapes) -> int | None:
    """Return the outputs of the last layer: the first axis of the last weight of two axes, or of a 1 x 1 kernel."""
    last = [shape for name, shape in shapes.items() if name.endswith("weight") and len(shape) in (2, 4)]
    return last[-1][0] if last and (len(last[-1]) == 2 or last[-1][2:] == (1, 1)) else None


def find_architecture(shapes: Shapes, classes: int | None) -> str:
    """Return the torchvision network whose parameters have these names and shapes.

    Args:
        shapes: Name -> shape of a state dict.
        classes: Outputs of the last layer.

    Raises:
        ModelError: No such network exists.
    """
    for name in _candidates(shapes):
        if _has_shapes(name, shapes, classes):
            return name
    raise ModelError(
        f"No network of torchvision has the layers of this checkpoint ({len(shapes)} tensors, such as "
        f"'{next(iter(shapes), '')}').",
        hint="Name the network besides its weights, such as file.py:build with --weights.",
    )


def _candidates(shapes: Shapes) -> Iterable[str]:
    from torchvision import models  # heavy

    families = [family for pattern, family in _FAMILIES.items() if any(re.match(pattern, name) for name in shapes)]
    wanted = re.compile("|".join(families)) if families else None
    return [name for name in models.list_models(module=models) if wanted is not None and wanted.search(name)]


def _has_shapes(name: str, shapes: Shapes, classes: int | None) -> bool:
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
    auxiliary = ("aux1.", "aux2.", "AuxLogits.")
    given = {key: shape for key, shape in shapes.items() if not key.startswith(auxiliary)}
    return given == {key: tuple(value.shape) for key, value in expected.items()}
