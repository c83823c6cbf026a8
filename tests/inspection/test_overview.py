"""What `compress inspect` finds of a file, a pipeline, a callable and a library's network."""

import json
from pathlib import Path

import nets
import onnx
import pytest
import smallrun
import torch
from exported import exported
from torch import nn

from compress.allocation.widths import Limits
from compress.cost.macs import count_macs, count_params
from compress.errors import ArtifactError, ConfigValueError, ModelError
from compress.inspection.least_latency import measure_least_latency, narrowed
from compress.inspection.overview import Overview, inspect_target
from compress.inspection.potential import Potential, find_potential
from compress.inspection.targets import Network, own_input_shape, spec_of, vary_weights
from compress.model.artifacts import FactorySpec
from compress.networks.wiring import signature_of
from compress.progress import SilentProgress
from compress.pruning.blocks import find_removable_blocks
from compress.pruning.trial import masked_copy
from compress.verification.measurement import Conditions

CHAIN_MACS, CHAIN_PARAMS = (
    count(nets.build("chain")) for count in (lambda m: count_macs(m, nets.EXAMPLE), count_params)
)
FIRST, SECOND, THIRD, HEAD = 8 * 27 * 256, 16 * 72 * 64, 16 * 144 * 64, 64


def rows(overview: Overview, title: str, with_layers: bool = False) -> list[list[str]]:
    """Return the rows of one table, after checking that each has a cell for every column."""
    (found,) = [table for table in overview.tables(with_layers) if table[0] == title]
    assert all(len(row) == len(found[1]) for row in found[2])
    return [list(row) for row in found[2]]


def potential(module: nn.Module, limits: Limits | None = None) -> Potential:
    return find_potential(module, nets.EXAMPLE, limits or Limits(), SilentProgress())[0]


def timed_briefly(module: nn.Module) -> Network:
    signature = signature_of(module, FactorySpec("factory", "nets:any"), nets.EXAMPLE)
    return Network(module, nets.EXAMPLE, signature, Limits(), Conditions(repeats=2, warmup=1))


def test_an_onnx_file() -> None:
    overview = inspect_target(str(exported("chain")))
    figures = dict(rows(overview, "chain.onnx"))
    assert figures["MACs"] == f"{CHAIN_MACS:,}"
    assert int(figures["nodes"]) == len(onnx.load(exported("chain")).graph.node)
    titles = [title for title, _, _ in overview.tables()]
    assert titles == ["chain.onnx", "network", "channel groups", "channel groups that are not prunable"]
    assert len(rows(overview, "channel groups")) == 3
    nodes = rows(overview, "nodes", with_layers=True)
    assert [row[1] for row in nodes if row[5] != "0"] == ["Conv", "Conv", "Conv", "Gemm"]
    assert sum(int(row[5].replace(",", "")) for row in nodes) == CHAIN_MACS
    assert nodes[0][2].endswith("3 x 16 x 16")


def test_a_callable_in_a_file_and_in_a_module() -> None:
    for target in (f"{smallrun.NETS}:chain", "nets:chain"):
        overview = inspect_target(target, (3, 16, 16))
        figures = dict(rows(overview, "network"))
        assert figures["MACs"] == f"{CHAIN_MACS:,}"
        assert figures["params"] == f"{CHAIN_PARAMS:,}"
        assert figures["input"] == "1 x 3 x 16 x 16"
        assert figures["prunable channel groups"] == "3 of 4"
        assert figures["residual blocks that can be removed"] == "0"
        assert "multiple_of 8" in figures["limits"]
    titles = ["network", "channel groups", "channel groups that are not prunable"]
    assert [title for title, _, _ in overview.tables()] == titles
    layers = rows(overview, "layers", with_layers=True)
    assert [row[:2] for row in layers] == [
        ["body.0.0", "Conv2d"], ["body.1.0", "Conv2d"], ["body.2.0", "Conv2d"], ["head", "Linear"]
    ]  # fmt: skip
    assert sum(int(row[2].replace(",", "")) for row in layers) == CHAIN_MACS
    assert sum(float(row[3].rstrip("%")) for row in layers) == pytest.approx(100, abs=0.5)
    (uncut,) = rows(overview, "channel groups that are not prunable")
    assert uncut == ["head", f"{HEAD / CHAIN_MACS:.1%}", "its channels are the network's outputs"]


