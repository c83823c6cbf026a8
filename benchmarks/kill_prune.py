"""Kills `prune` of a network at several moments; counts what is done twice, compares the results.

    python benchmarks/kill_prune.py PIPELINE --runs-dir FOLDER [--moments 10] [--set KEY=VALUE ...]

PIPELINE has a `prune` stage, as pipelines/resnet56_latency.yaml. Only the stages up to `prune` run. Where a target is a
latency, give a table that is not of this machine (`--set deploy.table=device.json` with --accept-foreign-table), or the
choice is timed anew in every run and no two results are the same; `--set stages.prune.target={macs: 0.5}` needs none.

The undisturbed run says which parts there are. The disturbed one is killed (SIGKILL) at moments spread over them, a
random while after a part was done, and started again each time.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHILD = """
import json, sys, time
from pathlib import Path
from compress.config.load import load_pipeline
from compress.progress import SilentProgress
from compress.engine.runner import _Run
from compress.engine.workers import Workers
from compress.engine.keys import build_steps
from compress.search.parts import Parts

def tell(what, key, started):
    text = json.dumps(key, default=list, sort_keys=True)
    print("PART", json.dumps([what, text, time.perf_counter() - started]), flush=True)

class Notes(SilentProgress):
    def note(self, text): print("NOTE", text, flush=True)
    warn = note

find, add, began = Parts.find, Parts.add, time.perf_counter()
def finding(self, key):
    part = find(self, key)
    if part is not None: tell("kept", key, began)
    return part
def adding(self, key, part):
    add(self, key, part)
    tell("made", key, began)
    return part
Parts.find, Parts.add = finding, adding

arguments = json.loads(sys.argv[1])
pipeline = load_pipeline(Path(arguments["pipeline"]), arguments["overrides"])
runs = Path(arguments["runs_dir"])
(runs / "killed").mkdir(parents=True, exist_ok=True)
steps = build_steps(pipeline)
last = next(step.index for step in steps if step.entry.name in ("prune", "slim"))
run = _Run(pipeline, runs, runs / "killed", Notes(), Workers())
run.store.sweep()
digest = ""
for step in steps[: last + 1]:
    if step.index == last:
        began = time.perf_counter()
        print("PRUNE", flush=True)
    digest = run._do(step, len(steps), digest)
print("DIGEST", digest, flush=True)
"""


class Attempt:
    """One process, and what it said.

    Attributes:
        made: Keys of the parts it made, in order.
        kept: Keys of those that it found.
        digest: Of the result; "" where it was killed before.
        seconds: What it spent in the stage.
    """

    def __init__(self) -> None:
        self.made: list[str] = []
        self.kept: list[str] = []
        self.digest, self.seconds = "", 0.0


def attempt(arguments: dict[str, Any], kill_after: int | None, chance: random.Random, span_s: float) -> Attempt:
    """Run the stages, and kill the process a while after it made so many parts."""
    done, began = Attempt(), 0.0
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, "-c", CHILD, json.dumps(arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            kind, _, rest = line.rstrip("\n").partition(" ")
            if kind == "PRUNE":
                began = time.perf_counter()
            elif kind == "PART":
                what, key, _ = json.loads(rest)
                (done.made if what == "made" else done.kept).append(key)
                if what == "made" and len(done.made) == kill_after:
                    time.sleep(chance.uniform(0.0, span_s))
                    process.send_signal(signal.SIGKILL)
                    break
            elif kind == "DIGEST":
                done.digest = rest
        for line in process.stdout:  # what it said before the signal came
            kind, _, rest = line.rstrip("\n").partition(" ")
            if kind == "PART" and (said := json.loads(rest))[0] == "made":
                done.made.append(said[1])
            elif kind == "DIGEST":
                done.digest = rest
    done.seconds = time.perf_counter() - began
    if not done.digest and process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the stages ended with {process.returncode}")
    return done


def main() -> int:
    """Run undisturbed, then disturbed; print what was done twice, and whether the results are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--runs-dir", type=Path, required=True)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--accept-foreign-table", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--delay-s", type=float, help="longest time from a part to the kill; by default a part's mean")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    overrides = options.overrides + ["deploy.accept_foreign_table=true"] * options.accept_foreign_table
    arguments = {"pipeline": str(options.pipeline), "overrides": overrides}
    chance = random.Random(options.seed)

    whole = attempt(arguments | {"runs_dir": str(options.runs_dir / "undisturbed")}, None, chance, 0.0)
    print(f"undisturbed: {len(whole.made)} parts in {whole.seconds:.1f} s, result {whole.digest[:12]}", flush=True)

    here = arguments | {"runs_dir": str(options.runs_dir / "disturbed")}
    mean_s = whole.seconds / max(1, len(whole.made))
    delay_s = mean_s if options.delay_s is None else options.delay_s
    made: list[str] = []
    spent = 0.0
    step = max(1, len(whole.made) // (options.moments + 1))
    for number in range(options.moments):
        one = attempt(here, step, chance, delay_s)
        made += one.made
        spent += one.seconds
        print(f"kill {number + 1}: {len(one.kept)} parts kept, {len(one.made)} made, {one.seconds:.1f} s", flush=True)
        if one.digest:
            break
    last = attempt(here, None, chance, 0.0)
    made += last.made
    spent += last.seconds
    twice = len(made) - len(set(made))
    print(f"end: {len(last.kept)} parts kept, {len(last.made)} made, {last.seconds:.1f} s, result {last.digest[:12]}")
    same, complete = last.digest == whole.digest, set(made) == set(whole.made)
    print(
        f"made twice: {twice} of {len(whole.made)} parts; same parts: {complete}; same result: {same}; "
        f"{spent:.1f} s in all, {whole.seconds:.1f} s undisturbed"
    )
    return 0 if same and complete and not twice else 1


if __name__ == "__main__":
    sys.exit(main())
