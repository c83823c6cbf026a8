"""How long does it take to find the channel groups of a network and to cut it, and how much memory?

    python benchmarks/graph_speed.py                              ResNet-50, DenseNet-121, EfficientNet-B4, ResNets
    python benchmarks/graph_speed.py resnet50 --rounds 5          one of them
    python benchmarks/graph_speed.py --depths 20 56 110           growth by depth alone, up to ResNet-110

For each network the channel graph is built, its groups are found and tried, and all of them are cut to half, as `prune`
does; beside it, where torch-pruning is installed, its own graph, groups and cut to half. Each measurement has a process
of its own with as many threads as cores, ours and theirs in turn; the median counts. On a busy machine seconds are too
many; those that the processors worked for it, of all threads together, are less disturbed. Memory is the most that it
has held, Python and torch included.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
CIFAR = f"{ROOT / 'models' / 'cifar_resnet' / 'model.py'}:resnet"
NETWORKS = {"resnet50": 3.0, "densenet121": 8.0, "efficientnet_b4": 8.0}  # seconds that are wanted at most
DEPTHS = (20, 56, 110, 1202)
KEPT_RATIO = 0.5
TOOLS = ("compress", "torch-pruning")
EXPONENT_LIMIT = 1.1  # as good as linear

ModelMetrics = dict[str, float]


def build(name: str) -> tuple[Any, Any]:
    """Return a network with random weights, and one input: a CIFAR ResNet by its depth, others by their name."""
    import torch

    from compress.checkpoint.rebuild import build_module
    from compress.inspection.targets import own_input_shape
    from compress.model.artifacts import FactorySpec

    if name.isdecimal():
        return build_module(FactorySpec("factory", CIFAR, {"depth": int(name)})), torch.zeros(1, 3, 32, 32)
    module = build_module(FactorySpec("torchvision", name))
    return module, torch.zeros(1, *(own_input_shape(f"torchvision:{name}", module) or (3, 224, 224)))


def measure_compress(module: Any, example: Any) -> ModelMetrics:
    """Find and try all channel groups, cut each to half."""
    from compress.pruning.surgery import cut_copy
    from compress.pruning.trial import find_cuttable

    started = time.perf_counter()
    groups, _ = find_cuttable(module, example)
    found = time.perf_counter()
    removed = {
        name: group.expand(range(int(group.width * KEPT_RATIO) // group.parts, group.width // group.parts))
        for name, group in groups.items()
    }
    cut_copy(module, removed, example)
    return {"groups": len(groups), "graph_s": found - started, "cut_s": time.perf_counter() - found}


def measure_torch_pruning(module: Any, example: Any) -> ModelMetrics:
    """Do the same with torch-pruning's own graph and pruner; it tries no cut."""
    import torch_pruning
    from torch import nn

    started = time.perf_counter()
    outputs = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1:]
    pruner = torch_pruning.pruner.MagnitudePruner(
        module,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=1 - KEPT_RATIO,
        ignored_layers=outputs,
    )
    found = time.perf_counter()
    groups = list(pruner.step(interactive=True))
    for group in groups:
        group.prune()
    return {"groups": len(groups), "graph_s": found - started, "cut_s": time.perf_counter() - found}


