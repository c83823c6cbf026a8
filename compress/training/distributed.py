"""Distributed training: each rank sees a part of every batch, and all ranks take the same steps.

`torchrun` starts the processes. All of them run only the code inside `together`; anywhere else, and in a single
process, there is one rank. Gradients are averaged by torch's `DistributedDataParallel`, through NCCL on GPUs and gloo
on CPUs. FSDP is not supported: every rank holds the complete network.

    training group    timeout of 30 minutes: gradients, statistics of batch norms, losses, votes
    waiting group     timeout of 30 days: orders of rank 0, and everything that rank 0 does while the others wait
"""

import json
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from compress.errors import RankLost

T = TypeVar("T")

TRAINING_TIMEOUT = timedelta(minutes=30)
WAITING_TIMEOUT = timedelta(days=30)
_POLL_S, _ANSWER_S, _PRINT_S = 0.05, 10.0, 2.0
_LOST = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "timed out waiting",
    "gloo",
    "nccl",
    "wait time",
)
_FAILURE, _TAKEN_OVER = "failure", "taken over"


@dataclass(frozen=True, slots=True)
class Ranks:
    """Ranks of one training.

    Attributes:
        rank: Number of this process, from 0; rank 0 writes files.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over the ranks, in place; the order must be the same on all ranks."""
        if self.size == 1:
            return
        by_type: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for several in by_type.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in several])
            add_up(flat)
            flat /= self.size
            parts = torch.split(flat, [tensor.numel() for tensor in several])
            for tensor, part in zip(several, parts, strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over the ranks."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        add_up(sums)
        found: list[float] = sums.tolist()
        return found

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any rank."""
        return self.total([float(flag)])[0] > 0


class Released(Exception):
    """Raised by `leave` on the ranks other than 0: their part of a stage is done."""


@dataclass(slots=True)
class _State:
    """State of this process.

    Attributes:
        is_together: True inside `together`.
        waiting: Process group with the long timeout; None for the default group.
        store: Store of this start, for messages about failures; None without `open_group`.
    """

    is_together: bool = False
    waiting: dist.ProcessGroup | None = None
    store: Store | None = None


_state = _State()


def open_group() -> Ranks:
    """Join the process group that `torchrun` has started, and return its ranks."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(_agreed_name(store, rank, size), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TRAINING_TIMEOUT)
    group = dist.new_group(backend="gloo", timeout=WAITING_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)  # this process is a member
    _state.waiting = group
    _state.store = store
    return Ranks(rank, size)


def _agreed_name(store: Store, rank: int, size: int) -> str:
    """Return a name that only the processes of this start know.

    After a restart the store still has entries of the processes before, such as their addresses. So each rank writes
    a random word, and rank 0 answers it with the name until all ranks have read their answers.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", own)
        name: str = store.get(f"answer/{own}").decode()
        store.set(f"{name}/knows/{rank}", "")
        return name
    others = range(1, size)
    while not all(store.check([f"{own}/knows/{other}"]) for other in others):
        for other in others:
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        time.sleep(_POLL_S)
    return own


def add_up(values: Tensor) -> None:
    """Replace a tensor by its sum over the ranks, in place.

    Raises:
        RankLost: Another process has ended, or has not answered for 30 minutes.
    """
    with _with_others():
        dist.all_reduce(values)


@contextmanager
def _with_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise rank_lost(error) from error


def is_lost(error: BaseException) -> bool:
    """Return whether an error of torch says that another process has ended or does not answer."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and dist.is_initialized() and any(part in text for part in _LOST)


def rank_lost(error: BaseException) -> RankLost:
    """Return the error to raise for one that `is_lost`."""
    text = str(error).splitlines()[0]
    if "timed out" in text.lower():
        return RankLost(
            f"All processes must take part in every step, another one has not answered for "
            f"{TRAINING_TIMEOUT.total_seconds() / 60:.0f} minutes: {text}",
            hint="Look for a process that is stuck. The same command goes on from the saved state.",
        )
    return RankLost(
        f"All processes must stay until the run is done, another one has ended: {text}",
        hint="Its own message says why. The same command goes on from the saved state.",
    )


def close_group(is_done: bool) -> None:
    """Leave the process group.

    Args:
        is_done: True if this process has reached the end. GPUs wait for one another here, so a failed process skips
            it.
    """
    _state.waiting = _state.store = None
    if dist.is_initialized() and (is_done or not torch.cuda.is_available()):
        dist.destroy_process_group()


def tell(text: str | None = None) -> str:
    """Broadcast the text of rank 0, and return it on all ranks; the others wait for it as long as it takes."""
    content = torch.tensor(list((text or "").encode()), dtype=torch.uint8)
    size = torch.tensor([len(content)])
    with _with_others():
        dist.broadcast(size, 0, group=_state.waiting)
        if dist.get_rank() > 0:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, 0, group=_state.waiting)
    return bytes(content.tolist()).decode()


@contextmanager
def together() -> Iterator[None]:
    """Context manager for code that all ranks run; ranks other than 0 skip the rest of it after `leave`."""
    _state.is_together = True
    try:
        with suppress(Released):
            yield
    finally:
        _state.is_together = False


