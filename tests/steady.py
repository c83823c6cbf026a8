"""A machine without noise: networks take as long as their MACs say."""

from pathlib import Path

import numpy as np
import onnx

import compress.search.rank_latency as rank_latency
import compress.search.width_latency as latency
from compress.onnx_file.counting import rows_of
from compress.verification.measurement import PairLatency
from compress.verification.profiling import Profile
from compress.verification.runtimes.onnxruntime import NodeTimes

CALLS = 4


def _node_ms(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    model = onnx.load(path)
    rows = rows_of(model)
    assert len(rows) == len(model.graph.node)
    return tuple(node.name for node in model.graph.node), np.array([1e-4 + row.macs * 1e-6 for row in rows])


def _total_ms(path: Path) -> float:
    return float(_node_ms(path)[1].sum())


def _pair(path: Path, reference: Path) -> PairLatency:
    return PairLatency(_total_ms(path) / _total_ms(reference), _total_ms(reference))


def _profile_models(models, count, reference, *_others):
    for path in models:
        names, ms = _node_ms(path)
        total, whole = (np.full(CALLS, value) for value in (ms.sum(), _total_ms(reference)))
        yield Profile(NodeTimes(names, np.tile(ms[:, None], CALLS)), total, whole)


def time_by_macs(monkeypatch) -> None:
    """Let the stages time whole networks by their MACs, and tables be what they are."""

    def pair(timing, widths):
        (variant,) = timing._variants([timing.axes.sizes(widths)], timing.ctx.folder)
        return _pair(variant, timing.reference)

    monkeypatch.setattr(latency._Timing, "pair", pair)


def profile_by_macs(monkeypatch) -> None:
    """Let the stages fill tables by MACs too."""
    time_by_macs(monkeypatch)
    monkeypatch.setattr(latency, "profile_models", _profile_models)
    monkeypatch.setattr(rank_latency, "profile_models", _profile_models)
    monkeypatch.setattr(rank_latency, "measure_pair", lambda path, reference, *_others: _pair(path, reference))
