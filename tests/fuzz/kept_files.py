"""Changed bits in what a run keeps: its store, its report, its slim checkpoint. None passes for what was written.

python tests/fuzz/kept_files.py [--count N]
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import smallrun

import compress
from compress.errors import CompressError
from compress.storage.store import Store


def flip(path: Path, chance: random.Random) -> tuple[bytes, str]:
    """Change one bit of a file; return what it was, and where."""
    whole = path.read_bytes()
    place, bit = chance.randrange(len(whole)), chance.randrange(8)
    changed = bytearray(whole)
    changed[place] ^= 1 << bit
    path.write_bytes(changed)
    return whole, f"{path.name}, byte {place} of {len(whole)}, bit {bit}"


def means_the_same(path: Path, whole: bytes) -> bool:
    """Whether a changed JSON file still says the same, as after a change of its white space."""
    try:
        return path.suffix == ".json" and json.loads(path.read_bytes()) == json.loads(whole)
    except ValueError:
        return False


def try_store(world: smallrun.World, path: Path, whole: bytes) -> str:
    """Return what is wrong with how a damaged entry is met; "" when nothing is."""
    key = path.relative_to(world.store).parts[0]
    warned: list[str] = []
    if Store(world.store, warned.append).get(key) is not None:
        return "" if means_the_same(path, whole) else "a damaged entry passes for whole"
    if len(warned) != 1:
        return "nothing is said"
    done = smallrun.call("plan", str(world.folder / "chain.yaml"), "--runs-dir", str(world.runs))
    return "" if done.exit_code == 0 and " run " in done.stdout else f"plan ends with {done.exit_code}: {done.output}"


def try_report(world: smallrun.World, path: Path, whole: bytes) -> str:
    """As `try_store`, of the report."""
    page = world.folder / "page.html"
    done = smallrun.call("report", str(world.runs / "chain"), "--out", str(page))
    if done.exit_code == 0:
        return "" if means_the_same(path, whole) else "a damaged report is shown"
    if done.exit_code != 4:
        return f"report ends with {done.exit_code}: {done.output}"
    done = smallrun.call("bundle", str(world.runs / "chain"), "-o", str(world.folder / "it.zip"), "--force")
    return "" if done.exit_code == 4 else f"bundle ends with {done.exit_code}: {done.output}"


def try_slim(world: smallrun.World, path: Path, whole: bytes) -> str:
    """As `try_store`, of the slim checkpoint."""
    try:
        compress.load(world.runs / "chain")
    except CompressError as error:
        return "" if error.exit_code == 4 and error.hint else f"{type(error).__name__} without a hint: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if means_the_same(path, whole) else "a damaged checkpoint loads"


def try_rest(world: smallrun.World, path: Path, whole: bytes) -> str:
    """As `try_store`, of files that a run writes for people and for messages."""
    done = smallrun.call("plan", str(world.folder / "chain.yaml"), "--runs-dir", str(world.runs))
    return "" if done.exit_code == 0 else f"plan ends with {done.exit_code}: {done.output}"


Try = Callable[[smallrun.World, Path, bytes], str]


def targets(world: smallrun.World) -> list[tuple[list[Path], Try]]:
    """Return kinds of files and how each is tried."""
    run = world.runs / "chain"
    entries = [folder for folder in sorted(world.store.iterdir()) if not folder.name.startswith(".")]
    records = [folder / "entry.json" for folder in entries]
    others = [
        file for folder in entries for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size
    ]
    slim = [file for file in sorted((run / "slim").iterdir()) if file.stat().st_size]
    rest = [run / "lock", run / "pipeline.yaml", run / ".holder"]
    return [(records, try_store), (others, try_store), ([run / "report.json"], try_report), (slim, try_slim),
            (rest, try_rest)]  # fmt: skip


def fuzz(world: smallrun.World, count: int, say: Callable[[str], None], seed: int = 0) -> list[str]:
    """Change bits, one at a time, in a finished run; return what went wrong with each that did."""
    chance, wrong = random.Random(seed), []
    tried: Counter[str] = Counter()
    kinds = targets(world)
    for number in range(count):
        files, attempt = kinds[number % len(kinds)]
        path = chance.choice(files)
        links = path.stat().st_nlink
        if links > 1:  # a hard link of the store: only this file is to change
            shutil.copyfile(path, path.with_name("copy"))
            path.with_name("copy").replace(path)
        whole, where = flip(path, chance)
        tried[attempt.__name__] += 1
        if said := attempt(world, path, whole):
            wrong.append(f"{where}: {said}")
            say(wrong[-1])
        path.write_bytes(whole)
    say(f"{count} changed bits: {dict(tried)}, {len(wrong)} wrong")
    return wrong


def main() -> int:
    """Change bits and print what each came to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    options = parser.parse_args()
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        world = smallrun.make_world(Path(folder))
        values = world.values()
        world.run(values)
        return 1 if fuzz(world, options.count, print) else 0


if __name__ == "__main__":
    sys.exit(main())
