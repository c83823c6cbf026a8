"""What does a network take, in milliseconds, at widths that were never timed? A table of sites, measured in place.

Variants of the network itself are timed node by node (`cost/variants.py`), because an operator alone in a small graph
pays for changes of memory layout that the network does not. A site's time at sizes (outputs, inputs) is

    measured      where a variant had a site of that kind at those sizes: the mean over all of them
    filled in     where none had:   own(outputs) * (base + slope * inputs)

with a factor of its own for every number of outputs, so that nothing is interpolated across a stair; along the inputs
a convolution adds up one block after the other. The sum over the sites is then held against whole variants, timed
without the clock inside:   network = scale * sum + offset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares

from compress.allocation.costs import Axis
from compress.allocation.problem import Factor, TableCost
from compress.cost.variants import Site, Sizes, site_of
from compress.errors import InternalError

QUANTILE = 0.25
HEAD, BEFORE = "before the first site", -1


@dataclass(frozen=True, slots=True)
class Entry:
    """What sites of one kind took at one pair of sizes.

    Attributes:
        milliseconds: Mean over the sites timed.
        spread: Half the range between the quartiles of single calls, as a share of their median; the worst site's.
        sites: How many were timed.
    """

    milliseconds: float
    spread: float
    sites: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One variant, timed.

    Attributes:
        sizes: What its layers had; layers not named were whole.
        site_ms: Site -> milliseconds; -1 stands for what runs before the first site.
        spreads: Site -> half the range between the quartiles of single calls, as a share of their median.
        total_ms: The whole variant.
    """

    sizes: Sizes
    site_ms: Mapping[int, float]
    spreads: Mapping[int, float]
    total_ms: float

    @classmethod
    def of(
        cls, sizes: Sizes, names: Sequence[str], node_ms: np.ndarray, total_ms: np.ndarray, slowness: float = 1.0
    ) -> Sample:
        """Sum up what was timed.

        Args:
            sizes: As above.
            names: Nodes in the order in which they ran.
            node_ms: (nodes, calls).
            total_ms: (calls,).
            slowness: How much slower than usual the machine was; times are divided by it.
        """
        times = site_times(names, node_ms)
        return cls(
            sizes,
            {site: float(np.quantile(calls, QUANTILE)) / slowness for site, calls in times.items()},
            {site: spread_of(calls) for site, calls in times.items()},
            float(np.quantile(total_ms, QUANTILE)) / slowness,
        )


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """What the sites of a network take, in milliseconds.

    Attributes:
        entries: Kind -> (outputs, inputs) -> entry. The kind HEAD has the one pair (0, 0).
        scale: Milliseconds of the network for a millisecond of the sum.
        offset_ms: What the network takes besides.
        error: Median of |predicted / measured - 1| over the variants timed.
        fills: Kind -> what fills in pairs that were not timed.
    """

    entries: Mapping[str, Mapping[tuple[int, int], Entry]]
    scale: float
    offset_ms: float
    error: float
    fills: Mapping[str, Fill] = field(default_factory=dict)

    def site_ms(self, kind: str, out: int, inp: int) -> float:
        """Return what a site adds to the network's time at the given sizes.

        Raises:
            InternalError: No site of this kind with as many outputs was ever timed.
        """
        known = self.entries.get(kind, {}).get((out, inp))
        if known is not None:
            return self.scale * known.milliseconds
        if kind not in self.fills or out not in self.fills[kind].own:
            raise InternalError(f"The latency table has no site '{kind}' with {out} outputs.")
        return self.scale * self.fills[kind].at(out, inp)

    def covers(self, sites: Sequence[Site]) -> bool:
        """Whether there are times for sites of all these kinds."""
        return all(site.kind in self.entries for site in sites)

    def network_ms(self, sites: Sequence[Site], sizes: Sizes) -> float:
        """Return what the network takes with layers at the given sizes; layers not named are whole."""
        parts = [self.site_ms(site.kind, *sizes.get(site.layer, site.sizes)) for site in sites]
        return self.fixed_ms + float(sum(parts))

    @property
    def fixed_ms(self) -> float:
        """What the network takes besides its sites."""
        head = self.entries.get(HEAD, {}).get((0, 0))
        return self.offset_ms + (self.scale * head.milliseconds if head is not None else 0.0)

    @property
    def spread(self) -> float:
        """The median over the entries of how much single calls scatter."""
        values = [entry.spread for pairs in self.entries.values() for entry in pairs.values()]
        return float(np.median(values)) if values else 0.0


@dataclass(frozen=True, slots=True)
class Fill:
    """own(outputs) * (base + slope * inputs)."""

    own: Mapping[int, float]
    base: float
    slope: float

    def at(self, out: int, inp: int) -> float:
        """Return milliseconds."""
        return self.own[out] * (self.base + self.slope * inp)


def build_table(sites: Sequence[Site], samples: Sequence[Sample]) -> LatencyTable:
    """Return the table of a network out of timed variants.

    Args:
        sites: Of the network that the variants are of.
        samples: At least two, one of them the whole network.
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
    fills = {kind: _fit_fill(pairs) for kind, pairs in entries.items() if kind != HEAD}
    bare = LatencyTable(entries, 1.0, 0.0, 0.0, fills)
    return _calibrated(bare, sites, samples)


def site_times(names: Sequence[str], node_ms: np.ndarray) -> dict[int, np.ndarray]:
    """Return site -> (calls,) the sum over its nodes; -1 stands for what runs before the first site.

    A node that the runtime put in (a change of memory layout) has no site in its name; it goes with the node before.
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


