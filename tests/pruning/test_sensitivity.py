"""The loss is measured with one group narrowed, is written down at once, and is not measured where it is hopeless."""

import copy
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.allocation.widths import Candidates
from compress.data.batches import evaluation_batches
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.progress import SilentProgress
from compress.pruning.groups import ChannelGroup
from compress.pruning.ranking.elimination import ReaderStats, reader_statistics
from compress.pruning.ranking.sensitivity import Rise, SavedRises, Sensitivity, with_rises
from compress.pruning.trial import find_cuttable, masked_copy
from compress.storage.digest import DIGEST_KEY
from compress.training.batch_norm import reestimate_batch_norm
from compress.training.evaluate import image_losses

SILENT = SilentProgress()
ENDLESS = 1e9  # a guess so bad that nothing is hopeless
LEVELS = {"body.0.0": (2, 4, 6, 8), "body.1.0": (2, 6, 10, 14, 16), "body.2.0": (4, 8, 16)}


def _split(count: int = 60) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
    wanted = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return Split("validation", ArraySource(images, np.arange(count) % 4), np.arange(count), wanted)


def _groups(module: nn.Module) -> dict[str, ChannelGroup]:
    return find_cuttable(module, nets.EXAMPLE)[0]


def _candidates(group: ChannelGroup, levels: tuple[int, ...]) -> Candidates:
    units = group.width // group.parts
    order = np.random.default_rng(1).permutation(units)
    return Candidates(group.name, np.ones(units), group.parts, levels, order)


def _stats(module: nn.Module, groups: dict[str, ChannelGroup]) -> dict[str, ReaderStats]:
    return {
        layer: one for _, stats in reader_statistics(module, groups, _split(), SILENT) for layer, one in stats.items()
    }


class _Measured:
    """Counts the networks whose losses are asked for, and says what they are."""

    def __init__(self, losses_of: Callable[[nn.Module], Tensor] = lambda network: image_losses(network, _split())):
        self.networks: list[nn.Module] = []
        self.losses_of = losses_of

    def __call__(self, network: nn.Module) -> Tensor:
        self.networks.append(network)
        return self.losses_of(network)


def _sensitivity(
    module: nn.Module,
    saved: Path,
    losses_of: Callable[[nn.Module], Tensor] | None = None,
    guess: float = ENDLESS,
    key: str = "",
    reestimate: Callable[[nn.Module], object] = lambda network: reestimate_batch_norm(network, _split(), SILENT),
) -> Sensitivity:
    rises = SavedRises(saved, key)
    return Sensitivity(module, losses_of or _Measured(), guess, reestimate, nets.EXAMPLE, rises, SILENT)


