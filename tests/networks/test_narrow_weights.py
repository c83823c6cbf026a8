"""Networks slimmed by other tools: widths are read from a state dict, cut, loaded strictly, and cut again."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.checkpoint.rebuild import apply_edits, build_narrow, rebuild, write_weights
from compress.cost.macs import count_params
from compress.errors import ArtifactError, NonFinite, UnsupportedLayer
from compress.model.artifacts import FactorySpec, Signature, TensorSpec
from compress.model.recipe import Narrow, Recipe, RemoveBlock, RemoveChannels, RemoveUnread
from compress.networks.narrow_weights import load_narrow
from compress.pruning.graph import ChannelGraph
from compress.pruning.narrowing import _Equation, _solve, find_removed, named_tensors
from compress.pruning.surgery import cut_copy, kept_indices
from compress.pruning.trial import find_cuttable
from compress.stages.load import _guessed_norms

SHARED = Path(os.environ.get("COMPRESS_SHARED") or Path(__file__).parents[3] / "shared")
PUBLISHED = SHARED / "data/networks/cifar10_resnet56_group_sl.state_dict.pth"
CIFAR = Path(__file__).parents[2] / "models/cifar_resnet/model.py"
SIGNATURE = Signature((TensorSpec("images", ("batch", 3, 16, 16)),), (TensorSpec("logits", ("batch", 4)),))


class Dense(nn.Module):
    """Two layers that each read everything before them, then norm, convolution and flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(inputs, 8, 3, 1, 1, bias=False) for inputs in (3, 8, 16))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (8, 16, 24))
        self.head = nn.Linear(24 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, (self.one, self.two), strict=False):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.norms[2](x)), 2).flatten(1))


class Split(nn.Module):
    """Halves of one convolution's outputs, of which each goes its own way; the split is written down as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.half = 8
        self.both = nn.Conv2d(3, 16, 3, 1, 1)
        self.left, self.right = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.both(x))
        left, right = x[:, : self.half], x[:, self.half :]
        return self.head(torch.cat([F.relu(self.left(left)), F.relu(self.right(right))], 1).mean((2, 3)))


class Scaled(nn.Module):
    """A parameter of the network's own on the channels, and a frozen output width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 12, 3), nn.GroupNorm(6, 12)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 12).reshape(12, 1, 1))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.gamma * F.relu(self.norm(self.conv(x)))).mean((2, 3)))


OWN = {"dense": Dense, "split": Split, "scaled": Scaled}


def build(name: str = "dense", seed: int = 0) -> nn.Module:
    """Build a network of this file or of `nets`; the factory of the tests."""
    if name not in OWN:
        return nets.build(name, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = OWN[name]()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean, 0.0, 0.3)
    return module.eval()


def spec(name: str) -> FactorySpec:
    return FactorySpec("factory", f"{__file__}:build", {"name": name})


