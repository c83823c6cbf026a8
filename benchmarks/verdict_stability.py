"""Does the verdict on a speed-up stay the same when the same file is verified again and again?

    python benchmarks/verdict_stability.py slim.onnx baseline.onnx --data FOLDER/test.npz
    ... --times 10 --away 0.05 --set preprocessing.mean=[0.5]

What the ratio is, is said by as many verifications against a gate that is nowhere near, with pauses between them, since
a machine may be in one state for seconds: the geometric mean of their speed-ups. Then the file is verified as `compress
verify` does, on a few images, against two gates: one that it keeps by `--away` of the ratio, one that it misses by as
much. The two take turns.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from compress.cli.console import Console
from compress.config.gates_file import load_gates
from compress.config.schema.verify import GatesFile
from compress.engine.verify_file import verify_file
from compress.errors import InternalError
from compress.progress import SilentProgress

IMAGES, PAUSE_S = 64, 3.0


def few_images(path: Path, folder: Path) -> Path:
    """Write some images of an .npz to another one."""
    with np.load(path) as arrays:
        step = max(1, len(arrays["y"]) // IMAGES)
        target = folder / "some.npz"
        np.savez(target, x=arrays["x"][::step], y=arrays["y"][::step])
    return target


def speedup(slim: Path, baseline: Path, settings: GatesFile) -> tuple[str, float, float, float]:
    """Verify once; return the verdict on `min_speedup`, the speed-up and its interval."""
    verdict = verify_file(slim, settings, baseline, SilentProgress())
    check = next(check for check in verdict.checks if check.name == "min_speedup")
    ratio = verdict.details["latency"]["ratio"]
    if check.value is None:
        raise InternalError("The speed-up was not measured.")
    return check.status, check.value, 1 / ratio["high"], 1 / ratio["low"]


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slim", type=Path)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="an .npz with x and y")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--away", type=float, default=0.05)
    parser.add_argument("--folder", type=Path, default=Path(), help="for a file of some of the images")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    console, images = Console(), few_images(arguments.data, arguments.folder)

    def settings(limit: float) -> GatesFile:
        fixed = [f"gates.min_speedup={limit}", "resources=null"]
        return load_gates(None, images, [*arguments.overrides, *fixed])

    files = arguments.slim, arguments.baseline
    before = []
    for _ in range(arguments.times):
        before.append(speedup(*files, settings(1e-6))[1])
        time.sleep(PAUSE_S)
    known = statistics.geometric_mean(before)
    console.say(f"speed-up: {known:.3f} ({min(before):.3f} to {max(before):.3f} in one sitting)\n")
    console.say("| gate | verdicts | speed-ups | widest interval |\n|---|---|---|---|")
    limits = known * (1 - arguments.away), known * (1 + arguments.away)
    found: dict[float, list[tuple[str, float, float, float]]] = {limit: [] for limit in limits}
    for _ in range(arguments.times):
        for limit in limits:
            found[limit].append(speedup(*files, settings(limit)))
    for limit, those in found.items():
        verdicts = [status for status, *_ in those]
        counts = ", ".join(f"{verdicts.count(one)} x {one}" for one in sorted(set(verdicts)))
        values = [value for _, value, *_ in those]
        widest = max((top - bottom) / value for _, value, bottom, top in those)
        console.say(f"| {limit:.3f} | {counts} | {min(values):.3f} to {max(values):.3f} | {widest:.1%} |")


if __name__ == "__main__":
    main()
