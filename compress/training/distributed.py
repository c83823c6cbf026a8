"""Distributed training: each rank sees a part of every batch, and all ranks take the same steps.

`torchrun` starts the processes. All of them run only the code inside `together`. Anywhere else, and in a single
process, there is one rank and these functions do nothing.
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


_is_together = False


def open_group() -> Ranks:
    """Join the process group that `torchrun` has started, and return its ranks."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(_agreed_name(store, rank, size), store)
    # an idle rank waits as long as it takes
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(days=30))
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
    """Leave the process group.

    Args:
        is_done: True if this process has reached the end. GPUs wait for one another here, so a failed process skips
            it.
    """
    if is_done or not torch.cuda.is_available():
        dist.destroy_process_group()


def tell(text: str | None = None) -> str:
    """Broadcast the text of rank 0, and return it on all ranks."""
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
    """Context manager for code that all ranks run."""
    global _is_together
    _is_together = True
    try:
        yield
    finally:
        _is_together = False


def current_ranks() -> Ranks:
    """Return the ranks that train: the process group inside `together`, else a single rank."""
    if not (_is_together and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())
