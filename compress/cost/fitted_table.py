"""Latency table fitted to complete variants, for a device that cannot time single nodes.

The time of a variant is a sum over its sites and a fixed part. The time of a site at sizes (outputs, inputs) is

    prior      rate of its operator * MACs + rate * elements, with both sizes rounded up to blocks of the runtime
    + kind     a factor, a constant and slopes of its kind
    + stairs   a deviation of each timed number of outputs and of inputs, interpolated in between

Rates and blocks are shared by all kinds of one operator. Deviations are normally distributed about zero, so the fit is
a regression with a covariance: Bayesian linear regression. Blocks and sizes of the deviations are those under which
the timed variants are most likely. The covariance gives a standard error of every entry and of every network, and the
networks with the largest errors are those to time next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import nnls

from compress.cost.latency_table import Sample
from compress.cost.variants import Site, Sizes
from compress.errors import InternalError

BLOCKS = ((1, 1), (4, 1), (4, 4), (8, 1), (8, 8), (16, 1), (16, 16), (32, 32))  # (outputs, inputs)
_KIND_DEVIATIONS, _STAIRS = (0.1, 0.3, 1.0), (0.01, 0.03, 0.1, 0.3)  # relative standard deviations
_NOISE = (0.0003, 0.001, 0.003, 0.006, 0.012, 0.025, 0.05)  # of one variant, relative
_FLOOR = 0.02  # of a network's time, shared out by work: the least scale of deviations
_LEAST = 0.02  # of the scale; no site is faster
_KNOTS = 16
_OUTLIER = 3.0  # standard errors
_AT_ONCE = 4096


@dataclass(frozen=True)
class _Kind:
    """Work of the sites of one kind.

    Attributes:
        operator: Operator, kernel and whether it is depthwise: kinds of one operator share their rates.
        macs: MACs for one output and one input channel; for a depthwise convolution for one channel.
        out_elements: Elements for one output channel.
        in_elements: Elements for one input channel.
        most: Largest (outputs, inputs) of its sites.
        is_depthwise: Whether outputs and inputs are the same channels.
    """

    operator: str
    macs: float
    out_elements: float
    in_elements: float
    most: tuple[int, int]
    is_depthwise: bool

    def work(self, out: np.ndarray, inp: np.ndarray, blocks: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return MACs and elements at sizes that are rounded up to blocks."""
        out, inp = _rounded(out, blocks[0]), _rounded(inp, blocks[1])
        macs = self.macs * out if self.is_depthwise else self.macs * out * inp
        return macs, self.out_elements * out + self.in_elements * (out if self.is_depthwise else inp)


@dataclass(frozen=True)
class _Prior:
    """Prior time of one kind, and the features of its deviations.

    Attributes:
        kind: Work of the kind.
        blocks: Blocks of the runtime along outputs and inputs.
        rates: Milliseconds for a MAC and for an element.
        floor: Least rates, for the scale of deviations.
        knots: Numbers of outputs and of inputs with a deviation of their own; ascending.
    """

    kind: _Kind
    blocks: tuple[int, int]
    rates: tuple[float, float]
    floor: tuple[float, float]
    knots: tuple[np.ndarray, np.ndarray]

    def mean(self, out: np.ndarray, inp: np.ndarray) -> np.ndarray:
        """Return the prior milliseconds."""
        macs, elements = self.kind.work(out, inp, self.blocks)
        return np.asarray(self.rates[0] * macs + self.rates[1] * elements)

    def scale(self, out: np.ndarray, inp: np.ndarray) -> np.ndarray:
        """Return the milliseconds that deviations are relative to."""
        macs, elements = self.kind.work(out, inp, self.blocks)
        return np.asarray(self.mean(out, inp) + self.floor[0] * macs + self.floor[1] * elements)

    def features(self, out: np.ndarray, inp: np.ndarray) -> np.ndarray:
        """Return (..., features): those of the kind, then one for each knot."""
        scale = self.scale(out, inp)
        whole = 0.5 * self.scale(*(np.asarray(size, dtype=float) for size in self.kind.most))
        most_out, most_in = self.kind.most
        own = [scale, np.broadcast_to(whole, scale.shape), whole * out / most_out, whole * inp / most_in]
        stairs = [_hats(out, self.knots[0]), _hats(inp, self.knots[1])]
        return np.concatenate(
            [np.stack(own, axis=-1), *(scale[..., None] * one for one in stairs)], axis=-1, dtype=float
        )

    @property
    def is_stair(self) -> np.ndarray:
        """Return (features,) whether a feature is a deviation at a knot."""
        return np.asarray([False] * 4 + [True] * sum(map(len, self.knots)))


