"""Run by several processes: rank 0 runs the pipeline, the others join wherever a network is trained.

    torchrun --nproc-per-node=4 -m compress run pipeline.yaml

The process of rank 0 does all that a single one would. Before a stage that trains it tells the others which one, and
where its input lies; they run that stage as well, each on its part of every batch, and write nothing. All must see the
same run folder.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from compress.engine.keys import Step, needs_latency

_END = "end"


class Workers:
    """The processes of one run, as the one of rank 0 sees them; of a single one, nothing happens."""

    def call(self, step: Step, key: str, source: Path | None) -> Context[Any]:
        """Return what to run a stage in; where it trains, call the others to it.

        Args:
            step: The stage.
            key: Of its result.
            source: Folder of its input.
        """
        return nullcontext()


class _Several(Workers):
    """Several processes.

    Attributes:
        is_at_work: Whether the others are in a stage; they then meet what ends it by themselves.
    """

    is_at_work = False

    def call(self, step: Step, key: str, source: Path | None) -> Context[Any]:
        if not trains_together(step) or source is None:
            return nullcontext()
        return self._with_all({"index": step.index, "key": key, "source": str(source.resolve())})

    @contextmanager
    def _with_all(self, order: dict[str, Any]) -> Iterator[None]:
        from compress.training.distributed import tell, together

        tell(json.dumps(order))
        self.is_at_work = True
        with together():
            yield
        self.is_at_work = False


Follow = Callable[[int, str, Path], None]


@contextmanager
def workers(follow: Follow) -> Iterator[Workers | None]:
    """Give the workers to the process that runs the pipeline; the others follow it to its end, and get None.

    Args:
        follow: Runs a stage by its place, the key of its result and the folder of its input, and keeps nothing.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        yield Workers()
        return
    from compress.training.distributed import close_group, open_group, tell, together  # imports torch

    ranks, is_done = open_group(), False
    try:
        if ranks.rank > 0:
            while (said := tell()) != _END:
                order = json.loads(said)
                with together():
                    follow(order["index"], order["key"], Path(order["source"]))
            yield None
        else:
            several = _Several()
            try:
                yield several
            finally:
                if not several.is_at_work:
                    tell(_END)
        is_done = True
    finally:
        close_group(is_done)


def trains_together(step: Step) -> bool:
    """Return whether a stage trains, and does nothing that must not be done by several at once: timing networks."""
    trains = step.entry.name == "finetune" or getattr(step.config, "method", None) is not None
    return trains and not needs_latency(step.config)
