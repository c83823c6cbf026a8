"""Formulas of the repairs by hand: tiny layers, tiny rows, expected numbers worked out beside them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import InternalError
from compress.progress import SilentProgress
from compress.pruning.repair import repairs as repair
from compress.pruning.repair.least_squares import (
    RIDGE,
    GramSum,
    Places,
    is_refittable,
    positions_needed,
    regression_rows,
)
from compress.pruning.repair.lockstep import Lockstep, call_order, following_norms, run_watched
from compress.pruning.repair.originals import Sampled
from compress.pruning.repair.repairs import Comparison, add_constant, fold_means, refit_readers

SILENT = SilentProgress()
IMAGE = torch.zeros(1, 2, 4, 4)


def split(count: int = 4) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 2), np.uint8)
    wanted = Preprocessing(mean=(0.5, 0.5), std=(0.25, 0.25))
    return Split("calibration", ArraySource(images, np.arange(count) % 2), np.arange(count), wanted)


def normed(mean: list[float], variance: list[float], weight: list[float], eps: float) -> nn.Sequential:
    """Return a convolution without bias and a batch norm behind it, whose numbers are given."""
    conv, norm = nn.Conv2d(2, len(mean), 1, bias=False), nn.BatchNorm2d(len(mean), eps=eps)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(conv.weight.numel()).reshape(conv.weight.shape) + 1.0)
        norm.running_mean.copy_(torch.tensor(mean))
        norm.running_var.copy_(torch.tensor(variance))
        norm.weight.copy_(torch.tensor(weight))
    return nn.Sequential(conv, norm).eval()


def compared(slim: nn.Module, original: nn.Module, *readers: str, **others) -> Comparison:
    return Comparison(slim, original, frozenset(readers), others.pop("kept", {}), split(), **others)


# what a reader should give ------------------------------------------------------------------------------------------


def test_statistics_of_the_norm_are_compared_with_their_eps() -> None:
    """stretch = sqrt((v + e) / (v0 + e0)), moved = m - stretch * m0, of the outputs that are left."""
    original = normed([1.0, 2.0, 3.0], [0.75, 9.0, 1.75], [1.0, 1.0, 1.0], eps=0.25)
    slim = normed([5.0, 4.0], [3.5, 0.0], [1.0, 1.0], eps=0.5)
    (reader,) = repair._readers(compared(slim, original, "0", kept={"0": torch.tensor([0, 2])}), IMAGE)
    assert reader.stretch.tolist() == pytest.approx([math.sqrt(4.0 / 1.0), math.sqrt(0.5 / 2.0)])
    assert reader.moved.tolist() == pytest.approx([5.0 - 2.0 * 1.0, 4.0 - 0.5 * 3.0])
    wanted = reader.wanted(torch.tensor([[10.0, 20.0, 30.0], [0.0, 1.0, 2.0]]))
    assert torch.allclose(wanted, torch.tensor([[23.0, 17.5], [3.0, 3.5]]))
    assert reader.kept.tolist() == [0, 2]


def test_equal_statistics_ask_for_the_original_outputs() -> None:
    original = normed([1.0, -2.0], [0.5, 2.0], [1.0, 1.0], eps=0.1)
    (reader,) = repair._readers(compared(normed([1.0, -2.0], [0.5, 2.0], [3.0, 3.0], eps=0.1), original, "0"), IMAGE)
    outputs = torch.tensor([[4.0, -1.0]])
    assert torch.allclose(reader.wanted(outputs), outputs, atol=1e-6)
    assert reader.kept.tolist() == [0, 1]


def test_without_a_norm_the_outputs_are_wanted_as_they_were() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)).eval()
    conv, linear = repair._readers(compared(network, network, "0", "3"), IMAGE)
    for reader, outputs in ((conv, 3), (linear, 5)):
        assert (reader.norm, reader.kept.tolist()) == (None, list(range(outputs)))
        rows = torch.randn(2, outputs)
        assert torch.equal(reader.wanted(rows), rows)
        assert reader.scale.tolist() == [1.0]


def test_a_norm_without_statistics_is_no_place_for_constants() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    (reader,) = repair._readers(compared(network, network, "0"), IMAGE)
    assert (reader.norm, reader.has_bias, reader.has_intercept) == (None, False, False)


def test_readers_come_in_the_order_of_calls_and_without_what_is_shared() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)).eval()
    network[2].weight = network[1].weight
    found = repair._readers(compared(network, network, "3", "2", "1", "0"), IMAGE)
    assert [reader.name for reader in found] == ["0", "3"]


def reader_with(norm: nn.Module | None, layer: nn.Module | None = None) -> repair._Reader:
    return repair._Reader("0", layer or nn.Linear(2, 3), norm, torch.arange(3), torch.ones(1), torch.zeros(1))


def test_the_scale_undoes_the_norm_with_its_eps() -> None:
    """One more behind the norm takes sqrt(v + e) / w more before it; where w is nearly 0 nothing is asked for."""
    norm = nn.BatchNorm2d(3, eps=0.5)
    with torch.no_grad():
        norm.running_var.copy_(torch.tensor([3.5, 0.5, 8.5]))
        norm.weight.copy_(torch.tensor([4.0, -2.0, 0.2]))  # gains 2, -2, 0.0667: the last is below 5 % of the largest
    assert reader_with(norm).scale.tolist() == pytest.approx([0.5, -0.5, 0.0])
    with torch.no_grad():
        norm.weight[2] = 0.6  # a gain of 0.2, 10 % of the largest
    assert reader_with(norm).scale.tolist() == pytest.approx([0.5, -0.5, 5.0])
    with torch.no_grad():
        norm.weight[2] = 0.3  # exactly at the border of 5 %
    assert reader_with(norm).scale.tolist()[2] == pytest.approx(0.0)


def test_a_norm_without_a_scale_passes_everything_on() -> None:
    assert reader_with(nn.BatchNorm2d(3, affine=False)).scale.tolist() == [1.0]
    assert reader_with(None).scale.tolist() == [1.0]


def test_where_constants_can_go() -> None:
    norm, bare = nn.BatchNorm2d(3), nn.Linear(2, 3, bias=False)
    cases = [(None, nn.Linear(2, 3), True, True), (norm, bare, False, True), (None, bare, False, False)]
    for norm, layer, has_bias, has_intercept in cases:
        reader = reader_with(norm, layer)
        assert (reader.has_bias, reader.has_intercept) == (has_bias, has_intercept)


@torch.no_grad()
def test_a_constant_goes_to_the_bias_or_off_the_mean_behind() -> None:
    layer, norm, constant = nn.Linear(1, 2), nn.BatchNorm1d(2), torch.tensor([3.0, -4.0])
    layer.bias.copy_(torch.tensor([1.0, 1.0]))
    add_constant(layer, norm, constant)
    assert (layer.bias.tolist(), norm.running_mean.tolist()) == ([4.0, -3.0], [0.0, 0.0])
    add_constant(nn.Linear(1, 2, bias=False), norm, constant)
    assert norm.running_mean.tolist() == [-3.0, 4.0]
    add_constant(nn.Linear(1, 2, bias=False), None, constant)  # nowhere to go, nothing happens


# the refit ----------------------------------------------------------------------------------------------------------


def refit(layer: nn.Module, x: Tensor, before: Tensor, y: Tensor, norm=None, missing=None, **numbers) -> bool:
    """Refit a layer on one batch in which it reads x, and the original read `before` and gave y."""
    outputs = y.shape[1]
    reader = repair._Reader(
        "0", layer, norm, torch.arange(outputs), numbers.get("stretch", torch.ones(1)), torch.zeros(1)
    )
    with torch.no_grad():
        (places,) = repair._places(reader, [reader.layer], [x])
        return repair._refit(reader, [(places, (x,), Sampled.of(before, y, places))], missing)


def ridge_solution(x: np.ndarray, y: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Return what minimises |x w - y|² + r |w - old|², r the mean of the Gram's diagonal times RIDGE."""
    gram = x.T @ x
    r = RIDGE * np.trace(gram) / len(gram)
    return np.linalg.solve(gram + r * np.eye(len(gram)), x.T @ y + r * old)


