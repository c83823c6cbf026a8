"""What `compress inspect` shows of a file, a pipeline and a callable."""

from pathlib import Path

import nets
import onnx
import pytest
import smallrun
from exported import exported

from compress.cost.macs import count_macs, count_params
from compress.errors import ArtifactError, ConfigValueError, ModelError
from compress.inspection import Table, inspect_target, inspect_torch
from compress.pruning.blocks import find_removable_blocks

CHAIN_MACS, CHAIN_PARAMS = (
    count(nets.build("chain")) for count in (lambda m: count_macs(m, nets.EXAMPLE), count_params)
)


def rows(tables: list[Table], title: str) -> list[list[str]]:
    """Return the rows of one table, after checking that each has a cell for every column."""
    (found,) = [table for table in tables if table[0] == title]
    assert all(len(row) == len(found[1]) for row in found[2])
    return [list(row) for row in found[2]]


def test_an_onnx_file() -> None:
    tables = inspect_target(str(exported("chain")), None)
    assert [title for title, _, _ in tables] == ["chain.onnx", "layers"]
    figures = dict(rows(tables, "chain.onnx"))
    assert figures["MACs"] == f"{CHAIN_MACS:,}"
    assert int(figures["nodes"]) == len(onnx.load(exported("chain")).graph.node)
    layers = rows(tables, "layers")
    assert [row[1] for row in layers if row[5] != "0"] == ["Conv", "Conv", "Conv", "Gemm"]
    assert sum(int(row[5].replace(",", "")) for row in layers) == CHAIN_MACS
    assert layers[0][2].endswith("3 x 16 x 16")


def test_a_callable_in_a_file_and_in_a_module() -> None:
    for target in (f"{smallrun.NETS}:chain", "nets:chain"):
        tables = inspect_target(target, (3, 16, 16))
        assert [title for title, _, _ in tables] == ["network", "layers", "channel groups"]
        figures = dict(rows(tables, "network"))
        assert figures["MACs"] == f"{CHAIN_MACS:,}"
        assert figures["params"] == f"{CHAIN_PARAMS:,}"
        assert figures["input"] == "1 x 3 x 16 x 16"
        assert figures["channel groups that can be cut"] == "3"
        assert figures["residual blocks that can be removed"] == "0"
    layers = rows(tables, "layers")
    assert [row[:2] for row in layers] == [
        ["body.0.0", "Conv2d"], ["body.1.0", "Conv2d"], ["body.2.0", "Conv2d"], ["head", "Linear"]
    ]  # fmt: skip
    assert sum(int(row[2].replace(",", "")) for row in layers) == CHAIN_MACS
    assert sum(float(row[3].rstrip("%")) for row in layers) == pytest.approx(100, abs=0.5)
    groups = rows(tables, "channel groups")
    assert [row[:3] for row in groups] == [
        ["body.0.0", "8", "yes"],
        ["body.1.0", "16", "yes"],
        ["body.2.0", "16", "yes"],
        ["head", "", "no: its channels are the network's outputs"],
    ]
    # half of the first group: half of the first convolution and half of the second one
    first = 8 * 27 * 256 / 2 + 16 * 72 * 64 / 2
    assert groups[0][3] == f"{first / CHAIN_MACS:.1%}"


def test_residual_blocks_are_named() -> None:
    module = nets.build("residual")
    figures = dict(rows(inspect_torch(module, nets.EXAMPLE), "network"))
    assert figures["residual blocks that can be removed"] == "2: body.1, body.2"
    assert find_removable_blocks(module, nets.EXAMPLE) == ("body.1", "body.2")


def test_inspection_leaves_the_network_as_it_is() -> None:
    module = nets.build("chain").train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    inspect_torch(module, nets.EXAMPLE)
    assert module.training
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())


def test_a_pipeline_file_shows_its_untouched_network(tmp_path: Path) -> None:
    world = smallrun.make_world(tmp_path / "world")
    path = world.write(world.values())
    (world.folder / "chain.safetensors").unlink()  # only images and the factory are needed
    figures = dict(rows(inspect_target(str(path), None), "network"))
    assert (figures["MACs"], figures["input"]) == (f"{CHAIN_MACS:,}", "1 x 3 x 16 x 16")
    figures = dict(rows(inspect_target(str(path), None, ["data.preprocessing.crop=[8, 8]"]), "network"))
    assert figures["input"] == "1 x 3 x 8 x 8"


def test_the_command_prints_the_tables() -> None:
    done = smallrun.call("inspect", str(exported("chain")))
    assert done.exit_code == 0
    assert f"{CHAIN_MACS:,}" in done.stdout
    done = smallrun.call("inspect", f"{smallrun.NETS}:chain", "--input-shape", "3,16,16")
    assert done.exit_code == 0
    assert "channel groups:" in done.stdout


@pytest.mark.parametrize(
    ("target", "shape", "error", "text"),
    [
        ("nothing", None, ConfigValueError, r"inspect takes an \.onnx file, .*, got 'nothing'"),
        ("nets:chain", None, ConfigValueError, "'nets:chain' needs the shape of one image"),
        ("nowhere.onnx", None, ArtifactError, "nowhere.onnx"),
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
        inspect_target(str(tmp_path / "a.onnx"), None)
