"""How fast is an ONNX file evaluated, next to a bare ONNX Runtime loop that has nothing else to do?

    python benchmarks/evaluation_speed.py model.onnx --data FOLDER/test.npz
    ... --rounds 9 --batch-size 256

The bare loop prepares each batch with three lines of numpy and calls a session on all cores; a second one gets batches
that were prepared before the clock ran. Ours is what a verdict does: it reads, prepares, checks names, shapes and
finiteness, keeps all outputs, and tells its progress. The three take turns, and the figure is the median over rounds of
the ratio of times. Preprocessing is what the file says, or CIFAR's usual mean and std. Nothing else should run on the
machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from compress.cli.console import Console
from compress.config.gates_file import load_gates
from compress.data.from_config import open_split
from compress.data.preprocessing import Preprocessing
from compress.data.splits import Split
from compress.onnx_file.io import load_onnx, read_metadata
from compress.verification.measurement import available_cores
from compress.verification.quality import predict
from compress.verification.runtimes.onnxruntime import OnnxRuntime

USUAL = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def bare_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Return a session with nothing set but its threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(path: Path, split: Split, rounds: int, batch_size: int) -> str:
    """Return the table."""
    threads, images, labels = available_cores(), split.read(np.arange(len(split))), split.labels
    bare, console = bare_session(path, threads), Console()
    name = bare.get_inputs()[0].name
    mean, std = (np.asarray(values, np.float32) for values in (split.preprocessing.mean, split.preprocessing.std))
    starts = range(0, len(images), batch_size)

    def prepare(start: int) -> np.ndarray:
        batch = images[start : start + batch_size].astype(np.float32) * np.float32(split.preprocessing.scale)
        return np.ascontiguousarray(((batch - mean) / std).transpose(0, 3, 1, 2))

    prepared = [prepare(start) for start in starts]

    def bare_loop() -> float:
        hits = [bare.run(None, {name: prepare(s)})[0].argmax(1) == labels[s : s + batch_size] for s in starts]
        return float(np.concatenate(hits).mean())

    def prepared_loop() -> float:
        hits = [
            bare.run(None, {name: batch})[0].argmax(1) == labels[s : s + batch_size]
            for s, batch in zip(starts, prepared, strict=True)
        ]
        return float(np.concatenate(hits).mean())

    with OnnxRuntime(path, threads=threads) as runtime:
        loops: dict[str, Callable[[], float]] = {
            "bare loop": bare_loop,
            "bare loop, batches prepared before": prepared_loop,
            "ours": lambda: float(predict(runtime, split, batch_size, Console(quiet=True)).hits.mean()),
        }
        times: dict[str, list[float]] = {label: [] for label in loops}
        for number in range(rounds + 1):
            found = {}
            for label in list(loops)[:: 1 if number % 2 else -1]:
                started = time.perf_counter()
                found[label] = loops[label]()
                taken = time.perf_counter() - started
                if number:  # the first round is a warm-up
                    times[label].append(taken)
            if len(set(found.values())) > 1:
                raise SystemExit(f"The loops must come to the same top-1, got {found}.")
            if number:
                console.note(
                    f"round {number}: " + ", ".join(f"{label} {all_[-1]:.2f} s" for label, all_ in times.items())
                )
    lines = [
        f"{path.name}: top-1 {found['ours']:.2%} of {len(split)} images, batch {batch_size}, {threads} threads",
        "",
        "| | seconds, median | ours / it, median | lowest to highest |",
        "|---|---|---|---|",
    ]
    for label, taken in times.items():
        ratios = [mine / other for mine, other in zip(times["ours"], taken, strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        lines.append(f"| {label} | {statistics.median(taken):.2f} | **{statistics.median(ratios):.3f}** | {spread} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="as of compress verify")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    source = load_gates(None, arguments.data).evaluation
    if source is None:
        raise SystemExit("--data names no images.")
    preprocessing = read_metadata(load_onnx(arguments.model)).preprocessing or USUAL
    split = open_split("evaluation", source, preprocessing)
    print(measure(arguments.model, split, arguments.rounds, arguments.batch_size))


if __name__ == "__main__":
    main()