@torch.no_grad()
def test_the_refit_is_a_ridge_regression_towards_the_old_weights() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 1.0], [2.0, 2.0]])
    y = torch.tensor([[1.0], [2.0], [-1.0], [0.5]])
    layer = nn.Linear(2, 1)
    layer.weight.copy_(torch.tensor([[5.0, -7.0]]))
    layer.bias.copy_(torch.tensor([2.0]))
    assert refit(layer, x, x + 1, y) is True
    rows = np.concatenate([x.double().numpy(), np.ones((4, 1))], 1)
    expected = ridge_solution(rows, y.double().numpy(), np.array([[5.0], [-7.0], [2.0]]))
    assert layer.weight[0].tolist() == pytest.approx(expected[:2, 0].tolist(), rel=1e-5)
    assert layer.bias.tolist() == pytest.approx(expected[2].tolist(), rel=1e-5)


@torch.no_grad()
def test_what_is_never_read_keeps_its_old_weight() -> None:
    """The ridge pulls towards the old weights: towards 0 the weight of an input that is always 0 would be lost."""
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.copy_(torch.tensor([[9.0, 4.0]]))
    assert refit(layer, x, x + 1, 2 * x[:, :1]) is True
    assert layer.weight[0, 1] == pytest.approx(4.0)
    assert layer.weight[0, 0] == pytest.approx(2.0, abs=0.01)


