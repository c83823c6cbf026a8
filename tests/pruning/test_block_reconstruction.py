"""Blocks of a cut network are trained towards the outputs of the original blocks, and only kept if they come nearer."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import nets
import pytest
import torch
from torch import Tensor, fx, nn

from compress.checkpoint.rebuild import apply_edits
from compress.model.recipe import Recipe, RemoveBlock, RemoveChannels
from compress.progress import SilentProgress
from compress.pruning.repair.block_reconstruction import Reconstruction, reconstruct_blocks
from compress.pruning.repair.segments import SegmentModule, find_segments
from compress.pruning.repair.units import find_units
from compress.pruning.repair.walks import Block, GraphWalk, ModuleWalk, Pair, find_walk
from compress.pruning.survival import surviving_channels
from compress.pruning.trial import find_cuttable

SETTINGS = Reconstruction(steps=60, batch_size=16, learning_rate=0.1, seed=0)


def _first_half(width: int, parts: int) -> tuple[int, ...]:
    each = width // parts
    return tuple(channel for channel in range(width) if channel % each < each // 2)


def _narrower(network: nn.Module) -> tuple[Recipe, nn.Module]:
    """Return a recipe that removes the first half of each group's channels, and the network it makes."""
    groups, _ = find_cuttable(network, nets.EXAMPLE)
    edit = RemoveChannels({group.name: _first_half(group.width, group.parts) for group in groups.values()})
    recipe = Recipe((edit,))
    return recipe, apply_edits(copy.deepcopy(network), recipe, nets.EXAMPLE).eval()


def _pair(network: nn.Module, recipe: Recipe, slim: nn.Module) -> Pair:
    return Pair(slim, network, lambda one: surviving_channels(one, recipe, nets.EXAMPLE, apply_edits))


def _seen(network: nn.Module, path: str, images: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = network.get_submodule(path).register_forward_hook(lambda _m, _i, output: found.append(output.clone()))
    with torch.no_grad():
        network(images)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("name", ["residual", "chain", "depthwise", "concat"])
def test_units_are_called_in_order_and_share_no_layer(name):
    network = nets.build(name).eval()
    units = find_units(network, nets.EXAMPLE)
    paths = [path for unit in units for path in unit.modules]
    assert units
    assert len(paths) == len(set(paths))
    assert not [(a, b) for a in paths for b in paths if a != b and a.startswith(f"{b}.")]


def test_residual_blocks_are_units_of_their_own():
    names = [unit.name for unit in find_units(nets.build("residual").eval(), nets.EXAMPLE)]
    assert {"body.1", "body.2"} <= set(names)


@pytest.mark.parametrize("name", ["residual", "chain", "depthwise", "grouped", "concat"])
def test_targets_are_the_surviving_channels_of_the_original(name):
    network = nets.build(name).eval()
    recipe, slim = _narrower(network)
    images = nets.images(8)
    walk = find_walk(_pair(network, recipe, slim), nets.EXAMPLE)
    assert isinstance(walk, ModuleWalk)
    kept = surviving_channels(network, recipe, nets.EXAMPLE, apply_edits)
    for unit, block in zip(walk.units, walk.blocks([images[:5], images[5:]]), strict=True):
        whole = _seen(network, unit.last, images)
        assert torch.allclose(block.wanted[0], whole[:, kept.get(unit.last, torch.arange(whole.shape[1]))], atol=1e-5)
        with torch.no_grad():
            (got,) = block.run()
        assert torch.allclose(got, _seen(slim, unit.last, images), atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "chain", "depthwise"])
def test_errors_fall_and_are_measured_on_held_out_images(name):
    network = nets.build(name).eval()
    recipe, slim = _narrower(network)
    walk = find_walk(_pair(network, recipe, slim), nets.EXAMPLE)
    images = nets.images(64)
    expected: list[float] = []

    def recorded() -> Iterator[Block]:
        for block in walk.blocks(list(images.split(16))):
            held = block.part(slice(0, 8))
            with torch.no_grad():
                error = (held.run()[0] - held.wanted[0]).square().mean()
            expected.append(float(error / (block.wanted[0] - block.wanted[0].mean(0)).square().mean()))
            yield block

    results = reconstruct_blocks(recorded(), len(walk), SETTINGS, SilentProgress())
    assert any(one.is_kept for one in results)
    assert [one.error_before for one in results] == pytest.approx(expected, rel=1e-4)
    for result in results:
        assert result.error_after <= result.error_before
        assert result.is_kept == (result.error_after < result.error_before)


def test_a_block_that_comes_no_nearer_keeps_its_weights():
    network = nets.build("residual").eval()
    recipe, slim = _narrower(network)
    before = copy.deepcopy(slim.state_dict())
    walk = find_walk(_pair(network, recipe, slim), nets.EXAMPLE)
    bad = replace(SETTINGS, learning_rate=1e6, steps=3)
    results = reconstruct_blocks(walk.blocks([nets.images(32)]), len(walk), bad, SilentProgress())
    assert not any(one.is_kept for one in results)
    assert all(torch.equal(values, before[key]) for key, values in slim.state_dict().items())


