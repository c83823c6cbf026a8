"""Formulas of the elimination by hand: statistics, refits and losses of readers with two or three inputs."""

from contextlib import closing

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.data.batches import evaluation_batches
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.progress import SilentProgress
from compress.pruning.groups import ChannelGroup, Member
from compress.pruning.ranking import elimination
from compress.pruning.ranking.downdates import Downdates
from compress.pruning.ranking.elimination import ReaderPass, ReaderStats, layer_statistics, removal_order, unit_inputs
from compress.pruning.repair.least_squares import RIDGE

SILENT = SilentProgress()


def split(count: int = 8) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 3, 2), np.uint8)
    wanted = Preprocessing(mean=(0.5, 0.5), std=(0.25, 0.25))
    return Split("calibration", ArraySource(images, np.arange(count) % 2), np.arange(count), wanted)


def f64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def group_of(width: int, parts: int, *readers: Member) -> ChannelGroup:
    return ChannelGroup("g", width, parts, readers, ())


def reader(name: str, layer: nn.Module, slots: list[int], channels: list[int]) -> Member:
    return Member(name, layer, "in", torch.tensor(slots), torch.tensor(channels))


# statistics ---------------------------------------------------------------------------------------------------------


def test_statistics_of_a_linear_layer_by_hand() -> None:
    """Second moments of [x, 1], a ridge of RIDGE times the mean of its diagonal, the variance of w x + b as energy."""
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -1.0]]))
        layer.bias.fill_(3.0)
    rows = np.array([[1.0, 0.0, 1.0], [3.0, 2.0, 1.0], [2.0, 4.0, 1.0]])
    gram = rows.T @ rows / 3
    found = elimination._finished("fc", layer, torch.from_numpy(gram.copy()), has_norm=False)
    outputs = rows @ np.array([2.0, -1.0, 3.0])
    assert found.energy == pytest.approx(outputs.var(), rel=1e-9)
    assert torch.allclose(found.weight, f64([2.0, -1.0, 3.0]))
    assert np.allclose(found.gram.numpy(), gram + RIDGE * np.trace(gram) / 3 * np.eye(3), rtol=1e-12)
    assert (found.layer, found.has_intercept) == ("fc", True)


@pytest.mark.parametrize(("bias", "has_norm", "size"), [(True, False, 3), (False, True, 3), (False, False, 2)])
def test_an_intercept_needs_a_bias_or_a_norm(bias: bool, has_norm: bool, size: int) -> None:
    layer = nn.Linear(2, 1, bias=bias)
    gram = torch.eye(3, dtype=torch.float64)
    found = elimination._finished("fc", layer, gram.clone(), has_norm)
    assert (found.has_intercept, found.gram.shape, found.weight.shape[1]) == (size == 3, (size, size), size)
    if not bias and size == 3:
        assert found.weight[0, 2] == 0
    assert found.gram[0, 0] == pytest.approx(1 + RIDGE)  # of the diagonal with the always-1


def test_the_energy_of_several_outputs_is_their_sum() -> None:
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [3.0]]))
    gram = f64([5.0, 2.0], [2.0, 1.0])  # E[x²] = 5, E[x] = 2, so the variance is 1
    assert elimination._finished("fc", layer, gram, has_norm=False).energy == pytest.approx(1.0 + 9.0)


def test_what_a_convolution_reads_is_gathered_over_images() -> None:
    network, data = nn.Sequential(nn.Conv2d(2, 3, 1)).eval(), split()
    (stats,) = [one["0"] for one in layer_statistics(network, ["0"], data, SILENT)]
    x = torch.cat([batch for batch, _ in evaluation_batches(data, 8)])
    flat = x.permute(0, 2, 3, 1).reshape(-1, 2).double()
    rows = torch.cat([flat, torch.ones(len(flat), 1, dtype=torch.float64)], 1)
    gram = rows.T @ rows / len(rows)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    assert torch.allclose(stats.gram, gram, atol=1e-5)


# refits and losses --------------------------------------------------------------------------------------------------


def test_a_refit_without_an_input_by_hand() -> None:
    """With moments [[2, 1], [1, 1]] and weights [1, 3], what is left of input 0 alone is (2·1 + 1·3) / 2 = 2.5."""
    stats = ReaderStats("r", f64([2.0, 1.0], [1.0, 1.0]), f64([1.0, 3.0]), 1.0)
    assert stats.refit(torch.tensor([1])).tolist() == [[pytest.approx(2.5), 0.0]]
    assert stats.refit(torch.tensor([0])).tolist() == [[0.0, pytest.approx(4.0)]]
    assert stats.refit(torch.tensor([], dtype=torch.int64)).tolist() == [[pytest.approx(1.0), pytest.approx(3.0)]]


# the order ----------------------------------------------------------------------------------------------------------


