"""Run by several processes: rank 0 runs the pipeline, the others join wherever a network is trained.

    torchrun --nproc-per-node=4 -m compress run pipeline.yaml

The process of rank 0 does all the work of a single process. Before a stage that trains, it sends the stage and the
folder of its input to the other ranks. They run that stage as well, each on its part of every batch, and write nothing.
All ranks must see the same run folder.
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
    """Interface of rank 0 to the other processes of a run; for a single process, it does nothing."""

    def call(self, step: Step, key: str, source: Path | None) -> Context[Any]:
        """Return the context manager to run a stage in; it makes the other ranks join a stage that trains.

        Args:
            step: The stage.
            key: Cache key of the stage's result.
            source: Folder of the stage's input.
        """
        return nullcontext()


class _Several(Workers):
    """Interface to several processes.

    Attributes:
        is_at_work: True while the other ranks run a stage; they then notice its failure by themselves.
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
    """Yield the workers on rank 0; the other ranks first join its stages until the run ends, and then yield None.

    Args:
        follow: Function that runs a stage by its index, the key of its result and the folder of its input.
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
    """Return whether all ranks run a stage: it trains, and times no networks."""
    trains = step.entry.name == "finetune" or getattr(step.config, "method", None) is not None
    return trains and not needs_latency(step.config)
