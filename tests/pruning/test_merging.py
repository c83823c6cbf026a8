"""A merged block is the best single convolution for the block's outputs, and part of recipes and budgets."""

import copy

import nets
import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from compress.checkpoint.rebuild import apply_edits
from compress.cost.macs import count_macs
from compress.errors import ArtifactError, RebuildMismatch
from compress.model.recipe import MergeBlock, Recipe, RemoveChannels
from compress.progress import SilentProgress
from compress.pruning.merging import find_mergeable_blocks, fit_merged, load_merged, merged_output
from compress.pruning.surgery import merge_block
from compress.pruning.trial import find_cuttable


class _Linear(nn.Module):
    """A chain without activations, between two layers."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.chain = nn.Sequential(
            nn.Conv2d(4, 16, 1, bias=False),
            nn.Conv2d(16, 16, 3, stride, 1, groups=16, bias=False),
            nn.Conv2d(16, 6, 1, bias=False),
        )
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.chain(self.stem(images)).mean((2, 3)))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_chain_without_activations_is_merged_exactly(stride):
    torch.manual_seed(0)
    network = _Linear(stride).eval()
    (found,) = find_mergeable_blocks(network, nets.EXAMPLE).values()
    assert found.edit == MergeBlock("chain", 4, 6, 3, stride, "none")
    batches = [nets.images(16), nets.images(16, seed=2)]
    weights = fit_merged(network, network, [found.edit], batches, SilentProgress())
    merged = merge_block(network, found.edit).eval()
    load_merged(merged, "chain", weights["chain"])
    before, after = count_macs(network, nets.EXAMPLE), count_macs(merged, nets.EXAMPLE)
    assert before - after == found.saved_macs > 0
    with torch.no_grad():
        assert torch.allclose(merged(nets.images(8, seed=3)), network(nets.images(8, seed=3)), atol=1e-3)


def test_weights_are_the_least_squares_solution():
    network = nets.build("residual").eval()
    found = find_mergeable_blocks(network, nets.EXAMPLE)["body.1"]
    images = nets.images(64)
    weights = fit_merged(network, network, [found.edit], [images], SilentProgress())["body.1"]
    seen: list[Tensor] = []
    block = network.get_submodule("body.1")
    handle = block.register_forward_hook(lambda _m, given, output: seen.extend([given[0].clone(), output.clone()]))
    with torch.no_grad():
        network(images)
    handle.remove()
    patches = torch.nn.functional.unfold(seen[0], found.edit.kernel, padding=found.edit.kernel // 2)
    rows = patches.permute(0, 2, 1).flatten(0, 1).numpy()
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    wanted = seen[1].flatten(2).permute(0, 2, 1).flatten(0, 1).numpy()
    least = np.square(rows @ np.linalg.lstsq(rows, wanted, rcond=None)[0] - wanted).mean()
    linear = torch.nn.functional.conv2d(seen[0], weights["weight"], weights["bias"], 1, found.edit.kernel // 2)
    assert float((linear - seen[1]).square().mean()) == pytest.approx(least, rel=0.1)
    assert torch.equal(merged_output(found.edit, weights, seen[0]), linear.relu())


def test_blocks_of_published_networks_are_found():
    example = torch.zeros(1, 3, 64, 64)
    mobile = find_mergeable_blocks(torchvision.models.mobilenet_v2(weights=None).eval(), example)
    assert set(mobile) <= {f"features.{number}" for number in range(1, 18)}
    assert {"features.3", "features.5", "features.8"} <= set(mobile)
    assert mobile["features.2"].edit.stride == 2
    assert mobile["features.3"].edit.activation == "none"
    residual = find_mergeable_blocks(torchvision.models.resnet18(weights=None).eval(), example)
    assert set(residual) == {f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)}
    assert {one.edit.activation for one in residual.values()} == {"relu"}
    assert not find_mergeable_blocks(torchvision.models.resnet50(weights=None).eval(), example)


def test_blocks_that_share_weights_or_run_twice_are_not_found():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = nets.ResidualBlock(3), nn.Linear(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.block(self.block(images)).mean((2, 3)))

    assert find_mergeable_blocks(Twice().eval(), nets.EXAMPLE) == {}


def test_a_recipe_with_a_merged_block_is_read_back_and_replayed():
    network = nets.build("residual").eval()
    edit = find_mergeable_blocks(network, nets.EXAMPLE)["body.2"].edit
    recipe = Recipe((edit,))
    assert Recipe.from_json(recipe.to_json()) == recipe
    slim = apply_edits(copy.deepcopy(network), recipe, nets.EXAMPLE)
    assert isinstance(slim.get_submodule("body.2.merged"), nn.Conv2d)
    groups, _ = find_cuttable(slim, nets.EXAMPLE)
    group = next(one for one in groups.values() if any(member.layer == "body.2.merged" for member in one.members))
    cut = recipe.then(RemoveChannels({group.name: (0,)}))
    assert apply_edits(copy.deepcopy(network), cut, nets.EXAMPLE)(nets.EXAMPLE).shape == (1, 4)
    with pytest.raises(RebuildMismatch, match="must have a block 'absent' to merge"):
        apply_edits(network, Recipe((MergeBlock("absent", 1, 1, 3, 1, "none"),)), nets.EXAMPLE)
    with pytest.raises(ArtifactError, match="known edits"):
        Recipe.from_json(recipe.to_json().replace('"kernel": 3', '"kernel": "3"'))


def test_networks_are_left_unchanged():
    network = nets.build("residual").eval()
    before = copy.deepcopy(network.state_dict())
    edits = [one.edit for one in find_mergeable_blocks(network, nets.EXAMPLE).values()]
    fit_merged(network, network, edits, [nets.images(4)], SilentProgress())
    merge_block(network, edits[0])
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())


def test_blocks_whose_input_is_given_by_name_are_not_found():
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = nets.ResidualBlock(3), nn.Linear(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.block(x=images).mean((2, 3)))

    network = ByName().eval()
    assert network(nets.EXAMPLE).shape == (1, 4)
    assert find_mergeable_blocks(network, nets.EXAMPLE) == {}