def test_the_order_by_hand_is_by_loss_and_stable() -> None:
    """Inputs that know nothing of one another: the loss of each is w² times its moment."""
    layer = nn.Linear(4, 1, bias=False)
    stats = ReaderStats("r", torch.diag(f64([1.0, 1.0, 4.0, 1.0])[0]), f64([3.0, 1.0, 1.0, 1.0]), 1.0, False)
    group = group_of(4, 1, reader("r", layer, [0, 1, 2, 3], [0, 1, 2, 3]))
    order = removal_order(group, {"r": stats}, 3)
    assert (order.tolist(), order.dtype) == ([1, 3, 2, 0], np.int64)
    assert removal_order(group, {"r": stats}, 0).tolist() == [0, 1, 2, 3]
    assert removal_order(group, {"r": stats}, 1).tolist() == [1, 0, 2, 3]


def test_losses_of_all_readers_are_added_each_over_its_own_energy() -> None:
    layer = nn.Linear(2, 1, bias=False)
    eye = torch.eye(2, dtype=torch.float64)
    first = ReaderStats("a", eye, f64([2.0, 1.0]), 1.0, False)  # losses 4, 1
    second = ReaderStats("b", eye, f64([1.0, 20.0]), 10.0, False)  # losses 0.1, 40
    members = reader("a", layer, [0, 1], [0, 1]), reader("b", layer, [0, 1], [0, 1])
    assert removal_order(group_of(2, 1, *members), {"a": first, "b": second}, 1).tolist() == [0, 1]
    assert removal_order(group_of(2, 1, members[0]), {"a": first}, 1).tolist() == [1, 0]
    assert first.weight.tolist() == [[2.0, 1.0]]  # a reader with one output, too, is left as it is


def test_many_units_go_at_a_time_in_a_wide_group(monkeypatch) -> None:
    monkeypatch.setattr(elimination, "_ROUNDS", 2)
    rounds: list[int] = []
    real = Downdates.losses
    monkeypatch.setattr(Downdates, "losses", lambda one: rounds.append(1) or real(one))
    layer, size = nn.Linear(7, 1, bias=False), 7
    stats = ReaderStats("r", torch.eye(size, dtype=torch.float64), torch.arange(7.0, dtype=torch.float64)[None], 1.0)
    group = group_of(7, 1, reader("r", layer, list(range(7)), list(range(7))))
    assert removal_order(group, {"r": stats}, 5).tolist() == list(range(7))
    assert len(rounds) == 3  # two at a time, and one


@pytest.mark.parametrize(
    ("layer", "width", "parts", "slots", "channels", "expected"),
    [
        (nn.Linear(3, 1), 3, 1, [0, 1, 2], [0, 1, 2], [[0], [1], [2]]),
        (nn.Linear(4, 1), 2, 1, [0, 1, 2, 3], [0, 0, 1, 1], [[0, 1], [2, 3]]),
        (nn.Conv2d(2, 1, (1, 2)), 2, 1, [0, 1], [1, 0], [[2, 3], [0, 1]]),
        (nn.Linear(4, 1), 4, 2, [0, 1, 2, 3], [0, 1, 2, 3], [[0, 2], [1, 3]]),
    ],
)
def test_unknowns_of_a_unit_by_hand(layer, width, parts, slots, channels, expected) -> None:
    one = reader("r", layer, slots, channels)
    assert unit_inputs(group_of(width, parts, one), one).tolist() == expected


# who is looked at ---------------------------------------------------------------------------------------------------


def test_only_readers_that_see_all_units_alike_are_eligible(monkeypatch) -> None:
    layer = nn.Linear(4, 1)
    cases = [([0, 1], [0, 1], True), ([0, 1, 2], [0, 0, 1], False), ([0], [0], False)]
    for slots, channels, expected in cases:
        one = reader("r", layer, slots, channels)
        assert elimination._is_eligible(group_of(2, 1, one), one) is expected
    halves = reader("r", layer, [0, 1, 2, 3], [0, 1, 2, 3])
    assert elimination._is_eligible(group_of(4, 2, halves), halves) is True
    monkeypatch.setattr(elimination, "_MOST_UNKNOWNS", 4)
    assert elimination._is_eligible(group_of(4, 2, halves), halves) is False


def test_unknowns_are_the_inputs_and_one(monkeypatch) -> None:
    assert elimination._unknowns(nn.Linear(4, 9)) == 5
    assert elimination._unknowns(nn.Conv2d(2, 9, 3, bias=False)) == 19
    monkeypatch.setattr(elimination, "_MOST_UNKNOWNS", 5)
    assert elimination._is_affordable(nn.Linear(4, 9)) is True
    assert elimination._is_affordable(nn.Linear(5, 9)) is False
    assert elimination._is_affordable(nn.Conv2d(2, 2, 1, groups=2)) is False


