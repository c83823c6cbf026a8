"""Shares of channels by hand and against sums over every product; error parameters against their formula."""

import math

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.errors import UnsupportedLayer
from compress.pruning.criteria.pfp import Contributions, Pfp, Sipp, _Shares, collect_contributions
from compress.pruning.groups import ChannelGroup, Member
from compress.pruning.trial import find_cuttable


def test_shares_of_a_linear_layer_by_hand() -> None:
    """Output 0 adds 1 + 3 of positive products, output 1 has one positive (2) and one negative product (-3)."""
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 3.0], [2.0, -3.0]]))
    shares = _Shares(layer)
    shares.add(torch.ones(1, 2), 0)
    assert shares.of_inputs(shares.largest).tolist() == [1.0, 1.0]  # each is all there is of one sign in output 1
    with torch.no_grad():
        layer.weight[1] = 0
    shares = _Shares(layer)
    shares.add(torch.ones(1, 2), 0)
    assert shares.of_inputs(shares.largest).tolist() == [0.25, 0.75]


def test_negative_inputs_count_by_the_sign_of_their_products() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
    shares = _Shares(layer)
    shares.add(torch.tensor([[1.0, -1.0]]), 0)  # products 1 and 2
    assert shares.of_inputs(shares.largest).tolist() == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2, groups=2),
        nn.Conv2d(4, 6, (1, 3), padding=(0, 1), padding_mode="reflect"),
        nn.Conv1d(4, 6, 3, padding=1),
        nn.Linear(4, 6),
    ],
)
def test_shares_equal_sums_over_every_product(layer, monkeypatch) -> None:
    monkeypatch.setattr("compress.pruning.criteria.pfp._POSITIONS", 10**6)
    monkeypatch.setattr("compress.pruning.criteria.pfp._CHUNK", 50)
    shape = {nn.Conv2d: (2, 4, 5, 6), nn.Conv1d: (2, 4, 7), nn.Linear: (2, 3, 4)}[type(layer)]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    shares = _Shares(layer)
    shares.add(x, 0)
    bare = F.linear if isinstance(layer, nn.Linear) else layer._conv_forward

    def outputs(weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        given = bare(inputs, weight, None)
        return given if isinstance(layer, nn.Linear) else given.movedim(1, -1).flatten(1, -2)

    largest, mean = torch.zeros(4), torch.zeros(4)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    groups = getattr(layer, "groups", 1)
    cells = layer.weight[0, 0].numel()
    positive = {
        sign: outputs((sign * layer.weight).clamp_min(0), x.clamp_min(0))
        + outputs((-sign * layer.weight).clamp_min(0), (-x).clamp_min(0))
        for sign in (1, -1)
    }
    with torch.no_grad():
        for channel in range(4):
            for cell in range(cells):
                weight = torch.zeros_like(layer.weight)
                inside = channel % (4 // groups)
                weight.reshape(6, -1, cells)[:, inside, cell] = layer.weight.reshape(6, -1, cells)[:, inside, cell]
                alone = torch.zeros_like(x)
                alone.select(axis, channel).copy_(x.select(axis, channel))
                product = outputs(weight, alone)
                for sign in (1, -1):
                    share = (sign * product).clamp_min(0) / positive[sign].clamp_min(1e-30)
                    largest[channel] = max(largest[channel], share.max())
                    mean[channel] = max(mean[channel], share.mean(1).max())
    assert torch.allclose(shares.of_inputs(shares.largest), largest, atol=1e-5)
    assert torch.allclose(shares.of_inputs(shares.largest_mean), mean, atol=1e-5)


def test_a_group_is_worth_its_largest_share_in_any_reader() -> None:
    layers = {"a": nn.Linear(3, 1), "b": nn.Linear(6, 1)}
    members = (
        Member("a", layers["a"], "in", torch.arange(3), torch.arange(3)),
        Member("b", layers["b"], "in", torch.arange(6), torch.arange(6) // 2),
    )
    group = ChannelGroup("g", 3, 1, members, ())
    shares = {"a": torch.tensor([0.5, 0.1, 0.0]), "b": torch.tensor([0.2, 0.3, 0.05, 0.2, 0.1, 0.0])}
    other = {name: values / 2 for name, values in shares.items()}
    stats = Contributions(shares, other)
    assert Pfp().scores(group, stats).tolist() == pytest.approx([0.5, 0.2, 0.1])
    assert Sipp().scores(group, stats).tolist() == pytest.approx([0.25, 0.1, 0.05])
    with pytest.raises(UnsupportedLayer, match="none reads 'g'"):
        Pfp().scores(group, Contributions({}, {}))


def _kept(eps: float, scores: np.ndarray) -> int:
    total = scores.sum()
    samples = math.ceil(3 * (6 + 2 * eps) * total * 2 * 3 * math.log(16 / 1e-16) / eps**2)
    return math.ceil(float(sum(1 - (1 - p / total) ** samples for p in scores)) - 1e-9)


def test_the_damage_of_a_width_is_the_least_error_that_keeps_no_more() -> None:
    scores = np.array([0.9, 0.5, 0.4, 0.1, 0.05])
    damages = Pfp().damages(scores)
    assert damages[0] == 0.0
    assert damages[-1] == damages[-2]
    assert (np.diff(damages) >= 0).all()
    for removed in range(1, 5):
        assert _kept(damages[removed] * 1.001, scores) <= 5 - removed
        assert _kept(damages[removed] * 0.98, scores) > 5 - removed


def test_channels_without_a_share_go_for_nothing() -> None:
    damages = Pfp().damages(np.array([0.0, 0.0, 0.5, 0.5]))
    assert damages[:3].tolist() == [0.0, 0.0, 0.0]
    assert damages[3] > 0
    assert not Pfp().damages(np.zeros(3)).any()
    assert not Pfp().damages(np.ones(1)).any()


def test_flat_profiles_are_dearer_to_narrow_than_concentrated_ones() -> None:
    flat, concentrated = np.full(8, 0.5), np.array([0.9, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01])
    assert Pfp().damages(flat)[5] > Pfp().damages(concentrated)[5]


def test_shares_of_a_network_are_in_range_and_labels_are_not_looked_at() -> None:
    module = nets.build("residual")
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    batches = [(nets.images(4), None), (nets.images(4) + 0.1, None)]
    found = collect_contributions(module, groups.values(), batches)
    assert set(found.largest) == {reader.layer for group in groups.values() for reader in group.readers}
    for name, largest in found.largest.items():
        assert ((largest >= 0) & (largest <= 1)).all()
        assert (found.mean[name] <= largest + 1e-6).all()
        assert float(largest.max()) > 0
