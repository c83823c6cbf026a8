"""Batch-norm statistics become those of the data, and refitted readers give what they gave before the cut."""

import copy
import threading
from dataclasses import replace

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.data.batches import evaluation_batches
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import DataError, InternalError
from compress.model.recipe import RemoveBlock
from compress.networks.normalize import FrozenNorm
from compress.progress import SilentProgress
from compress.pruning.blocks import closing_layers
from compress.pruning.groups import BATCH_NORMS, kept_outputs
from compress.pruning.repair.least_squares import Places
from compress.pruning.repair.lockstep import Lockstep, call_order, following_norms
from compress.pruning.repair.repairs import Comparison, fold_means, refit_readers
from compress.pruning.surgery import cut_copy, remove_block
from compress.pruning.trial import find_cuttable
from compress.training.batch_norm import reestimate_batch_norm

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


def test_statistics_of_frozen_norms_are_kept():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenNorm(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    frozen = module.get_submodule("1")
    frozen.running_mean.fill_(3.0)
    assert reestimate_batch_norm(module, _split(), SILENT) == ("3",)
    assert frozen.running_mean.tolist() == [3.0] * 4
    assert not any(part.training for part in module.modules())


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


def _refit(slim: nn.Module, module: nn.Module, readers: set[str], kept: dict[str, Tensor], split: Split):
    return refit_readers(Comparison(slim, module, frozenset(readers), kept, split), SILENT)


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
    assert _refit(fitted, module, readers, {}, split) == tuple(sorted(readers))
    (reader,) = readers
    images = _all_images(split)
    norm = following_norms(module, BATCH_NORMS, images[:1]).get(reader)
    watched = norm or reader
    wanted = _outputs(module, watched, images)
    errors = [float((_outputs(net, watched, images) - wanted).square().mean()) for net in (slim, fitted)]
    assert errors[1] < 0.9 * errors[0]
    changed = {key for key, value in fitted.state_dict().items() if not torch.equal(value, slim.state_dict()[key])}
    assert changed == ({f"{reader}.weight", f"{norm}.running_mean"} if norm else {f"{reader}.weight", f"{reader}.bias"})


def test_least_squares_refits_a_layer_that_lost_outputs_too():
    module, split = nets.build("chain"), _split()
    removed = {"body.0.0": (0, 2), "body.1.0": (1, 4, 7, 9)}
    slim = cut_copy(module, removed, nets.EXAMPLE)
    fitted = copy.deepcopy(slim)
    kept = torch.tensor([channel for channel in range(16) if channel not in removed["body.1.0"]])
    assert _refit(fitted, module, {"body.1.0"}, {"body.1.0": kept}, split) == ("body.1.0",)
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
        _refit(slim, module, readers, {}, split)
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
    _refit(slim, module, readers, {}, split)
    with torch.no_grad():
        assert (slim(images) - module(images)).abs().max() < 1e-3


def test_layers_that_cannot_be_refitted_are_left_out_of_the_answer():
    module = nets.build("grouped")
    slim, readers = _cut(module, "body.0.0", (0, 4, 8, 12))
    before = copy.deepcopy(slim.state_dict())
    assert readers == {"body.1.0"}
    assert _refit(slim, module, readers, {}, _split(8)) == ()
    assert all(torch.equal(value, before[name]) for name, value in slim.state_dict().items())


@pytest.mark.parametrize(
    ("name", "group"), [("chain", "body.1.0"), ("residual", "body.1.conv1"), ("linear_head", "fc1")]
)
def test_bias_folding_gives_readers_the_mean_they_had(name, group):
    module, split = nets.build(name), _split()
    slim, readers = _cut(module, group, (0, 2, 5))
    before = {key: value.clone() for key, value in slim.named_parameters()}
    (reader,) = readers
    images = _all_images(split)
    watched = following_norms(module, BATCH_NORMS, images[:1]).get(reader, reader)
    wanted, without = (_channel_means(_outputs(net, watched, images)) for net in (module, slim))
    assert fold_means(Comparison(slim, module, frozenset(readers), {}, split), SILENT) == (reader,)
    assert not torch.allclose(without, wanted, atol=1e-3)
    assert torch.allclose(_channel_means(_outputs(slim, watched, images)), wanted, atol=1e-5)
    assert {key for key, value in slim.named_parameters() if not torch.equal(value, before[key])} <= {f"{reader}.bias"}


def _channel_means(outputs: Tensor) -> Tensor:
    return outputs.mean((0, 2, 3)) if outputs.ndim == 4 else outputs.mean(0)


def test_bias_folding_of_a_constant_channel_is_exact_without_padding():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 4)
    ).eval()
    with torch.no_grad():
        module[0].weight[3], module[0].bias[3] = 0.0, 1.7
    slim, readers = _cut(module, "0", (3,))
    images = _all_images(_split())
    with torch.no_grad():
        before = (slim(images) - module(images)).abs().max()
        fold_means(Comparison(slim, module, frozenset(readers), {}, _split()), SILENT)
        after = (slim(images) - module(images)).abs().max()
    assert before > 0.01
    assert after < 1e-5