def _place(sites: Sequence[Site], number: int, sizes: Sizes) -> tuple[str, tuple[int, int]]:
    if number == BEFORE:
        return HEAD, (0, 0)
    if number >= len(sites):
        raise InternalError(f"A variant has a site {number}, its network has {len(sites)}.")
    site = sites[number]
    out, inp = sizes.get(site.layer, site.sizes)
    return site.kind, (int(out), int(inp))


def _fit_fill(pairs: Mapping[tuple[int, int], Entry]) -> Fill:
    """Fit own(outputs) * (base + slope * inputs) by least squares of the relative error, base and slope at least 0."""
    outs = sorted({out for out, _ in pairs})
    position = {out: index for index, out in enumerate(outs)}
    rows = np.asarray([position[out] for out, _ in pairs])
    inputs = np.asarray([inp for _, inp in pairs], dtype=np.float64)
    times = np.asarray([max(entry.milliseconds, 1e-6) for entry in pairs.values()])
    most = float(inputs.max())
    own = np.asarray(
        [np.mean(times[rows == row] / (0.1 + 0.9 * inputs[rows == row] / most)) for row in range(len(outs))]
    )

    def error(values: np.ndarray) -> np.ndarray:
        share = values[-1]
        return np.asarray(np.exp(values[:-1])[rows] * (share + (1 - share) * inputs / most) / times - 1)

    low, high = np.full(len(outs) + 1, -np.inf), np.full(len(outs) + 1, np.inf)
    low[-1], high[-1] = 0.0, 1.0
    found = least_squares(error, np.append(np.log(own), 0.1), bounds=(low, high)).x
    share = float(found[-1])
    return Fill(dict(zip(outs, np.exp(found[:-1]).tolist(), strict=True)), share, (1 - share) / most)


def _calibrated(table: LatencyTable, sites: Sequence[Site], samples: Sequence[Sample]) -> LatencyTable:
    """Hold the sums against whole variants; the relative error is made least, the scale at least 0."""
    sums = np.asarray([table.network_ms(sites, sample.sizes) for sample in samples])
    totals = np.asarray([sample.total_ms for sample in samples])
    columns = np.stack([sums, np.ones_like(sums)], axis=1) / totals[:, None]
    scale, offset = np.linalg.lstsq(columns, np.ones_like(sums), rcond=None)[0]
    if len(samples) < 4 or scale <= 0 or sums.max() < 1.2 * sums.min():
        scale, offset = float(np.median(totals / sums)), 0.0
    error = float(np.median(np.abs((scale * sums + offset) / totals - 1)))
    return LatencyTable(table.entries, float(scale), float(offset), error, table.fills)


def latency_cost(
    table: LatencyTable,
    sites: Sequence[Site],
    axes: Mapping[str, tuple[Axis, Axis]],
    levels: Mapping[str, Sequence[int]],
    switches: Mapping[str, str] | None = None,
) -> TableCost:
    """Return the network's latency as tables over the widths allowed.

    Args:
        table: What the sites take.
        sites: Of the network.
        axes: Layer -> (outputs, inputs) as functions of what groups lose.
        levels: Decision (channel group) -> its allowed widths, the last one full.
        switches: Layer -> the decision whose option 0 removes it.
    """
    removed = {name: widths[-1] - np.asarray(widths, dtype=np.float64) for name, widths in levels.items()}
    factors = []
    for site in sites:
        switch = (switches or {}).get(site.layer)
        out, inp = axes.get(site.layer, (Axis(site.sizes[0]), Axis(site.sizes[1])))
        names = sorted({*out.slots, *inp.slots} & set(levels))
        if len(names) > 2:
            factors += _linear_factors(table, site, out, inp, removed, switch)
            continue
        shape = tuple(len(levels[name]) for name in names)
        values = np.empty(shape)
        for options in np.ndindex(shape):
            lost = {name: int(removed[name][option]) for name, option in zip(names, options, strict=True)}
            values[options] = table.site_ms(site.kind, round(out.at(lost)), round(inp.at(lost)))
        factors.append(Factor(tuple(names), values, switch))
    fixed = sum(float(factor.table) for factor in factors if not factor.decisions and factor.switch is None)
    kept = tuple(factor for factor in factors if factor.decisions or factor.switch is not None)
    return TableCost(table.fixed_ms + fixed, kept)


def _linear_factors(
    table: LatencyTable, site: Site, out: Axis, inp: Axis, removed: Mapping[str, np.ndarray], switch: str | None
) -> list[Factor]:
    """Return the cost of a site that many groups narrow (behind a concatenation): a plane through its corners."""
    full = table.site_ms(site.kind, *site.sizes)
    factors = [Factor((), np.asarray(full), switch)]
    for axis, size in ((out, site.sizes[0]), (inp, site.sizes[1])):
        for name, slots in axis.slots.items():
            if name in removed and not (axis is inp and site.is_depthwise):
                factors.append(Factor((name,), -full * slots * removed[name] / size, switch))
    return factors
