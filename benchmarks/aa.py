"""A/A test of the latency comparison: a file timed against itself by the product's own measuring.

    python benchmarks/aa.py [FILE.onnx] [--runs 160] [--state aa.jsonl]
    python benchmarks/aa.py --simulate

A run that was stopped goes on where it was; --state names the file in which finished runs are kept. Without FILE the
ResNet-20 of `models/` is exported with random weights. The two sides take turns in being named first. Asked, on a quiet
machine: median ratio 1.000 +- 0.002 whatever the order, and 1.0 inside the interval in at least 37 of 40 runs. Single
runs scatter by 0.6 %, the median of 20 of one order by 0.17 %: 40 runs do for the interval, 160 for the orders.

--simulate does the same on simulated machines, and counts how often the interval holds the true ratio of two models
that react differently to the speed of the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from simulated_machine import SimulatedMachine, no_inputs

from compress.cli.console import Console
from compress.verification.latency import Calls, LatencyRatio, compare_latency

ROOT = Path(__file__).resolve().parents[1]
ASKED, HELD_OF_40 = 0.002, 37


def export_resnet20(path: Path) -> None:
    """Write the ResNet-20 of `models/` to an ONNX file."""
    sys.path.insert(0, str(ROOT))
    from compress.exporting.settings import ExportSettings
    from compress.exporting.torch_onnx import export_onnx
    from compress.model.artifacts import Signature, TensorSpec
    from compress.search.export import OPSET
    from models.cifar_resnet.model import resnet

    signature = Signature((TensorSpec("image", ("batch", 3, 32, 32)),), (TensorSpec("logits", ("batch", 10)),))
    export_onnx(resnet(20).eval(), signature, path, ExportSettings(opset=OPSET))


def record(ratio: LatencyRatio, number: int) -> dict[str, Any]:
    """Return what is kept of a run; the ratio is always that of "a" to "b"."""
    is_swapped = number % 2 == 1
    value, low, high = ratio.value, ratio.low, ratio.high
    if is_swapped:
        value, low, high = 1 / value, 1 / high, 1 / low
    own = estimate_half(ratio)
    return {
        "run": number,
        "first": "b" if is_swapped else "a",
        "ratio": value,
        "low": low,
        "high": high,
        "own_half": own,
        "sittings": ratio.sittings,
        "control": None if ratio.control is None else ratio.control.value,
    }


def estimate_half(ratio: LatencyRatio) -> float:
    """Return half of the width of the interval, as a share, before the control has widened it."""
    from scipy.stats import t

    return float(t.ppf(0.975, max(1, ratio.sittings - 1))) * ratio.error


def measure(path: Path, number: int) -> dict[str, Any]:
    """Time a file against itself once, as `verify` does."""
    from compress.inspection.least_latency import random_inputs
    from compress.verification.measurement import Conditions

    conditions = Conditions()
    labels = ("a", "b") if number % 2 == 0 else ("b", "a")
    found = compare_latency(
        {label: partial(conditions.open, path) for label in labels},
        lambda session: random_inputs(session.signature, conditions.batch_size),
        conditions.calls,
        has_control=True,
    )
    assert found.ratio is not None
    return record(found.ratio, number)


def summarize(runs: list[dict[str, Any]], console: Console) -> None:
    """Print the table of finished runs."""
    console.say(
        "| runs | median ratio a/b | smallest to largest | 1.0 inside | without the A/A arm's width | half width |"
    )
    console.say("|---|---|---|---|---|---|")
    parts = {
        "all": runs,
        "a named first": [run for run in runs if run["first"] == "a"],
        "b named first": [run for run in runs if run["first"] == "b"],
    }
    medians = {}
    for name, those in parts.items():
        if not those:
            continue
        ratios = [run["ratio"] for run in those]
        medians[name] = statistics.median(ratios)
        held = sum(run["low"] <= 1 <= run["high"] for run in those)
        alone = sum(abs(math.log(run["ratio"])) <= run["own_half"] for run in those)
        half = statistics.median(math.log(run["high"] / run["low"]) / 2 for run in those)
        console.say(
            f"| {name} ({len(those)}) | {medians[name]:.4f} | {min(ratios):.4f} to {max(ratios):.4f} | "
            f"{held} of {len(those)} | {alone} of {len(those)} | {half:.2%} |"
        )
    held = sum(run["low"] <= 1 <= run["high"] for run in runs)
    is_met = all(abs(value - 1) <= ASKED for value in medians.values()) and held >= HELD_OF_40 / 40 * len(runs)
    console.say(f"\n{'Met' if is_met else 'Not met'}: 1.000 +- {ASKED} in each row, 1.0 inside in {HELD_OF_40} of 40.")


def run_measured(options: argparse.Namespace, console: Console) -> None:
    """Make the runs that are not there yet, and print the table."""
    state: Path = options.state
    runs = [json.loads(line) for line in state.read_text(encoding="utf-8").splitlines()] if state.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "resnet20.onnx"
        if options.file is None and len(runs) < options.runs:
            export_resnet20(path)
        for number in range(len(runs), options.runs):
            runs.append(measure(path, number))
            with state.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(runs[-1]) + "\n")
    summarize(runs[: options.runs], console)


def run_simulated(options: argparse.Namespace, console: Console) -> None:
    """Print the table of simulated A/A runs, and the coverage for two models that differ."""
    runs = []
    for number in range(options.runs):
        machine = SimulatedMachine(seed=number)
        labels = ("a", "b") if number % 2 == 0 else ("b", "a")
        models = {label: machine.model(label, 0.4) for label in labels}
        found = compare_latency(models, no_inputs, Calls(10, 100), has_control=True, stopwatch=machine.stopwatch)
        assert found.ratio is not None
        runs.append(record(found.ratio, number))
    summarize(runs, console)
    console.say("\n| reaction to the slow state | at once | near a limit, with pauses |\n|---|---|---|")
    for reaction in (1.0, 1.1, 1.2):
        cells = []
        for is_close in (False, True):
            held, halves = 0, []
            for number in range(options.runs):
                machine = SimulatedMachine(seed=number)
                models = {"slim": machine.model("slim", 0.25, reaction), "baseline": machine.model("baseline", 0.4)}
                ratio = compare_latency(
                    models, no_inputs, Calls(10, 100), has_control=True,
                    is_close=lambda _, answer=is_close: answer, stopwatch=machine.stopwatch,
                ).ratio  # fmt: skip
                assert ratio is not None
                held += ratio.low <= machine.true_ratio((0.25, reaction), (0.4, 1.0)) <= ratio.high
                halves.append(math.log(ratio.high / ratio.low) / 2)
            cells.append(f"{held / options.runs:.1%} held, half width {statistics.median(halves):.2%}")
        console.say(f"| {reaction} | {' | '.join(cells)} |")


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=160)
    parser.add_argument("--state", type=Path, default=Path("aa.jsonl"))
    parser.add_argument("--simulate", action="store_true")
    options = parser.parse_args()
    (run_simulated if options.simulate else run_measured)(options, Console())


if __name__ == "__main__":
    main()
