"""Samples of the original's outputs serve the repairs of several cuts as its own passes do."""

import copy

import nets
import numpy as np
import pytest
import torch

from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.model.recipe import RemoveChannels
from compress.progress import SilentProgress
from compress.pruning.blocks import closing_layers
from compress.pruning.groups import kept_outputs
from compress.pruning.repair import originals
from compress.pruning.repair.least_squares import Places
from compress.pruning.repair.originals import OriginalOutputs, Sampled
from compress.pruning.repair.repairs import Comparison, fold_means, refit_readers
from compress.pruning.surgery import remove_channels
from compress.pruning.trial import find_cuttable

SILENT = SilentProgress()
CUTS = ({"body.0.0": (1, 2, 5)}, {"body.1.conv1": (0, 3)}, {"body.0.0": (0, 7), "body.2.conv1": (4,)})


def split(count: int = 40) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return Split("calibration", ArraySource(images, np.arange(count) % 4), np.arange(count), Preprocessing())


def repaired(module, removed, data, outputs):
    """Return the weights of a cut network after refits and folded means, and the refitted layers."""
    groups = find_cuttable(module, nets.EXAMPLE)[0]
    slim = remove_channels(module, RemoveChannels(removed), nets.EXAMPLE)
    layers = frozenset(name for name, part in slim.named_modules() if hasattr(part, "weight") and part.weight.ndim > 1)
    closing, means = closing_layers(module, nets.EXAMPLE), {} if outputs is None else outputs.means
    one = Comparison(slim, module, layers, kept_outputs(removed, groups), data, closing, means, 512, outputs)
    refitted = refit_readers(one, SILENT)
    fold_means(one, SILENT)
    return slim.state_dict(), refitted


def test_repairs_of_several_cuts_are_those_of_each_alone_with_one_pass_of_the_original():
    module, data, outputs = nets.build("residual"), split(), OriginalOutputs()
    passes: list[int] = []
    watched = module.body[2].conv2

    def count(layer, inputs, _output):
        if layer is watched:  # a copy of the network has a copy of the hook
            passes.append(len(inputs[0]))

    handle = watched.register_forward_hook(count)
    for number, removed in enumerate(CUTS):
        passes.clear()
        found, refitted = repaired(module, removed, data, outputs)
        images_run = sum(images for images in passes if images > 1)
        assert (images_run >= 40) == (number == 0), "the original runs for the first cut only"
        wanted, alone = repaired(module, removed, data, None)
        assert refitted == alone != ()
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    handle.remove()


def test_samples_of_other_images_are_not_used():
    module, outputs = nets.build("residual"), OriginalOutputs()
    repaired(module, CUTS[0], split(40), outputs)
    assert outputs.has(["body.1.conv1"], [32, 8])
    assert not outputs.has(["body.1.conv1", "none"], [32, 8])
    assert not outputs.has(["body.1.conv1"], [24])
    outputs.means.clear()
    found, _ = repaired(module, CUTS[1], split(24), outputs)
    wanted, _ = repaired(module, CUTS[1], split(24), None)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert outputs.has(["body.1.conv1"], [24])
    assert not outputs.has(["body.1.conv1"], [32, 8])


def test_no_more_is_kept_than_there_is_room_for(monkeypatch):
    sample = Sampled.of(torch.ones(2, 3), torch.ones(2, 5), Places(4, 0))
    assert sample.nbytes == 40
    monkeypatch.setattr(originals, "_MOST_BYTES", 80)
    outputs = OriginalOutputs()
    for name in ("a", "b", "a", "c"):
        outputs.add(name, [sample], [2])
    assert outputs.has(["a", "b"], [2])
    assert not outputs.has(["c"], [2])


@pytest.mark.parametrize("count", [1, 3, 9, 100])
def test_fewer_places_are_the_first_of_the_sample(count):
    maps = torch.randn(2, 4, 3, 3)
    sample = Sampled.of(torch.zeros(1), maps, Places(max(count, 9), 7))
    assert torch.equal(sample.rows_of(Places(count, 7)), Places(count, 7).rows_of(maps))
    features = torch.randn(2, 6, 5)
    assert torch.equal(
        Sampled.of(torch.zeros(1), features, Places(2, 0)).rows_of(Places(1, 0)), features.reshape(12, 5)
    )


def test_samples_outlive_an_output_that_is_overwritten():
    outputs = torch.randn(4, 5)
    sample, before = Sampled.of(torch.zeros(1), outputs, Places(1, 0)), outputs.clone()
    outputs.relu_()
    assert torch.equal(sample.rows_of(Places(1, 0)), before)


def test_an_input_is_recognised_by_shape_and_values():
    inputs = torch.randn(3, 4)
    sample = Sampled.of(inputs, torch.zeros(3, 2), Places(1, 0))
    assert sample.equals_input(inputs.clone())
    changed = copy.deepcopy(inputs)
    changed[1, 2] += 1e-4
    for other in (changed, inputs[:, :3], -inputs, inputs.reshape(4, 3)):
        assert not sample.equals_input(other)