@torch.no_grad()
def test_without_an_intercept_no_constant_is_fitted() -> None:
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[11.0], [12.0]])
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.copy_(torch.tensor([[1.0]]))
    refit(layer, x, x + 1, y)
    expected = ridge_solution(x.double().numpy(), y.double().numpy(), np.array([[1.0]]))
    assert layer.weight.item() == pytest.approx(float(expected[0, 0]), rel=1e-5)


@torch.no_grad()
def test_the_intercept_of_a_layer_without_bias_goes_off_the_mean_of_its_norm() -> None:
    x = torch.tensor([[-1.0], [1.0]])
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(5.0)
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.copy_(torch.tensor([[2.0]]))
    assert refit(layer, x, x + 1, 2 * x + 3, norm) is True
    assert layer.weight.item() == pytest.approx(2.0, rel=1e-4)
    assert norm.running_mean.item() == pytest.approx(5.0 - 3.0, rel=1e-3)


@torch.no_grad()
def test_what_a_sum_lacks_is_asked_for_in_units_before_the_norm() -> None:
    """wanted = y + missing * sqrt(v + e) / w; here 3 + 2 * sqrt(3.5 + 0.5) / 0.5 = 11."""
    norm = nn.BatchNorm1d(1, eps=0.5)
    norm.running_var.fill_(3.5)
    norm.weight.fill_(0.5)
    x = torch.tensor([[-1.0], [1.0]])
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.zero_()
    missing = [torch.full((2, 1), 2.0)]
    assert refit(layer, x, x, torch.full((2, 1), 3.0), norm, missing) is True  # what it reads is what it was
    assert norm.running_mean.item() == pytest.approx(-11.0, rel=1e-3)
    assert layer.weight.item() == pytest.approx(0.0, abs=1e-6)


@torch.no_grad()
def test_a_layer_that_lacks_nothing_is_left_alone() -> None:
    x = torch.tensor([[1.0], [2.0]])
    layer = nn.Linear(1, 1)
    before = layer.weight.clone()
    assert refit(layer, x, x.clone(), torch.ones(2, 1)) is False
    assert refit(layer, x, x.clone(), torch.ones(2, 1), missing=[torch.zeros(2, 1)]) is False
    assert torch.equal(layer.weight, before)


@torch.no_grad()
def test_inputs_of_another_number_are_a_reason_to_refit() -> None:
    x = torch.tensor([[1.0], [2.0], [4.0]])
    assert refit(nn.Linear(1, 1), x, x.repeat(1, 2), torch.ones(3, 1)) is True


@torch.no_grad()
def test_a_layer_that_reads_nothing_but_zeros_keeps_its_weights() -> None:
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.clone()
    assert refit(layer, torch.zeros(3, 2), torch.ones(3, 2), torch.ones(3, 1)) is False
    assert torch.equal(layer.weight, before)


@torch.no_grad()
def test_numbers_that_are_not_finite_are_written_nowhere() -> None:
    layer = nn.Linear(1, 1)
    before = layer.weight.clone(), layer.bias.clone()
    assert refit(layer, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1), torch.tensor([[math.nan], [1.0]])) is False
    assert (layer.weight, layer.bias) == before


@torch.no_grad()
def test_the_outputs_wanted_are_stretched() -> None:
    x = torch.tensor([[-1.0], [1.0]])
    layer = nn.Linear(1, 1, bias=False)
    refit(layer, x, x + 1, 3 * x, stretch=torch.tensor([2.0]))
    assert layer.weight.item() == pytest.approx(6.0, rel=1e-3)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Conv2d(2, 2, 1), _Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x))


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