def cut(module: nn.Module, keep: int = 3) -> nn.Module:
    """Return a network without every `keep`-th unit of every group: other positions than `narrow` removes."""
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    removed = {
        name: group.expand(range(number % 2, group.width // group.parts, keep + number % 3))
        for number, (name, group) in enumerate(groups.items())
    }
    return cut_copy(module, removed, nets.EXAMPLE).eval()


def outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(nets.images())
    return found


def narrowed(name: str, slim: nn.Module, folder: Path) -> tuple[nn.Module, Recipe]:
    torch.save(slim.state_dict(), folder / "slim.pth")
    module, recipe, _ = build_narrow(spec(name), folder / "slim.pth", nets.images())
    return module, recipe


@pytest.mark.parametrize("name", [*nets.NAMES, *OWN])
def test_a_narrow_state_dict_loads_and_is_cut_again_and_reloads(name: str, tmp_path: Path) -> None:
    slim = cut(build(name, seed=7))
    module, recipe = narrowed(name, slim, tmp_path)
    assert count_params(module) == count_params(slim) < count_params(build(name))
    assert torch.equal(outputs(module), outputs(slim))
    assert [type(edit) for edit in recipe.edits] == [Narrow]
    assert recipe.is_baseline
    again = cut(module)
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    removed = {name: group.expand(range(number % 2, group.width // group.parts, 3 + number % 3))
               for number, (name, group) in enumerate(groups.items())}  # fmt: skip
    write_weights(again, tmp_path / "again.safetensors")
    whole = Recipe.from_json(recipe.then(RemoveChannels(removed)).to_json())
    assert whole.of_baseline == recipe
    assert whole.after_baseline == Recipe((RemoveChannels(removed),))
    reloaded = rebuild(spec(name), whole, SIGNATURE, tmp_path / "again.safetensors")
    assert torch.equal(outputs(reloaded), outputs(again))


@pytest.mark.parametrize("name", ["residual", "depthwise", "grouped", "concat", "linear_head", "dense"])
def test_networks_cut_by_torch_pruning_load_with_no_difference(name: str, tmp_path: Path) -> None:
    pruning = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    module = build(name, seed=3)
    heads = [part for part in module.modules() if isinstance(part, nn.Linear) and part.out_features == 4]
    pruner = pruning.pruner.MetaPruner(
        module,
        nets.EXAMPLE,
        importance=pruning.importance.MagnitudeImportance(),
        global_pruning=name not in ("grouped", "depthwise"),
        pruning_ratio=0.4,
        ignored_layers=heads,
    )
    pruner.step()
    assert count_params(module) < count_params(build(name))
    loaded, recipe = narrowed(name, module, tmp_path)
    assert recipe.edits
    assert torch.equal(outputs(loaded), outputs(module))


def test_widths_made_by_hand_are_found() -> None:
    module = build("concat")
    state = module.state_dict()
    for name, size in (("body.left.0.weight", 5), ("body.left.1", 5), ("body.right.0.weight", 7), ("body.right.1", 7)):
        for key in [key for key in state if key.startswith(name) and state[key].ndim]:
            state[key] = state[key][:size]
    state["body.join.0.weight"] = state["body.join.0.weight"][:, :12]
    slim, removed, _ = load_narrow(build("concat", seed=1), state, nets.images(), "'slim.pth'")
    assert removed == {"body.left.0": (5, 6, 7), "body.right.0": (7,)}
    assert all(torch.equal(value, state[name]) for name, value in slim.state_dict().items())


def test_a_flattened_map_counts_several_indices_for_a_channel() -> None:
    module = build("linear_head")
    graph = ChannelGraph(module, nets.EXAMPLE)
    (axis,) = [axis for axis in graph.parameter_axes() if axis.tensor is module.fc1.weight and axis.dim == 1]
    assert axis.lost == {"features.0.0": 16}
    kept = {id(tensor): by_dim for tensor, by_dim in kept_indices(graph, {"features.0.0": (7,)})}
    assert torch.equal(kept[id(module.fc1.weight)][1], torch.arange(112))


def test_a_state_dict_of_full_width_cuts_nothing(tmp_path: Path) -> None:
    module, recipe = narrowed("chain", build("chain", seed=2), tmp_path)
    assert recipe == Recipe()
    assert torch.equal(outputs(module), outputs(build("chain", seed=2)))


def _with(state: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    changed = {key: tensor for key, tensor in state.items() if key != name}
    return changed if value is None else {**changed, name: value}


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("head.weight", torch.ones(3, 16),
         r"narrower at prunable channels alone; head.weight is \(3, 16\) in the file and \(4, 16\) in the network: its "
         "channels are the network's outputs"),
        ("body.1.0.weight", torch.ones(20, 8, 3, 3),
         r"nowhere wider.*body.1.0.weight is \(20, 8, 3, 3\) in the file and \(16, 8, 3, 3\)"),
        ("body.1.0.weight", torch.ones(16, 8), r"axes of the network's; .*\(16, 8\) in the file and \(16, 8, 3, 3\)"),
        ("body.1.0.weight", torch.ones(9, 8, 3, 3),
         r"some set of widths; (body.1.*; )?body.1.0.weight is \(9, 8, 3, 3\) in the file and \(16, 8, 3, 3\)"),
        ("body.1.0.weight", torch.ones(16, 8, 1, 1),
         r"kernels of the network's size; body.1.0.weight is \(16, 8, 1, 1\)"),
        ("body.1.0.weight", torch.ones(0, 8, 3, 3), r"some set of widths; body.1"),
        ("body.1.0.weight", None, r"missing: body.1.0.weight"),
        ("extra", torch.ones(1), r"unexpected: extra"),
    ],
)  # fmt: skip
def test_state_dicts_that_fit_no_widths_are_refused(name: str, value: Tensor | None, match: str) -> None:
    module = build("chain")
    with pytest.raises(ArtifactError, match=match) as caught:
        load_narrow(module, _with(module.state_dict(), name, value), nets.images(), "'slim.pth'")
    assert caught.value.exit_code == 4
    assert caught.value.hint


def test_layers_that_contradict_each_other_are_both_named() -> None:
    slim = cut(build("residual"))
    state = slim.state_dict()
    name = "body.2.conv2.weight"
    state[name] = torch.cat([state[name], state[name][:1]])
    shape, full = tuple(state[name].shape), (16, 16, 3, 3)
    match = re.escape(f"{name} is {shape} in the file and {full} in the network")
    with pytest.raises(ArtifactError, match=f"{match}; |; {match}"):
        load_narrow(build("residual"), state, nets.images(), "'slim.pth'")


def test_a_part_of_a_unit_is_refused() -> None:
    state = build("linear_head").state_dict()
    state["fc1.weight"] = state["fc1.weight"][:, :120]  # 7.5 channels of 16 places
    with pytest.raises(ArtifactError, match=r"some set of widths; fc1.weight is \(24, 120\)"):
        load_narrow(build("linear_head"), state, nets.images(), "'slim.pth'")


def test_widths_that_only_a_sum_tells_are_refused() -> None:
    graph, tensors = _graph_of(build("concat"))
    with pytest.raises(
        ArtifactError, match=r"body.left.0, body.right.0 its .*, such as: body.join.0.weight is \(16, 13"
    ):
        find_removed(graph, tensors, {"body.join.0.weight": (16, 13, 3, 3)}, "'slim.pth'")


def test_widths_are_solved_where_no_shape_tells_one_alone() -> None:
    """Three sums of two groups each: a + b = 3, b + c = 4, a + c = 5."""
    lost = _solve(
        [
            _Equation(name, (8,), (8 - lacking,), lacking, dict.fromkeys(name.split("+"), 1.0))
            for name, lacking in (("a+b", 3), ("b+c", 4), ("a+c", 5))
        ],
        dict.fromkeys("abc", 8),
        "x",
    )
    assert lost == {"a": 2, "b": 1, "c": 3}


def test_nan_is_refused() -> None:
    slim = cut(build("chain"))
    slim.head.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFinite, match=r"NaN or infinity in head.weight"):
        load_narrow(build("chain"), slim.state_dict(), nets.images(), "'slim.pth'")


class Counting(nn.Module):
    """Code that computes something else at every width but its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head((x if x.shape[1] == 16 else 2 * x).mean((2, 3)))


def test_a_network_that_computes_something_else_at_other_widths_is_refused() -> None:
    torch.manual_seed(0)
    module = Counting().eval()
    slim = cut_copy(module, {"conv": (3, 9)}, nets.EXAMPLE)
    with pytest.raises(UnsupportedLayer, match=r"compute the same at the widths of 'slim.pth'.*differs.*conv"):
        load_narrow(copy.deepcopy(module), slim.state_dict(), nets.images(), "'slim.pth'")


def test_group_norms_whose_groups_no_tensor_tells_are_named(tmp_path: Path) -> None:
    module, _ = narrowed("scaled", cut_copy(build("scaled"), {"conv": (1, 3, 7, 9)}, nets.EXAMPLE), tmp_path)
    assert _guessed_norms(build("scaled"), module) == ["norm is taken to have 4 of 6"]
    assert not _guessed_norms(module, module)


def test_the_edit_goes_through_json_and_is_replayed() -> None:
    recipe = Recipe((RemoveUnread(("aux",)), Narrow({"body.0.0": (6, 7)}), RemoveBlock("a")))
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.of_baseline == Recipe(recipe.edits[:2])
    assert recipe.after_baseline == Recipe(recipe.edits[2:])
    assert Narrow({"a": (1,)}) != RemoveChannels({"a": (1,)})
    slim = apply_edits(build("chain"), Recipe((Narrow({"body.0.0": (6, 7)}),)), nets.EXAMPLE)
    assert slim.body[0][0].out_channels == 6


def test_shortcuts_padded_with_zeros_are_narrowed_inside_their_blocks(tmp_path: Path) -> None:
    resnet = FactorySpec("factory", f"{CIFAR}:resnet", {"depth": 8})
    from compress.checkpoint.rebuild import build_module

    full, images = build_module(resnet), torch.randn(2, 3, 32, 32)
    graph = ChannelGraph(full, images[:1])
    inner = {name: (0, 3) for name in graph.groups if name.endswith("conv1") and name != "conv1"}
    slim = cut_copy(full, inner, images[:1]).eval()
    torch.save(slim.state_dict(), tmp_path / "slim.pth")
    module, recipe, _ = build_narrow(resnet, tmp_path / "slim.pth", images)
    assert {name: len(gone) for name, gone in recipe.edits[0].removed.items()} == dict.fromkeys(inner, 2)
    with torch.no_grad():
        assert torch.allclose(module(images), slim(images), atol=1e-6)


def test_own_weights_with_shortcuts_written_out_are_refused_by_name() -> None:
    state = build().state_dict() | {"layer2.0.fixed_shortcut.compress_fixed_weight": torch.zeros(4, 2, 1, 1)}
    with pytest.raises(ArtifactError, match=r"zero-padded shortcuts as convolutions(.|\n)*Hint: `compress\.load"):
        load_narrow(build(), state, nets.EXAMPLE, "'slim.pth'")


def test_the_published_slim_resnet56_loads_with_no_difference() -> None:
    if not PUBLISHED.is_file():
        pytest.skip("the published network is not in ../shared")
    factory = FactorySpec("factory", f"{CIFAR}:projected_resnet", {"depth": 56})
    module, recipe, conversions = build_narrow(factory, PUBLISHED, torch.randn(2, 3, 32, 32))
    state = torch.load(PUBLISHED, weights_only=True)
    assert set(state) == set(module.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert count_params(module) == 294_225
    assert not conversions
    assert [type(edit) for edit in recipe.edits] == [Narrow]
    widths = [len(state[f"layer{layer}.{block}.conv1.weight"]) for layer in (1, 2, 3) for block in range(9)]
    assert widths[:9] == [9, 5, 7, 9, 6, 12, 4, 11, 7]


def _graph_of(module: nn.Module) -> tuple[ChannelGraph, dict[str, Any]]:
    return ChannelGraph(module, nets.EXAMPLE), named_tensors(module)


def test_names_without_a_shape_are_passed_over() -> None:
    graph, tensors = _graph_of(build("chain"))
    assert find_removed(graph, tensors, {"body.0.0.weight": (6, 3, 3, 3)}, "x") == {"body.0.0": (6, 7)}
