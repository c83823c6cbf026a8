"""Architecture of a checkpoint: outputs of the last layer, prefixes, the nearest network."""

import pytest
from torchvision import models

from compress.errors import ModelError
from compress.networks.architectures import Shapes, count_outputs, find_architecture


def shapes(name: str, classes: int = 7) -> dict[str, tuple[int, ...]]:
    state = models.get_model(name, weights=None, num_classes=classes).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small", "resnet18"])
def test_outputs_and_names_are_found_in_sorted_files_and_below_prefixes(name: str) -> None:
    given = shapes(name)
    for found in (dict(sorted(given.items())), {f"model.net.{key}": shape for key, shape in given.items()}):
        assert count_outputs(found) == 7
        assert find_architecture(found, 7) == name


@pytest.mark.parametrize(
    ("found", "outputs"),
    [
        ({"0.weight": (16, 3, 3, 3), "9.weight": (5, 16)}, 5),
        ({"0.weight": (16, 3, 3, 3), "1.weight": (4, 16, 1, 1)}, 4),
        ({"0.weight": (5, 16), "1.weight": (16, 3, 3, 3)}, None),
        ({"heads.2.weight": (3, 8), "heads.10.weight": (6, 8)}, 6),
        ({}, None),
    ],
)
def test_outputs_of_the_last_layer(found: Shapes, outputs: int | None) -> None:
    assert count_outputs(found) == outputs


def test_the_nearest_network_and_its_differences_are_named() -> None:
    found = shapes("resnet18") | {"conv1.weight": (64, 1, 3, 3)}
    with pytest.raises(
        ModelError,
        match=r"nearest is resnet18, which differs in conv1\.weight \(64, 1, 3, 3\) in place of \(64, 3, 7, 7\)",
    ) as one:
        find_architecture(found, 7)
    assert "file.py:build" in str(one.value.hint)
    with pytest.raises(ModelError, match=r"No network of torchvision .*such as 'a\.weight'\)\.\n"):
        find_architecture({"a.weight": (1, 1)}, 1)
