"""Centripetal SGD: similar channels are pulled together while training until they are equal, and merged."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from compress.config.schema.methods import CsgdConfig
from compress.pruning.groups import BATCH_NORMS, ChannelGroup, Member, is_depthwise
from compress.pruning.methods.base import Removed, Setting, TrainingMethod
from compress.pruning.methods.group_tensors import GroupTensors, Rows, fixed_members, folded_filters, unfit_gate

_STARTS, _ROUNDS = 4, 30


class Csgd(TrainingMethod):
    """Training-time method: clusters of channels, one for each kept channel, whose members become equal.

    All members of a cluster get the mean of their gradients and are pulled towards their own mean. The factor of the
    pull brings their distance to e^-8 by the last step. Then the first member replaces all: readers read it with the
    sum of the weights. The number of clusters in a group follows from how far its channels would have to move.

    Args:
        setting: Network, budget and schedule.
        options: See `CsgdConfig`.

    Raises:
        StageError: The run is too short for the channels to meet; the hint names a sufficient number of steps.

    Source: Ding et al. 2019, "Centripetal SGD for Pruning Very Deep Convolutional Networks", arXiv:1904.03837. Widths
        by k-means distortion under a budget, clusters over all layers of a group, and the size of the pull are
        adaptations.
    """

    name: ClassVar[str] = "csgd"

    def __init__(self, setting: Setting, options: CsgdConfig | None = None) -> None:
        self.setting, self.options = setting, options or CsgdConfig()
        self.pull = self.options.pull or setting.sized_decay(0)
        if self.options.pull is not None:
            setting.require_decay(0, self.options.pull, f"csgd.pull {self.options.pull:g}")
        self.tensors = {name: GroupTensors(group) for name, group in setting.groups.items()}
        self.clusters: dict[str, Tensor] | None = None  # (C,) the cluster of each channel
        self._apart = self._left = 0.0

    @staticmethod
    def unfit(group: ChannelGroup) -> str | None:
        """Return the reason why the channels of a group cannot be merged, or None."""
        if group.parts > 1 or any(_groups_of(reader.module) > 1 for reader in group.readers):
            return "a grouped convolution computes or reads it"
        if shortcuts := fixed_members(group):
            return f"the shortcut '{shortcuts[0].layer}' gives each of them a channel of its own, which stay apart"
        if group.other_reads:
            return f"'{group.other_reads[0].path}' reads it, whose weights are fixed"
        if not all(isinstance(norm.module, BATCH_NORMS) for norm in group.norms):
            return "a norm other than batch norm lies behind it"
        return unfit_gate(group)

    @property
    def removed(self) -> Removed:
        """All members of each cluster except the first."""
        removed = {}
        for name, clusters in (self.clusters or {}).items():
            _, first = np.unique(clusters.numpy(), return_index=True)
            if len(first) < len(clusters):
                removed[name] = tuple(sorted(set(range(len(clusters))) - {int(channel) for channel in first}))
        return removed

    def on_step_begin(self, step: int) -> None:
        """Find the clusters before the first step."""
        if self.clusters is None:
            self.clusters = self._find_clusters()
            self._apart = self._distance()

    def on_gradients(self, step: int) -> None:
        """Give the members of each cluster their mean gradient, and pull them together."""
        for name, clusters in (self.clusters or {}).items():
            for rows in self.tensors[name].every():
                gradient, values = rows.gradient, rows.values
                pull = self.pull * (values - _means(values, rows, clusters))
                rows.set_gradient(_means(gradient, rows, clusters) + pull)

    @torch.no_grad()
    def finish(self) -> None:
        """Merge each cluster: its first member becomes the mean, and is read with the sum of the members' weights."""
        self._left = self._distance()
        for name, clusters in (self.clusters or {}).items():
            group = self.setting.groups[name]
            for rows in self.tensors[name].every():
                rows.set_values(_means(rows.values, rows, clusters))
            for norm in group.norms:
                _merge_statistics(norm, clusters)
            for reader in group.readers:
                _merge_columns(reader, clusters)

    def metrics(self) -> dict[str, float]:
        """Return the remaining share of the channels' distance to the means of their clusters."""
        return {"left_ratio": self._left / self._apart if self._apart else 0.0}

    def cause(self) -> str:
        """Return the likely cause of a higher loss after the cut, and the remedy."""
        left = self.metrics()["left_ratio"]
        return f"Channels kept {left:.2%} of their distance from those they merge with; more steps would help."

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` resumes."""
        return {"clusters": self.clusters, "apart": self._apart}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.clusters, self._apart = state["clusters"], state["apart"]

    def _find_clusters(self) -> dict[str, Tensor]:
        features = {name: channel_features(group) for name, group in self.setting.groups.items()}
        levels, seed = self.setting.levels, self.setting.seed
        curves = {
            name: [clustering(values, count, seed) for count in levels[name]] for name, values in features.items()
        }
        damages = {name: np.asarray([one.distortion for one in curve]) for name, curve in curves.items()}
        scores = {name: torch.zeros(len(values)) for name, values in features.items()}
        removed = self.setting.choose(scores, damages=damages, is_final=True)
        found = {}
        for name, curve in curves.items():
            width = len(scores[name]) - len(removed.get(name, ()))
            found[name] = torch.from_numpy(curve[list(levels[name]).index(width)].labels)
        return found

    def _distance(self) -> float:
        """Return the root of the sum of squared distances of channels to the means of their clusters."""
        total = 0.0
        for name, clusters in (self.clusters or {}).items():
            for rows in self.tensors[name].every():
                total += float((rows.values - _means(rows.values, rows, clusters)).square().sum())
        return math.sqrt(total)


@dataclass(frozen=True, slots=True, eq=False)
class Clustering:
    """Clusters of channels.

    Attributes:
        labels: (C,) int64, the cluster of each channel.
        distortion: Sum of squared distances to the centres, over the sum with one centre for all; in [0, 1].
    """

    labels: np.ndarray
    distortion: float


def clustering(features: np.ndarray, count: int, seed: int) -> Clustering:
    """Return `count` clusters of (C, n) features by k-means; none of them is empty."""
    _, equal = np.unique(features, axis=0, return_inverse=True)
    equal = equal.reshape(-1).astype(np.int64)
    if equal.max() < count:
        return Clustering(_filled(equal, count), 0.0)
    whole = _spread(features, np.zeros(len(features), dtype=np.int64))
    found = []
    for start in range(_STARTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an empty cluster, which is filled below
            _, labels = kmeans2(features, count, _ROUNDS, minit="++", seed=np.random.default_rng([seed, start]))
        found.append(_filled(labels.astype(np.int64), count))
    best = min(found, key=lambda labels: _spread(features, labels))
    return Clustering(best, _spread(features, best) / whole)


def _spread(features: np.ndarray, labels: np.ndarray) -> float:
    """Return the sum of squared distances to the centres of the clusters."""
    centres = np.stack([features[labels == label].mean(0) for label in range(labels.max() + 1)])
    return float(((features - centres[labels]) ** 2).sum())


def _filled(labels: np.ndarray, count: int) -> np.ndarray:
    """Move a member of the largest cluster to each empty one, such as k-means leaves among equal channels."""
    labels = labels.copy()
    for empty in sorted(set(range(count)) - set(labels.tolist())):
        largest = np.bincount(labels, minlength=count).argmax()
        labels[np.flatnonzero(labels == largest)[-1]] = empty
    return labels


def channel_features(group: ChannelGroup) -> np.ndarray:
    """Return (C, n) the filters that produce each channel, with batch norms folded in; each row has norm 1."""
    features = folded_filters(group)
    lengths = features.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return np.asarray((features / lengths).double().numpy())


def _means(values: Tensor, rows: Rows, clusters: Tensor) -> Tensor:
    """Return for each slot the mean over the slots of its cluster."""
    label = clusters[rows.channels]
    counts = torch.bincount(label, minlength=int(clusters.max()) + 1).clamp_min(1)
    label, counts = label.to(values.device), counts.reshape(-1, *[1] * (values.ndim - 1)).to(values.device)
    sums = values.new_zeros((len(counts), *values.shape[1:])).index_add_(0, label, values)
    return (sums / counts)[label]


def _merge_statistics(norm: Member, clusters: Tensor) -> None:
    """Average the running mean and variance of a batch norm over each cluster."""
    for name in ("running_mean", "running_var"):
        values = getattr(norm.module, name)
        if isinstance(values, Tensor):
            as_rows = Rows(nn.Parameter(values.clone()), norm.slots, norm.channels)
            values[norm.slots] = _means(as_rows.values, as_rows, clusters)


def _merge_columns(reader: Member, clusters: Tensor) -> None:
    """Move the weights that read a cluster to its first channel, as their sum; the others become 0."""
    layer = reader.module
    axis = 0 if getattr(layer, "transposed", False) else 1
    weight = layer.weight.transpose(0, axis)  # type: ignore[union-attr,operator]
    firsts = _firsts(clusters)
    before = {int(channel): reader.slots[reader.channels == channel] for channel in range(len(clusters))}
    columns = weight.clone()
    for slots in before.values():
        columns[slots] = 0
    for channel, slots in before.items():
        columns[before[firsts[int(clusters[channel])]]] += weight[slots]
    weight.copy_(columns)


def _firsts(clusters: Tensor) -> Mapping[int, int]:
    """Return cluster -> its first channel."""
    firsts: dict[int, int] = {}
    for channel, label in enumerate(clusters.tolist()):
        firsts.setdefault(label, channel)
    return firsts


def _groups_of(layer: nn.Module) -> int:
    return 1 if is_depthwise(layer) else int(getattr(layer, "groups", 1))
