"""Latency table of a network: milliseconds of its sites at any widths, from timed variants.

Variants of the network itself are timed node by node (`cost/variants.py`). An operator alone in a small graph would
need changes of memory layout that the network does not. The time of a site at sizes (outputs, inputs) is

    measured    where a variant had a site of that kind at those sizes: the mean over all such sites
    fitted      elsewhere: own(outputs) * (base + slope * inputs)

Every timed number of outputs has its own factor `own`, so that nothing is interpolated across a step of the runtime's
time. Along the inputs a convolution adds up one block after the other, which is linear. Behind a concatenation, groups
add up to other numbers of outputs; there the factor is interpolated between its neighbours.

The sum over the sites is calibrated on complete variants, timed without per-node profiling: network = scale * sum +
offset. Profiling adds its own time at every site, which makes the offset negative. A network of fewer sites (blocks
removed) has a proportional offset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy.optimize import least_squares

from compress.allocation.costs import Axis, whole_channels
from compress.allocation.problem import Factor, TableCost
from compress.allocation.sizes import SizeAxis, SizeFactor
from compress.cost.variants import Site, Sizes, site_of
from compress.errors import InternalError

_AxisKey = tuple[float, tuple[tuple[str, float], ...]]

QUANTILE = 0.25  # of a layer's calls
WHOLE_QUANTILE = 0.5  # of a complete network's, as choices are timed; a lower one favours short calls on a busy machine
HEAD, BEFORE = "before the first site", -1


@dataclass(frozen=True, slots=True)
class Entry:
    """Time of the sites of one kind at one pair of sizes.

    Attributes:
        milliseconds: Mean over the timed sites.
        spread: Largest spread of the timed sites (`spread_of`).
        sites: Number of timed sites.
    """

    milliseconds: float
    spread: float
    sites: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Measured times of one variant.

    Attributes:
        sizes: Layer -> (outputs, inputs); layers not named have their full sizes.
        site_ms: Site -> milliseconds; site -1 stands for all nodes before the first site.
        spreads: Site -> spread of its calls (`spread_of`).
        total_ms: Latency of the complete variant.
    """

    sizes: Sizes
    site_ms: Mapping[int, float]
    spreads: Mapping[int, float]
    total_ms: float

    @classmethod
    def of(
        cls, sizes: Sizes, names: Sequence[str], node_ms: np.ndarray, total_ms: np.ndarray, slowness: float = 1.0
    ) -> Sample:
        """Return the sample of a profile.

        Args:
            sizes: Layer -> (outputs, inputs); layers not named have their full sizes.
            names: Nodes in the order in which they ran.
            node_ms: (nodes, calls) times of the nodes.
            total_ms: (calls,) times of the complete variant.
            slowness: Slowness of the machine relative to its usual speed; times are divided by it.
        """
        times = site_times(names, node_ms)
        return cls(
            sizes,
            {site: float(np.quantile(calls, QUANTILE)) / slowness for site, calls in times.items()},
            {site: spread_of(calls) for site, calls in times.items()},
            float(np.quantile(total_ms, WHOLE_QUANTILE)) / slowness,
        )


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Milliseconds of the sites of a network.

    Attributes:
        entries: Kind -> (outputs, inputs) -> entry. The kind HEAD has the one pair (0, 0).
        scale: Milliseconds of the network per millisecond of the sum over the sites.
        offset_ms: Time of the network besides its sites; negative where their times include profiling overhead.
        error: Median of |predicted / measured - 1| over the timed variants.
        fills: Kind -> fitted times of the pairs that were not timed.
        sites: Number of sites in the timed network, which share the offset; 0 for an offset that does not depend on
            the number of sites.
    """

    entries: Mapping[str, Mapping[tuple[int, int], Entry]]
    scale: float
    offset_ms: float
    error: float
    fills: Mapping[str, Fill] = field(default_factory=dict)
    sites: int = 0

    def site_ms(self, kind: str, out: int, inp: int) -> float:
        """Return the time of a site at the given sizes.

        Raises:
            InternalError: No site of this kind was ever timed.
        """
        return float(self.sites_ms(kind, np.asarray(out), np.asarray(inp)))

    def sites_ms(self, kind: str, out: np.ndarray, inp: np.ndarray) -> np.ndarray:
        """Return the times of sites at arrays of sizes, in the shape to which the arrays broadcast."""
        if kind not in self.fills:
            raise InternalError(f"The latency table has no site '{kind}'.")
        out, inp = np.broadcast_arrays(out, inp)
        found = self.fills[kind].at(out, inp)
        known = self.entries[kind]
        codes = np.asarray([_code(*sizes) for sizes in known])
        order = np.argsort(codes)
        wanted = _code(out, inp)
        places = order[np.minimum(np.searchsorted(codes, wanted, sorter=order), len(codes) - 1)]
        times = np.asarray([entry.milliseconds for entry in known.values()])
        return np.asarray(self.scale * np.where(codes[places] == wanted, times[places], found))

    def covers(self, sites: Sequence[Site]) -> bool:
        """Return whether the table has times for the kinds of all given sites."""
        return all(site.kind in self.entries for site in sites)

    def network_ms(self, sites: Sequence[Site], sizes: Sizes) -> float:
        """Return the time of the network with layers at the given sizes; layers not named have their full sizes."""
        parts = [self.site_ms(site.kind, *sizes.get(site.layer, site.sizes)) for site in sites]
        return self.fixed_ms(len(sites)) + float(sum(parts))

    def fixed_ms(self, sites: int) -> float:
        """Return the time outside of the sites, for a network with this number of sites."""
        head = self.entries.get(HEAD, {}).get((0, 0))
        before = self.scale * head.milliseconds if head is not None else 0.0
        return before + self.share_ms * sites if self.sites else before + self.offset_ms

    @property
    def share_ms(self) -> float:
        """The part of the offset that comes with each site."""
        return self.offset_ms / self.sites if self.sites else 0.0

    @property
    def spread(self) -> float:
        """Median over the entries of the spread of single calls."""
        values = [entry.spread for pairs in self.entries.values() for entry in pairs.values()]
        return float(np.median(values)) if values else 0.0


def build_table(sites: Sequence[Site], samples: Sequence[Sample]) -> LatencyTable:
    """Return the table of a network out of timed variants.

    Args:
        sites: Sites of the network.
        samples: Timed variants, at least two; one of them is the baseline.
    """
    collected: dict[str, dict[tuple[int, int], list[tuple[float, float]]]] = {}
    for sample in samples:
        for number, milliseconds in sample.site_ms.items():
            kind, sizes = _place(sites, number, sample.sizes)
            collected.setdefault(kind, {}).setdefault(sizes, []).append((milliseconds, sample.spreads[number]))
    entries = {
        kind: {
            sizes: Entry(float(np.mean([v for v, _ in found])), max(s for _, s in found), len(found))
            for sizes, found in sorted(pairs.items())
        }
        for kind, pairs in collected.items()
    }
    fills = {
        kind: fit_fill({sizes: entry.milliseconds for sizes, entry in pairs.items()})
        for kind, pairs in entries.items()
        if kind != HEAD
    }
    bare = LatencyTable(entries, 1.0, 0.0, 0.0, fills)
    return _calibrated(bare, sites, samples)


def site_times(names: Sequence[str], node_ms: np.ndarray) -> dict[int, np.ndarray]:
    """Return site -> (calls,) sums over its nodes; site -1 stands for all nodes before the first site.

    A node that the runtime inserted (a change of memory layout) has no site in its name and counts for the site before.
    """
    times: dict[int, np.ndarray] = {}
    current = BEFORE
    for name, row in zip(names, node_ms, strict=True):
        found = site_of(name)
        current = current if found is None else found
        times[current] = times[current] + row if current in times else row
    return times


def spread_of(calls: np.ndarray) -> float:
    """Return half the range between the quartiles, as a share of the median.

    >>> spread_of(np.array([1.0, 2.0, 3.0]))
    0.25
    """
    low, middle, high = np.quantile(calls, (0.25, 0.5, 0.75))
    return float((high - low) / (2 * middle)) if middle > 0 else 0.0


def _code(out: Any, inp: Any) -> Any:
    """Return one integer for a pair of sizes, or an array of integers for arrays."""
    return out * 2**32 + inp


def _place(sites: Sequence[Site], number: int, sizes: Sizes) -> tuple[str, tuple[int, int]]:
    if number == BEFORE:
        return HEAD, (0, 0)
    if number >= len(sites):
        raise InternalError(f"A variant has a site {number}, its network has {len(sites)}.")
    site = sites[number]
    out, inp = sizes.get(site.layer, site.sizes)
    return site.kind, (int(out), int(inp))


def _calibrated(table: LatencyTable, sites: Sequence[Site], samples: Sequence[Sample]) -> LatencyTable:
    """Return the table calibrated on complete variants by least relative error; no prediction is negative."""
    sums = np.asarray([table.network_ms(sites, sample.sizes) for sample in samples])
    totals = np.asarray([sample.total_ms for sample in samples])
    columns = np.stack([sums, np.ones_like(sums)], axis=1) / totals[:, None]
    scale, offset = np.linalg.lstsq(columns, np.ones_like(sums), rcond=None)[0]
    least = sum(_least_ms(table, site.kind) for site in sites)
    if len(samples) < 4 or scale <= 0 or scale * least + offset <= 0 or sums.max() < 1.2 * sums.min():
        scale, offset = float(np.median(totals / sums)), 0.0
    error = float(np.median(np.abs((scale * sums + offset) / totals - 1)))
    of_clock = len(sites) if offset < 0 else 0  # only the overhead of profiling can make it negative
    return LatencyTable(table.entries, float(scale), float(offset), error, table.fills, of_clock)


def _least_ms(table: LatencyTable, kind: str) -> float:
    """Return a lower bound on the time of a site of a kind, over all sizes between the timed ones."""
    known, fill = table.entries[kind], table.fills[kind]
    least = min(fill.own.values()) * (fill.base + fill.slope * min(inp for _, inp in known))
    return min(least, *(entry.milliseconds for entry in known.values()))


class SiteTimes(Protocol):
    """Times of sites at any sizes, and of what comes besides them."""

    def sites_ms(self, kind: str, out: np.ndarray, inp: np.ndarray) -> np.ndarray:
        """Return the times of sites at arrays of sizes, in the shape to which the arrays broadcast."""
        ...

    def fixed_ms(self, sites: int) -> float:
        """Return the time outside of the sites, for a network with this number of sites."""
        ...

    @property
    def share_ms(self) -> float:
        """The part of it that comes with each site."""
        ...


def latency_cost(
    table: SiteTimes,
    sites: Sequence[Site],
    axes: Mapping[str, tuple[Axis, Axis]],
    levels: Mapping[str, Sequence[int]],
    switches: Mapping[str, str] | None = None,
) -> TableCost:
    """Return the latency as tables over the allowed widths, equal to `LatencyTable.network_ms` at all of them.

    Args:
        table: Times of the sites.
        sites: Sites of the network.
        axes: Layer -> (outputs, inputs) as functions of the channels removed from groups.
        levels: Decision (channel group) -> its allowed widths, the last one full.
        switches: Layer -> the decision whose option 0 removes the layer.
    """
    removed = {name: widths[-1] - np.asarray(widths, dtype=np.float64) for name, widths in levels.items()}
    known: dict[_AxisKey, SizeAxis] = {}
    factors, sized = [], []
    for site in sites:
        switch = (switches or {}).get(site.layer)
        out, inp = axes.get(site.layer, (Axis(site.sizes[0]), Axis(site.sizes[1])))
        outs, inps = (_size_axis(axis, removed, known) for axis in (out, inp))
        names = sorted({*outs.lost, *inps.lost})
        if len(names) > 2:
            sized.append(_size_factor(table, site.kind, outs, inps, switch))
            continue
        lost = np.meshgrid(*(np.arange(len(levels[name])) for name in names), indexing="ij")
        options = dict(zip(names, lost, strict=True))
        values = table.sites_ms(site.kind, _sizes_at(outs, options), _sizes_at(inps, options))
        values = values if switch is None else values + table.share_ms
        factors.append(Factor(tuple(names), values, switch))
    fixed = sum(float(factor.table) for factor in factors if not factor.decisions and factor.switch is None)
    kept = tuple(factor for factor in factors if factor.decisions or factor.switch is not None)
    always = sum((switches or {}).get(site.layer) is None for site in sites)
    return TableCost(table.fixed_ms(always) + fixed, kept, tuple(sized))


def _size_axis(axis: Axis, removed: Mapping[str, np.ndarray], known: dict[_AxisKey, SizeAxis]) -> SizeAxis:
    """Return a channel count as a function of options; the same object for the same count."""
    slots = {name: slots for name, slots in axis.slots.items() if name in removed}
    key = axis.size, tuple(sorted(slots.items()))
    if key not in known:
        known[key] = SizeAxis(axis.size, {name: slots[name] * removed[name] for name in sorted(slots)})
    return known[key]


def _sizes_at(axis: SizeAxis, options: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the kept channels at arrays of options of one shape."""
    return whole_channels(
        axis.full - sum((lost[options[name]] for name, lost in axis.lost.items()), start=np.zeros(()))
    )


