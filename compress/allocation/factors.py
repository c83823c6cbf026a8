"""Factors of estimated damages, learned from the losses of candidate networks.

    rise of the loss of a network = sum over decisions of   factor * damage of the option it took ^ power

Damages are estimated decision by decision, and damages of channels and of blocks have no common unit. Candidate
networks show how much each counts. The fit has two steps: a scale for each kind of decision, then a factor for each
decision, which a ridge draws to the scale of its kind. Errors are relative, so that networks of small loss count as
much as bad ones. The ridge is chosen by leave-one-out error over the n networks: the strongest whose error is at most
(1 + 1/sqrt(n)) times the least, with the best power for this ridge.

Source: Frantar and Alistarh 2022, "SPDY: Accurate Pruning with Speedup Guarantees", ICML, arXiv:2201.13096, where
sensitivities are searched at random by the loss of candidate networks. The regression is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from compress.errors import InternalError

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
POWERS = (0.5, 0.6, 0.7, 0.85, 1.0)  # from 0.5 up, each further channel removed from a group costs more
LEAST = 0.25  # of the scale of its kind: nothing is free
_LEAST_KIND, _KIND_RIDGE = 1e-3, 1e-3  # of the common scale


@dataclass(frozen=True, slots=True)
class Observation:
    """One candidate network with its damages and its loss.

    Attributes:
        damages: Decision -> estimated damage of the option taken, before any factor; a missing decision has damage 0.
        rise: Loss of the network less that of the network before the cut, > 0.
    """

    damages: Mapping[str, float]
    rise: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Learned factors, and how well they explain the networks.

    Attributes:
        factors: Decision -> factor, at least a quarter of the scale of its kind.
        power: Exponent of every damage.
        scales: Kind of decision -> scale that the ridge draws its factors to.
        ridge: Strength of the ridge.
        error: Root mean square of the relative errors for networks left out of the fit.
    """

    factors: dict[str, float]
    power: float
    scales: dict[str, float]
    ridge: float
    error: float

    def rise(self, damages: Mapping[str, float]) -> float:
        """Return the predicted rise of the loss."""
        return float(sum(self.factors[name] * damage**self.power for name, damage in damages.items()))


def learn_factors(observations: Sequence[Observation], kinds: Mapping[str, str]) -> Fit:
    """Fit the factors of all decisions.

    Args:
        observations: Candidate networks, at least one; each with a damage above 0.
        kinds: Decision -> its kind, for every decision. A kind that no network has damaged gets the common scale.

    >>> seen = [Observation({"a": 1.0}, 2.0), Observation({"b": 1.0}, 6.0), Observation({"a": 2.0, "b": 1.0}, 10.0)]
    >>> fit = learn_factors(seen, {"a": "width", "b": "block"})
    >>> fit.power, {name: round(factor, 1) for name, factor in fit.factors.items()}
    (1.0, {'a': 2.0, 'b': 6.0})
    """
    names, order = list(kinds), list(dict.fromkeys(kinds.values()))
    damages = np.asarray([[seen.damages.get(name, 0.0) for name in names] for seen in observations])
    rises = np.asarray([seen.rise for seen in observations])
    if not len(rises) or not (np.isfinite(rises) & (rises > 0)).all() or not (damages.sum(axis=1) > 0).all():
        raise InternalError("Factors must be learned from damaged networks of higher, finite loss.")
    members = np.asarray([[kinds[name] == kind for name in names] for kind in order], dtype=np.float64)
    found: list[tuple[float, float, float, np.ndarray, np.ndarray]] = []
    for power in POWERS:
        shares = damages**power / rises[:, None]
        scales = _kind_scales(shares @ members.T)
        columns = shares * (scales @ members)
        found += [(_left_out_error(columns, ridge), power, ridge, scales, columns) for ridge in RIDGES]
    tolerated = min(error for error, *_ in found) * (1 + 1 / np.sqrt(len(rises)))
    error, power, ridge, scales, columns = min(
        (one for one in found if one[0] <= tolerated), key=lambda one: (-one[2], one[0], -one[1])
    )
    factors = np.maximum(_ridge(columns, ridge), LEAST) * (scales @ members)
    return Fit(_named(names, factors), power, _named(order, scales), ridge, error)


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, map(float, values), strict=True))


def _kind_scales(shares: np.ndarray) -> np.ndarray:
    """Return (kinds,) scales by which shares, (networks, kinds), add up to 1 for each network as nearly as can be."""
    total = shares.sum(axis=1)
    common = float(total.sum() / (total @ total))
    scales: np.ndarray = np.maximum(_ridge(shares * common, _KIND_RIDGE), _LEAST_KIND) * common
    return scales


def _ridge(columns: np.ndarray, ridge: float) -> np.ndarray:
    """Return x >= 0 of least |columns x - 1|^2 + ridge |x - 1|^2."""
    count, weight = columns.shape[1], np.sqrt(ridge)
    rows = np.concatenate([columns, weight * np.eye(count)])
    found: np.ndarray = nnls(rows, np.concatenate([np.ones(len(columns)), np.full(count, weight)]))[0]
    return found


def _left_out_error(columns: np.ndarray, ridge: float) -> float:
    """Return the root mean square error of each network when the others are fitted, signs of the factors free."""
    rest = 1 - columns.sum(axis=1)
    products = columns @ columns.T
    inverse = np.linalg.inv(products + ridge * np.eye(len(rest)))
    errors = (inverse @ rest) / np.diag(inverse)
    return float(np.sqrt(np.mean(errors**2)))
