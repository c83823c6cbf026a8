"""Replaying a recipe on a fresh network and loading the weights strictly gives the same outputs to the bit."""

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.checkpoint.rebuild import apply_edits
from compress.cost.macs import count_params
from compress.errors import RebuildMismatch
from compress.lowrank.factorize import applicable_schemes, full_ranks
from compress.lowrank.layers import find_layers
from compress.lowrank.surgery import apply_factorize
from compress.model.recipe import Factorize, Recipe, RemoveBlock, RemoveChannels
from compress.pruning.blocks import find_removable_blocks
from compress.pruning.surgery import remove_block, remove_channels
from compress.pruning.trial import find_cuttable


def _draw_block(draw, module):
    names = find_removable_blocks(module, nets.EXAMPLE)
    return RemoveBlock(draw(st.sampled_from(names))) if names else None


def _draw_channels(draw, module):
    removed = {}
    for name, group in find_cuttable(module, nets.EXAMPLE)[0].items():
        units = group.width // group.parts
        gone = draw(st.lists(st.integers(0, units - 1), unique=True, max_size=units - 1))
        if gone:
            removed[name] = group.expand(gone)
    return RemoveChannels(removed) if removed else None


def _draw_factorize(draw, module):
    layers, _ = find_layers(module, nets.EXAMPLE)
    if not layers:
        return None
    name = draw(st.sampled_from(sorted(layers)))
    shape = tuple(module.get_submodule(name).weight.shape)
    scheme = draw(st.sampled_from(applicable_schemes(shape)))
    return Factorize(name, scheme, tuple(draw(st.integers(1, most)) for most in full_ranks(shape, scheme)))


DRAW = {"block": _draw_block, "channels": _draw_channels, "factorize": _draw_factorize}
APPLY = {
    RemoveBlock: remove_block,
    RemoveChannels: lambda module, edit: remove_channels(module, edit, nets.EXAMPLE),
    Factorize: apply_factorize,
}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(nets.NAMES), st.lists(st.sampled_from(sorted(DRAW)), min_size=1, max_size=4), st.data())
def test_replay_and_strict_load_give_the_same_outputs(name, kinds, data):
    module, recipe = nets.build(name), Recipe()
    for kind in kinds:
        edit = DRAW[kind](data.draw, module)
        if edit is not None:
            module = APPLY[type(edit)](module, edit)
            recipe = recipe.then(edit)
    replayed = apply_edits(nets.build(name, seed=7), Recipe.from_json(recipe.to_json()), nets.EXAMPLE)
    replayed.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(replayed(nets.images()), module(nets.images()))
    assert count_params(replayed) == count_params(module)
    assert not any(part.training for part in replayed.modules())


def test_a_chain_of_every_kind_of_edit_is_replayed():
    recipe = Recipe().then(
        RemoveBlock("body.1"),
        RemoveChannels({"body.0.0": (0, 5), "body.2.conv1": (1, 2, 3)}),
        Factorize("body.2.conv2", "vh", (4,)),
        RemoveChannels({"body.2.conv1": (0,)}),
        Factorize("head", "svd", (2,)),
    )
    module = nets.build("residual")
    for edit in recipe.edits:
        module = APPLY[type(edit)](module, edit)
    replayed = apply_edits(nets.build("residual", seed=7), recipe, nets.EXAMPLE)
    replayed.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(replayed(nets.images()), module(nets.images()))
    assert replayed.body[2].conv1.weight.shape == (12, 14, 3, 3)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (RemoveBlock("body.9"), "Edit 'remove_block' must fit the network .* a block 'body.9'"),
        (RemoveChannels({"body.0.0": (99,)}), "Edit 'remove_channels' must fit .*Group 'body.0.0' has 16 channels"),
        (RemoveChannels({"nowhere": (0,)}), "Edit 'remove_channels' must fit .*group 'nowhere'"),
        (Factorize("head", "vh", (1,)), "Edit 'factorize' must fit .*Layer 'head'"),
    ],
)
def test_edit_of_another_network_is_a_mismatch(edit, match):
    with pytest.raises(RebuildMismatch, match=match):
        apply_edits(nets.build("residual"), Recipe((edit,)), nets.EXAMPLE)