def test_bulks_hold_as_many_gram_matrices_as_there_is_room_for(monkeypatch) -> None:
    a, b, c = nn.Linear(9, 1), nn.Linear(9, 1), nn.Linear(4, 1)  # 800, 800 and 200 bytes
    wanted = {"one": [a], "two": [b], "three": [c], "four": [a, c]}
    for room, expected in (
        (10**6, [["one", "two", "three", "four"]]),
        (1600, [["one", "two"], ["three", "four"]]),
        (1599, [["one"], ["two", "three"], ["four"]]),
        (1, [["one"], ["two"], ["three"], ["four"]]),
    ):
        monkeypatch.setattr(elimination, "_GRAM_BYTES", room)
        assert list(elimination._bulks(wanted)) == expected
    assert list(elimination._bulks({})) == []


# precision and passes ------------------------------------------------------------------------------------------------


def test_float32_gives_way_to_float64_where_it_does_not_suffice(monkeypatch) -> None:
    monkeypatch.setattr(elimination, "preferred_dtype", lambda _unknowns: torch.float32)
    gram = torch.ones(4, 4, dtype=torch.float64)
    gram.diagonal().add_(1e-9)  # 1 + 1e-9 is 1 in float32
    layer = nn.Linear(4, 1, bias=False)
    stats = {"r": ReaderStats("r", gram, f64([1.0, 2.0, 3.0, 4.0]), 1.0, False)}
    group = group_of(4, 1, reader("r", layer, [0, 1, 2, 3], [0, 1, 2, 3]))
    assert sorted(removal_order(group, stats, 3).tolist()) == [0, 1, 2, 3]
    used: list[torch.dtype] = []
    real = Downdates.__init__
    monkeypatch.setattr(Downdates, "__init__", lambda one, *values: (used.append(values[-1]), real(one, *values))[1])
    removal_order(group, stats, 3)
    assert used == [torch.float32, torch.float64]


@pytest.mark.parametrize("size", [3, 8, 32, 50, 70])
def test_statistics_along_another_loop_are_those_of_an_own_pass(size: int, monkeypatch) -> None:
    monkeypatch.setattr(elimination, "positions_needed", lambda _unknowns, _images: 2)  # of nine: samples matter
    torch.manual_seed(0)
    network, data = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval(), split(70)

    def one_pass() -> ReaderPass:
        return ReaderPass(network, ["g"], {"0": network[0], "2": network[2]}, (), data)

    own, shared = one_pass(), one_pass()
    for images, _ in shared.along(evaluation_batches(data, size)):
        network(images).sum().backward()
    ran: list[int] = []
    handle = network.register_forward_hook(lambda *_: ran.append(1))
    along, alone = shared.collect(SILENT), own.collect(SILENT)
    handle.remove()
    assert len(ran) == 3, "batches of 32 for the own pass, none for the other"
    for name, one in alone.items():
        assert torch.allclose(along[name].gram, one.gram, rtol=1e-6)
        assert along[name].energy == pytest.approx(one.energy, rel=1e-5)
    assert not any(part._forward_hooks for part in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_loop_that_ends_early_is_followed_by_an_own_pass() -> None:
    network, data = nn.Sequential(nn.Conv2d(2, 3, 1)).eval(), split(40)
    wanted = ReaderPass(network, [], {"0": network[0]}, (), data).collect(SILENT)["0"]
    one = ReaderPass(network, [], {"0": network[0]}, (), data)
    assert not one.has_begun
    with closing(one.along(evaluation_batches(data, 8))) as batches:
        network(next(batches)[0])
    assert one.has_begun
    assert not network[0]._forward_hooks
    assert torch.equal(one.collect(SILENT)["0"].gram, wanted.gram)


def test_calls_between_batches_do_not_count() -> None:
    """Targets of images without labels come from the baseline, which may be the network itself."""
    network, data = nn.Sequential(nn.Conv2d(2, 3, 1)).eval(), split(40)
    wanted = ReaderPass(network, [], {"0": network[0]}, (), data).collect(SILENT)["0"]

    def batches():
        for images, targets in evaluation_batches(data, 8):
            network(images + 1)
            yield images, targets

    one = ReaderPass(network, [], {"0": network[0]}, (), data)
    for images, _ in one.along(batches()):
        network(images)
    assert torch.allclose(one.collect(SILENT)["0"].gram, wanted.gram, rtol=1e-6)


def test_inputs_with_other_counts_than_images_are_taken_whole() -> None:
    network, data = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 27)), nn.Linear(27, 2)).eval(), split(3)
    with torch.no_grad():
        stats = ReaderPass(network, [], {"2": network[2]}, (), data).collect(SILENT)["2"]
        x = torch.cat([batch for batch, _ in evaluation_batches(data, 8)]).reshape(-1, 27)
    assert len(x) == 2
    rows = torch.cat([x, torch.ones(2, 1)], 1).double()
    gram = rows.T @ rows / 2
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    assert torch.allclose(stats.gram, gram, atol=1e-5)