def measure_here(tool: str, name: str) -> ModelMetrics:
    """Measure one tool on one network in this process, to be called once in it."""
    module, example = build(name)
    model_mb = sum(value.numel() * value.element_size() for value in module.state_dict().values()) / 1e6
    before = peak_mb()
    measure = measure_compress if tool == "compress" else measure_torch_pruning
    started = time.process_time()
    figures = measure(module, example)
    figures["cpu_s"] = time.process_time() - started
    return {**figures, "model_mb": model_mb, "before_mb": before, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """Return the most memory that this process has held, in 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def measure(tool: str, name: str, limit_s: float) -> ModelMetrics | str:
    """Measure in a process of its own; return what went wrong where something did."""
    command = [sys.executable, __file__, "--one", tool, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"more than {limit_s:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    figures: ModelMetrics = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def measure_in_turn(
    tools: Sequence[str], name: str, rounds: int, limit_s: float
) -> dict[str, list[ModelMetrics | str]]:
    """Measure tools in turn; one that fails is not asked again."""
    found: dict[str, list[ModelMetrics | str]] = {tool: [] for tool in tools}
    for _ in range(rounds):
        for tool in tools:
            if not any(isinstance(one, str) for one in found[tool]):
                found[tool].append(measure(tool, name, limit_s))
                print(f"{name}, {tool}: {found[tool][-1]}", file=sys.stderr, flush=True)
    return found


def median(figures: Sequence[ModelMetrics]) -> ModelMetrics:
    """Return the median of each figure; of seconds in all, too."""
    whole = [{**one, "all_s": one["graph_s"] + one["cut_s"]} for one in figures]
    return {name: statistics.median(one[name] for one in whole) for name in whole[0]}


def row(tool: str, name: str, found: Sequence[ModelMetrics | str], limit: float | None) -> str:
    """Return one row of the table; a failure takes the place of the figures."""
    failures = [one for one in found if isinstance(one, str)]
    if failures:
        return f"| {name} | {tool} | {failures[0].replace('|', '/')} | | | | | | | |"
    one = median([one for one in found if not isinstance(one, str)])
    allowed = 3 * one["model_mb"] + 1000
    cells = [
        f"{one['groups']:.0f}",
        f"{one['graph_s']:.2f}",
        f"{one['cut_s']:.2f}",
        f"{one['all_s']:.2f}{_judged(one['all_s'], limit) if tool == 'compress' else ''}",
        f"{one['cpu_s']:.2f}",
        f"{one['model_mb']:.0f}",
        f"{one['before_mb']:.0f}",
        f"{one['peak_mb']:.0f}{_judged(one['peak_mb'], allowed) if tool == 'compress' else ''}",
    ]
    return f"| {name} | {tool} | {' | '.join(cells)} |"


def _judged(value: float, limit: float | None) -> str:
    return "" if limit is None else f" ({'within' if value <= limit else 'above'} {limit:.4g})"


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the power of the size that the seconds grow with: the slope of a line through their logarithms.

    >>> round(exponent([10, 20, 40], [1.0, 4.0, 16.0]), 3)
    2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "networks", nargs="*", metavar="NETWORK", help="of torchvision; by default three and all depths"
    )
    parser.add_argument("--depths", type=int, nargs="*", help="of CIFAR ResNets; by default 20 56 110 1202")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=900.0, metavar="SECONDS", help="for one measurement")
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "NETWORK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(measure_here(*arguments.one)))
        return
    asked = bool(arguments.networks or arguments.depths)
    networks = arguments.networks or ([] if asked else list(NETWORKS))
    depths = arguments.depths or ([] if asked else list(DEPTHS))
    tools = TOOLS if find_spec("torch_pruning") else TOOLS[:1]
    rows, times = [], {}
    for name in networks:
        found = measure_in_turn(tools, name, arguments.rounds, arguments.limit)
        rows += [row(tool, name, each, NETWORKS.get(name)) for tool, each in found.items()]
    for depth in depths:  # torch-pruning cuts these wrongly, so that its time says nothing
        each = measure_in_turn(TOOLS[:1], str(depth), arguments.rounds, arguments.limit)["compress"]
        rows.append(row("compress", f"CIFAR ResNet-{depth}", each, None))
        if not any(isinstance(one, str) for one in each):
            times[depth] = median([one for one in each if not isinstance(one, str)])["all_s"]
    print("| network | tool | groups | graph s | cut s | in all s | CPU s | model MB | before MB | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    if len(times) > 1:
        power = exponent(list(times), list(times.values()))
        said = "at most linear" if power <= EXPONENT_LIMIT else "more than linear"
        print(f"\nTime grows with depth to the power of {power:.2f}: {said}.")


if __name__ == "__main__":
    main()
