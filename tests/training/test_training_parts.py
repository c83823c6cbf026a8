"""Schedules, mixed images and averaged weights, each against what its definition gives by hand."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from compress.data.batches import Augmentation
from compress.training.mixing import mixed
from compress.training.schedule import schedule
from compress.training.weight_averaging import WeightAverage


@pytest.mark.parametrize("name", ["cosine", "one_cycle", "step"])
def test_a_schedule_rises_to_its_peak_and_falls(name: str) -> None:
    rates = [schedule(step, 100, 0.1, name) for step in range(100)]
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert rates[9] == max(rates) == 1.0
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert schedule(0, 1, 0.0, name) == 1.0
    assert all(0 < schedule(step, steps, 0.99, name) <= 1 for steps in (1, 2, 3) for step in range(steps))


def test_each_schedule_has_its_shape() -> None:
    assert [schedule(step, 100, 0.1) for step in range(10)] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert 0 < schedule(99, 100, 0.1) < 0.001
    assert schedule(55, 100, 0.1) == pytest.approx(0.5)
    # a one-cycle run is half-way up, between 1/25 and 1, in the middle of its warm-up
    assert schedule(14, 100, 0.3, "one_cycle") == pytest.approx((1 / 25 + 1) / 2)
    assert schedule(0, 1000, 0.3, "one_cycle") == pytest.approx(1 / 25, rel=1e-3)
    assert schedule(99, 100, 0.3, "one_cycle") == schedule(99, 100, 0.3)
    assert [schedule(step, 100, 0.0, "step") for step in (0, 49, 50, 74, 75, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def _batch(layout: str) -> torch.Tensor:
    """Four images whose every pixel is their number."""
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 12).contiguous()
    return images if layout == "NCHW" else images.permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_cutmix_puts_one_rectangle_of_the_neighbour_into_each_image(layout: str) -> None:
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        images = _batch(layout)
        result, share = mixed(images, Augmentation(cutmix=1.0), layout)
        assert torch.equal(images, _batch(layout)), "the batch itself is left alone"
        if layout == "NHWC":
            result = result.permute(0, 3, 1, 2)
        assert bool((share == share[0]).all())
        for number, image in enumerate(result):
            foreign = image[0] == (number - 1) % 4
            assert bool((foreign | (image[0] == number)).all())
            assert torch.equal(image[0], image[1]), "all channels alike"
            assert torch.equal(foreign, foreign.any(1)[:, None] & foreign.any(0)[None]), "a rectangle"
            assert foreign.float().mean() == pytest.approx(float(share[0]))
        shares.append(float(share[0]))
    assert min(shares) < 0.05
    assert max(shares) > 0.5


def test_nothing_is_mixed_unless_asked_for_and_a_coin_decides_between_two_ways() -> None:
    images = _batch("NCHW")
    same, share = mixed(images, Augmentation())
    assert same is images
    assert not share.any()
    kinds = set()
    for seed in range(20):
        torch.manual_seed(seed)
        result, _ = mixed(images, Augmentation(mixup=1.0, cutmix=1.0))
        kinds.add("cutmix" if bool((result == result.round()).all()) else "mixup")
    assert kinds == {"mixup", "cutmix"}


def test_the_moving_average_is_that_of_its_definition() -> None:
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    network[0].weight.data.fill_(8.0)
    average = WeightAverage(network, 0.2)
    expected, seen = 8.0, []
    for step, (value, kept) in enumerate([(2.0, 0.1), (4.0, 2 / 11), (1.0, 0.2), (5.0, 0.2)], start=1):
        network[0].weight.data.fill_(value)
        network[1].running_mean.fill_(value)
        network[1].num_batches_tracked.fill_(step)
        average.update(network)
        expected = kept * expected + (1 - kept) * value
        assert float(average.module[0].weight) == pytest.approx(expected)
        assert int(average.module[1].num_batches_tracked) == step
        seen.append(float(average.module[1].running_mean))
    assert seen[0] == pytest.approx(0.9 * 2.0), "buffers are averaged, too: the mean was 0"
    assert network[0].weight.item() == 5.0
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert not average.module.training


def test_an_average_of_all_weighs_all_alike() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = WeightAverage(network, None)
    for value in (2.0, 4.0, 9.0):
        network.weight.data.fill_(value)
        average.update(network)
    assert average.module.weight.item() == pytest.approx(5.0)
    again = WeightAverage(network, None)
    again.load_state_dict(average.state_dict())
    network.weight.data.fill_(1.0)
    again.update(network)
    assert again.module.weight.item() == pytest.approx(4.0)
