"""Blocks of back-to-back calls, the unit of every latency measurement.

A sitting is one opening of a model, in which calls are made in blocks. Its latency is the median of the medians of its
blocks. A model is opened in several sittings, since the latency of each opening has an offset of its own (0.5 to 1 %).

The part between the two marks stands word for word in `compress/bundle/check.py`, which runs without this package.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

# -- begin of the arithmetic shared with the bundle's check --

SITTINGS = 6  # openings of each model
BLOCKS = 4  # of calls in a sitting
OPENING_S = 20.0  # to be spent on opening; where one opening takes more than a sixth of it, there are fewer sittings

WARM_MS = 50.0


def count_sittings(opening_s: float) -> int:
    """Return the number of sittings, at least 1, given the seconds that it takes to open all models once."""
    return max(1, min(SITTINGS, int(OPENING_S / max(opening_s, 1e-9))))


def count_warmup(asked: int, call_ms: float) -> int:
    """Return the untimed calls after a model was opened again: those asked for, of slow models 50 ms of them."""
    return max(1, min(asked, int(WARM_MS / max(call_ms, 1e-6))))


def plan_blocks(calls: int) -> list[int]:
    """Return the number of timed calls of each block, `calls` in all; a block has at least two where that is possible.

    >>> plan_blocks(10), plan_blocks(5), plan_blocks(1)
    ([3, 3, 2, 2], [3, 2], [1])
    """
    count = max(1, min(BLOCKS, calls // 2))
    return [calls // count + (number < calls % count) for number in range(count)]


def time_block(call: Callable[[], object], size: int, clock: Callable[[], float]) -> list[float]:
    """Return the milliseconds of `size` back-to-back calls; one call before them is not timed.

    So every timed call follows a call of the same model and finds the caches as that one left them.
    """
    call()
    times = []
    for _ in range(size):
        started = clock()
        call()
        times.append((clock() - started) * 1e3)
    return times


def median_of_blocks(blocks: Sequence[Sequence[float]]) -> float:
    """Return the median of the medians of the blocks: the latency of one sitting in milliseconds."""
    return median(median(block) for block in blocks)


# -- end of the arithmetic shared with the bundle's check --


def alternate(labels: Sequence[str], seed: int) -> Iterator[tuple[str, ...]]:
    """Yield orders of labels without end: a random order, its reverse, then both rotated by one position, and so on.

    In every two orders each label comes before each other label once. In every 2n orders of n labels each label takes
    each position twice, so that no label has an advantage. Then another random order begins.
    """
    source = random.Random(seed)
    while True:
        order = tuple(source.sample(labels, len(labels)))
        for turned in range(len(order)):
            yield (now := order[turned:] + order[:turned])
            yield now[::-1]


def time_in_blocks(
    calls: Mapping[str, Callable[[], object]],
    sizes: Sequence[int],
    orders: Iterator[tuple[str, ...]],
    clock: Callable[[], float],
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[list[float]]]:
    """Time several models in rounds, one block of each model a round.

    Args:
        calls: Label -> function that makes one call of the model.
        sizes: Timed calls of a block, one entry a round.
        orders: Iterator over the orders of the labels, one order a round.
        clock: Function that returns the time in seconds.
        on_round: Function called after each round.

    Returns:
        Label -> (rounds, calls) milliseconds.
    """
    blocks: dict[str, list[list[float]]] = {label: [] for label in calls}
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a call would be counted as its time
    try:
        for size in sizes:
            for label in next(orders):
                blocks[label].append(time_block(calls[label], size, clock))
            on_round()
    finally:
        if collecting:
            gc.enable()
    return blocks


def timed_positions(sizes: Sequence[int]) -> list[int]:
    """Return the positions of a model's timed calls among all its calls; the first call of each block is not timed.

    >>> timed_positions([2, 3])
    [1, 2, 4, 5, 6]
    """
    found: list[int] = []
    start = 0
    for size in sizes:
        found += range(start + 1, start + 1 + size)
        start += 1 + size
    return found