def _rise_by_hand(network: nn.Module, module: nn.Module) -> tuple[float, float]:
    images, labels = next(evaluation_batches(_split(), 60))
    with torch.no_grad():
        after, before = (F.cross_entropy(net(images).double(), labels, reduction="none") for net in (network, module))
    return _mean_and_error((after - before).numpy())


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _distance_to(module: nn.Module) -> Callable[[nn.Module], Tensor]:
    """A loss that can only rise: how far the outputs are from those of `module`, for each image."""
    images = torch.cat([images for images, _ in evaluation_batches(_split(), 64)])
    with torch.no_grad():
        wanted = module(images)

    def losses_of(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return (network(images) - wanted).square().sum(1).double()

    return losses_of


def _running_most(values: list[float]) -> list[float]:
    """What is never less at a narrower width, for values from narrow to wide."""
    return list(np.maximum.accumulate(np.array([*values, 0.0])[::-1])[::-1])


@pytest.mark.parametrize("group", LEVELS)
def test_rises_without_statistics_are_those_of_silenced_networks_after_new_batch_norms(tmp_path, group):
    module = nets.build("chain")
    groups = _groups(module)
    one = _candidates(groups[group], LEVELS[group])
    found = _sensitivity(module, tmp_path / "s.json").rises(groups[group], one, None)
    by_hand = []
    for width in one.levels[:-1]:
        silent = masked_copy(module, {group: groups[group].expand(one.removed_units(width))}, groups)
        unrepaired = _rise_by_hand(silent, module)
        reestimate_batch_norm(silent, _split(), SILENT)
        by_hand.append(_rise_by_hand(silent, module))
        assert by_hand[-1][0] != pytest.approx(unrepaired[0], abs=1e-4), "the new statistics matter"
    assert [rise.mean for rise in found] == pytest.approx(_running_most([mean for mean, _ in by_hand]), abs=1e-6)
    assert [rise.error for rise in found[:-1]] == pytest.approx([error for _, error in by_hand], rel=1e-4)
    assert all(rise.is_measured for rise in found)


def _refitted_by_hand(module: nn.Module, group: ChannelGroup, units: list[int], stats: dict[str, ReaderStats]):
    """Silence the units and let a hook put what the refitted readers give in the place of what they gave."""
    silent = masked_copy(module, {group.name: group.expand(units)}, {group.name: group})
    for reader in group.readers:
        layer = silent.get_submodule(reader.layer)
        each = layer.weight[0].numel() // group.width
        gone = torch.tensor([channel * each + cell for channel in units for cell in range(each)])
        weight = stats[reader.layer].refit(gone).float()

        def refit(layer: nn.Module, inputs: tuple[Tensor], _output: Tensor, weight: Tensor = weight) -> Tensor:
            kernel, constant = weight[:, :-1].reshape(layer.weight.shape), weight[:, -1]
            if isinstance(layer, nn.Linear):
                return F.linear(inputs[0], kernel, constant)
            return F.conv2d(inputs[0], kernel, constant, layer.stride, layer.padding)

        layer.register_forward_hook(refit)
    return silent


@pytest.mark.parametrize(
    ("name", "group", "levels"),
    [*(("chain", group, levels) for group, levels in LEVELS.items()), ("linear_head", "features.0.0", (2, 4, 6, 8))],
)
def test_rises_with_statistics_are_those_of_refitted_networks(tmp_path, name, group, levels):
    module = nets.build(name)
    groups = _groups(module)
    stats, one = _stats(module, groups), _candidates(groups[group], levels)

    def fail(network: nn.Module) -> None:
        raise AssertionError("a refitted network keeps its batch-norm statistics")

    losses_of = _distance_to(module)
    found = _sensitivity(module, tmp_path / "s.json", losses_of, reestimate=fail).rises(groups[group], one, stats)
    for rise, width in zip(found[:-1], levels[:-1], strict=True):
        units = list(one.removed_units(width))
        mean, error = _mean_and_error(losses_of(_refitted_by_hand(module, groups[group], units, stats)).numpy())
        assert (rise.mean, rise.error) == pytest.approx((mean, error), rel=1e-3)
        silent = masked_copy(module, {group: groups[group].expand(units)}, groups)
        assert 0 < mean < 0.7 * float(losses_of(silent).mean()), "the refit makes up for some of it"
    assert found[-1] == Rise(0.0, 0.0)
    assert all(narrow.mean > wide.mean for narrow, wide in pairwise(found))


def test_a_group_in_parts_loses_the_same_of_each_part(tmp_path):
    module = nets.build("grouped")
    group = _groups(module)["body.1.0"]
    one = _candidates(group, (4, 8, 12, 16))
    measured = _Measured()
    _sensitivity(module, tmp_path / "s.json", measured).rises(group, one, _stats(module, {group.name: group}))
    for network, width in zip(measured.networks[1:], (12, 8, 4), strict=True):
        units = one.removed_units(width)
        zeros = (network.get_submodule("body.2.0").weight == 0).all(3).all(2).all(0).nonzero().flatten()
        assert zeros.tolist() == sorted(4 * part + unit for unit in units for part in range(4))


def _scripted(module: nn.Module, rises: dict[int, float]) -> _Measured:
    """Losses that depend on how many channels of body.1.0 are masked: width -> rise."""

    def losses_of(network: nn.Module) -> Tensor:
        width = int((network.get_submodule("body.2.0").weight != 0).any((0, 2, 3)).sum())
        return torch.full((10,), 1.0 + (0.0 if width == 16 else rises[width]), dtype=torch.float64)

    return _Measured(losses_of)


def _nothing(network: nn.Module) -> None:
    pass


def test_the_whole_width_costs_nothing_and_no_narrower_one_less_than_a_wider(tmp_path):
    module = nets.build("chain")
    group = _groups(module)["body.1.0"]
    levels = (2, 4, 8, 12, 14, 16)
    measured = _scripted(module, {14: -0.3, 12: 0.2, 8: 0.1, 4: 0.5, 2: 0.4})
    sensitivity = _sensitivity(module, tmp_path / "s.json", measured, reestimate=_nothing)
    found = sensitivity.rises(group, _candidates(group, levels), None)
    assert [rise.mean for rise in found] == pytest.approx([0.5, 0.5, 0.2, 0.2, 0.0, 0.0])
    assert found[-1] == Rise(0.0, 0.0)
    damaged = with_rises(_candidates(group, levels), found)
    assert damaged.damages == pytest.approx([0.5, 0.5, 0.2, 0.2, 0.0, 0.0])
    assert damaged.damages.dtype == np.float64
    assert damaged.errors == pytest.approx([rise.error for rise in found])
    assert all(narrow.mean >= wide.mean for narrow, wide in pairwise(found))


def test_the_standard_error_is_that_of_the_mean_over_images(tmp_path):
    module = nets.build("chain")
    group = _groups(module)["body.1.0"]
    rises = torch.tensor([0.1, 0.7, -0.2, 0.4, 1.0], dtype=torch.float64)
    losses = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0], dtype=torch.float64)
    measured = _Measured(lambda network: losses if network is module else losses + rises)
    (found, _) = _sensitivity(module, tmp_path / "s.json", measured).rises(group, _candidates(group, (8, 16)), None)
    assert found.mean == pytest.approx(0.4)
    assert found.error == pytest.approx(math.sqrt(float(((rises - 0.4) ** 2).mean()) / 5))