@torch.no_grad()
def test_the_layer_that_closes_a_block_makes_up_for_its_input_through_the_norm() -> None:
    """The block's input lost 7 a channel; the norm divides by 2 and multiplies by 0.5, so 28 more come before it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        original = Nested().eval()
    original.block.norm.running_var.fill_(4.0)
    original.block.norm.weight.fill_(0.5)
    slim = Nested().eval()
    slim.load_state_dict(original.state_dict())
    slim.first.bias.sub_(7.0)
    comparison = Comparison(slim, original, frozenset(["block.conv"]), {}, split(), {"block.conv": "block"})
    assert refit_readers(comparison, SILENT) == ("block.conv",)
    images = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    assert (slim(images) - original(images)).abs().mean() < 0.3  # 7 without the repair


# means --------------------------------------------------------------------------------------------------------------


def test_means_are_over_images_and_places() -> None:
    mean = repair._Mean(nn.Conv2d(1, 2, 1))
    mean.add(torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]]))
    mean.add(torch.tensor([[[[5.0, 7.0]], [[1.0, 1.0]]], [[[2.0, 0.0]], [[0.0, 0.0]]]]))
    assert mean.value.tolist() == pytest.approx([18 / 6, 1.0])
    assert (mean.images, mean.value.dtype) == (3, torch.float32)


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 3), (2, 4, 5, 3)])
def test_means_of_a_linear_layer_are_over_all_but_the_last_axis(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    mean = repair._Mean(nn.Linear(2, 3))
    mean.add(values)
    assert torch.allclose(mean.value, values.reshape(-1, 3).mean(0), atol=1e-6)


def test_many_small_numbers_are_added_up_in_double_precision() -> None:
    mean = repair._Mean(nn.Linear(1, 1))
    for _ in range(20):
        mean.add(torch.full((1000, 1), 0.1) + 1000)
    assert mean.value.item() == pytest.approx(1000.1, abs=1e-4)


@torch.no_grad()
def test_bias_folding_shifts_by_the_difference_of_means() -> None:
    """The norm's statistics were moved: what the layer should give is stretched and moved first."""
    original = normed([1.0, 0.0], [0.75, 0.75], [1.0, 1.0], eps=0.25)
    slim = normed([4.0, 0.0], [3.75, 0.75], [1.0, 1.0], eps=0.25)
    slim[0].weight.mul_(0.5)
    comparison = compared(slim, original, "0", means={"0": torch.tensor([10.0, 20.0])})
    images = torch.cat(repair._batches(comparison))
    given = slim[0](images).mean((0, 2, 3))
    assert fold_means(comparison, SILENT) == ("0",)
    wanted = torch.tensor([2 * 10.0 + (4 - 2 * 1.0), 20.0])
    assert torch.allclose(slim[1].running_mean, torch.tensor([4.0, 0.0]) - (wanted - given), atol=1e-4)


@torch.no_grad()
def test_bias_folding_goes_on_with_the_bias_that_it_gave() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)).eval()
    slim = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)).eval()
    slim.load_state_dict(network.state_dict())
    slim[0].bias.add_(3.0)
    assert fold_means(compared(slim, network, "0", "1"), SILENT) == ("0", "1")
    for ours, theirs in zip(slim, network, strict=True):
        assert torch.allclose(ours.bias, theirs.bias, atol=1e-4)


def test_layers_without_a_place_for_constants_are_not_folded() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    assert fold_means(compared(network, network, "0", "2"), SILENT) == ("2",)


# how much is looked at ----------------------------------------------------------------------------------------------


def test_the_images_looked_at_fit_into_memory(monkeypatch) -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(48, 1)).eval()
    live = 2 * 4 * (48 + 48)  # what the flattening reads and gives, twice, 4 bytes each
    assert repair._live_bytes(network, IMAGE) == live
    comparison = Comparison(network, network, frozenset(), {}, split(20))
    for room, expected in ((2 * live * 7, 7), (2 * live * 7 - 1, 6), (1, 1), (10**9, 20)):
        monkeypatch.setattr(repair, "_LIVE_BYTES", room)
        assert sum(map(len, repair._batches(comparison))) == expected
    comparison = replace(comparison, most_images=5)
    assert [len(one) for one in repair._batches(comparison)] == [5]
    monkeypatch.setattr(repair, "_PASS_BATCH", 3)
    assert [len(one) for one in repair._batches(comparison)] == [3, 2]


