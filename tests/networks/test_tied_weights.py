"""Parameters that several layers share: cut alike, counted once, shared still after reloading, never refitted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.checkpoint.rebuild import load_strict, rebuild, write_weights
from compress.cost.macs import count_macs, count_params
from compress.errors import ArtifactError
from compress.model.artifacts import FactorySpec, Signature, TensorSpec
from compress.model.recipe import Recipe, RemoveChannels
from compress.model.tensors import find_shared
from compress.pruning.surgery import cut_copy
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import build_cost

EXAMPLE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """Two convolutions of the same width, which share what is asked for.

    Args:
        shared: "weight", "bias", "norm" (scale and shift), "transposed", "functional", "names", or "half" (the weight
            of a convolution whose twin reads channels that cannot go).
    """

    def __init__(self, shared: str = "weight") -> None:
        super().__init__()
        self.shared = shared
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.na, self.nb, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 4)
        if shared in ("weight", "half"):
            self.b.weight = self.a.weight
        elif shared == "bias":
            self.b.bias = self.a.bias
        elif shared == "norm":
            self.nb.weight, self.nb.bias = self.na.weight, self.na.bias
        elif shared == "names":
            self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.na(self.a(F.relu(self.stem(x)))))
        if self.shared == "transposed":
            y = F.relu(F.conv_transpose2d(y, self.a.weight, padding=1))
        elif self.shared == "functional":
            y = F.relu(F.conv2d(y, self.a.weight, padding=1))
        y = y + self.b(x.repeat(1, 3, 1, 1)[:, :8]) if self.shared == "half" else self.nb(self.b(y))
        return self.head(y.mean((2, 3)))


def make_tied(shared: str = "weight") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = Tied(shared)
        for norm in (module.na, module.nb):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean)
    return module.eval()


def _parts_that_share(module: nn.Module) -> int:
    """Return how many names a network has for its parameters beyond the first of each."""
    return len(list(module.named_parameters(remove_duplicate=False))) - len(list(module.parameters()))


@pytest.mark.parametrize("shared", ["weight", "bias", "norm", "transposed", "functional", "names"])
def test_layers_that_share_are_cut_alike_and_counted_once(shared: str) -> None:
    module = make_tied(shared)
    groups, _ = find_cuttable(module, EXAMPLE)
    assert groups
    removed = {name: group.expand([0, 2]) for name, group in groups.items()}
    slim = cut_copy(module, removed, EXAMPLE)
    widths = {name: groups[name].width - len(gone) for name, gone in removed.items()}
    for unit, count in (("macs", count_macs(slim, EXAMPLE)), ("params", count_params(slim))):
        assert build_cost(module, EXAMPLE, groups, unit).at(widths) == pytest.approx(count)
    assert _parts_that_share(slim) == _parts_that_share(module)
    assert count_params(slim) == sum(one.numel() for one in {id(p): p for p in slim.parameters()}.values())


def test_tied_weights_join_the_inputs_and_outputs_of_both_layers() -> None:
    groups, _ = find_cuttable(make_tied("weight"), EXAMPLE)
    (group,) = groups.values()  # stem -> a and a -> b: the same filters and the same channels read
    assert {member.layer for member in group.producers} == {"stem", "a", "b"}
    assert {reader.layer for reader in group.readers} == {"a", "b", "head"}


def test_each_twin_is_silenced_at_the_norm_behind_itself() -> None:
    groups, _ = find_cuttable(make_tied("weight"), EXAMPLE)
    (group,) = groups.values()
    gates = dict(zip([one.layer for one in group.producers], [gate.layer for gate in group.gates], strict=True))
    assert gates == {"stem": "stem", "a": "na", "b": "nb"}


def test_what_one_twin_cannot_lose_the_other_keeps() -> None:
    groups, excluded = find_cuttable(make_tied("half"), EXAMPLE)
    assert list(groups) == ["a"]  # what b reads are channels of the image, and a reads with the same weight
    assert not any(reader.layer in ("a", "b") for reader in groups["a"].readers)
    assert [(item.name, bool(item.reason)) for item in excluded if not item.expected] == [("stem", True)]


def test_weights_are_still_shared_after_replaying_a_recipe(tmp_path) -> None:
    module = make_tied()
    slim = cut_copy(module, {"stem": (0, 3, 5)}, EXAMPLE)
    write_weights(slim, tmp_path / "slim.safetensors")
    spec = FactorySpec("python", f"{__name__}:make_tied", {})
    signature = Signature((TensorSpec("images", (1, 3, 8, 8), "float32"),), (TensorSpec("y", (1, 4), "float32"),))
    recipe = Recipe((RemoveChannels({"stem": (0, 3, 5)}),))
    again = rebuild(spec, recipe, signature, tmp_path / "slim.safetensors", make=make_tied)
    assert again.a.weight is again.b.weight
    assert torch.equal(again(EXAMPLE), slim(EXAMPLE))


def test_find_shared_names_the_other_owner_and_knows_modules_of_two_names() -> None:
    assert find_shared(make_tied("weight")) == {"a": "b.weight", "b": "a.weight"}
    assert find_shared(make_tied("bias")) == {"a": "b.bias", "b": "a.bias"}
    assert find_shared(make_tied("norm")) == {"na": "nb.weight", "nb": "na.weight"}
    assert find_shared(make_tied("names")) == {}
    assert find_shared(make_tied("functional")) == {}
    rooted = nn.Module()
    rooted.kernel = nn.Parameter(torch.zeros(2, 2))
    rooted.fc = nn.Linear(2, 2)
    rooted.fc.weight = rooted.kernel
    assert find_shared(rooted) == {"": "fc.weight", "fc": "kernel"}


def test_a_copy_keeps_what_is_shared() -> None:
    twin = copy.deepcopy(make_tied())
    assert twin.a.weight is twin.b.weight


def test_a_file_with_two_values_for_one_parameter_is_refused() -> None:
    state = make_tied("functional").state_dict()  # the same names, not tied
    with pytest.raises(ArtifactError, match=r"two values for one parameter .* share: a\.weight and b\.weight"):
        load_strict(make_tied(), state, "'w.pt'")
    state["b.weight"] = state["a.weight"].clone()
    tied = make_tied()
    load_strict(tied, state, "'w.pt'")
    assert torch.equal(tied.b.weight, state["a.weight"])
