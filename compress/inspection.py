"""What is in a network before anything is done to it? Used by `compress inspect`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.artifacts import FactorySpec
from compress.building import build_module
from compress.config.load import load_pipeline
from compress.config.schema import LoadConfig
from compress.cost.macs import count_macs, count_params, layer_macs
from compress.cost.onnx_graph import count_onnx, layer_rows
from compress.data.batches import evaluation_batches
from compress.data.opening import Splits
from compress.errors import ConfigValueError
from compress.pruning.blocks import find_removable_blocks
from compress.pruning.costs import build_cost
from compress.pruning.graph import ChannelGroup, Exclusion, find_cuttable
from compress.stages.load import factory_spec
from compress.tasks.opening import open_task

Row = Sequence[str]
Table = tuple[str, Sequence[str], Sequence[Row]]


def inspect_target(target: str, input_shape: tuple[int, ...] | None, overrides: Sequence[str] = ()) -> list[Table]:
    """Return tables that describe a network.

    Args:
        target: An .onnx file, a pipeline file, or "file.py:callable" or "pkg.module:callable".
        input_shape: Of one image without the batch axis; needed for a callable only.
        overrides: As `--set`, for a pipeline file.

    Raises:
        ConfigValueError: The target is none of these, or its input shape is not given.
        ArtifactError, ModelError, UntraceableModel: The network cannot be read, built or traced.
    """
    suffix = Path(target).suffix
    if suffix == ".onnx":
        return inspect_onnx(Path(target))
    if suffix in (".yaml", ".yml"):
        config = load_pipeline(Path(target), overrides).config
        load = config.stages[0]
        assert isinstance(load, LoadConfig)
        splits = Splits(config.data, open_task(config.task))
        images, _ = next(evaluation_batches(splits.evaluation.first(1), 1, "nothing"))
        return inspect_torch(build_module(factory_spec(load.model)), torch.zeros_like(images))
    if ":" not in target:
        raise ConfigValueError(
            f"inspect takes an .onnx file, a pipeline file or 'file.py:callable', got '{target}'.",
        )
    if input_shape is None:
        raise ConfigValueError(f"'{target}' needs the shape of one image.", hint="Add --input-shape 3,224,224.")
    return inspect_torch(build_module(FactorySpec("factory", target)), torch.zeros([1, *input_shape]))


def inspect_onnx(path: Path) -> list[Table]:
    """Return the figures and layers of an ONNX file."""
    counts = count_onnx(path)
    layers = [
        (row.name, row.op, _shape(row.input_shape), _shape(row.output_shape), f"{row.weights:,}", f"{row.macs:,}")
        for row in layer_rows(path)
    ]
    summary = [
        ("MACs", f"{counts.macs:,}"),
        ("weights", f"{counts.params:,}"),
        ("nodes", f"{counts.nodes:,}"),
        ("bytes of weights", f"{counts.initializer_bytes:,}"),
    ]
    return [
        (path.name, ("figure", "value"), summary),
        ("layers", ("name", "operator", "input", "output", "weights", "MACs"), layers),
    ]


def inspect_torch(module: nn.Module, example: Tensor) -> list[Table]:
    """Return figures, layers, channel groups and removable blocks of a torch network."""
    groups, excluded = find_cuttable(module, example)
    macs = layer_macs(module, example)
    total = sum(macs.values())
    blocks = find_removable_blocks(module, example)
    summary = [
        ("MACs", f"{count_macs(module, example):,}"),
        ("params", f"{count_params(module):,}"),
        ("input", _shape(tuple(example.shape))),
        ("channel groups that can be cut", str(len(groups))),
        ("residual blocks that can be removed", f"{len(blocks)}{': ' if blocks else ''}{', '.join(blocks)}"),
    ]
    layers = [
        (name, type(module.get_submodule(name)).__name__, f"{count:,}", f"{count / max(1, total):.1%}")
        for name, count in macs.items()
    ]
    return [
        ("network", ("figure", "value"), summary),
        ("layers", ("name", "type", "MACs", "share"), layers),
        ("channel groups", ("name", "width", "can be cut", "MACs that go with half of it"),
         _group_rows(module, example, groups, excluded)),
    ]  # fmt: skip


def _group_rows(
    module: nn.Module, example: Tensor, groups: dict[str, ChannelGroup], excluded: list[Exclusion]
) -> list[Row]:
    cost = build_cost(module, example, groups, "macs")
    rows: list[Row] = [
        (name, str(group.width), "yes", f"{1 - cost.at({name: group.width // 2}) / cost.full:.1%}")
        for name, group in groups.items()
    ]
    return rows + [(item.name, "", f"no: {item.reason}", "") for item in excluded]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "?" if shape is None else " x ".join(str(size) for size in shape)
