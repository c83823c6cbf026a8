"""Output of `compress inspect`, as tables for people and plain values for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.inspection.least_latency import LeastLatency, TimedShare, measure_least_latency
from compress.inspection.potential import Potential, find_potential
from compress.inspection.second_opinion import SecondOpinion, find_second_opinion
from compress.inspection.targets import Network, open_target
from compress.onnx_file.counting import LayerRow, OnnxCounts, count_onnx, layer_rows
from compress.onnx_file.io import require_valid
from compress.progress import Progress, SilentProgress

Row = Sequence[str]
Table = tuple[str, Sequence[str], Sequence[Row]]
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class Overview:
    """Overview of a network or ONNX file, and of its potential for pruning.

    Attributes:
        target: Name of the target, as given by the user.
        potential: Potential of the network; None for an ONNX file that cannot be imported.
        latency: Least latency that pruning can reach; None if not requested.
        file: Size of the ONNX file; None for other targets.
        nodes: Nodes of the ONNX file.
        second_opinion: Comparison of channel groups with torch-pruning's; None if not requested.
    """

    target: str
    potential: Potential | None = None
    latency: LeastLatency | None = None
    file: OnnxCounts | None = None
    nodes: tuple[LayerRow, ...] = ()
    second_opinion: SecondOpinion | None = None

    def tables(self, with_layers: bool = False) -> list[Table]:
        """Return the overview as tables, with a table of all layers if `with_layers`."""
        tables: list[Table] = []
        if self.file is not None:
            tables.append(_file_table(Path(self.target).name, self.file))
        if self.potential is not None:
            tables += _potential_tables(self.potential, self.latency)
        if self.second_opinion is not None:
            tables += _opinion_tables(self.second_opinion)
        if with_layers and self.potential is not None:
            tables.append(_layer_table(self.potential))
        if with_layers and self.file is not None:
            tables.append(_node_table(self.nodes))
        return tables

    def _repr_html_(self) -> str:
        """Return the tables for a notebook."""
        return "".join(_html(*table) for table in self.tables())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; None for parts that were not inspected."""
        values = asdict(self)
        return {**values, "nodes": list(values["nodes"]) if self.file is not None else None}


def inspect_target(
    target: str,
    input_shape: tuple[int, ...] | None = None,
    overrides: Sequence[str] = (),
    with_latency: bool = False,
    progress: Progress | None = None,
    with_second_opinion: bool = False,
) -> Overview:
    """Inspect the potential of a network for pruning.

    Args:
        target: Name of the network, as in `compress.inspection.targets`.
        input_shape: Shape of one image, without the batch axis.
        overrides: Texts "key=value" as for `--set`, for a pipeline file.
        with_latency: Whether the least reachable latency is measured.
        progress: Listener for the progress.
        with_second_opinion: Whether channel groups are compared with those of torch-pruning.

    Raises:
        ConfigValueError: The kind of the target is unknown, or its input shape.
        ArtifactError, ModelError, UntraceableModel: The network cannot be read, built or traced.
        ExportFailed: The network cannot be exported for timing.
        RuntimeUnavailable: The execution provider of the pipeline is not available.
    """
    progress = progress or SilentProgress()
    if Path(target).suffix == ".onnx":
        return _inspect_file(target, input_shape, with_latency, progress, with_second_opinion)
    network = open_target(target, input_shape, overrides)
    return inspect_network(target, network, with_latency, progress, with_second_opinion)


def inspect_network(
    name: str, network: Network, with_latency: bool, progress: Progress, with_second_opinion: bool = False
) -> Overview:
    """Inspect the potential of an open network; arguments as in `inspect_target`."""
    potential, groups = find_potential(network.module, network.example, network.limits, progress)
    latency = measure_least_latency(network, potential, groups, progress) if with_latency else None
    opinion = find_second_opinion(network.module, network.example, progress) if with_second_opinion else None
    return Overview(name, potential, latency, second_opinion=opinion)


def _inspect_file(
    target: str,
    input_shape: tuple[int, ...] | None,
    with_latency: bool,
    progress: Progress,
    with_second_opinion: bool,
) -> Overview:
    """Return the size of an ONNX file and, if it can be imported, the potential of its network."""
    require_valid(Path(target))
    metrics, nodes = count_onnx(Path(target)), tuple(layer_rows(Path(target)))
    try:
        with progress.task("import", 1) as task:
            network = open_target(target, input_shape)
            task.advance()
    except ModelError as error:
        if with_latency or with_second_opinion:
            raise
        progress.warn(f"Channel groups could not be found: {error.message}")
        return Overview(target, file=metrics, nodes=nodes)
    potential, groups = find_potential(network.module, network.example, network.limits, progress)
    latency = measure_least_latency(network, potential, groups, progress) if with_latency else None
    opinion = find_second_opinion(network.module, network.example, progress) if with_second_opinion else None
    return Overview(target, potential, latency, metrics, nodes, opinion)


