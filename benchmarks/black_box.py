"""A table fitted to complete variants against a table of nodes, on this CPU: predictions, and widths for a target.

    python benchmarks/black_box.py                                     ResNet-20 and MobileNetV2, ONNX Runtime
    python benchmarks/black_box.py --runtimes onnxruntime openvino     the same files in OpenVINO as well
    python benchmarks/black_box.py resnet20 --variants 4 --most 24     a quick try
    python benchmarks/black_box.py --write FILE.md                     puts the tables between the markers of a page

For each network there is one row by nodes and one for each runtime by a command (`benchmarks/time_file.py`, a process
that stands for a device). Each table predicts the same networks of random widths, and each prediction is compared with
that network timed the same way, in turn with the baseline. Then widths are chosen for the target as `prune` chooses
them, and the file is timed. The second table shows the chosen widths. Weights are random; time does not depend on them.
Nothing else should run on the machine. What was measured is kept in the folder, and the same call goes on there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from made import write_marked
from prediction import NETWORKS, ROOT, Trial

from compress.cli.console import Console
from compress.config.schema.verify import DeployConfig
from compress.search.survey import Survey

TARGETS = {"resnet20": 0.667, "mobilenet_v2": 0.7}
NODES = "nodes, ONNX Runtime"
HEADER = (
    "network", "table", "baseline (ms)", "variants", "made in (s)", "median error", "worst error", "error stated",
    "asked", "reached in the search", "reached by the file",
)  # fmt: skip


def deployment(runtime: str | None, repeats: int, most: int) -> DeployConfig:
    """Return the deployment of a row; `runtime` None stands for the table of nodes."""
    if runtime is None:
        return DeployConfig(repeats=repeats)
    script = str(Path(__file__).with_name("time_file.py"))
    options = (f"--runtime={runtime}", "--threads={threads}", "--batch={batch_size}", "--calls={repeats}")
    return DeployConfig(
        command=(sys.executable, script, "{model}", *options),
        device=f"this machine, {runtime}",
        repeats=repeats,
        variants=most,
    )


def row(trial: Trial, surveyed: Survey, label: str) -> list[str]:
    """Return the cells of one row."""
    latency, found = surveyed.targets.latency, trial.measured
    if latency is None:
        raise AssertionError("a latency target needs a latency model")
    errors = np.asarray([abs(one["predicted"] / one["measured"] - 1) for one in found["variants"]])
    cells = [
        trial.name,
        label,
        f"{latency.reference_ms:.3g}",
        f"{len(latency.file.samples)}",
        f"{found['table_s']:.0f}",
    ]
    cells += [f"{np.median(errors):.1%}", f"{errors.max():.1%}", f"{latency.table.error:.1%}"]
    reached = found.get(f"reached {surveyed.targets.latency_ratio:g}", {})
    if "file" not in reached:
        return [*cells, f"{surveyed.targets.latency_ratio:g}", "refused", "–"]
    file = f"{np.median(reached['file']):.3f} ({min(reached['file']):.3f} to {max(reached['file']):.3f})"
    return [*cells, f"{reached['asked']:g}", f"{reached['search']:.3f} ({len(reached['rounds'])} rounds)", file]


def widths(trials: Sequence[tuple[str, Trial, Survey]]) -> list[str]:
    """Return the lines of a table: channel groups whose chosen widths differ between the rows of one network."""
    chosen = {
        label: trial.measured.get(f"reached {surveyed.targets.latency_ratio:g}", {}).get("widths", {})
        for label, trial, surveyed in trials
    }
    _, first, surveyed = trials[0]
    lines = [f"| {first.name} | full | {' | '.join(chosen)} |", f"|{'---|' * (len(chosen) + 2)}"]
    same = 0
    for group, allowed in surveyed.levels.items():
        found = [str(one.get(group, "–")) for one in chosen.values()]
        same += len(set(found)) == 1
        if len(set(found)) > 1:
            lines.append(f"| {group} | {allowed[-1]} | {' | '.join(found)} |")
    return [*lines, f"| {same} other groups | | {' | '.join('equal' for _ in chosen)} |"]


def main() -> None:
    """Parse the command line, measure what is missing, print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime"], choices=["onnxruntime", "openvino"])
    parser.add_argument("--variants", type=int, default=20, help="networks of random widths")
    parser.add_argument("--most", type=int, default=96, help="most variants of a fitted table, as deploy.variants")
    parser.add_argument("--repeats", type=int, default=100, help="timed calls, as deploy.repeats")
    parser.add_argument("--size", type=int, help="height and width of images; each network's usual one by default")
    parser.add_argument("--latency", type=float, help="target; 0.667 for ResNet-20, 0.7 for others by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "black_box", help="what was measured is kept")
    parser.add_argument("--write", type=Path, help="Markdown file with the markers")
    arguments = parser.parse_args()
    if unknown := set(arguments.networks) - set(NETWORKS):
        parser.error(f"networks are {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    lines, tables = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"], list[str]()
    for name in arguments.networks or TARGETS:
        size, target = arguments.size or NETWORKS[name][1], arguments.latency or TARGETS.get(name, 0.7)
        trials = []
        for runtime in (None, *arguments.runtimes):
            folder = arguments.folder / f"{name}-{size}-seed{arguments.seed}-{runtime or 'nodes'}"
            deploy = deployment(runtime, arguments.repeats, arguments.most)
            trial = Trial(name, size, folder, arguments.seed, Console(), arguments.repeats, deploy)
            surveyed = trial.survey(target)
            trial.predict(surveyed, arguments.variants)
            trial.reach(surveyed)
            label = NODES if runtime is None else f"command, {runtime}"
            trials.append((label, trial, surveyed))
            lines.append(f"| {' | '.join(row(trial, surveyed, label))} |")
            print(lines[-1], flush=True)
        tables += ["", *widths(trials)]
    text = "\n".join([*lines, *tables])
    print(f"\n{text}")
    if arguments.write is not None:
        write_marked(arguments.write, text, "black-box", "benchmarks/black_box.py")


if __name__ == "__main__":
    main()