def test_bias_folding_goes_from_layer_to_layer():
    module, split = nets.build("chain"), _split()
    removed = {"body.0.0": (0, 2), "body.1.0": (1, 4, 7, 9)}
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    slim = cut_copy(module, removed, nets.EXAMPLE)
    kept = torch.tensor([channel for channel in range(16) if channel not in removed["body.1.0"]])
    readers = frozenset(reader.layer for name in removed for reader in groups[name].readers)
    assert fold_means(Comparison(slim, module, readers, {"body.1.0": kept}, split), SILENT) == ("body.1.0", "body.2.0")
    images = _all_images(split)
    for norm, channels in (("body.1.1", kept), ("body.2.1", torch.arange(16))):
        wanted = _channel_means(_outputs(module, norm, images))[channels]
        assert torch.allclose(_channel_means(_outputs(slim, norm, images)), wanted, atol=1e-5), norm


def test_bias_folding_after_least_squares_counts_no_constant_twice():
    module, split = nets.build("chain"), _split()
    slim, readers = _cut(module, "body.1.0", (0, 2, 5))
    norm = slim.get_submodule("body.2.1")
    before = norm.running_mean.clone()
    _refit(slim, module, readers, {}, split)
    refitted = norm.running_mean.clone()
    fold_means(Comparison(slim, module, frozenset(readers), {}, split), SILENT)
    assert (norm.running_mean - refitted).abs().max() < 0.1 * (refitted - before).abs().max()


@pytest.mark.parametrize("name", ["residual", "depthwise", "linear_head"])
def test_bias_folding_knows_from_the_refit_what_the_original_gives(name):
    """Layers that cannot be refitted are seen on the way, too; the original is not run for its means again."""
    module, split = nets.build(name), _split()
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    group = next(name for name, group in groups.items() if group.readers)
    slim, _ = _cut(module, group, (0, 1))
    layers = frozenset(name for name, part in slim.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear)))
    comparison = Comparison(slim, module, layers, kept_outputs({group: (0, 1)}, groups), split)
    refit_readers(comparison, SILENT)
    known = dict(comparison.means)
    alone = replace(comparison, slim=copy.deepcopy(slim), means={})
    labels = _Labels()
    assert fold_means(comparison, labels) != ()
    assert "mean outputs" not in labels.seen
    assert all(comparison.means[name] is mean for name, mean in known.items())
    fold_means(alone, labels)
    assert "mean outputs" in labels.seen
    for name, mean in alone.means.items():
        assert torch.allclose(mean, known[name], atol=1e-6)
    assert torch.allclose(alone.slim(nets.images()), slim(nets.images()), atol=1e-5)


class _Labels(SilentProgress):
    """Keeps the labels of the tasks it is told about."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def task(self, label: str, total: int):
        self.seen.append(label)
        return super().task(label, total)


def test_memory_bounds_the_images_looked_at(monkeypatch):
    module, split = nets.build("chain"), _split()
    slim, readers = _cut(module, "body.0.0", (3,))
    counts = []
    monkeypatch.setattr(
        "compress.pruning.repair.repairs.Lockstep",
        lambda *args, **named: counts.append(args[2]) or Lockstep(*args, **named),
    )
    _refit(slim, module, readers, {}, split)
    assert [sum(map(len, batches)) for batches in counts] == [64, 64]
    counts.clear()
    monkeypatch.setattr("compress.pruning.repair.repairs._LIVE_BYTES", 10**6)
    _refit(slim, module, readers, {}, split)
    assert 1 <= sum(map(len, counts[0])) < 64


def _three_layers() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), [torch.randn(2, 4), torch.randn(3, 4)]


def test_passes_in_lockstep_see_changes_made_while_they_wait():
    network, batches = _three_layers()
    with torch.no_grad(), Lockstep(network, ["0", "2"], batches) as passes:
        assert all(torch.equal(a, b) for (a,), b in zip(passes.reach("0"), batches, strict=True))
        network[0].weight.mul_(2)
        expected = [network[1](network[0](images)) for images in batches]
        assert all(torch.equal(a, b) for (a,), b in zip(passes.reach("2"), expected, strict=True))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_passes_left_early_end_and_errors_come_through():
    network, batches = _three_layers()
    threads = threading.active_count()

    def reach(layers: list[str], images: list[Tensor], layer: str) -> None:
        with Lockstep(network, layers, images, after=layers) as passes:
            list(passes.reach(layer))
            raise KeyError(layer)

    with pytest.raises(KeyError):
        reach(["0", "2"], batches, "0")
    with pytest.raises(RuntimeError, match="shapes"):
        reach(["2"], [torch.randn(2, 5)], "2")
    with pytest.raises(InternalError, match="to layer '2' next, it came to '0'"):
        reach(["2", "0"], batches, "2")
    with pytest.raises(InternalError, match="out of it"):
        reach(["0", "2"], batches, "2")
    assert threading.active_count() == threads


def test_call_order_is_that_of_the_calls_and_leaves_out_what_is_called_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.c(self.b(self.c(x))))

    assert call_order(Twice(), ["a", "b", "c", "d"], torch.zeros(1, 4)) == ["b", "a"]


def test_a_reader_that_gets_nothing_but_zeros_is_left_alone():
    torch.manual_seed(0)
    module = _Dead().eval()
    slim, readers = _cut(module, "a", (0, 1))
    before = copy.deepcopy(slim.state_dict())
    assert _refit(slim, module, readers, {}, _split()) == ()
    assert all(torch.equal(value, before[name]) for name, value in slim.state_dict().items())


class _Dead(nn.Module):
    """A branch that gives zeros on every image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.a.weight.zero_()
            self.a.bias.fill_(-1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.b(torch.relu(self.a(x))) + self.c(x)).mean((2, 3)))


