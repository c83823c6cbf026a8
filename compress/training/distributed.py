"""Distributed training: each process sees a part of every batch, and all take the same steps.

The processes are those that `torchrun` started. Only code inside `together` runs in all of them. Anywhere else, and in
a single process, there is one rank and these functions do nothing.
"""

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from compress.errors import StageError

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of one training.

    Attributes:
        rank: Which of them this is; 0 writes files.
        size: How many they are.
    """

    rank: int = 0
    size: int = 1

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over the processes, in place; all give the same ones in the same order."""
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
        """Return the sums of numbers over the processes."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        add_up(sums)
        found: list[float] = sums.tolist()
        return found

    def any(self, flag: bool) -> bool:
        """Return whether it is true in any of the processes."""
        return self.total([float(flag)])[0] > 0


_is_together = False


def open_group() -> Ranks:
    """Meet the other processes that `torchrun` has started, and return who they are and who this is."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(_agreed_name(store, rank, size), store)
    # one that has nothing to do waits as long as it takes
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(days=30))
    return Ranks(rank, size)


def _agreed_name(store: Store, rank: int, size: int) -> str:
    """Return a name that only the processes of this start know.

    After a restart the store still has what the processes before have left in it, such as their addresses. So each
    says a word of its own, and the first one answers it until all have taken the name from their answer.
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
    """Replace a tensor by its sum over the processes, in place.

    Raises:
        StageError: Another process has ended.
    """
    with _with_others():
        dist.all_reduce(values)


@contextmanager
def _with_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise StageError(
            f"All processes must stay until the run is done, another one has ended: {str(error).splitlines()[0]}",
            hint="Its own message says why. The same command goes on from the saved state.",
        ) from error


def close_group(is_done: bool) -> None:
    """Part.

    Args:
        is_done: Whether all processes have come to the end; GPUs wait for one another here, so that one which has
            failed must not.
    """
    if is_done or not torch.cuda.is_available():
        dist.destroy_process_group()


def tell(text: str | None = None) -> str:
    """Return to all processes what the one of rank 0 says."""
    content = torch.tensor(list((text or "").encode()), dtype=torch.uint8)
    size = torch.tensor([len(content)])
    with _with_others():
        dist.broadcast(size, 0)
        if dist.get_rank() > 0:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, 0)
    return bytes(content.tolist()).decode()


@contextmanager
def together() -> Iterator[None]:
    """Context manager for code that all processes run."""
    global _is_together
    _is_together = True
    try:
        yield
    finally:
        _is_together = False


def current_ranks() -> Ranks:
    """Return who trains: the processes that met, inside `together`; else a ranks of one."""
    if not (_is_together and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())
