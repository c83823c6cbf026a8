"""Batch-norm statistics become those of the data, and refitted readers give what they gave before the cut."""

import copy

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.data.batches import Split, evaluation_batches
from compress.data.preprocessing import Preprocessing
from compress.data.sources import ArraySource
from compress.errors import DataError
from compress.progress import SilentProgress
from compress.pruning.graph import cut_copy, find_cuttable
from compress.pruning.repair import reestimate_batch_norm, refit_readers

SILENT = SilentProgress()


def _split(count: int = 64, size: int = 16) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    wanted = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return Split("calibration", ArraySource(images, np.arange(count) % 4), np.arange(count), wanted)


def _all_images(split: Split) -> Tensor:
    return torch.cat([images for images, _ in evaluation_batches(split, 64)])


def _outputs(module: nn.Module, layer: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = module.get_submodule(layer).register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
    with torch.no_grad():
        module(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("count", [64, 100, 130, 257])
def test_statistics_are_the_mean_and_variance_on_the_data(count):
    module, split = nets.build("chain"), _split(count)
    reestimate_batch_norm(module, split, SILENT)
    values = _outputs(module, "body.0.0", _all_images(split))
    norm = module.body[0][1]
    assert torch.allclose(norm.running_mean, values.mean((0, 2, 3)), atol=2e-3)
    assert torch.allclose(norm.running_var, values.var((0, 2, 3)), rtol=1e-2)


def test_a_single_batch_is_measured_exactly_in_every_layer():
    module, split = nets.build("residual"), _split(32)
    reestimate_batch_norm(module, split, SILENT)
    train = copy.deepcopy(module).train()
    images = _all_images(split)
    for norm, conv in (("body.0.1", "body.0.0"), ("body.1.bn2", "body.1.conv2"), ("body.2.bn2", "body.2.conv2")):
        values = _outputs(copy.deepcopy(train), conv, images)
        assert torch.allclose(module.get_submodule(norm).running_mean, values.mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(module.get_submodule(norm).running_var, values.var((0, 2, 3)), rtol=1e-4)


def test_the_last_small_batch_does_not_weigh_more_than_its_images():
    split = _split(130)
    split.source.images[128:] = 255  # two images unlike the others
    module = nets.build("chain")
    reestimate_batch_norm(module, split, SILENT)
    mean = _outputs(module, "body.0.0", _all_images(split)).mean((0, 2, 3))
    assert torch.allclose(module.body[0][1].running_mean, mean, atol=1e-4)


def test_momentum_flags_and_weights_are_as_before():
    module = nets.build("residual").train()
    module.body[1].eval()
    for index, norm in enumerate(part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.momentum = 0.1 * (index + 1)
    before = copy.deepcopy(module)
    reestimate_batch_norm(module, _split(), SILENT)
    for (name, part), old in zip(module.named_modules(), before.modules(), strict=True):
        assert part.training == old.training, name
        if isinstance(part, nn.BatchNorm2d):
            assert part.momentum == old.momentum
            assert not torch.equal(part.running_mean, old.running_mean)
    for parameter, old in zip(module.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, old)


def test_momentum_is_restored_when_the_network_fails():
    module = nets.build("chain")
    with pytest.raises(RuntimeError, match="size"):
        reestimate_batch_norm(module, _break_channels(_split()), SILENT)
    assert {part.momentum for part in module.modules() if isinstance(part, nn.BatchNorm2d)} == {0.1}


def _break_channels(split: Split) -> Split:
    source = ArraySource(split.source.images[..., :1], split.source.labels)
    return Split("calibration", source, split.indices, Preprocessing(channels="L"))


def test_network_without_batch_norm_is_left_alone():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    reestimate_batch_norm(module, _split(1), SILENT)
    assert not any(part.training for part in module.eval().modules())


def test_a_single_image_has_no_statistics():
    module = nets.build("chain")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(DataError, match="at least 2 images, 'calibration' has 1"):
        reestimate_batch_norm(module, _split(1), SILENT)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def _cut(module: nn.Module, group: str, removed: tuple[int, ...]) -> tuple[nn.Module, set[str]]:
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    return cut_copy(module, {group: removed}, nets.EXAMPLE), {reader.layer for reader in groups[group].readers}


@pytest.mark.parametrize(
    ("name", "group"),
    [("chain", "body.1.0"), ("residual", "body.1.conv1"), ("linear_head", "fc1"), ("linear_head", "features.0.0")],
)
def test_least_squares_reduces_the_error_and_leaves_other_layers_alone(name, group):
    module, split = nets.build(name), _split()
    slim, readers = _cut(module, group, (0, 2, 5))
    fitted = copy.deepcopy(slim)
    assert refit_readers(fitted, module, readers, {}, split, SILENT) == tuple(sorted(readers))
    (reader,) = readers
    images = _all_images(split)
    wanted = _outputs(module, reader, images)
    errors = [float((_outputs(net, reader, images) - wanted).square().mean()) for net in (slim, fitted)]
    assert errors[1] < 0.9 * errors[0]
    for key, value in fitted.state_dict().items():
        assert torch.equal(value, slim.state_dict()[key]) != key.startswith(f"{reader}."), key


def test_least_squares_refits_a_layer_that_lost_outputs_too():
    module, split = nets.build("chain"), _split()
    removed = {"body.0.0": (0, 2), "body.1.0": (1, 4, 7, 9)}
    slim = cut_copy(module, removed, nets.EXAMPLE)
    fitted = copy.deepcopy(slim)
    kept = torch.tensor([channel for channel in range(16) if channel not in removed["body.1.0"]])
    assert refit_readers(fitted, module, {"body.1.0"}, {"body.1.0": kept}, split, SILENT) == ("body.1.0",)
    images = _all_images(split)
    wanted = _outputs(module, "body.1.0", images)[:, kept]
    errors = [float((_outputs(net, "body.1.0", images) - wanted).square().mean()) for net in (slim, fitted)]
    assert errors[1] < 0.9 * errors[0]


def test_least_squares_restores_everything_that_can_be_restored():
    module, split = nets.build("chain"), _split()
    with torch.no_grad():  # channel 3 is twice channel 1, so that nothing is lost with it
        conv, norm, _ = module.body[0]
        conv.weight[3] = conv.weight[1]
        for values in (norm.weight, norm.bias):
            values[3] = 2 * values[1]
        for values in (norm.running_mean, norm.running_var):
            values[3] = values[1]
    slim, readers = _cut(module, "body.0.0", (3,))
    images = _all_images(split)
    with torch.no_grad():
        before = (slim(images) - module(images)).abs().max()
        refit_readers(slim, module, readers, {}, split, SILENT)
        after = (slim(images) - module(images)).abs().max()
    assert before > 0.01
    assert after < 0.01 * before


class _Vgg(nn.Module):
    """No batch norm, and activations that overwrite what the convolutions gave."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def test_least_squares_fits_the_output_before_an_activation_in_place():
    torch.manual_seed(0)
    module, split = _Vgg().eval(), _split()
    with torch.no_grad():  # channel 3 is channel 1, so that its share can be taken over in full
        module.body[0].weight[3], module.body[0].bias[3] = module.body[0].weight[1], module.body[0].bias[1]
    slim, readers = _cut(module, "body.0", (3,))
    assert readers == {"body.2"}
    images = _all_images(split)
    refit_readers(slim, module, readers, {}, split, SILENT)
    with torch.no_grad():
        assert (slim(images) - module(images)).abs().max() < 1e-3


def test_layers_that_cannot_be_refitted_are_left_out_of_the_answer():
    module = nets.build("grouped")
    slim, readers = _cut(module, "body.0.0", (0, 4, 8, 12))
    before = copy.deepcopy(slim.state_dict())
    assert readers == {"body.1.0"}
    assert refit_readers(slim, module, readers, {}, _split(8), SILENT) == ()
    assert all(torch.equal(value, before[name]) for name, value in slim.state_dict().items())