def _size_factor(table: SiteTimes, kind: str, out: SizeAxis, inp: SizeAxis, switch: str | None) -> SizeFactor:
    """Return the cost of a site with sizes that depend on more than two groups."""
    share = 0.0 if switch is None else table.share_ms
    if out is inp:
        return SizeFactor((out,), table.sites_ms(kind, out.sizes, out.sizes) + share, switch)
    values = table.sites_ms(kind, out.sizes[:, None], inp.sizes[None, :]) + share
    if not out.lost:
        return SizeFactor((inp,), values[0], switch)
    return SizeFactor((out,), values[:, 0], switch) if not inp.lost else SizeFactor((out, inp), values, switch)


@dataclass(frozen=True, slots=True)
class Fill:
    """Fitted time of a kind of site: own(outputs) * (base + slope * inputs).

    Attributes:
        own: Number of outputs -> factor in ms; ascending.
        base: Part that does not depend on the inputs, at least 0.
        slope: Part for one input, at least 0.

    >>> fill = Fill({8: 1.0, 16: 3.0}, 0.5, 0.25)
    >>> fill.at(np.array([8, 12, 99]), np.array([2, 2, 2])).tolist()
    [1.0, 2.0, 3.0]
    """

    own: Mapping[int, float]
    base: float
    slope: float

    def at(self, out: np.ndarray | int, inp: np.ndarray | int) -> np.ndarray:
        """Return the milliseconds for numbers of outputs and inputs, arrays of the same shape."""
        own = np.interp(out, list(self.own), list(self.own.values()))
        return np.asarray(own * (self.base + self.slope * np.asarray(inp)))


