"""Our channel groups beside torch-pruning's: equal ones are counted, others are listed with a trial of each."""

import json

import nets
import pytest
import smallrun
import torch
import torch_pruning
from torch import Tensor, nn

from compress.inspection.overview import inspect_target
from compress.inspection.second_opinion import RIGHT, _Theirs, find_second_opinion
from compress.progress import SilentProgress
from compress.pruning.graph import ChannelGraph

RESNET = f"{smallrun.ROOT / 'models' / 'cifar_resnet' / 'model.py'}:resnet"


def opinion(module: nn.Module, example: Tensor = nets.EXAMPLE):
    return find_second_opinion(module, example, SilentProgress())


@pytest.mark.parametrize("name", nets.NAMES)
def test_tiny_networks_have_the_same_groups(name):
    module = nets.build(name)
    found = opinion(module)
    assert (found.error, found.differences) == (None, ())
    assert found.ours == found.theirs == found.equal == len(ChannelGraph(module, nets.EXAMPLE).groups) >= 2
    assert found.version.startswith("1.6.")
    assert all(one.grad is None for one in module.parameters())


@pytest.mark.parametrize("name", nets.NAMES)
def test_torch_prunings_own_cut_of_an_equal_group_is_right(name):
    """The trial of its cuts finds no fault where there is none."""
    module = nets.build(name)
    outputs = [part for part, layer in module.named_modules() if isinstance(layer, nn.Linear)][-1:]
    theirs = _Theirs(module, nets.EXAMPLE, outputs)
    assert {theirs.judgement(root) for root in theirs.places} == {RIGHT}


def test_zero_padded_shortcuts_join_streams_in_torch_prunings_graph(tmp_path):
    """ResNet-20: three residual streams are one group there, and its cut fails."""
    done = smallrun.call(
        "inspect", RESNET, "--input", "3,32,32", "--second-opinion", "--json", str(tmp_path / "a.json")
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["second_opinion"]
    assert (found["ours"], found["theirs"], found["equal"], found["error"]) == (12, 10, 9, None)
    kinds = {one["name"]: (one["kind"], one["ours"]) for one in found["differences"]}
    assert kinds == {
        "conv1": ("other members", RIGHT),
        "layer2.0.conv2": ("only ours", RIGHT),
        "layer3.0.conv2": ("only ours", RIGHT),
    }
    joined = next(one for one in found["differences"] if one["name"] == "conv1")
    assert "layer3.2.bn2 out" in joined["only_theirs"]
    assert joined["only_ours"] == []
    assert joined["theirs"].startswith("the cut network does not run (RuntimeError")
    assert "torch-pruning's cut" in done.stdout
    assert "differences" in done.stdout


def test_a_network_as_it_is_written_is_cut_wrongly_too():
    """With the padding itself, torch-pruning's cut of that group runs, and gives other outputs."""
    from compress.checkpoint.rebuild import build_module
    from compress.model.artifacts import FactorySpec

    torch.manual_seed(0)
    module = build_module(FactorySpec("factory", RESNET, {"depth": 8}))
    theirs = _Theirs(module, torch.randn(1, 3, 32, 32), ["linear"])
    assert "differs from the original" in theirs.judgement("conv1")
    assert theirs.judgement("layer1.0.conv1") == RIGHT


class _Normed(nn.Module):
    """A layer norm over the channels of a convolution, whose statistics a cut changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_a_group_that_only_torch_pruning_cuts_has_our_reason():
    (one,) = opinion(_Normed().eval()).differences
    assert (one.kind, one.name, one.only_ours) == ("only torch-pruning's", "first", ())
    assert one.only_theirs == ("first out", "norm out", "head in")
    assert "layer norm's statistics are over its channels" in str(one.ours)
    assert "differs from the original" in str(one.theirs)


def test_a_graph_that_fails_is_one_line(monkeypatch):
    def fail(*_arguments, **_settings):
        raise ZeroDivisionError("integer division\nby zero")

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", fail)
    overview = inspect_target("nets:chain", (3, 16, 16), with_second_opinion=True)
    (table,) = [table for table in overview.tables() if table[0] == "second opinion"]
    rows = dict(table[2])
    assert rows["its graph fails"].startswith("ZeroDivisionError: integer division")
    assert "\n" not in rows["its graph fails"]
    assert rows["channel groups of compress"] == "3"
    assert "channel groups that differ" not in [title for title, _, _ in overview.tables()]


def test_shuffled_channels_end_torch_prunings_graph():
    overview = inspect_target("torchvision:shufflenet_v2_x0_5", (3, 32, 32), with_second_opinion=True)
    assert overview.second_opinion is not None
    assert overview.second_opinion.error == "ZeroDivisionError: integer division or modulo by zero"
    assert overview.second_opinion.ours > 0
