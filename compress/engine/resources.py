"""Processes and hosts for the runs of a sweep or search, as the command line names them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resources:
    """Processes and hosts for jobs.

    Attributes:
        jobs: Number of jobs at a time; None for one in this process, and for as many as a cluster can take.
        ray: Address of a Ray cluster, or "local" for one on this machine; None for no Ray.
        cpus: Cores of a job on Ray.
        gpus: GPUs of a stage that does not measure latency, on Ray.
        device: Name of the device that latency is measured on: nodes with the resource "device:NAME"; None for any node
            with the resource "timing".
    """

    jobs: int | None = None
    ray: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    device: str | None = None