def leave() -> None:
    """End the joint part of a stage: rank 0 goes on alone, the others leave `together`."""
    if current_ranks().rank > 0:
        raise Released
    _state.is_together = False


def current_ranks() -> Ranks:
    """Return the ranks that train: the process group inside `together`, else a single rank."""
    if not (_state.is_together and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


def wait_for_all() -> None:
    """Wait until all ranks have come here, as long as it takes."""
    if current_ranks().size > 1:
        with _with_others():
            dist.all_reduce(torch.zeros(1), group=_state.waiting)


def on_rank_0(work: Callable[[], T]) -> T | None:
    """Do work on rank 0 alone while the other ranks wait without load; return its result there, None on the others.

    Rank 0 begins once all ranks have come, so that nothing of this run disturbs what it times.
    """
    ranks = current_ranks()
    if ranks.size == 1:
        return work()
    wait_for_all()
    result = None
    if ranks.rank == 0:
        _state.is_together = False
        try:
            result = work()
        finally:
            _state.is_together = True
    wait_for_all()
    return result


def from_rank_0(make: Callable[[], Any]) -> Any:
    """Return what rank 0 makes, a JSON value, on all ranks; one rank returns it as it is."""
    ranks = current_ranks()
    if ranks.size == 1:
        return make()
    made = on_rank_0(make)
    return json.loads(tell(json.dumps(made) if ranks.rank == 0 else None))


class ParallelLoss:
    """Loss of a network whose gradients are averaged over the ranks during the backward pass.

    Args:
        module: The loss, or `DistributedDataParallel` around it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *inputs: Any, syncs: bool = True) -> Tensor:
        """Return the loss of a batch.

        Args:
            inputs: Arguments of the loss.
            syncs: False leaves the gradients of this batch to each rank; the next batch that syncs averages their sum.
        """
        module = self._module
        is_kept = isinstance(module, DistributedDataParallel) and not syncs
        with module.no_sync() if is_kept else nullcontext():  # type: ignore[no-untyped-call,operator]
            loss: Tensor = module(*inputs)
        return loss


class _Loss(nn.Module):
    """Loss and network in one module: the parameters that a loss does not depend on are found from the loss itself.

    Outputs are no measure of that. A network may have outputs that are not learned, and feature maps that are.
    """

    def __init__(self, network: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self._loss = network, loss

    def forward(self, *inputs: Any) -> Tensor:
        """Return the loss of a batch."""
        return self._loss(*inputs)


@contextmanager
def data_parallel(network: nn.Module, loss: Callable[..., Tensor], ranks: Ranks) -> Iterator[ParallelLoss]:
    """Wrap a loss in `DistributedDataParallel` within the context; afterwards nothing of it is left on the network.

    Parameters without a gradient are looked for in each step, as a network may skip layers at random. Buckets of
    gradients then stay as they are made first, so that a resumed run adds up in the same order.

    Args:
        network: Network on its device, on which the loss depends.
        loss: Computes the loss of a batch by the network.
        ranks: The ranks; for a single rank nothing is wrapped.
    """
    module = _Loss(network, loss)
    if ranks.size == 1:
        yield ParallelLoss(module)
        return
    with warnings.catch_warnings():
        # one warning that every parameter had a gradient in the first step, one that a newer torch renames a setting
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified")
        warnings.filterwarnings("ignore", message=".*broadcast_buffers")
        with _with_others():
            wrapped = DistributedDataParallel(
                module, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
            )
        try:
            yield ParallelLoss(wrapped)
        finally:
            wrapped.reducer._remove_autograd_hooks()
            for parameter in network.parameters():
                parameter.grad = None  # a view of a bucket


@dataclass(frozen=True, slots=True)
class Messages:
    """Messages between the ranks about failures, through the store, so that one rank prints.

    Attributes:
        store: Store of this start.
    """

    store: Store

    def report_failure(self, rank: int, message: str, hint: str | None) -> bool:
        """Return whether rank 0 prints the failure of this rank, or one of its own; wait for that for some seconds."""
        with suppress(RuntimeError):  # the store may have ended with another process
            self.store.set(_FAILURE, json.dumps([rank, message, hint]))
            return self.is_taken_over()
        return False

    def hear_failure(self) -> tuple[int, str, str | None] | None:
        """Return rank, message and hint of another rank's failure; None if none comes within some seconds."""
        with suppress(RuntimeError):
            if self._comes(_FAILURE):
                rank, message, hint = json.loads(self.store.get(_FAILURE))
                return rank, message, hint
        return None

    def take_over(self) -> None:
        """State that rank 0 prints what there is to print."""
        with suppress(RuntimeError):
            self.store.set(_TAKEN_OVER, "")

    def is_taken_over(self) -> bool:
        """Return whether rank 0 prints; wait for that for some seconds, and for the print itself.

        The starter of the processes ends all others as soon as one fails.
        """
        with suppress(RuntimeError):
            if self._comes(_TAKEN_OVER):
                time.sleep(_PRINT_S)
                return True
        return False

    def _comes(self, key: str) -> bool:
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            if self.store.check([key]):
                return True
            time.sleep(_POLL_S)
        return False


def open_messages() -> Messages:
    """Return the messages about failures; within `open_group` and `close_group`."""
    assert _state.store is not None
    return Messages(_state.store)