@pytest.mark.parametrize("has_stats", [False, True])
def test_the_network_is_left_as_it_is(tmp_path, has_stats):
    module = nets.build("chain")
    groups = _groups(module)
    stats = _stats(module, groups) if has_stats else None
    before = copy.deepcopy(module.state_dict())
    sensitivity = _sensitivity(module, tmp_path / "s.json")
    for name, levels in LEVELS.items():
        sensitivity.rises(groups[name], _candidates(groups[name], levels), stats)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks or part.training for part in module.modules())


def _all_rises(sensitivity: Sensitivity, groups: dict[str, ChannelGroup]) -> dict[str, tuple[Rise, ...]]:
    return {
        name: sensitivity.rises(groups[name], _candidates(groups[name], levels), None)
        for name, levels in LEVELS.items()
    }


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4, 6, 9])
def test_what_was_measured_before_a_kill_is_not_measured_again(tmp_path, killed_at):
    module = nets.build("chain")
    groups, saved = _groups(module), tmp_path / "s.json"
    undisturbed = _Measured()
    expected = _all_rises(_sensitivity(module, tmp_path / "other.json", undisturbed), groups)
    widths = sum(len(levels) - 1 for levels in LEVELS.values())
    assert len(undisturbed.networks) == 1 + widths

    def dies(network: nn.Module) -> Tensor:
        if len(first.networks) == killed_at:
            raise KeyboardInterrupt
        return image_losses(network, _split())

    first = _Measured(dies)
    with pytest.raises(KeyboardInterrupt):
        _all_rises(_sensitivity(module, saved, first), groups)
    done = max(killed_at - 2, 0)  # the first network is the intact one, the last was not finished
    kept = json.loads(saved.read_text(encoding="utf-8")) if done else {}
    assert len(kept.keys() - {DIGEST_KEY}) == done
    assert saved.is_file() == bool(done)
    second = _Measured()
    assert _all_rises(_sensitivity(module, saved, second), groups) == expected
    assert len(second.networks) == 1 + widths - done
    third = _Measured()
    assert _all_rises(_sensitivity(module, saved, third), groups) == expected
    assert third.networks == []
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == []


def test_the_early_end_is_the_same_after_a_kill(tmp_path):
    module = nets.build("chain")
    group = _groups(module)["body.1.0"]
    one, script = _candidates(group, (2, 4, 8, 12, 16)), {12: 0.1, 8: 0.6, 4: 0.7, 2: 0.8}
    results, counts = [], []
    for _ in range(2):
        measured = _scripted(module, script)
        sensitivity = _sensitivity(module, tmp_path / "s.json", measured, 1.5, reestimate=_nothing)
        results.append(sensitivity.rises(group, one, None))
        counts.append(len(measured.networks))
    assert results[0] == results[1]
    assert [rise.is_measured for rise in results[1]] == [False, False, True, True, True]
    assert counts == [3, 1]


@pytest.mark.parametrize(
    "content",
    [b"", b'{"/body.1.0/8": [0.5, 0.', b"[1, 2]", b"3", b'{"/body.1.0/8": 0.5}', b'{"/body.1.0/8": [1]}', b"\xff\xfe",
     b'{"/body.1.0/8": ["x", 0.1]}', b'{"/body.1.0/8": null}'],
)  # fmt: skip
def test_a_file_that_is_not_whole_is_as_good_as_none(tmp_path, content):
    module = nets.build("chain")
    group, saved = _groups(module)["body.1.0"], tmp_path / "s.json"
    one = _candidates(group, (8, 12, 16))
    expected = _sensitivity(module, tmp_path / "none.json").rises(group, one, None)
    saved.write_bytes(content)
    measured = _Measured()
    assert _sensitivity(module, saved, measured).rises(group, one, None) == expected
    assert len(measured.networks) == 3
    assert set(json.loads(saved.read_text(encoding="utf-8"))) == {"/body.1.0/8", "/body.1.0/12", DIGEST_KEY}


