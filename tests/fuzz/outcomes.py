"""Commands on damaged files, in this process or in one that may die: exit codes, time limits, counts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 60
WALL_LIMIT_S = 5 * LIMIT_S  # of a case in a process of its own, where foreign code may not come back
HANG, CRASH, WRONG = "hang", "crash", "wrong"
BAD = ("70", HANG, CRASH, WRONG)


class Hang(BaseException):
    """A command ran past its time; no `Exception`, so that nobody takes it for an error of a file."""


@dataclass(frozen=True)
class Outcome:
    """How one command on one damaged file ended.

    Attributes:
        case: Which one, as `--from` takes it.
        what: What was damaged, and which command was given.
        code: The exit code as text, or one of HANG, CRASH and WRONG.
        said: The last of what was printed.
    """

    case: int
    what: str
    code: str
    said: str = ""


@contextlib.contextmanager
def time_limit(seconds: float = LIMIT_S) -> Iterator[None]:
    """Raise `Hang` where the block takes more seconds of the CPU: those of the wall say how busy the machine is."""

    def ring(*_: object) -> None:
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def command(*arguments: str) -> tuple[int, str]:
    """Give a command in this process, and return its exit code and what it printed.

    Raises:
        AssertionError: It printed a traceback.
    """
    from typer.testing import CliRunner

    from compress.cli.commands import app

    done = CliRunner().invoke(app, list(arguments), prog_name="compress")
    assert "Traceback" not in done.output
    return done.exit_code, done.output


def guarded(case: int, what: str, act: Callable[[], tuple[int, str, str]]) -> Outcome:
    """Run one case within the time limit.

    Args:
        case: Its number.
        what: What was damaged.
        act: Returns exit code, output, and what is wrong with the result ("" where nothing is).
    """
    try:
        with time_limit():
            code, output, wrong = act()
    except Hang as hang:
        return Outcome(case, what, HANG, str(hang))
    if f"({Hang.__name__}:" in output:  # the command line caught it
        return Outcome(case, what, HANG, output.strip()[-200:])
    return Outcome(case, what, WRONG if wrong else str(code), wrong or output.strip()[-600:])


def run_apart(script: Path, count: int, first: int, seed: int, show: bool) -> list[Outcome]:
    """Run cases in processes of their own, a new one behind each that died or hung in foreign code.

    A case is tried twice before it counts as a crash: the system may have ended its process for lack of memory.
    """
    found: list[Outcome] = []
    at, died_at = first, -1
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    while at < first + count:
        here = [sys.executable, str(script), "--worker", "--from", str(at), "--count", str(first + count - at)]
        with (
            tempfile.TemporaryFile("w+") as log,
            subprocess.Popen(
                [*here, "--seed", str(seed)], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            ) as worker,
        ):
            assert worker.stdout is not None
            for line in worker.stdout:
                if not line.startswith("{"):
                    continue
                entry = json.loads(line)
                if "begun" in entry:
                    at, begun = entry["begun"], entry["what"]
                    continue
                found.append(Outcome(**entry))
                if show and found[-1].code in BAD:
                    print(json.dumps(entry), flush=True)
            worker.wait()
            if worker.returncode == 0:
                break
            log.seek(0)
            died = Outcome(at, begun, CRASH, f"exit {worker.returncode}: {log.read()[-500:]}")
        if at != died_at:
            died_at = at
            continue
        found.append(died)
        if show:
            print(json.dumps(asdict(died)), flush=True)
        at += 1
    return found


def main(script: str, run_case: Callable[[int, int, Path], list[Outcome]], describe: Callable[[int, int], str]) -> int:
    """Run the cases of one kind of files by one command; returns 1 where one of them ended badly.

    Args:
        script: `__file__` of the kind.
        run_case: Seed, number and a folder -> the outcomes of one damaged file.
        describe: Seed and number -> what is damaged.
    """
    import argparse
    import faulthandler

    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    if given.worker:
        with tempfile.TemporaryDirectory() as folder:
            for case in range(given.first, given.first + given.count):
                print(json.dumps({"begun": case, "what": describe(given.seed, case)}), flush=True)
                faulthandler.dump_traceback_later(WALL_LIMIT_S, exit=True)
                for outcome in run_case(given.seed, case, Path(folder)):
                    print(json.dumps(asdict(outcome)), flush=True)
        return 0
    found = run_apart(Path(script), given.count, given.first, given.seed, show=True)
    counts = Counter(outcome.code for outcome in found)
    print(f"{given.count} files, {len(found)} commands, seed {given.seed}:", dict(sorted(counts.items())))
    return int(any(outcome.code in BAD for outcome in found))
