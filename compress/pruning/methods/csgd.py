"""Centripetal SGD: alike channels are drawn together until they are one, and are merged."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from compress.config.schema.methods import CsgdConfig
from compress.pruning.groups import BATCH_NORMS, ChannelGroup, Member, is_depthwise
from compress.pruning.methods.base import (
    GroupTensors,
    Removed,
    Rows,
    Setting,
    fixed_members,
    folded_filters,
    unfit_gate,
)

_STARTS, _ROUNDS = 4, 30


class Csgd:
    """Channels are parted into as many clusters as are to be left; those of a cluster become equal while training.

    All members of a cluster get the mean of their gradients, and are pulled towards their own mean by a factor sized so
    that what parts them comes to e^-8 by the last step. Then one of them stands for all: what reads them reads the one
    with the sum of the weights. How many clusters a group has follows from how far its channels would have to move.

    Args:
        setting: What to work with.
        options: See `CsgdConfig`.

    Raises:
        StageError: The run is too short for the channels to meet; says how many steps would do.

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
        """Say why the channels of a group cannot be merged, or None."""
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
        """All members of a cluster but the first."""
        removed = {}
        for name, clusters in (self.clusters or {}).items():
            _, first = np.unique(clusters.numpy(), return_index=True)
            if len(first) < len(clusters):
                removed[name] = tuple(sorted(set(range(len(clusters))) - {int(channel) for channel in first}))
        return removed

    @property
    def closed(self) -> tuple[str, ...]:
        """No residual block goes."""
        return ()

    def parameters(self) -> Iterable[Tensor]:
        """Return nothing: all that is learned is the network."""
        return ()

    def on_step_begin(self, step: int) -> None:
        """Part the channels into clusters before the first step."""
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

    def on_step_end(self, step: int) -> None:
        """Nothing is done."""

    @torch.no_grad()
    def finish(self) -> None:
        """Merge: the first of each cluster becomes their mean, and is read with the sum of their weights."""
        self._left = self._distance()
        for name, clusters in (self.clusters or {}).items():
            group = self.setting.groups[name]
            for rows in self.tensors[name].every():
                rows.set_values(_means(rows.values, rows, clusters))
            for norm in group.norms:
                _merge_statistics(norm, clusters)
            for reader in group.readers:
                _merge_columns(reader, clusters)

    def figures(self) -> dict[str, float]:
        """Return the share that is left of the distance of the channels to the means of their clusters."""
        return {"left_ratio": self._left / self._apart if self._apart else 0.0}

    def cause(self) -> str:
        """Say what it would come from, were the loss higher after the cut, and what would help."""
        left = self.figures()["left_ratio"]
        return f"Channels kept {left:.2%} of their distance from those they merge with; more steps would help."

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load_state_dict` goes on."""
        return {"clusters": self.clusters, "apart": self._apart}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.clusters, self._apart = state["clusters"], state["apart"]

    def _find_clusters(self) -> dict[str, Tensor]:
        features = {name: channel_features(group) for name, group in self.setting.groups.items()}
        curves = {name: self._clusterings(name, values) for name, values in features.items()}
        damages = {name: np.asarray([one.distortion for one in curve]) for name, curve in curves.items()}
        scores = {name: torch.zeros(len(values)) for name, values in features.items()}
        removed = self.setting.choose(scores, damages=damages, is_final=True)
        found = {}
        for name, curve in curves.items():
            width = len(scores[name]) - len(removed.get(name, ()))
            found[name] = torch.from_numpy(curve[list(self.setting.levels[name]).index(width)].labels)
        return found

    def _clusterings(self, name: str, features: np.ndarray) -> list["Clustering"]:
        return [clustering(features, count, self.setting.seed) for count in self.setting.levels[name]]

    def _distance(self) -> float:
        """Return the root of the sum of squares of what parts channels from the means of their clusters."""
        total = 0.0
        for name, clusters in (self.clusters or {}).items():
            for rows in self.tensors[name].every():
                total += float((rows.values - _means(rows.values, rows, clusters)).square().sum())
        return math.sqrt(total)


@dataclass(frozen=True, slots=True, eq=False)
class Clustering:
    """Channels in clusters.

    Attributes:
        labels: (C,) int64, the cluster of each.
        distortion: Sum of squared distances to the centres, as a share of that to one centre for all; in [0, 1].
    """

    labels: np.ndarray
    distortion: float


def clustering(features: np.ndarray, count: int, seed: int) -> Clustering:
    """Part (C, n) features into `count` clusters by k-means; none of them is empty."""
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
    """Give each empty cluster (of equal channels k-means leaves some) a member of the largest one."""
    labels = labels.copy()
    for empty in sorted(set(range(count)) - set(labels.tolist())):
        largest = np.bincount(labels, minlength=count).argmax()
        labels[np.flatnonzero(labels == largest)[-1]] = empty
    return labels


def channel_features(group: ChannelGroup) -> np.ndarray:
    """Return (C, n) of each channel the filters that produce it, scaled as batch norms scale; each row has norm 1."""
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
    """Let the first channel of each cluster be read with the sum of the weights of all, and the others with none."""
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