def test_networks_of_different_keys_do_not_mix(tmp_path):
    saved, found = tmp_path / "s.json", {}
    for key, seed in (("", 0), ("body.1", 1), ("body.1+body.2", 2)):
        module = nets.build("chain", seed)
        groups, measured = _groups(module), _Measured()
        found[key] = _all_rises(_sensitivity(module, saved, measured, key=key), groups)
        assert len(measured.networks) == 1 + sum(len(levels) - 1 for levels in LEVELS.values())
        alone = _all_rises(_sensitivity(module, tmp_path / f"{seed}.json"), groups)
        assert found[key] == alone
    assert found[""] != found["body.1"] != found["body.1+body.2"]
    for key, seed in (("", 0), ("body.1", 1)):
        module, measured = nets.build("chain", seed), _Measured()
        assert _all_rises(_sensitivity(module, saved, measured, key=key), _groups(module)) == found[key]
        assert measured.networks == []


def test_below_a_width_that_is_as_bad_as_a_guess_nothing_is_measured(tmp_path):
    module = nets.build("chain")
    group = _groups(module)["body.1.0"]
    one, guess = _candidates(group, (2, 4, 8, 12, 14, 16)), 1.5  # the intact loss is 1
    measured = _scripted(module, {14: 0.1, 12: 0.5, 8: 0.6})
    sensitivity = _sensitivity(module, tmp_path / "s.json", measured, guess, reestimate=_nothing)
    found = sensitivity.rises(group, one, None)
    assert [rise.mean for rise in found] == pytest.approx([2.4, 1.2, 0.6, 0.5, 0.1, 0.0])
    assert [rise.is_measured for rise in found] == [False, False, True, True, True, True]
    assert len(measured.networks) == 4, "the intact one, and three widths: 0.5 is not above guess - intact, 0.6 is"


def test_a_network_no_better_than_a_guess_is_measured_until_it_gets_worse(tmp_path):
    module = nets.build("chain")
    group = _groups(module)["body.1.0"]
    measured = _scripted(module, {14: -0.1, 12: 0.2})
    sensitivity = _sensitivity(module, tmp_path / "s.json", measured, 0.4, reestimate=_nothing)
    found = sensitivity.rises(group, _candidates(group, (2, 8, 12, 14, 16)), None)
    assert [rise.mean for rise in found] == pytest.approx([0.8, 0.4, 0.2, 0.0, 0.0])
    assert [rise.is_measured for rise in found] == [False, False, True, True, True]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_no_number_counts_as_worse_than_a_guess(tmp_path, broken):
    module = nets.build("chain")
    group = _groups(module)["body.1.0"]
    measured = _scripted(module, {14: 0.1, 12: broken})
    sensitivity = _sensitivity(module, tmp_path / "s.json", measured, 1.5, reestimate=_nothing)
    found = sensitivity.rises(group, _candidates(group, (8, 12, 14, 16)), None)
    assert found[1].mean > 1.5 - 1.0
    assert all(math.isfinite(rise.mean) and math.isfinite(rise.error) for rise in found)
    assert found[0].mean == 2 * found[1].mean
    assert not found[0].is_measured


class _PreActivation(nn.Module):
    """No batch norm of its own follows the second convolution: without a bias nothing takes up a constant."""

    def __init__(self, has_bias: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.conv1, self.norm = nn.Conv2d(8, 12, 3, 1, 1), nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 1, bias=has_bias)
        self.last, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(x + self.conv2(torch.relu(self.norm(self.conv1(x))))).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "has_bias",
    [
        True,
        False,
    ],
)
def test_readers_are_refitted_with_what_they_have(tmp_path, has_bias):
    torch.manual_seed(0)
    module = _PreActivation(has_bias).eval()
    with torch.no_grad():
        module.norm.bias.fill_(3.0)  # the channels are constants and a little more
    group, measured = _groups(module)["conv1"], _Measured()
    one = _candidates(group, (4, 12))
    _sensitivity(module, tmp_path / "s.json", measured).rises(group, one, _stats(module, {"conv1": group}))
    _, refitted = measured.networks
    left = [channel for channel in range(12) if channel not in one.removed_units(4)]
    images, _ = next(evaluation_batches(_split(), 60))
    with torch.no_grad():
        x = torch.relu(module.norm(module.conv1(module.stem(images))))
        wanted = module.conv2(x)
        error = float((refitted.conv2(x) - wanted).square().mean())
        rows, outputs = (values.movedim(1, -1).flatten(0, 2) for values in (x, wanted))
        rows = torch.cat([rows[:, left], torch.ones(len(rows), int(has_bias))], 1)
        best = torch.linalg.lstsq(rows, outputs).solution
        least = float((rows @ best - outputs).square().mean())
    assert error < 1.5 * least