def test_stored_weights_are_used_instead_of_training():
    network = nets.build("residual").eval()
    recipe, slim = _narrower(network)
    stored, again = {}, copy.deepcopy(slim)

    def keep(name, train):
        stored[name] = train()
        return stored[name]

    walk = find_walk(_pair(network, recipe, slim), nets.EXAMPLE)
    first = reconstruct_blocks(walk.blocks([nets.images(32)]), len(walk), SETTINGS, SilentProgress(), keep)
    walk = find_walk(_pair(network, recipe, again), nets.EXAMPLE)
    second = reconstruct_blocks(
        walk.blocks([nets.images(32)]), len(walk), SETTINGS, SilentProgress(), lambda name, _train: stored[name]
    )
    assert first == second
    assert all(torch.equal(values, again.state_dict()[key]) for key, values in slim.state_dict().items())


def test_flags_of_parameters_and_the_original_are_left_unchanged():
    network = nets.build("residual").eval().requires_grad_(False)
    recipe, slim = _narrower(network)
    before = copy.deepcopy(network.state_dict())
    flags = [one.requires_grad for one in slim.parameters()]
    walk = find_walk(_pair(network, recipe, slim), nets.EXAMPLE)
    reconstruct_blocks(walk.blocks([nets.images(32)]), len(walk), SETTINGS, SilentProgress())
    assert [one.requires_grad for one in slim.parameters()] == flags
    assert all(torch.equal(values, before[key]) for key, values in network.state_dict().items())
    assert all(one.grad is None for one in slim.parameters())


class _Tied(nn.Module):
    """Two layers with one weight, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 8, 3)
        self.second.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.second(self.first(images)).relu()).mean((2, 3))


def test_layers_with_shared_weights_are_no_blocks():
    network = _Tied().eval()
    walk = ModuleWalk(Pair(copy.deepcopy(network), network, lambda _network: {}), nets.EXAMPLE)
    assert [unit.name for unit in walk.units] == ["last"]
    traced = fx.symbolic_trace(network)
    walk = GraphWalk(fx.symbolic_trace(copy.deepcopy(network)), traced, lambda _network: {}, nets.EXAMPLE)
    trainable = [one for block in walk.blocks([nets.images(4)]) for one in block.trainable]
    assert {one.shape for one in trainable} == {network.last.weight.shape, network.last.bias.shape}


@pytest.mark.parametrize("name", ["residual", "chain", "depthwise", "grouped", "concat"])
def test_segments_in_a_row_are_the_network(name):
    network = fx.symbolic_trace(nets.build(name).eval())
    segments = find_segments(network, nets.EXAMPLE)
    nodes = [node for segment in segments for node in segment.nodes]
    assert nodes == [node.name for node in network.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    values = {next(node.name for node in network.graph.nodes): nets.images(3)}
    with torch.no_grad():
        for segment in segments:
            outputs = SegmentModule(network, segment)(*(values[name] for name in segment.inputs))
            values.update(zip(segment.outputs, outputs, strict=True))
        assert torch.allclose(values[segments[-1].outputs[0]], network(nets.images(3)), atol=1e-6)


@pytest.mark.parametrize("name", ["residual", "chain", "depthwise", "concat"])
def test_a_traced_network_is_repaired_by_segments(name):
    network = nets.build(name).eval()
    recipe, narrow = _narrower(network)
    traced, slim = fx.symbolic_trace(network), fx.symbolic_trace(narrow)
    walk = find_walk(_pair(traced, recipe, slim), nets.EXAMPLE)
    assert isinstance(walk, GraphWalk)
    images = nets.images(48)
    with torch.no_grad():
        before = float((slim(images) - network(images)).square().mean())
    results = reconstruct_blocks(walk.blocks(list(images.split(16))), len(walk), SETTINGS, SilentProgress())
    with torch.no_grad():
        after = float((slim(images) - network(images)).square().mean())
    assert any(one.is_kept for one in results)
    assert after < before
    assert not [path for path, _ in slim.named_modules() if path.startswith("marked")]


def test_the_block_behind_a_removed_one_makes_up_for_it():
    network = nets.build("residual").eval()
    recipe = Recipe((RemoveBlock("body.1"),))
    slim = apply_edits(copy.deepcopy(network), recipe, nets.EXAMPLE).eval()
    walk = find_walk(_pair(network, recipe, slim), nets.EXAMPLE)
    assert "body.1" not in [unit.name for unit in walk.units]
    images = nets.images(48)
    results = reconstruct_blocks(walk.blocks([images]), len(walk), SETTINGS, SilentProgress())
    behind = next(one for one in results if one.name == "body.2")
    assert behind.error_after < behind.error_before


def test_memory_grows_with_the_images_of_one_block():
    network = nets.build("residual").eval()
    recipe, slim = _narrower(network)
    small = find_walk(_pair(network, recipe, slim), nets.EXAMPLE).live_bytes(nets.EXAMPLE)
    wide = torch.cat([nets.EXAMPLE, nets.EXAMPLE], 3)
    assert find_walk(_pair(network, recipe, slim), nets.EXAMPLE).live_bytes(wide) > 1.5 * small > 0
