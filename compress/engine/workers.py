"""Run by several processes: rank 0 runs the pipeline, the others join wherever a network is trained.

    torchrun --nproc-per-node=4 -m compress run pipeline.yaml

The process of rank 0 does all the work of a single process. Before a stage that trains, it sends the stage and the
folder of its input to the other ranks. They run that stage as well, each on its part of every batch, up to the end of
its training. Of `slim`, they run only the trainings between its steps. Ranks other than 0 write no files, and print a
message only if rank 0 cannot. All ranks must see the same run folder.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from compress.engine.keys import Step
from compress.errors import INTERRUPTED_EXIT_CODE, CompressError, RankLost, StageError
from compress.user_code import as_stage_error

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

    def call_within(self, step: Step, key: str, source: Path | None) -> Callable[[int], Context[Any]]:
        """Return the function whose context managers make the other ranks join a numbered training of a stage.

        Args:
            step: A stage that rank 0 runs alone but for its trainings.
            key: Cache key of the stage's result.
            source: Folder of the stage's input.
        """
        return lambda _number: nullcontext()


class _Several(Workers):
    """Interface to several processes.

    Attributes:
        is_at_work: True once rank 0 has failed while the other ranks ran a stage; they notice that by themselves.
    """

    is_at_work = False

    def call(self, step: Step, key: str, source: Path | None) -> Context[Any]:
        if not trains_together(step) or source is None:
            return nullcontext()
        return self._with_all({"index": step.index, "key": key, "source": str(source.resolve()), "training": None})

    def call_within(self, step: Step, key: str, source: Path | None) -> Callable[[int], Context[Any]]:
        if source is None:
            return super().call_within(step, key, source)
        order = {"index": step.index, "key": key, "source": str(source.resolve())}
        return lambda number: self._with_all({**order, "training": number})

    @contextmanager
    def _with_all(self, order: dict[str, Any]) -> Iterator[None]:
        from compress.training.distributed import current_ranks, tell, together

        tell(json.dumps(order))
        with together():
            try:
                yield
            except BaseException:
                self.is_at_work = current_ranks().size > 1
                raise


Follow = Callable[[int, str, Path, int | None], None]


@contextmanager
def workers(follow: Follow) -> Iterator[Workers | None]:
    """Yield the workers on rank 0; the other ranks first join its stages until the run ends, and then yield None.

    Args:
        follow: Function that runs a stage by its index, the key of its result and the folder of its input; with a
            number, only that training of the stage.

    Raises:
        StageError: Another process has failed, with its message.
        SystemExit: This process has failed, and rank 0 prints the reason.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        yield Workers()
        return
    from compress.training.distributed import close_group, open_group  # imports torch

    ranks, is_done = open_group(), False
    failures = _failure_of_rank_0(ranks.size) if ranks.rank == 0 else _failure_of_another(ranks.rank)
    with failures:
        try:
            if ranks.rank > 0:
                _join(follow)
                yield None
            else:
                with _ended_at_last() as several:
                    yield several
            is_done = True
        finally:
            close_group(is_done)


def _join(follow: Follow) -> None:
    """Join the trainings of rank 0 until it ends the run."""
    from compress.training.distributed import tell, together

    while (said := tell()) != _END:
        order = json.loads(said)
        with together():
            follow(order["index"], order["key"], Path(order["source"]), order["training"])


@contextmanager
def _ended_at_last() -> Iterator[_Several]:
    """Yield the interface to the other processes, and end their work unless they are in a stage that has failed."""
    from compress.training.distributed import tell

    several = _Several()
    try:
        yield several
    except BaseException:
        if not several.is_at_work:
            with suppress(RankLost):  # the first error counts
                tell(_END)
        raise
    tell(_END)


@contextmanager
def _failure_of_rank_0(size: int) -> Iterator[None]:
    """Raise the failure of another rank in place of its loss, and let the other ranks end without a message."""
    from compress.training.distributed import open_messages

    messages = open_messages()
    try:
        yield
    except RankLost as error:
        failure = messages.hear_failure()
        if failure is None:
            raise
        rank, message, hint = failure
        raise StageError(f"Process {rank + 1} of {size} has failed: {message}", hint=hint) from error
    finally:
        messages.take_over()


@contextmanager
def _failure_of_another(rank: int) -> Iterator[None]:
    """Report a failure of this rank to rank 0, and end without a message where that prints one."""
    from compress.training.distributed import open_messages

    messages = open_messages()
    try:
        yield
    except BaseException as error:
        ours = as_stage_error(error) or error
        code = ours.exit_code if isinstance(ours, CompressError) else INTERRUPTED_EXIT_CODE
        is_printed = False
        if isinstance(ours, CompressError) and not isinstance(ours, RankLost):
            is_printed = messages.report_failure(rank, ours.message, ours.hint)
        elif isinstance(ours, RankLost | KeyboardInterrupt):
            is_printed = messages.is_taken_over()
        if is_printed:
            raise SystemExit(code) from None
        raise  # such as a bug, which writes a file of its own


def trains_together(step: Step) -> bool:
    """Return whether all ranks run a stage up to the end of its training; `slim` calls them for each training."""
    return step.entry.name == "finetune" or getattr(step.config, "method", None) is not None