def test_bias_folding_knows_the_outputs_of_a_transposed_convolution():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2), nn.Flatten(), nn.Linear(8 * 225, 4)
    ).eval()
    slim, readers = _cut(module, "0", (0, 5))
    assert fold_means(Comparison(slim, module, frozenset(readers), {}, _split()), SILENT) == ("2",)
    images = _all_images(_split())
    assert torch.allclose(
        _channel_means(_outputs(slim, "2", images)), _channel_means(_outputs(module, "2", images)), atol=1e-5
    )


class _PreActivation(nn.Module):
    """Norms that read sums, a norm beside another reader, and one that reads a layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, 1, 1) for _ in range(4))
        self.of_sum, self.beside, self.alone = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(x)
        y += x
        z = self.a(self.of_sum(y))
        z = self.c(z) + self.beside(z)
        return self.alone(self.d(z))


def test_a_norm_follows_a_layer_only_where_nothing_else_reads_it():
    network = _PreActivation().eval()
    assert following_norms(network, BATCH_NORMS, torch.randn(1, 4, 5, 5)) == {"d": "alone"}


def test_a_network_that_catches_exceptions_does_not_hold_up_the_end():
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.first(x)
            except Exception:
                x = x + 1
            return self.second(x)

    threads = threading.active_count()
    with Lockstep(Catching(), ["first", "second"], [torch.zeros(1, 4)], after=["first", "second"]) as passes:
        list(passes.reach("first"))
    assert threading.active_count() == threads


def _error(slim: nn.Module, module: nn.Module, part: str, split: Split) -> float:
    """Return the mean squared error of what a part gives."""
    images = _all_images(split)
    return float((_outputs(slim, part, images) - _outputs(module, part, images)).square().mean())


@pytest.mark.parametrize("without", ["channels", "block"])
def test_a_layer_that_closes_a_block_makes_up_for_what_the_shortcut_lacks(without):
    module, split = nets.build("residual"), _split()
    if without == "channels":
        slim, _ = _cut(module, "body.1.conv1", tuple(range(12)))
    else:
        slim = remove_block(module, RemoveBlock("body.1"))
    layers = frozenset(name for name, part in slim.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear)))
    closing = closing_layers(module, nets.EXAMPLE)
    assert closing == {"body.1.conv2": "body.1", "body.2.conv2": "body.2"}
    errors = []
    for known in ({}, closing):
        fitted = copy.deepcopy(slim)
        kept = {"body.1.conv1": torch.arange(12, 16)} if without == "channels" else {}
        refit_readers(Comparison(fitted, module, layers, kept, split, known), SILENT)
        errors.append(_error(fitted, module, "body.2", split))
    assert errors[1] < 0.9 * errors[0]
    assert errors[0] < _error(slim, module, "body.2", split)


def test_a_network_that_lost_nothing_is_refitted_nowhere():
    module, split = nets.build("residual"), _split()
    same = copy.deepcopy(module)
    layers = frozenset(name for name, part in same.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear)))
    closing = closing_layers(module, nets.EXAMPLE)
    assert refit_readers(Comparison(same, module, layers, {}, split, closing), SILENT) == ()
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in same.state_dict().items())


def test_a_layer_behind_new_statistics_is_refitted_to_what_they_make_of_it():
    """The norm behind a refitted layer may have other statistics than the original's: its output counts."""
    module, split = nets.build("chain"), _split()
    plain, readers = _cut(module, "body.0.0", (0, 1, 2, 3))
    other = copy.deepcopy(plain)
    other.body[1][1].running_var *= 4
    other.body[1][1].running_mean += 1
    before = _error(plain, module, "body.1.1", split)
    assert _error(other, module, "body.1.1", split) > before
    for slim in (plain, other):
        assert _refit(slim, module, readers, {}, split) == ("body.1.0",)
    fitted = _error(plain, module, "body.1.1", split)
    assert fitted < 0.9 * before
    assert _error(other, module, "body.1.1", split) == pytest.approx(fitted, rel=0.02)


def test_places_are_the_same_for_one_seed_and_cover_small_maps_whole():
    maps = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    rows = Places(7, 3).rows_of(maps)
    assert rows.shape == (14, 3)
    assert torch.equal(rows, Places(7, 3).rows_of(maps))
    assert not torch.equal(rows, Places(7, 4).rows_of(maps))
    whole = Places(100, 0).rows_of(maps)
    assert whole.shape == (40, 3)
    assert torch.equal(whole.sort(0).values, maps.transpose(0, 1).flatten(1).T.sort(0).values)
