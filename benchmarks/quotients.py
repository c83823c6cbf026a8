"""Why is a network with half of the MACs not twice as fast? Time of two files, layer by layer.

    python benchmarks/quotients.py runs/resnet20_cifar10 runs/resnet56_cifar10      finished runs, file beside baseline
    ... --threads 4 --repeats 200                                                   other conditions of the measurement
    ... --layers 5                                                                  with the layers that lose most
    ... --write docs/results.md                                                     table between its markers

The latency of the slim file, as a share of the baseline's, is the share of MACs that is left, and four losses:

    cheap MACs     MACs were removed from layers that take less time for a MAC than the average layer
    narrow layers  a narrowed layer takes more time for a MAC than the full layer
    other nodes    nodes without MACs (pooling, reordering of memory, additions that no convolution took in) shrink less
    between nodes  time of a call outside of its nodes

A loss below 0 is a gain. Times are medians: of nodes in profiled calls, of complete calls without profiling. The
baseline runs in turn with each file. Nothing else should run on the machine.
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from made import write_marked

from compress.cli.console import Console
from compress.cost.variants import VariantWriter, site_of
from compress.onnx_file.counting import layer_rows
from compress.onnx_file.io import load_onnx, read_signature, save_onnx
from compress.verification.measurement import Conditions
from compress.verification.profiling import Profile, profile_models
from compress.verification.runtimes.onnxruntime import OnnxRuntime

OTHER = ""  # layer of the nodes without MACs
HEADER = (
    "| network | MACs left | latency left | fewer MACs | faster | quotient | cheap MACs | narrow layers | other nodes "
    "| between nodes |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Timed:
    """Times and MACs of one file.

    Attributes:
        call_ms: Median time of a call without profiling.
        layer_ms: Layer -> median time of its nodes; `OTHER` -> that of all other nodes.
        macs: Layer -> MACs for one image.
        widths: Layer -> (outputs, inputs).
    """

    call_ms: float
    layer_ms: Mapping[str, float]
    macs: Mapping[str, int]
    widths: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Losses:
    """Parts that a latency ratio is made of; they sum up to the ratio.

    Attributes:
        macs_left: MACs of the slim file / MACs of the baseline.
        cheap_macs: Share of the baseline's latency, as all that follow.
        narrow_layers: Layer -> loss.
        other_nodes: Loss of the nodes without MACs.
        between_nodes: Loss outside of nodes.
    """

    macs_left: float
    cheap_macs: float
    narrow_layers: Mapping[str, float]
    other_nodes: float
    between_nodes: float

    @property
    def latency_left(self) -> float:
        """Latency of the slim file / latency of the baseline."""
        narrow = sum(self.narrow_layers.values())
        return self.macs_left + self.cheap_macs + narrow + self.other_nodes + self.between_nodes


def find_losses(baseline: Timed, slim: Timed) -> Losses:
    """Split the ratio of two latencies; a layer that the slim file has no more takes no time.

    >>> before = Timed(11.0, {"a": 6.0, "b": 3.0, "": 1.0}, {"a": 100, "b": 100}, {})
    >>> after = Timed(8.5, {"a": 6.0, "b": 1.0, "": 0.5}, {"a": 100, "b": 20}, {})
    >>> found = find_losses(before, after)
    >>> round(found.latency_left - 8.5 / 11, 9), round(found.narrow_layers["b"] * 11, 9), found.macs_left
    (0.0, 0.4, 0.6)
    """
    left = sum(slim.macs.values()) / sum(baseline.macs.values())
    shares = {layer: slim.macs.get(layer, 0) / macs for layer, macs in baseline.macs.items() if macs}
    before = {layer: baseline.layer_ms.get(layer, 0.0) for layer in shares}
    expected = {layer: before[layer] * share for layer, share in shares.items()}
    narrow = {layer: (slim.layer_ms.get(layer, 0.0) - expected[layer]) / baseline.call_ms for layer in shares}
    rest = [timed.call_ms - sum(timed.layer_ms.values()) for timed in (baseline, slim)]
    others = [sum(time for layer, time in timed.layer_ms.items() if layer not in shares) for timed in (baseline, slim)]
    return Losses(
        left,
        (sum(expected.values()) - left * sum(before.values())) / baseline.call_ms,
        narrow,
        (others[1] - left * others[0]) / baseline.call_ms,
        (rest[1] - left * rest[0]) / baseline.call_ms,
    )


def time_both(baseline: Path, slim: Path, threads: int, repeats: int, console: Console) -> tuple[Timed, Timed]:
    """Time the nodes and the calls of two files, each in turn with the baseline."""
    writers = [VariantWriter(load_onnx(path, weights=True)) for path in (baseline, slim)]
    with tempfile.TemporaryDirectory() as folder:
        renamed = [Path(folder) / f"{name}.onnx" for name in ("baseline", "slim")]
        for writer, path in zip(writers, renamed, strict=True):
            save_onnx(writer.write({}, {}), path, external=False)
        conditions = Conditions(OnnxRuntime.name, "CPUExecutionProvider", threads, 1, repeats)
        profiles = list(profile_models(renamed, 2, renamed[0], _zeros, conditions, console))
    reference = float(np.median(profiles[0].reference_ms))
    found = [
        _timed(path, writer, one, reference / float(np.median(one.reference_ms)))
        for path, writer, one in zip((baseline, slim), writers, profiles, strict=True)
    ]
    return found[0], found[1]


def _zeros(session: OnnxRuntime) -> dict[str, np.ndarray]:
    inputs = session.signature.inputs
    shapes = {spec.name: [side if isinstance(side, int) else 1 for side in spec.shape] for spec in inputs}
    return {spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in inputs}


def _timed(path: Path, writer: VariantWriter, profile: Profile, speed: float) -> Timed:
    """Return times of a file, multiplied by the speed of the machine in its rounds."""
    milliseconds: defaultdict[str, float] = defaultdict(float)
    for name, times in zip(profile.nodes.names, profile.nodes.milliseconds, strict=True):
        site = site_of(name)
        milliseconds[OTHER if site is None else writer.sites[site].layer] += speed * float(np.median(times))
    macs: Counter[str] = Counter()
    for row in layer_rows(path):
        macs[row.name] += row.macs
    own = {name: count for name, count in macs.items() if count}
    widths = {site.layer: site.sizes for site in writer.sites}
    return Timed(speed * float(np.median(profile.total_ms)), milliseconds, own, widths)


def row(name: str, losses: Losses) -> str:
    """Return one row of the table."""
    left = losses.latency_left
    parts = (losses.cheap_macs, sum(losses.narrow_layers.values()), losses.other_nodes, losses.between_nodes)
    cells = [name, f"{losses.macs_left:.3f}", f"{left:.3f}", f"{1 / losses.macs_left:.2f}×", f"{1 / left:.2f}×"]
    return f"| {' | '.join([*cells, f'{losses.macs_left / left:.2f}', *(f'{part:+.3f}' for part in parts)])} |"


def worst_layers(losses: Losses, baseline: Timed, slim: Timed, count: int) -> list[str]:
    """Return a line for each of the layers that lose most."""
    ranked = sorted(losses.narrow_layers, key=lambda layer: -losses.narrow_layers[layer])[:count]
    lines = []
    for layer in ranked:
        pairs = [f"{one.widths[layer][1]}→{one.widths[layer][0]}" for one in (baseline, slim) if layer in one.widths]
        both = [one for one in (baseline, slim) if one.macs.get(layer)]
        costs = " to ".join(f"{1e9 * one.layer_ms.get(layer, 0.0) / one.macs[layer]:.1f}" for one in both)
        lines.append(f"  {layer}: {' to '.join(pairs)}, {costs} ps for a MAC, {losses.narrow_layers[layer]:+.3f}")
    return lines


def files_of(run: Path) -> tuple[Path, Path]:
    """Return the baseline's and the slim file of a finished run.

    Raises:
        SystemExit: The run is not finished, or its store is gone.
    """
    try:
        first = json.loads((run / "lock").read_text(encoding="utf-8"))["stages"][0]
    except (OSError, ValueError, LookupError) as error:
        raise SystemExit(f"{run} must be the folder of a finished run: {error}") from error
    found = run.parent / ".store" / first["key"] / "baseline.onnx", run / "model.onnx"
    for path in found:
        if not path.is_file():
            raise SystemExit(f"{run} must be the folder of a finished run, {path} is not there.")
    if [len(read_signature(load_onnx(path)).inputs) for path in found] != [1, 1]:
        raise SystemExit(f"{run} must be of networks with one input.")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--sittings", type=int, default=3, help="measurements of each run; the median one is shown")
    parser.add_argument("--layers", type=int, default=0, help="number of layers to list for each run")
    parser.add_argument("--write", type=Path, help="Markdown file with the markers quotients")
    given = parser.parse_args(arguments)
    console, rows = Console(), []
    for run in given.runs:
        files = files_of(run)
        sittings = [time_both(*files, given.threads, given.repeats, console) for _ in range(given.sittings)]
        measured = [(find_losses(*pair), pair) for pair in sittings]
        middle = statistics.median_low([losses.latency_left for losses, _ in measured])
        losses, pair = next(one for one in measured if one[0].latency_left == middle)
        rows.append(row(run.name, losses))
        print("\n".join([rows[-1], *worst_layers(losses, *pair, given.layers)]))
    table = "\n".join([*HEADER, *rows])
    if given.write is not None:
        names = " ".join(run.name for run in given.runs)
        write_marked(given.write, table, "quotients", f"python benchmarks/quotients.py {names}")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