def fit_fill(times: Mapping[tuple[int, int], float]) -> Fill:
    """Fit the times of sites of one kind by least squares of the relative error.

    Args:
        times: (outputs, inputs) -> milliseconds, at least one entry.
    """
    outs = sorted({out for out, _ in times})
    position = {out: index for index, out in enumerate(outs)}
    rows = np.asarray([position[out] for out, _ in times])
    inputs = np.asarray([inp for _, inp in times], dtype=np.float64)
    wanted = np.asarray([max(milliseconds, 1e-6) for milliseconds in times.values()])
    most = float(inputs.max())
    own = np.asarray(
        [np.mean(wanted[rows == row] / (0.1 + 0.9 * inputs[rows == row] / most)) for row in range(len(outs))]
    )

    def error(values: np.ndarray) -> np.ndarray:
        share = values[-1]
        return np.asarray(np.exp(values[:-1])[rows] * (share + (1 - share) * inputs / most) / wanted - 1)

    low, high = np.full(len(outs) + 1, -np.inf), np.full(len(outs) + 1, np.inf)
    low[-1], high[-1] = 0.0, 1.0
    found = least_squares(error, np.append(np.log(own), 0.1), bounds=(low, high)).x
    share = float(found[-1])
    return Fill(dict(zip(outs, np.exp(found[:-1]).tolist(), strict=True)), share, (1 - share) / most)
