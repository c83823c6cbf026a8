"""The predicted cost of a cut equals a count on the cut network, exactly, in both units."""

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.cost.macs import count_macs, count_params
from compress.pruning.surgery import cut_copy
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import build_cost

COUNTS = {"macs": count_macs, "params": lambda module, _example: count_params(module)}


class _Mix(nn.Module):
    """Depthwise layers, a concatenation (once of a tensor with itself), PReLU, and a flattened linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.point, self.other = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 6, 1, bias=False)
        self.norm, self.one, self.each = nn.BatchNorm2d(18), nn.PReLU(), nn.PReLU(18)
        self.paired = nn.Conv2d(36, 10, 3, 2, 1)
        self.fc, self.head = nn.Linear(10 * 16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.one(self.bn(self.stem(x))))
        x = self.each(self.norm(torch.cat([self.point(x), self.other(x)], 1)))
        x = F.relu(self.paired(torch.cat([x, x], 1)))
        return self.head(F.relu(self.fc(torch.flatten(x, 1))))


def _network(name: str) -> nn.Module:
    return _Mix().eval() if name == "mix" else nets.build(name)


def _some(groups, generator: torch.Generator) -> dict[str, tuple[int, ...]]:
    """Return a random removal of some groups."""
    removed = {}
    for name, group in groups.items():
        units = group.width // group.parts
        count = int(torch.randint(0, units, (1,), generator=generator))
        if count:
            removed[name] = group.expand(torch.randperm(units, generator=generator)[:count].tolist())
    return removed


@pytest.mark.parametrize("name", [*nets.NAMES, "mix"])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_prediction_equals_a_count_on_the_cut_network(name, unit):
    module = _network(name)
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    cost = build_cost(module, nets.EXAMPLE, groups, unit)
    count = COUNTS[unit]
    assert cost.full == pytest.approx(count(module, nets.EXAMPLE), abs=1e-6)
    generator = torch.Generator().manual_seed(len(name))
    cuts = [removed for removed in (_some(groups, generator) for _ in range(4)) if removed]
    assert cuts
    for removed in cuts:
        widths = {group: groups[group].width - len(gone) for group, gone in removed.items()}
        left = count(cut_copy(module, removed, nets.EXAMPLE), nets.EXAMPLE)
        assert cost.at(widths) == pytest.approx(left, abs=1e-6)
        assert left < cost.full


def test_the_mix_has_the_groups_it_is_there_for():
    groups, _ = find_cuttable(_Mix().eval(), nets.EXAMPLE)
    assert list(groups) == ["stem", "point", "other", "paired", "fc"]


@pytest.mark.parametrize("name", ["residual", "mix"])
def test_groups_left_out_keep_their_width(name):
    module = _network(name)
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    first = next(iter(groups))
    some = {first: groups[first]}
    cost = build_cost(module, nets.EXAMPLE, some, "params")
    assert cost.full == count_params(module)
    left = count_params(cut_copy(module, {first: (0, 1, 2)}, nets.EXAMPLE))
    assert cost.at({first: groups[first].width - 3}) == pytest.approx(left)


def test_frozen_parameters_are_counted():
    module = nets.build("residual")
    whole = count_params(module)
    for parameter in module.body[1].parameters():
        parameter.requires_grad_(False)
    module.body[0][1].bias.requires_grad_(False)
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    cost = build_cost(module, nets.EXAMPLE, groups, "params")
    removed = {"body.0.0": (1, 2), "body.1.conv1": (0,), "body.2.conv1": (5, 6, 7)}
    assert cost.full == count_params(module) == whole
    widths = {name: 16 - len(gone) for name, gone in removed.items()}
    assert cost.at(widths) == pytest.approx(count_params(cut_copy(module, removed, nets.EXAMPLE)))


def test_coupled_widths_are_a_product_and_not_a_sum_of_savings():
    module = nets.build("chain")
    cost = build_cost(module, nets.EXAMPLE, find_cuttable(module, nets.EXAMPLE)[0], "macs")
    alone = [cost.full - cost.at({name: 8}) for name in ("body.1.0", "body.2.0")]
    assert cost.full - cost.at({"body.1.0": 8, "body.2.0": 8}) < sum(alone)
