"""Networks of torchvision and timm by name, and their published weights.

The networks are built without weights. `weights: pretrained` fetches the library's weights and loads them like a file.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.catalog import closest, require_packages
from compress.errors import ArtifactError, ModelError, translated
from compress.model.adapter import wiring_of
from compress.model.artifacts import FactorySpec
from compress.networks.detectors import DETECTORS, raw_detector, why_not
from compress.networks.weights import first_sentence

AUXILIARY = ("aux_classifier.", "AuxLogits.", "aux1.", "aux2.")  # heads that torchvision trains with and then drops
_WITH_AUXILIARY = ("googlenet", "inception_v3")
_Build = Callable[..., nn.Module]


def torchvision_factory(name: str) -> _Build:
    """Return a function that builds a network of torchvision without weights.

    A single-stage detector is built in its raw form (`detectors.py`), which takes images and returns tensors.

    Raises:
        ModelError: The name is unknown, or the network is a detector of two stages.
    """
    from torchvision import models  # heavy, and only needed by those who name a torchvision network

    names = models.list_models()
    if name not in names:
        raise ModelError(f"torchvision has no network named '{name}'.", hint=closest(name, names))
    if reason := why_not(name):
        raise ModelError(f"'{name}' of torchvision cannot be used: {reason}", hint=f"Use {', '.join(DETECTORS)}.")
    fixed = _without_weights(models.get_model_builder(name))
    defaults = {"aux_logits": False, "init_weights": False} if name in _WITH_AUXILIARY else {}

    def build(**kwargs: Any) -> nn.Module:
        built: nn.Module = models.get_model(name, **fixed, **{**defaults, **kwargs})
        return raw_detector(built) if name in DETECTORS else built

    return build


def timm_factory(name: str) -> _Build:
    """Return a function that builds a network of timm without weights.

    Raises:
        PackageMissing: timm is not installed.
        ModelError: timm has no network of that name.
    """
    require_packages(["timm"], f"model.timm: {name}")
    import timm

    names = timm.list_models()
    if name.partition(".")[0] not in names:
        raise ModelError(f"timm has no network named '{name}'.", hint=closest(name, names))
    return lambda **kwargs: timm.create_model(name, pretrained=False, **kwargs)


def pretrained_state(spec: FactorySpec) -> dict[str, Tensor]:
    """Fetch the weights that a network's library offers for it.

    Raises:
        ArtifactError: The weights cannot be fetched or do not exist.
        ModelError: The network comes from the user's code, or the weights need settings that it does not have.
    """
    if spec.kind not in ("timm", "torchvision"):
        raise ModelError(
            "weights: pretrained must stand beside a network of timm or torchvision, the model is a factory.",
            hint="Give a file of weights.",
        )
    make = timm_factory(spec.reference) if spec.kind == "timm" else torchvision_factory(spec.reference)
    built = make(**spec.kwargs)
    with (
        translated(
            lambda error: ArtifactError(
                f"The weights that {spec.kind} offers for '{spec.reference}' could not be had, "
                f"got {type(error).__name__}: {first_sentence(error)}.",
                hint="Without a connection, give a file of weights; "
                "num_classes and the like must be those of the weights.",
            )
        ),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(0)
        trained = _fetch(spec)
    state = {key: value for key, value in trained.state_dict().items() if isinstance(value, Tensor)}
    state = without_auxiliary(state, built.state_dict())
    _match_settings(built, trained, state)
    return state


def without_auxiliary(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Return a state dict without the auxiliary heads of torchvision that a network was built without."""
    return {
        name: value
        for name, value in state.items()
        if not name.startswith(AUXILIARY) or any(known.startswith(name.partition(".")[0] + ".") for known in expected)
    }


def drop_auxiliary(module: nn.Module) -> None:
    """Remove the unused auxiliary head of a segmentation network whose kept output is another one."""
    wiring = wiring_of(module)
    if wiring is not None and "aux" not in wiring.outputs and getattr(module, "aux_classifier", None) is not None:
        module.aux_classifier = None  # type: ignore[assignment]


def _fetch(spec: FactorySpec) -> nn.Module:
    if spec.kind == "timm":
        import timm

        fetched: nn.Module = timm.create_model(spec.reference, pretrained=True, **spec.kwargs)
        return fetched
    from torchvision import models

    loaded: nn.Module = models.get_model(spec.reference, weights="DEFAULT", **spec.kwargs)
    return loaded


def _match_settings(built: nn.Module, trained: nn.Module, state: dict[str, Tensor]) -> None:
    """Adapt weights to a network that was built without them: some weights need other settings of layers.

    A different epsilon of a batch norm is added to its variances, in place; other differences raise ModelError.
    """
    theirs = dict(trained.named_modules())
    for name, part in built.named_modules():
        other: Any = theirs.get(name)
        if f"{name}.running_var" in state and other.eps != part.eps:
            state[f"{name}.running_var"] = state[f"{name}.running_var"] + (other.eps - part.eps)  # type: ignore[operator]
    if getattr(trained, "transform_input", False) != getattr(built, "transform_input", False):
        raise ModelError(
            "These weights come with transform_input: true, and the network is built without it.",
            hint="Set model.kwargs: {transform_input: true}.",
        )


def _without_weights(builder: Callable[..., Any]) -> dict[str, None]:
    """Return the keyword arguments that keep a builder from fetching anything."""
    takes = inspect.signature(builder).parameters
    return {name: None for name in ("weights", "weights_backbone") if name in takes}