def test_a_network_that_reads_nothing_still_takes_a_byte() -> None:
    network = nn.Sequential(nn.Identity())
    network.forward = lambda x: x
    assert repair._live_bytes(network, IMAGE) == 1


def test_places_follow_the_number_of_unknowns() -> None:
    reader = reader_with(None, nn.Linear(40, 3))
    found = repair._places(reader, [reader.layer], [torch.zeros(3), torch.zeros(2)])
    assert found == [Places(positions_needed(41, 5), 0), Places(positions_needed(41, 5), 1)]
    bare = reader_with(None, nn.Conv2d(8, 3, 3, bias=False))
    assert repair._places(bare, [bare.layer], [torch.zeros(2)]) == [Places(4 * 72 // 2, 0)]
    assert repair._places(bare, [bare.layer, nn.Linear(100, 1)], [torch.zeros(2)]) == [Places(200, 0)]


@pytest.mark.parametrize(
    ("unknowns", "images", "expected"), [(1, 1, 32), (8, 1, 32), (9, 1, 36), (10, 3, 32), (100, 3, 134), (99, 3, 132)]
)
def test_four_rows_for_each_unknown_and_at_least_32_places(unknowns: int, images: int, expected: int) -> None:
    assert positions_needed(unknowns, images) == expected


# rows of a regression -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(2, 2, 3), True),
        (nn.Conv2d(2, 2, 3, groups=2), False),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(2, 2, 3, padding="same"), False),
        (nn.Linear(2, 2), True),
        (nn.ConvTranspose2d(2, 2, 3), False),
        (nn.Conv1d(2, 2, 3), False),
        (nn.BatchNorm2d(2), False),
    ],
)
def test_what_can_be_refitted(layer: nn.Module, expected: bool) -> None:
    assert is_refittable(layer) is expected


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": (1, 3), "padding": (0, 1)},
        {"kernel_size": (3, 2), "padding": (2, 1), "stride": (1, 2), "dilation": (2, 1)},
        {"kernel_size": 2, "stride": (2, 3)},
    ],
)
def test_rows_times_weights_are_what_the_layer_gives(settings: dict) -> None:
    layer = nn.Conv2d(3, 4, bias=False, **settings)
    inputs = torch.randn(2, 3, 8, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = layer(inputs)
        x, y = regression_rows(layer, inputs, outputs, Places(5, 3))
        assert x.shape == (2 * 5, layer.weight[0].numel())
        assert torch.allclose(x @ layer.weight.flatten(1).T, y, atol=1e-5)


def test_rows_of_a_linear_layer_are_all_of_its_inputs() -> None:
    layer, inputs = nn.Linear(3, 2), torch.arange(24.0).reshape(2, 4, 3)
    with torch.no_grad():
        x, y = regression_rows(layer, inputs, layer(inputs), Places(1, 0))
    assert torch.equal(x, inputs.reshape(8, 3))
    assert y.shape == (8, 2)


def test_places_lie_in_the_map_each_once() -> None:
    down, across = Places(100, 5).inside(3, 4)
    assert sorted(zip(down.tolist(), across.tolist(), strict=True)) == [(i, j) for i in range(3) for j in range(4)]
    down, across = Places(2, 5).inside(3, 4)
    assert len(down) == len(across) == 2


def test_rows_of_a_map_are_image_by_image() -> None:
    maps = torch.arange(12.0).reshape(2, 3, 1, 2)
    (down, across), rows = Places(9, 0).inside(1, 2), Places(9, 0).rows_of(maps)
    assert torch.equal(rows, torch.cat([maps[n][:, down, across].T for n in range(2)]))


@pytest.mark.parametrize("size", [1, 512, 513])
def test_gram_matrices_of_several_blocks(size: int) -> None:
    rows = torch.randn(3, size, dtype=torch.float64)
    added = GramSum(size)
    added.add(rows[:1])
    added.add(rows[1:])
    assert torch.allclose(added.matrix(), rows.T @ rows)
    assert added.matrix() is added.matrix()


# passes in lockstep -------------------------------------------------------------------------------------------------


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.flat, self.fc = nn.Conv2d(2, 3, 1), nn.Flatten(1, 2), nn.Linear(4, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.seen.append(y.clone())
        z = self.fc(self.flat(y))
        self.seen.append(z.clone())
        return z


@torch.no_grad()
def test_a_shift_is_added_along_the_axis_of_outputs() -> None:
    network, images, shift = Steps().eval(), torch.randn(2, 2, 3, 4), torch.tensor([1.0, -2.0, 3.0])
    network(images)
    conv, _ = network.seen
    with Lockstep(network, ["conv", "fc"], [images], after=["conv", "fc"]) as passes:
        ((inputs, outputs),) = passes.reach("conv")
        assert torch.equal(inputs, images)
        assert torch.equal(outputs, conv)
        passes.shift = shift
        ((flat, given),) = passes.reach("fc")
        assert torch.equal(network.seen[2], conv + shift[:, None, None])
        assert torch.equal(given, F.linear(flat, network.fc.weight, network.fc.bias))
    shifted = Lockstep(network, ["fc"], [images], after=["fc"])
    with shifted:
        ((_, plain),) = shifted.reach("fc")
        shifted.shift = shift
        found = shifted._after(network.fc, (flat,), plain)
        assert torch.equal(found, plain + shift)


@torch.no_grad()
def test_passes_wait_before_a_layer_unless_told_otherwise() -> None:
    network, batches = Steps().eval(), [torch.randn(1, 2, 3, 4), torch.randn(2, 2, 3, 4)]
    with Lockstep(network, ["conv", "fc"], batches) as passes:
        assert [len(one) for (one,) in passes.reach("conv")] == [1, 2]
        network.conv.weight.zero_()
        network.conv.bias.zero_()
        assert all(not one.any() for (one,) in passes.reach("fc"))
    with Lockstep(network, ["conv", "fc"], batches) as passes, pytest.raises(InternalError, match="'fc' is out of it"):
        list(passes.reach("fc"))
    came = pytest.raises(InternalError, match=r"come to layer 'fc' next, it came to 'conv'")
    with Lockstep(network, ["fc", "conv"], batches) as passes, came:
        list(passes.reach("fc"))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_watching_hooks_are_taken_away_and_run_without_gradients() -> None:
    network, seen = Steps().eval(), []
    run_watched(network, torch.randn(1, 2, 3, 4), {network.conv: lambda part, i, o: seen.append((o.requires_grad, 3))})
    run_watched(network, torch.randn(1, 2, 3, 4), {network.fc: lambda part, i: seen.append((True, 2))}, before=True)
    assert seen == [(False, 3), (True, 2)]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())
    with pytest.raises(RuntimeError):
        run_watched(network, torch.randn(1, 9, 3, 4), {network.conv: lambda *_: None})
    assert not network.conv._forward_hooks


def test_call_order_is_that_of_entering() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()), nn.Conv2d(2, 2, 1))
    assert call_order(network, ["1", "0.0", "0"], IMAGE) == ["0", "0.0", "1"]
    assert call_order(network, [], IMAGE) == []