def test_what_hangs_on_a_group_and_what_is_left_at_the_least_widths() -> None:
    found = potential(nets.build("chain"), Limits(max_removed_ratio=0.75))
    first = found.groups[0]
    assert (first.name, first.width, first.least_width, first.producers) == ("body.0.0", 8, 2, ("body.0.0",))
    assert first.macs_share == pytest.approx((FIRST + SECOND) / CHAIN_MACS)
    assert first.saved_share == pytest.approx(0.75 * (FIRST + SECOND) / CHAIN_MACS)
    least = FIRST / 4 + SECOND / 16 + THIRD / 16 + HEAD / 4
    assert found.least_share == pytest.approx(least / CHAIN_MACS)
    assert (found.fixed_share, found.fixed_layers) == (0.0, ())
    assert found.least_share_without_blocks == found.least_share  # there are none


def test_residual_blocks_are_worth_the_macs_inside_them() -> None:
    module = nets.build("residual")
    found = potential(module)
    assert tuple(block.name for block in found.blocks) == find_removable_blocks(module, nets.EXAMPLE)
    total, inner = count_macs(module, nets.EXAMPLE), 2 * 16 * 144 * 256
    assert [block.macs_share for block in found.blocks] == [pytest.approx(inner / total)] * 2
    outside = 2 * 27 * 256 + 2 * 4  # two of sixteen channels are left of the first layer and of what the head reads
    assert found.least_share_without_blocks == pytest.approx(outside / total)
    assert found.least_share > found.least_share_without_blocks


