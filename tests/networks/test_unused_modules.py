"""What no output reads is removed by `load`, by name, in a way that can be replayed; what is read stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoint.rebuild import apply_edits, rebuild, with_one_array, without_unread, write_weights
from compress.cost.macs import count_macs, count_params
from compress.errors import ArtifactError, RebuildMismatch, UnsupportedLayer
from compress.model.artifacts import FactorySpec, Signature, TensorSpec
from compress.model.recipe import Recipe, RemoveBlock, RemoveUnread
from compress.networks.unused_modules import Unread, UnreadShape, find_unread, remove_unread

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """A stem and two heads."""

    def __init__(self, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.main, self.use = nn.Linear(8, 4), use
        self.aux = nn.Sequential(nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
        self.pair = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.use(self, self.stem(x))


def _two(m: Any, y: Tensor) -> Any:
    return {"main": m.main(y.mean((2, 3))), "aux": m.aux(y), "pair": m.pair(y.flatten(2).transpose(1, 2))[0]}


def _strict_shapes(m: Any, y: Tensor) -> Any:
    aux = m.aux(y).view(-1, 5)
    states, (last, _) = m.pair(y.flatten(2).transpose(1, 2))
    return {"main": m.main(y.mean((2, 3))), "aux": aux + 1, "pair": torch.cat([states[:, 0], last[0]], 1)}


def _never_called(m: Any, y: Tensor) -> Any:
    if m.training:
        return {"main": m.main(y.mean((2, 3))), "aux": m.aux(y)}
    return {"main": m.main(y.mean((2, 3)))}


def built(use: Callable[[Any, Tensor], Any], *outputs: str) -> nn.Module:
    torch.manual_seed(0)
    return with_one_array(Heads(use).eval(), FactorySpec("factory", "x.py:Heads", {}, {}, outputs), IMAGES)


@pytest.mark.parametrize("use", [_two, _strict_shapes, _never_called])
def test_what_no_output_reads_goes_with_its_weights(use: Any):
    module = built(use, "main")
    with torch.no_grad():
        wanted = module(IMAGES)
    slim, recipe = without_unread(module, IMAGES)
    assert recipe == Recipe((RemoveUnread(("aux", "pair")),))
    assert recipe.is_baseline
    assert not recipe.then(RemoveBlock("stem")).is_baseline
    assert torch.equal(slim(IMAGES), wanted)
    assert slim(IMAGES[:1]).shape == (1, 4)
    assert count_params(slim) == 3 * 8 * 9 + 8 + 16 + 8 * 4 + 4
    assert count_macs(slim, IMAGES[:1]) == 3 * 8 * 9 * 14 * 14 + 8 * 4
    assert not any(name.startswith(("aux", "pair")) for name in slim.state_dict())
    assert isinstance(slim.pair, Unread | UnreadShape)
    assert any(name.startswith("aux") for name in module.state_dict())  # the network that came in stays


@pytest.mark.parametrize("outputs", [(), ("main", "aux", "pair")])
def test_a_network_all_of_which_is_read_comes_back_itself(outputs: tuple[str, ...]):
    module = built(_two, *outputs)
    slim, recipe = without_unread(module, IMAGES)
    assert slim is module
    assert recipe == Recipe()


def _behind_no_gradients(m: Any, y: Tensor) -> Any:
    with torch.no_grad():
        weight = m.aux(y).softmax(1)[:, :4]
    return {"main": m.main(y.mean((2, 3))) * weight}


def _by_index(m: Any, y: Tensor) -> Any:
    return {"main": m.main(y.mean((2, 3))).roll(int(m.aux(y.detach()).argmax(1)[0]) + 1, 1)}


def _times_zero(m: Any, y: Tensor) -> Any:
    return {"main": m.main(y.mean((2, 3))) + 0.0 * m.aux(y)[:, :4].detach()}


@pytest.mark.parametrize("use", [_behind_no_gradients, _by_index, _times_zero])
def test_what_no_gradient_reaches_but_outputs_read_stays(use: Any):
    module = built(use, "main")
    assert "aux" not in find_unread(module, IMAGES)


def _by_value(m: Any, y: Tensor) -> Any:
    return {"main": m.aux(y)[:, :4] if bool(y.sum() > 1e9) else m.main(y.mean((2, 3)))}


def test_nothing_is_removed_where_other_inputs_may_need_it():
    module = built(_by_value, "main")
    slim, recipe = without_unread(module, IMAGES)
    assert slim is module
    assert recipe == Recipe()


def test_a_recipe_without_unread_modules_is_replayed_and_checked(tmp_path: Path):
    module, recipe = without_unread(built(_two, "main"), IMAGES)
    write_weights(module, tmp_path / "w.safetensors")
    spec = FactorySpec("factory", "x.py:Heads", {}, {}, ("main",))
    signature = Signature((TensorSpec("images", ("batch", 3, 16, 16)),), (TensorSpec("main", ("batch", 4)),))
    read = Recipe.from_json(recipe.to_json())
    again = rebuild(spec, read, signature, tmp_path / "w.safetensors", make=lambda: Heads(_two))
    assert torch.equal(again(IMAGES), module(IMAGES))
    assert torch.equal(apply_edits(again, read, IMAGES[:1])(IMAGES), module(IMAGES))  # once more changes nothing
    with pytest.raises(RebuildMismatch, match="must fit the replayed network"):
        rebuild(spec, Recipe(), signature, tmp_path / "w.safetensors", make=lambda: Heads(_two))


def test_a_module_that_is_read_is_not_removed():
    module = built(_two, "main")
    with pytest.raises(UnsupportedLayer, match="does not give the same outputs without 'main'"):
        remove_unread(module, RemoveUnread(("main",)), IMAGES)
    with pytest.raises(UnsupportedLayer, match="no module 'nowhere'"):
        remove_unread(module, RemoveUnread(("nowhere",)), IMAGES)


@pytest.mark.parametrize("modules", ['"aux"', "[1]", "null"])
def test_a_recipe_with_names_of_another_kind_is_refused(modules: str):
    with pytest.raises(ArtifactError, match="list of known edits"):
        Recipe.from_json(f'{{"schema": 1, "edits": [{{"edit": "remove_unread", "modules": {modules}}}]}}')
