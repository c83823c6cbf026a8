"""Odd values in every field of a pipeline file: each ends with a sentence and an exit code, in time and in bounds.

    python tests/fuzz/yaml_values.py [--run] [--count N]

Every value goes through `validate` and, where that accepts it, through `plan`, which reads the data's files; with
--run also through `run` on a network that trains in seconds.
"""

import argparse
import copy
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

import smallrun

SECONDS = 300
EXPECTED = {"validate": {0, 2}, "plan": {0, 2, 4}, "run": {0, 1, 2, 3, 4, 5, 6}}
ODD: dict[str, str] = {
    "10^400": "1" + "0" * 400, "2^62": str(2**62), "2^63": str(2**63), "2^64": str(2**64), "-2^63": str(-(2**63)),
    "9,000 digits": "9" * 9000, "2,000,000,001": "2000000001", "100,000": "100000", "-1": "-1", "0": "0",
    "-0.0": "-0.0",
    "1e308": "1e308", "1e400": "1e400", "1e-308": "1e-308", "0.5": "0.5", "hexadecimal": "0x7fffffffffffffff",
    "5,000 characters": "x" * 5000, "300 characters": "x" * 300, "path of 5,000": "/".join(["a"] * 2500),
    "NUL": '"a\\0b"', "surrogate": '"\\ud800"', "low surrogate": '"\\udce9"', "empty": '""', "space": '" "',
    "line break": '"a\\nb"', "bell": '"\\a"', "right to left": '"\\u202e"', "true": "true", "null": "null", "no": "no",
    "date": "2024-01-01", "list": "[]", "mapping": "{}", "list of lists": "[[[]]]", "list of null": "[null]",
    "mapping of itself": "&a {a: *a}", "60 deep": "[" * 60 + "]" * 60, "9,000 deep": "[" * 9000 + "]" * 9000,
    "2,000 entries": f"[{', '.join(['1'] * 2000)}]", "bomb": "BOMB", "a tag": "!!python/object/apply:os.system ['x']",
    "binary": "!!binary aGVsbG8=", "merge": "{<<: {a: 1}}", "/dev/zero": "/dev/zero", "/dev/null": "/dev/null",
    "folder": "/", "home": "~", "parents": "../../../../../../..", "colon": '":"', "reference": "nets.py:build",
    "dots": '".."', "star": '"*"', "bracket": '"["', "brace": '"{x}"', "percent": '"%s%n"', "one": "[1]",
    "pair": "[-1, -1]",
    "large pair": "[100000, 100000]", "nan": ".nan", "inf": ".inf",
}  # fmt: skip
BOMB = "[" + ", ".join(["*b8"] * 9) + "]"
KIND = tuple[tuple[str | int, ...], str]


def base(world: smallrun.World) -> dict[str, Any]:
    """Return a pipeline with something in every section."""
    values = world.values()
    load, prune, finetune, export, verify = values["stages"]
    values |= {"seed": 0, "plugins": [], "task": {"name": "classification"}}
    values["deploy"] = {
        "provider": "CPUExecutionProvider",
        "threads": 1,
        "batch_size": 1,
        "repeats": 5,
        "precision": "fp32",
    }
    values["data"] |= {"split_seed": 0}
    values["data"]["preprocessing"] |= {
        "scale": 0.0039,
        "resize": 16,
        "crop": [16, 16],
        "channels": "RGB",
        "layout": "NCHW",
    }
    prune |= {"criterion": "l1", "min_width": 1, "max_removed_ratio": 0.9, "exclude": [], "repair": ["batch_norm"],
              "blocks": 0, "residual": "auto"}  # fmt: skip
    finetune |= {
        "momentum": 0.9, "weight_decay": 0.0001, "warmup_ratio": 0.05, "optimizer": "sgd", "schedule": "cosine",
        "accumulation": 1, "ema": 0.0, "label_smoothing": 0.0, "save_minutes": 5,
        "augmentation": {"crop_padding": 2, "flip": True, "mixup": 0.1},
        "distillation": {"weight": 0.5, "temperature": 2.0},
    }  # fmt: skip
    verify |= {"parity_samples": 4, "warmup": 1, "repeats": 4, "threads": 1, "batch_size": 1}
    verify["gates"] |= {"max_size_mb": 10, "max_latency_ms": 1000, "max_fallback_nodes": 100}
    low_rank = {"stage": "low_rank", "relative_error": 0.3, "multiple_of": 1, "schemes": ["vh", "svd"]}
    quantize = {"stage": "quantize", "images": 8, "method": "minmax"}
    values["stages"] = [load, prune, low_rank, finetune, export, quantize, verify]
    return values


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the place of every value, containers too."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from leaves(entry, (*path, key))


def text_with(values: dict[str, Any], path: tuple[str | int, ...], odd: str) -> str:
    """Return the text of a pipeline file with an odd value, as YAML spells it, in one place."""
    changed = copy.deepcopy(values)
    here: Any = changed
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = "ODD"
    text = yaml.safe_dump(changed, sort_keys=False, width=10**9)
    if odd == "BOMB":
        lines = ["bombs:", "  - &b0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"  - &b{level} [{', '.join([f'*b{level - 1}'] * 9)}]" for level in range(1, 9)]
        return "\n".join(lines) + "\n" + text.replace("ODD", BOMB)
    return text.replace("ODD", odd)


@contextmanager
def in_time(seconds: int) -> Iterator[list[bool]]:
    """Interrupt the block when it lasts too long; the list that it gets then is no longer empty."""
    late: list[bool] = []

    def stop(*_: object) -> None:
        late.append(True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield late
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(world: smallrun.World, text: str, commands: tuple[str, ...]) -> tuple[str, int, str]:
    """Give a pipeline file to commands until one refuses it; return the last one, its exit code and what it said."""
    path = world.folder / "odd.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    for command in commands:
        arguments = [] if command == "validate" else ["--runs-dir", str(world.runs)]
        with in_time(SECONDS) as late:
            done = smallrun.call(command, str(path), *arguments)
        if late:
            return command, -1, "it hangs"
        code = -2 if done.exception is not None and not isinstance(done.exception, SystemExit) else done.exit_code
        if code:
            break
    return command, code, f"{done.stdout[-300:]}{done.stderr[-500:]}"


def cases(values: dict[str, Any], count: int | None = None, seed: int = 0) -> list[KIND]:
    """Return places and odd values, shuffled; all of them or so many."""
    every = [(path, name) for path in leaves(values) for name in ODD]
    random.Random(seed).shuffle(every)
    return every[:count]


def fuzz(world: smallrun.World, count: int | None, commands: tuple[str, ...], say: Callable[[str], None]) -> list[str]:
    """Try odd values; return what went wrong with each that did."""
    values, wrong = base(world), []
    ends: Counter[str] = Counter()
    for path, name in cases(values, count):
        command, code, said = attempt(world, text_with(values, path, ODD[name]), commands)
        ends[f"{command} {code}"] += 1
        if code not in EXPECTED[command] or "Traceback" in said or (code and not said.strip()):
            wrong.append(f"{'.'.join(map(str, path))} = {name}: {command} ends with {code}: {said}")
            say(wrong[-1])
    say(f"{sum(ends.values())} values: {dict(sorted(ends.items()))}, {len(wrong)} wrong")
    return wrong


def main() -> int:
    """Try odd values and print what each came to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--run", action="store_true", help="also run the pipelines that are accepted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = smallrun.make_world(Path(folder))
        commands = ("validate", "plan", "run") if options.run else ("validate", "plan")
        return 1 if fuzz(world, options.count, commands, print) else 0


if __name__ == "__main__":
    sys.exit(main())
