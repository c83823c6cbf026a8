"""Networks whose inputs, outputs or layers are out of the ordinary, seeded and in eval mode."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torchvision.ops import FrozenBatchNorm2d

Pair = namedtuple("Pair", "logits features")


@dataclass
class Found:
    """As libraries of language models return it: a field is None where it was not asked for."""

    logits: Tensor
    loss: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None


FORMS: dict[str, Any] = {
    "tensor": lambda logits, features: logits,
    "dict": lambda logits, features: {"features": features, "logits": logits},
    "tuple": lambda logits, features: (logits, features),
    "list": lambda logits, features: [logits, [features, None]],
    "namedtuple": Pair,
    "dataclass": lambda logits, features: Found(logits, hidden=(features,)),
}
NAMES = {
    "tensor": ["logits"],
    "dict": ["features", "logits"],
    "tuple": ["output_0", "output_1"],
    "list": ["output_0", "output_1.0"],
    "namedtuple": ["logits", "features"],
    "dataclass": ["logits", "hidden.0"],
}


class Structured(nn.Module):
    """(N, 3, 16, 16) -> logits (N, 4) and features (N, 12), in one of `FORMS`; every layer is re-parametrised."""

    def __init__(self, form: str = "dict", training_form: str | None = None) -> None:
        super().__init__()
        self.form, self.training_form = form, training_form or form
        self.stem = weight_norm(nn.Conv2d(3, 16, 3, padding=1, bias=False))
        self.norm = FrozenBatchNorm2d(16)
        self.body = parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1))
        self.last = spectral_norm(nn.Conv2d(16, 12, 1))
        self.head = parametrizations.spectral_norm(nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        features = F.relu(self.last(F.relu(self.body(x)))).mean((2, 3))
        return FORMS[self.training_form if self.training else self.form](self.head(features), features)


class Several(nn.Module):
    """An image, tokens and a scale: (N, 3, 8, 12), (N, 5) below 20, (N, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 8, 3, padding=1), nn.Embedding(20, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor, *, tokens: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.conv(image).relu().mean((2, 3)) + self.embed(tokens).mean(1)
        return {"hidden": hidden, "logits": self.head(hidden if scale is None else hidden * scale)}


INPUTS = {
    "image": {"shape": [3, 8, 12]},
    "tokens": {"shape": [5], "dtype": "int64", "high": 20},
    "scale": {"shape": [1]},
}


def structured(form: str = "dict", training_form: str | None = None) -> nn.Module:
    """Build `Structured` with weights that are not those torch begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = Structured(form, training_form)
        module.norm.weight.uniform_(0.5, 1.5)
        module.norm.running_var.uniform_(0.5, 1.5)
        module.norm.running_mean.normal_(0, 0.3)
        module.stem.weight_g.data.mul_(1.5)
    return module.eval()


def several() -> nn.Module:
    """Build `Several`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Several().eval()