class Follows(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.norm, self.other = kind, nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.kind == "in place":
            y.add_(1)
        if self.kind == "both":
            return self.norm(y) + self.other(y)
        return self.norm(self.other(y) if self.kind == "between" else y)


@pytest.mark.parametrize(
    ("kind", "expected"), [("direct", {"conv": "norm"}), ("in place", {}), ("both", {}), ("between", {"other": "norm"})]
)
def test_the_norm_behind_a_layer(kind: str, expected: dict[str, str]) -> None:
    assert following_norms(Follows(kind).eval(), (nn.BatchNorm2d,), IMAGE) == expected
    assert following_norms(Follows(kind).eval(), (nn.LayerNorm,), IMAGE) == {}


def test_the_patches_of_a_layer_are_those_of_unfold() -> None:
    layer, inputs = nn.Conv2d(2, 3, (2, 3), padding=(1, 2), stride=(2, 1)), torch.randn(1, 2, 5, 4)
    with torch.no_grad():
        outputs = layer(inputs)
    x, _ = regression_rows(layer, inputs, outputs, Places(1000, 0))
    every = F.unfold(inputs, (2, 3), padding=(1, 2), stride=(2, 1))[0].T
    assert torch.allclose(x.sum(0), every.sum(0), atol=1e-5)
    assert x.shape == every.shape