def test_layers_that_no_group_narrows_are_fixed_cost() -> None:
    class Tied(nn.Module):
        """Three layers that one weight belongs to, between two of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.again, self.twin, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.twin.weight = self.third.weight = self.again.weight
            self.own, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.own(self.third(self.twin(self.again(x)))).mean((2, 3)))

    found = potential(Tied())
    tied, own = 3 * 27 * 256, 8 * 27 * 256
    assert found.fixed_layers == ("again", "twin", "third")
    assert found.fixed_share == pytest.approx(3 * tied / (3 * tied + own + 32))
    said = dict(rows(Overview("tied", found), "network"))["MACs that no cut of channels touches"]
    assert said.endswith("again, twin, third")
    assert {item.name for item in found.uncut} == {"again", "head"}


def test_the_least_latency_is_that_of_the_narrowest_network() -> None:
    module = nets.build("residual")
    network = timed_briefly(module)
    found, groups = find_potential(module, nets.EXAMPLE, network.limits, SilentProgress())
    slim = narrowed(module, groups, found.least_widths, nets.EXAMPLE)
    assert count_macs(slim, nets.EXAMPLE) / found.macs == pytest.approx(found.least_share)
    latency = measure_least_latency(network, found, groups, SilentProgress())
    assert latency.narrowest is not None
    assert latency.without_blocks is not None
    assert latency.narrowest.share > 0
    assert latency.narrowest.low <= latency.narrowest.share <= latency.narrowest.high
    told = dict(rows(Overview("residual", found, latency), "network"))
    assert f"{latency.narrowest.share:.1%}" in told["least latency, by channels"]
    assert f"{latency.without_blocks.latency_ms:.3g} ms" in told["least latency, blocks removed, too"]


def test_a_network_of_which_nothing_can_be_cut_is_timed_alone() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    network = timed_briefly(module)
    found, groups = find_potential(module, nets.EXAMPLE, network.limits, SilentProgress())
    latency = measure_least_latency(network, found, groups, SilentProgress())
    assert latency.whole_ms > 0
    assert (latency.narrowest, latency.without_blocks) == (None, None)


def test_a_network_of_a_library_has_an_input_of_its_own() -> None:
    overview = inspect_target("torchvision:squeezenet1_1")
    assert dict(rows(overview, "network"))["input"] == "1 x 3 x 224 x 224"
    assert spec_of("timm:resnet18") == FactorySpec("timm", "resnet18")
    timm = pytest.importorskip("timm")
    module = timm.create_model("test_resnet")
    assert own_input_shape("timm:test_resnet", module) == tuple(module.pretrained_cfg["input_size"])
    assert own_input_shape("nets:chain", module) is None
    assert own_input_shape("torchvision:r3d_18", module) is None  # how many images a clip has is open


def test_inspection_leaves_the_network_as_it_is() -> None:
    module = nets.build("chain").train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    potential(module)
    assert module.training
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())


class Timid(nn.Module):
    """As built, nothing that its block computes reaches the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.last = nn.Conv2d(8, 8, 1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return (x + self.scale * self.last(torch.relu(self.norm(self.conv(x))))).mean((2, 3))


def test_varied_weights_let_every_channel_count() -> None:
    module = Timid().train()
    _, groups = find_potential(module, nets.EXAMPLE, Limits(), SilentProgress())
    removed = {"conv": tuple(range(4))}
    images = nets.images()

    @torch.no_grad()
    def difference(network: nn.Module) -> float:
        network = network.eval()
        return float((network(images) - masked_copy(network, removed, groups)(images)).abs().max())

    assert difference(module) < 1e-6
    module.train()
    vary_weights(module, nets.EXAMPLE)
    assert module.training
    assert module.norm.momentum == 0.1
    assert difference(module) > 1e-2
    again = Timid()
    again.load_state_dict(Timid().state_dict() | {k: v for k, v in module.state_dict().items() if "conv" in k})
    drawn = torch.random.get_rng_state()
    vary_weights(again, nets.EXAMPLE)
    assert torch.random.get_rng_state().equal(drawn)
    assert again.scale.equal(module.scale)


def test_a_pipeline_file_shows_its_untouched_network(tmp_path: Path) -> None:
    world = smallrun.make_world(tmp_path / "world")
    path = world.write(world.values())
    (world.folder / "chain.safetensors").unlink()  # only images and the factory are needed
    figures = dict(rows(inspect_target(str(path)), "network"))
    assert (figures["MACs"], figures["input"]) == (f"{CHAIN_MACS:,}", "1 x 3 x 16 x 16")
    figures = dict(rows(inspect_target(str(path), None, ["data.preprocessing.crop=[8, 8]"]), "network"))
    assert figures["input"] == "1 x 3 x 8 x 8"
    figures = dict(rows(inspect_target(str(path), None, ["stages.prune.min_width=5"]), "network"))
    assert "min_width 5" in figures["limits"]


def unimportable(folder: Path) -> Path:
    """Return a file with an operator that no network needs."""
    model = onnx.load(exported("chain"))
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Bernoulli"
    onnx.save(model, folder / "odd.onnx")
    return folder / "odd.onnx"


def test_the_command_prints_tables_and_writes_json(tmp_path: Path) -> None:
    done = smallrun.call("inspect", str(exported("chain")))
    assert done.exit_code == 0
    assert f"{CHAIN_MACS:,}" in done.stdout
    done = smallrun.call("inspect", str(unimportable(tmp_path)))
    assert (done.exit_code, "Channel groups could not be found" in done.stderr) == (0, True)
    assert "channel groups" not in done.stdout
    assert smallrun.call("inspect", str(unimportable(tmp_path)), "--latency").exit_code == 3
    file = tmp_path / "chain.json"
    done = smallrun.call("inspect", f"{smallrun.NETS}:chain", "--input", "3,16,16", "--json", str(file))
    assert done.exit_code == 0
    assert "channel groups:" in done.stdout
    values = json.loads(file.read_text("utf-8"))
    assert values["potential"]["macs"] == CHAIN_MACS
    assert [group["name"] for group in values["potential"]["groups"]] == ["body.0.0", "body.1.0", "body.2.0"]
    assert (values["nodes"], values["latency"]) == (None, None)


@pytest.mark.parametrize(
    ("target", "shape", "error", "text"),
    [
        ("nothing", None, ModelError, "torchvision has no network named 'nothing'"),
        ("nets:chain", None, ConfigValueError, "'nets:chain' needs the shape of one image"),
        ("nowhere.onnx", None, ArtifactError, "nowhere.onnx"),
        ("torchvision:resnet81", None, ModelError, "torchvision has no network named 'resnet81'"),
        (f"{smallrun.NETS}:nothing", (3, 16, 16), ModelError, "must have a callable 'nothing', it has none"),
        ("nowhere.py:chain", (3, 16, 16), ModelError, "Factory file 'nowhere.py' does not exist"),
        ("nothing_of_this_name:chain", (3, 16, 16), ModelError, "must import, got ModuleNotFoundError"),
        (f"{smallrun.NETS}:build", (3, 16, 16), ModelError, "must build the network with no arguments"),
        (f"{smallrun.NETS}:chain", (1, 16, 16), ModelError, r"run on images of shape \(1, 1, 16, 16\)"),
        ("timm:resnet81", (3, 16, 16), ModelError, r"timm has no network named 'resnet81'"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_inspected(
    target: str, shape: tuple[int, ...] | None, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        inspect_target(target, shape)


def test_a_file_that_is_no_onnx_model(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match=r"a\.onnx"):
        inspect_target(str(tmp_path / "a.onnx"))
