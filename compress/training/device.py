"""Device of a training, and the transfer of images to it.

Everything outside the training loop runs on the CPU: a network is moved to the device and back. Random numbers are
drawn on the CPU, so that order and augmentation are the same on every device.
"""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.data.batches import CPU, PlacedSplit
from compress.data.sources.classification import ArraySource, ImageSource
from compress.data.splits import Split
from compress.errors import StageError

_MOST_OF_MEMORY = 0.4


def training_device(name: str) -> torch.device:
    """Return the device of a name: "cpu", "cuda", or "auto" for the GPU if torch sees one.

    With several processes on one machine, each takes the GPU of its local rank.

    Raises:
        StageError: A GPU is requested, but torch sees no GPU, or fewer GPUs than processes.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise StageError(
            "device cuda needs a GPU that torch can use, it sees none.",
            hint="Set device: cpu, or install a torch that was built for this GPU's driver.",
        )
    own, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= count:
        raise StageError(
            f"Each process on a machine must have a GPU of its own, torch sees {count}, this is process {own + 1}.",
            hint="Start as many processes as there are GPUs, or set device: cpu.",
        )
    torch.cuda.set_device(own)  # queries about "the" GPU then refer to this one
    return torch.device("cuda", own)


def require_precision(precision: str, device: torch.device) -> None:
    """Check that a device has instructions for a precision.

    Raises:
        StageError: The device lacks these instructions.
    """
    if device.type == "cpu":
        if precision == "bf16" and not has_bf16():
            raise StageError(
                f"precision bf16 must be one that this CPU has instructions for, it has "
                f"{torch.backends.cpu.get_cpu_capability()}.",
                hint="Leave precision out: on this CPU bf16 would be slower than fp32.",
            )
        if precision == "fp16":
            raise StageError(
                "precision fp16 needs a GPU, the network trains on the CPU.",
                hint="Leave precision out, or set device: cuda.",
            )
    elif precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise StageError(
            f"precision bf16 must be one that this GPU has instructions for, {torch.cuda.get_device_name(device)} "
            "has none.",
            hint="Set precision: fp16.",
        )


def has_bf16() -> bool:
    """Return whether this CPU has instructions for bfloat16; without them it is emulated, and slower than float32."""
    if platform.machine() in ("x86_64", "AMD64"):  # here the library accepts any AVX-512, and emulates
        return bool(torch.cpu.get_capabilities()["avx512_bf16"])
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def placed(splits: Sequence[Split], device: torch.device) -> list[Split]:
    """Return splits whose batches are made on a device; images held in memory are copied there once if they fit.

    Args:
        splits: Splits to place; splits of one source share one copy of its images on the device.
        device: Target device; for the CPU the splits are returned unchanged.
    """
    if device.type == "cpu":
        return list(splits)
    whole: dict[int, Tensor | None] = {}
    for split in splits:
        if id(split.source) not in whole:
            whole[id(split.source)] = resident(split.source, device)
    return [
        PlacedSplit(
            one.name, one.source, one.indices, one.preprocessing, one.task, one.original, device, whole[id(one.source)]
        )
        for one in splits
    ]


def resident(source: ImageSource, device: torch.device) -> Tensor | None:
    """Return all images of a source on a device, (N, H, W, C) uint8; None if they are not an array in memory.

    Return None, too, if they need more than two fifths of the free GPU memory.
    """
    if not isinstance(source, ArraySource) or source.fit_image is not None:
        return None
    if device.type == "cuda" and source.images.nbytes > _MOST_OF_MEMORY * torch.cuda.mem_get_info(device)[0]:
        return None
    return torch.tensor(source.images).to(device)  # a copy first: torch dislikes arrays that must not be written to


@contextmanager
def moved(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Keep networks on a device within the context, then move them back to the CPU."""
    try:
        for network in networks:
            network.to(device)
        yield
    finally:
        for network in networks:
            network.to(CPU)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Make the CPU treat denormal numbers, which slow it down many times over, as zero; restore the setting at the end.

    For training only: within the context, every denormal number in the process counts as zero.
    """
    were_flushed = float(torch.tensor(1e-310, dtype=torch.float64) * 1) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_flushed)
