"""Times of the nodes of several models, and of complete calls of each model, beside one reference.

At most `TOGETHER` models are timed at a time, in rounds of blocks with the reference: node by node, and as complete
calls in another session without per-node profiling. The reference's times show the machine's speed in those rounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from compress.errors import ConfigValueError
from compress.progress import Progress, SilentProgress
from compress.verification.call_blocks import plan_blocks, timed_positions
from compress.verification.latency import measure_latency
from compress.verification.measurement import Conditions
from compress.verification.runtimes.onnxruntime import NodeTimes, OnnxRuntime

TOGETHER = 1  # more of them push one another out of the caches, the large more than the small
WARMUP = 3
_MS_EACH, _FEWEST_CALLS = 4.0, 0.1  # for each requested repeat

Inputs = Callable[[OnnxRuntime], Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Profile of one model: times of its nodes and of complete calls.

    Attributes:
        nodes: Times of each node.
        total_ms: (calls,) times of the model without per-node profiling.
        reference_ms: (calls,) times of the reference in the same rounds.
    """

    nodes: NodeTimes
    total_ms: np.ndarray
    reference_ms: np.ndarray


def profile_models(
    models: Iterable[Path],
    count: int,
    reference: Path,
    inputs: Inputs,
    conditions: Conditions,
    progress: Progress | None = None,
) -> Iterator[Profile]:
    """Yield the profile of each model, in order.

    Args:
        models: Model files, requested a few at a time, so that the iterable may write them one by one.
        count: Number of models, for the progress.
        reference: File that every model is timed next to.
        inputs: Function that makes the inputs of an open runtime.
        conditions: Conditions of the measurement; the runtime must be ONNX Runtime.
        progress: Receives progress by model.

    Raises:
        ConfigValueError: The runtime cannot time single nodes.
        ArtifactError, ModelError: A model cannot be opened or run.
        RuntimeUnavailable: The provider is not available.
    """
    if conditions.runtime != OnnxRuntime.name:
        raise ConfigValueError(
            f"deploy.runtime must be {OnnxRuntime.name} for a budget in milliseconds, got {conditions.runtime}."
        )
    iterator, is_reference_first = iter(models), True
    with (progress or SilentProgress()).task("time variants of the network", count) as task:
        while batch := list(islice(iterator, TOGETHER)):
            yield from _profile_together(batch, reference, inputs, conditions, is_reference_first)
            is_reference_first = not is_reference_first  # the session opened first is a little slower
            task.advance(len(batch))


def _profile_together(
    paths: list[Path], reference: Path, inputs: Inputs, conditions: Conditions, is_reference_first: bool
) -> Iterator[Profile]:
    with ExitStack() as stack:
        plain, profiled = {}, {}
        for number, path in list(enumerate([reference, *paths]))[:: 1 if is_reference_first else -1]:
            plain[number] = stack.enter_context(OnnxRuntime(path, conditions.provider, conditions.threads))
            if number:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                profiled[number] = stack.enter_context(
                    OnnxRuntime(path, conditions.provider, conditions.threads, profile_folder=folder)
                )
        sessions = {("plain", n): s for n, s in plain.items()} | {("nodes", n): s for n, s in profiled.items()}
        labels = {f"{kind} {number}": session for (kind, number), session in sessions.items()}
        feeds = {label: inputs(session) for label, session in labels.items()}
        first = measure_latency(labels, feeds, WARMUP, 1)
        slowest = max(sample.p50 for sample in first.values())
        repeats = max(2, round(conditions.repeats * float(np.clip(_MS_EACH / slowest, _FEWEST_CALLS, 1.0))))
        sizes = plan_blocks(repeats)
        made, timed = sum(sizes) + len(sizes), timed_positions(sizes)
        samples = measure_latency(labels, feeds, 0, repeats)
        reference_ms = np.asarray(samples["plain 0"].milliseconds)
        for number in profiled:
            nodes = profiled[number].read_profile()
            warm = NodeTimes(nodes.names, nodes.milliseconds[:, -made:][:, timed])
            yield Profile(warm, np.asarray(samples[f"plain {number}"].milliseconds), reference_ms)