@dataclass(frozen=True, eq=False)
class FittedTable:
    """Milliseconds of the sites of a network, fitted to complete variants.

    Attributes:
        priors: Kind -> prior and features.
        weights: Kind -> (features,) fitted weights.
        offset_ms: Time of the network besides its sites, which comes in equal parts with the sites.
        sites: Sites of the timed network.
        samples: Timed variants.
        predicted_ms: (samples,) prediction of each variant by a fit without it.
        noise: Standard deviation of one measurement, relative.
        covariance: (1 + features, 1 + features) covariance of offset and weights, kinds in the order of `priors`.
    """

    priors: Mapping[str, _Prior]
    weights: Mapping[str, np.ndarray]
    offset_ms: float
    sites: tuple[Site, ...]
    samples: tuple[Sample, ...]
    predicted_ms: tuple[float, ...]
    noise: float
    covariance: np.ndarray = field(repr=False)
    offset_scale: float = 1.0

    def site_ms(self, kind: str, out: int, inp: int) -> float:
        """Return the time of a site at the given sizes.

        Raises:
            InternalError: The timed network has no site of this kind.
        """
        return float(self.sites_ms(kind, np.asarray(out), np.asarray(inp)))

    def sites_ms(self, kind: str, out: np.ndarray, inp: np.ndarray) -> np.ndarray:
        """Return the times of sites at arrays of sizes, in the shape to which the arrays broadcast."""
        if kind not in self.priors:
            raise InternalError(f"The latency table has no site '{kind}'.")
        out, inp = np.broadcast_arrays(np.asarray(out, dtype=float), np.asarray(inp, dtype=float))
        prior, weights = self.priors[kind], self.weights[kind]
        flat = [np.zeros(0)]
        for start in range(0, out.size, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            sizes = out.ravel()[part], inp.ravel()[part]
            times = prior.mean(*sizes) + prior.features(*sizes) @ weights
            flat.append(np.maximum(times, _LEAST * prior.scale(*sizes)))
        return np.concatenate(flat).reshape(out.shape)

    def covers(self, sites: Sequence[Site]) -> bool:
        """Return whether the table has times for the kinds of all given sites."""
        return all(site.kind in self.priors for site in sites)

    def network_ms(self, sites: Sequence[Site], sizes: Sizes) -> float:
        """Return the time of the network with layers at the given sizes; layers not named have their full sizes."""
        parts = [self.site_ms(site.kind, *sizes.get(site.layer, site.sizes)) for site in sites]
        return self.fixed_ms(len(sites)) + float(sum(parts))

    def fixed_ms(self, sites: int) -> float:
        """Return the time outside of the sites, for a network with this number of sites."""
        return self.share_ms * sites

    @property
    def share_ms(self) -> float:
        """The part of the offset that comes with each site."""
        return self.offset_ms / len(self.sites)

    @property
    def spread(self) -> float:
        """Median over the variants of the spread of single calls."""
        return float(np.median([spread for sample in self.samples for spread in sample.spreads.values()] or [0.0]))

    @property
    def error(self) -> float:
        """Median of |predicted / measured - 1| over the variants, each predicted by a fit without it."""
        totals = np.asarray([sample.total_ms for sample in self.samples])
        return float(np.median(np.abs(np.asarray(self.predicted_ms) / totals - 1)))

    @cached_property
    def entry_errors_ms(self) -> dict[tuple[str, int, int], float]:
        """Standard error of each (kind, outputs, inputs) in the variants, in ms."""
        found: dict[tuple[str, int, int], float] = {}
        places = self._places()
        for sample in self.samples:
            for site in self.sites:
                out, inp = sample.sizes.get(site.layer, site.sizes)
                if (site.kind, out, inp) in found:
                    continue
                features = self.priors[site.kind].features(np.asarray(float(out)), np.asarray(float(inp)))
                place = places[site.kind]
                variance = float(features @ self.covariance[place, place] @ features)
                found[site.kind, out, inp] = max(variance, 0.0) ** 0.5
        return found

    @property
    def entry_error(self) -> float:
        """Median standard error of the entries, as a share of the network's latency at full sizes."""
        return float(np.median(list(self.entry_errors_ms.values()))) / self.network_ms(self.sites, {})

    def errors(self, networks: Sequence[Sizes]) -> np.ndarray:
        """Return (networks,) relative standard errors of predicted latencies."""
        rows = self._rows(networks)
        return np.asarray(np.sqrt(np.maximum((rows @ self.covariance * rows).sum(axis=1), 0.0)))

    def least_known(self, networks: Sequence[Sizes], count: int) -> list[int]:
        """Return the positions of networks to time next: each has the largest error once those before it are timed."""
        rows, covariance, chosen = self._rows(networks), self.covariance.copy(), list[int]()
        for _ in range(min(count, len(networks))):
            variances = (rows @ covariance * rows).sum(axis=1)
            variances[chosen] = -1.0
            best = int(np.argmax(variances))
            chosen.append(best)
            gain = covariance @ rows[best]
            covariance -= np.outer(gain, gain) / (float(variances[best]) + self.noise**2)
        return chosen

    def _rows(self, networks: Sequence[Sizes]) -> np.ndarray:
        """Return (networks, 1 + features), relative to the predicted latency."""
        out, inp = _sizes_of(self.sites, networks)
        rows = [np.full((len(networks), 1), self.offset_scale)]
        rows += [
            prior.features(out[:, place], inp[:, place]).sum(axis=1)
            for kind, prior in self.priors.items()
            for place in [_of_kind(self.sites, kind)]
        ]
        predicted = self.fixed_ms(len(self.sites)) + sum(
            self.sites_ms(kind, out[:, place], inp[:, place]).sum(axis=1)
            for kind in self.priors
            for place in [_of_kind(self.sites, kind)]
        )
        return np.asarray(np.concatenate(rows, axis=1) / predicted[:, None])

    def _places(self) -> dict[str, slice]:
        places, start = {}, 1
        for kind, weights in self.weights.items():
            places[kind] = slice(start, start + len(weights))
            start += len(weights)
        return places


def fit_table(sites: Sequence[Site], samples: Sequence[Sample]) -> FittedTable:
    """Return the table of a network, fitted to variants that were timed as complete networks.

    Args:
        sites: Sites of the network.
        samples: Timed variants, at least two.
    """
    data = _Data(sites, samples)
    best = max((_fit(data, blocks) for blocks in BLOCKS), key=lambda fit: fit.likelihood)
    return _table(data, _without_outliers(best))


@dataclass(frozen=True, eq=False)
class _Data:
    """Timed variants as arrays.

    Attributes:
        kinds: Kind -> its work.
        out: (samples, sites) outputs.
        inp: (samples, sites) inputs.
        total_ms: (samples,) latencies.
    """

    sites: Sequence[Site]
    samples: Sequence[Sample]

    @cached_property
    def kinds(self) -> dict[str, _Kind]:
        found: dict[str, _Kind] = {}
        for site in self.sites:
            out, inp = site.sizes
            if site.kind in found:
                most = found[site.kind].most
                found[site.kind] = replace(found[site.kind], most=(max(most[0], out), max(most[1], inp)))
            else:
                found[site.kind] = _kind_of(site)
        return found

    @cached_property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        return _sizes_of(self.sites, [sample.sizes for sample in self.samples])

    @cached_property
    def total_ms(self) -> np.ndarray:
        return np.asarray([sample.total_ms for sample in self.samples])

    def of_kind(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the sizes of the sites of one kind, (samples, its sites) each."""
        place = _of_kind(self.sites, kind)
        return self.sizes[0][:, place], self.sizes[1][:, place]


@dataclass(frozen=True, eq=False)
class _Fit:
    """Regression with given blocks and standard deviations; rows are relative to the measured latency.

    Attributes:
        priors: Kind -> prior and features.
        base_ms: Prior offset.
        rows: (samples, 1 + features) features of the variants.
        residual: (samples,) measured less prior latency.
        deviations: (1 + features,) standard deviations of the weights.
        noise: (samples,) standard deviations of the measurements.
        likelihood: Logarithm of the likelihood of the variants.
    """

    priors: dict[str, _Prior]
    base_ms: float
    rows: np.ndarray
    residual: np.ndarray
    deviations: np.ndarray
    noise: np.ndarray
    likelihood: float = -np.inf

    @cached_property
    def inverse(self) -> np.ndarray:
        """Inverse of the covariance of the variants."""
        scaled = self.rows * self.deviations
        return np.asarray(np.linalg.inv(scaled @ scaled.T + np.diag(self.noise**2)))

    @property
    def left_out(self) -> np.ndarray:
        """Measured less predicted latency of each variant, predicted without it."""
        return np.asarray((self.inverse @ self.residual) / np.diag(self.inverse))


def _fit(data: _Data, blocks: tuple[int, int]) -> _Fit:
    """Return the fit with given blocks, and the standard deviations under which the variants are most likely."""
    priors, base_ms = _priors(data, blocks)
    totals = data.total_ms
    means = base_ms + sum(prior.mean(*data.of_kind(kind)).sum(axis=1) for kind, prior in priors.items())
    features = [prior.features(*data.of_kind(kind)).sum(axis=1) for kind, prior in priors.items()]
    rows = np.concatenate([np.full((len(totals), 1), _offset_scale(data)), *features], axis=1) / totals[:, None]
    residual = 1 - means / totals
    is_stair = np.concatenate([np.asarray([False]), *(prior.is_stair for prior in priors.values())])
    own, stairs = rows[:, ~is_stair], rows[:, is_stair]
    products = own @ own.T, stairs @ stairs.T
    likelihood, chosen = max(
        (likelihood, (kind, stair, noise))
        for kind in _KIND_DEVIATIONS
        for stair in _STAIRS
        for noise, likelihood in _likelihoods(residual, kind**2 * products[0] + stair**2 * products[1])
    )
    deviations = np.where(is_stair, chosen[1], chosen[0])
    return _Fit(priors, base_ms, rows, residual, deviations, np.full(len(totals), chosen[2]), likelihood)


def _likelihoods(residual: np.ndarray, covariance: np.ndarray) -> list[tuple[float, float]]:
    """Return the noises and the logarithm of the likelihood at each of them, up to a constant."""
    values, vectors = np.linalg.eigh(covariance)
    squares, values = (residual @ vectors) ** 2, np.maximum(values, 0.0)
    return [
        (noise, float(-0.5 * (squares / (values + noise**2)).sum() - 0.5 * np.log(values + noise**2).sum()))
        for noise in _NOISE
    ]


def _without_outliers(fit: _Fit) -> _Fit:
    """Return the fit with more noise in variants that are far from what the others predict."""
    distance = np.abs(fit.left_out) * np.sqrt(np.diag(fit.inverse))
    return replace(fit, noise=fit.noise * np.maximum(1.0, distance / _OUTLIER))


def _table(data: _Data, fit: _Fit) -> FittedTable:
    prior = np.diag(fit.deviations**2)
    gain = prior @ fit.rows.T @ fit.inverse
    weights, covariance = gain @ fit.residual, prior - gain @ fit.rows @ prior
    by_kind, start = {}, 1
    for kind, one in fit.priors.items():
        by_kind[kind] = weights[start : start + len(one.is_stair)]
        start += len(one.is_stair)
    scale = _offset_scale(data)
    return FittedTable(
        fit.priors,
        by_kind,
        max(0.0, fit.base_ms + scale * float(weights[0])),
        tuple(data.sites),
        tuple(data.samples),
        tuple((data.total_ms * (1 - fit.left_out)).tolist()),
        float(np.median(fit.noise)),
        covariance,
        scale,
    )


def _priors(data: _Data, blocks: tuple[int, int]) -> tuple[dict[str, _Prior], float]:
    """Return kind -> its prior, and the prior offset: rates of the operators by non-negative least squares."""
    operators = sorted({kind.operator for kind in data.kinds.values()})
    columns = np.zeros((len(data.samples), 1 + 2 * len(operators)))
    columns[:, 0] = 1.0
    for name, kind in data.kinds.items():
        place = 1 + 2 * operators.index(kind.operator)
        for offset, work in enumerate(kind.work(*data.of_kind(name), blocks)):
            columns[:, place + offset] += work.sum(axis=1)
    largest = np.maximum(columns.max(axis=0), 1e-300)
    found: np.ndarray = nnls(columns / largest / data.total_ms[:, None], np.ones(len(columns)))[0]
    rates = found / largest
    floor = _floor(columns, float(data.total_ms.max()))
    priors = {}
    for name, kind in data.kinds.items():
        place = 1 + 2 * operators.index(kind.operator)
        own = float(rates[place]), float(rates[place + 1])
        knots = tuple(_knots(sizes) for sizes in data.of_kind(name))
        if kind.is_depthwise:
            knots = knots[0], np.zeros(0)
        priors[name] = _Prior(kind, blocks, own, floor, (knots[0], knots[1]))
    return priors, float(rates[0])


def _floor(columns: np.ndarray, total_ms: float) -> tuple[float, float]:
    """Return least rates for a MAC and an element."""
    macs, elements = (float(columns[:, start::2].sum(axis=1).max()) for start in (1, 2))
    share = 0.5 * _FLOOR * total_ms
    return share / max(macs, 1e-300), share / max(elements, 1e-300)


def _offset_scale(data: _Data) -> float:
    """Return the scale in ms of the deviation of the offset."""
    return 0.1 * float(np.median(data.total_ms))


def _kind_of(site: Site) -> _Kind:
    out, inp = site.sizes
    macs, in_elements, out_elements = site.work if any(site.work) else (out * inp, inp, out)
    words = site.kind.split()
    kernel = next((word for word in words if word.startswith("kernel_shape=")), "")
    operator = " ".join([words[0], *(["depthwise"] if site.is_depthwise else []), kernel]).strip()
    pairs = out if site.is_depthwise else out * inp
    return _Kind(operator, macs / pairs, out_elements / out, in_elements / inp, (out, inp), site.is_depthwise)


def _sizes_of(sites: Sequence[Site], networks: Sequence[Sizes]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.asarray([[one.get(site.layer, site.sizes) for site in sites] for one in networks], dtype=float)
    return sizes[..., 0], sizes[..., 1]


def _of_kind(sites: Sequence[Site], kind: str) -> list[int]:
    return [number for number, site in enumerate(sites) if site.kind == kind]


def _rounded(sizes: Any, block: int) -> np.ndarray:
    return np.asarray(np.ceil(np.asarray(sizes, dtype=float) / block) * block)


def _knots(sizes: np.ndarray) -> np.ndarray:
    """Return the sizes with a deviation of their own: all that were timed, or quantiles of many."""
    found = np.unique(sizes)
    return found if len(found) <= _KNOTS else np.unique(np.quantile(found, np.linspace(0, 1, _KNOTS)))


def _hats(sizes: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Return (..., knots) weights of the linear interpolation between knots; one knot stands for no deviation.

    >>> _hats(np.asarray([8.0, 10.0]), np.asarray([8.0, 16.0])).tolist()
    [[1.0, 0.0], [0.75, 0.25]]
    """
    if len(knots) < 2:
        return np.zeros((*np.shape(sizes), len(knots)))
    return np.stack([np.interp(sizes, knots, row) for row in np.eye(len(knots))], axis=-1)