def _potential_tables(potential: Potential, latency: LeastLatency | None) -> list[Table]:
    groups = [
        (g.name, str(g.width), str(g.least_width), str(len(g.producers)), f"{g.macs_share:.1%}", f"{g.saved_share:.1%}")
        for g in potential.groups
    ]
    tables: list[Table] = [
        ("network", ("metric", "value"), [*_metrics(potential), *([] if latency is None else _latency_rows(latency))]),
        ("channel groups",
         ("name", "width", "least width", "layers", "MACs that hang on it", "MACs that go at its least width"), groups),
    ]  # fmt: skip
    if potential.uncut:
        rows = [(item.name, f"{item.macs_share:.1%}", item.reason) for item in potential.uncut]
        tables.append(("channel groups that are not prunable", ("name", "MACs of that layer", "why"), rows))
    if potential.blocks:
        blocks = [(block.name, f"{block.macs_share:.1%}") for block in potential.blocks]
        tables.append(("residual blocks that can be removed", ("name", "MACs"), blocks))
    return tables


def _opinion_tables(opinion: SecondOpinion) -> list[Table]:
    rows: list[Row] = [("torch-pruning", opinion.version)]
    if opinion.error is not None:
        rows.append(("its graph fails", opinion.error))
    rows.append(("channel groups of compress", str(opinion.ours)))
    if opinion.error is None:
        rows += [
            ("channel groups of torch-pruning", str(opinion.theirs)),
            ("equal groups", str(opinion.equal)),
            ("differences", str(len(opinion.differences))),
        ]
    tables: list[Table] = [("second opinion", ("metric", "value"), rows)]
    if opinion.differences:
        found = [
            (one.kind, one.name, _some(one.only_ours), _some(one.only_theirs), one.ours or "–", one.theirs or "–")
            for one in opinion.differences
        ]
        columns = ("difference", "group", "only in ours", "only in torch-pruning's", "our cut", "torch-pruning's cut")
        tables.append(("channel groups that differ", columns, found))
    return tables


def _html(title: str, columns: Sequence[str], rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{', '.join(names[:_NAMES_SHOWN])}{more}" or "–"


def _metrics(potential: Potential) -> list[Row]:
    limits, found = potential.limits, len(potential.groups)
    rows: list[Row] = [
        ("input", _shape((1, *potential.input_shape))),
        ("MACs", f"{potential.macs:,}"),
        ("params", f"{potential.params:,}"),
        ("prunable channel groups", f"{found} of {found + len(potential.uncut)}"),
        ("residual blocks that can be removed", str(len(potential.blocks))),
        ("MACs that no cut of channels touches", _share_of(potential.fixed_share, potential.fixed_layers)),
        ("limits", f"max_removed_ratio {limits.max_removed_ratio}, min_width {limits.min_width}, "
                   f"multiple_of {limits.multiple_of}"),
        ("least MACs, by channels", f"{potential.least_share:.1%}"),
    ]  # fmt: skip
    if potential.blocks:
        rows.append(("least MACs, blocks removed, too", f"{potential.least_share_without_blocks:.1%}"))
    return rows


def _latency_rows(latency: LeastLatency) -> list[Row]:
    rows: list[Row] = [(f"latency ({latency.conditions})", f"{latency.whole_ms:.3g} ms")]
    for name, timed in (
        ("least latency, by channels", latency.narrowest),
        ("least latency, blocks removed, too", latency.without_blocks),
    ):
        if timed is not None:
            rows.append((name, _timed_text(timed)))
    return rows


def _timed_text(timed: TimedShare) -> str:
    return f"{timed.latency_ms:.3g} ms, {timed.share:.1%} ({timed.low:.1%} to {timed.high:.1%})"


def _share_of(share: float, layers: Sequence[str]) -> str:
    if not layers:
        return f"{share:.1%}"
    shown = ", ".join(layers[:_NAMES_SHOWN])
    return f"{share:.1%}: {shown}{f' and {len(layers) - _NAMES_SHOWN} more' if len(layers) > _NAMES_SHOWN else ''}"


def _layer_table(potential: Potential) -> Table:
    total = max(1, potential.macs)
    rows = [(layer.name, layer.kind, f"{layer.macs:,}", f"{layer.macs / total:.1%}") for layer in potential.layers]
    return "layers", ("name", "type", "MACs", "share"), rows


def _file_table(name: str, counts: OnnxCounts) -> Table:
    rows = [
        ("MACs", f"{counts.macs:,}"),
        ("weights", f"{counts.params:,}"),
        ("nodes", f"{counts.nodes:,}"),
        ("bytes of weights", f"{counts.initializer_bytes:,}"),
    ]
    return name, ("metric", "value"), rows


def _node_table(nodes: Sequence[LayerRow]) -> Table:
    rows = [
        (row.name, row.op, _shape(row.input_shape), _shape(row.output_shape), f"{row.weights:,}", f"{row.macs:,}")
        for row in nodes
    ]
    return "nodes", ("name", "operator", "input", "output", "weights", "MACs"), rows


def _shape(shape: tuple[int, ...] | None) -> str:
    return "?" if shape is None else " x ".join(str(size) for size in shape)
