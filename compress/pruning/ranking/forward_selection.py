"""Orders of channels from the statistics of their readers: forward selection and the LASSO path.

    contribution gram   (U, U): products of the units' contributions to the outputs of all readers of a group
    imitation           weights on the simplex, one best unit added at a time (greedy forward selection)
    refit               the unit that lowers the error of fully refitted readers most is added
    lasso               one path of the penalty from large to small; units are removed in the reverse order of entry

All work on the Gram matrices of `pruning/ranking/elimination.py`, need no labels, and give the order for every width.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from compress.pruning.criteria.base import Ranking
from compress.pruning.groups import ChannelGroup
from compress.pruning.ranking.elimination import ReaderStats, unit_inputs

_REWEIGHTS = 8
_MOST_REWEIGHTS = 200
_PENALTIES = 100
_SMALLEST_PENALTY = 1e-4
_SWEEPS = 200
_TOLERANCE = 1e-6
_ROUNDS = 64
_RIDGE = 1e-8


def contribution_gram(group: ChannelGroup, stats: Mapping[str, ReaderStats]) -> np.ndarray:
    """Return (U, U) float64: sums over readers of E<h_i, h_j> / energy, with unit i's contribution h_i to the outputs.

    If a reader has an intercept, means are subtracted first, because the intercept compensates a constant.

    Args:
        group: C channels in `parts` equal parts, U = C / parts.
        stats: Reader path -> statistics, for all readers of the group.
    """
    units = group.width // group.parts
    total = torch.zeros(units, units, dtype=torch.float64)
    for reader in group.readers:
        one, inputs = stats[reader.layer], unit_inputs(group, reader)
        columns = inputs.flatten()
        gram = one.gram[columns][:, columns]
        if one.has_intercept:
            mean = one.gram[-1, columns]
            gram = gram - mean[:, None] * mean
        weight = one.weight[:, columns]
        products = gram * (weight.T @ weight)
        blocks = products.reshape(units, inputs.shape[1], units, inputs.shape[1]).sum((1, 3))
        total += blocks / max(one.energy, 1e-12)
    return total.numpy()


def imitation_ranking(gram: np.ndarray, most: int) -> Ranking:
    """Rank units by greedy local imitation with line search.

    The outputs of the readers are F = sum of u_i H_i with u = 1/U and H_i = U h_i. A point `a` of the simplex starts at
    the best single unit. Each step moves it to the unit that brings it nearest to F: a <- (1 - t) a + t e_i with the
    best t. Units are kept in the order in which they enter. A step may also shift weight between entered units, at most
    8 times between two entries while a new unit would lower the error, too.

    Args:
        gram: (U, U), from `contribution_gram`.
        most: Largest number of units to remove.

    Returns:
        Order and errors of all widths; `scales` are U * a, the factors of the readers' columns at each width.

    Source: Ye et al. 2020, "Greedy Optimization Provably Wins the Lottery: Logarithmic Number of Winning Tickets is
        Enough", NeurIPS (local imitation), the successor of Ye et al. 2020, "Good Subnetworks Provably Exist", ICML,
        arXiv:2003.01794.
    """
    units = len(gram)
    scaled = gram * float(units) ** 2
    diagonal = scaled.diagonal().copy()
    target = scaled.mean(1)
    energy = float(target.mean())
    weights = np.zeros(units)
    entered: list[int] = [int(np.argmin(diagonal - 2 * target))]
    weights[entered[0]] = 1.0
    is_in = np.zeros(units, dtype=bool)
    is_in[entered[0]] = True
    products = scaled[:, entered[0]].copy()
    errors, scales = np.zeros(units + 1), np.zeros((units + 1, units), dtype=np.float32)
    since_entry = 0

    def close() -> None:
        """Record the state of the present width."""
        removed = units - len(entered)
        errors[removed] = max(float(weights @ products) - 2 * float(weights @ target) + energy, 0.0)
        scales[removed] = units * weights

    while len(entered) < units:
        square, along = float(weights @ products), float(weights @ target)
        slope = products - square - target + along
        bend = np.maximum(diagonal - 2 * products + square, 1e-300)
        least = -weights / np.maximum(1 - weights, 1e-12)
        step = np.clip(-slope / bend, least, 1.0)
        gain = 2 * step * slope + step**2 * bend
        best = int(np.argmin(gain))
        outside = np.flatnonzero(~is_in)
        if is_in[best]:
            new = int(outside[np.argmin(gain[outside])])
            is_new_useful = gain[new] < 0
            if (
                since_entry >= (_REWEIGHTS if is_new_useful else _MOST_REWEIGHTS)
                or gain[best] > -(_TOLERANCE**2) * energy
            ):
                best = new
        if not is_in[best]:
            close()
            entered.append(best)
            is_in[best] = True
            since_entry = 0
        else:
            since_entry += 1
        move = step[best] if gain[best] < 0 else 0.0
        weights *= 1 - move
        weights[best] += move
        products = (1 - move) * products + move * scaled[:, best]
    order = np.asarray(entered[::-1], dtype=np.int64)
    scales[0] = 1.0
    errors[0] = 0.0
    return _limited(order, errors, most, scales)


def refit_ranking(group: ChannelGroup, stats: Mapping[str, ReaderStats], most: int) -> Ranking:
    """Rank units by forward selection with full refit: the unit that lowers the refitted readers' error most is added.

    Args:
        group: C channels in `parts` equal parts.
        stats: Reader path -> statistics, for all readers of the group.
        most: Largest number of units to remove.

    Source: orthogonal least squares (Chen et al. 1989, "Orthogonal least squares methods and their application to
        non-linear system identification") on the Gram matrices of the readers, whole columns of a layer at once.
    """
    units = group.width // group.parts
    readers = [_Selected(stats[reader.layer], unit_inputs(group, reader)) for reader in group.readers]
    left = np.arange(units)
    entered: list[int] = []
    error = sum(reader.error for reader in readers)
    errors = np.zeros(units + 1)
    errors[units] = error
    at_once = max(1, units // _ROUNDS)
    while len(left):
        gains = sum((reader.gains(left) for reader in readers), start=torch.zeros(len(left), dtype=torch.float64))
        chosen = left[np.argsort(-gains.numpy(), kind="stable")[:at_once]]
        for unit in chosen.tolist():
            error -= sum(reader.add(unit) for reader in readers)
            entered.append(unit)
            errors[units - len(entered)] = max(error, 0.0)
        left = np.setdiff1d(left, chosen)
    errors[0] = 0.0
    return _limited(np.asarray(entered[::-1], dtype=np.int64), errors, most)


def lasso_ranking(gram: np.ndarray, most: int) -> Ranking:
    """Rank units by a LASSO path: units whose coefficient leaves zero last, as the penalty falls, are removed first.

    Minimises 1/2 || F - sum of b_i h_i ||^2 + penalty * sum of |b_i| ||h_i|| by coordinate descent, warm-started along
    100 penalties that fall in equal ratios; the weights ||h_i|| make the penalty independent of the size of a unit.

    Args:
        gram: (U, U), from `contribution_gram`.
        most: Largest number of units to remove.

    Returns:
        The order; errors are computed with the best factors of the kept units.

    Source: He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV, arXiv:1707.06168. One
        path for all widths, in place of a search of the penalty for each, is an adaptation.
    """
    units = len(gram)
    sizes = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    is_dead = sizes <= 1e-12 * max(float(sizes.max(initial=0.0)), 1e-300)
    inverse = np.where(is_dead, 0.0, 1 / np.maximum(sizes, 1e-300))
    unit_gram = gram * inverse[:, None] * inverse
    np.fill_diagonal(unit_gram, 1.0)
    wanted = gram.sum(1) * inverse
    coefficients, residual = np.zeros(units), wanted.copy()  # residual = wanted - unit_gram @ coefficients
    entered: list[int] = []
    is_in = is_dead.copy()
    penalty = float(np.abs(wanted).max(initial=0.0))
    ratio = _SMALLEST_PENALTY ** (1 / (_PENALTIES - 1))
    for _ in range(_PENALTIES):
        if is_in.all() or penalty <= 0:
            break
        penalty *= ratio
        _descend(unit_gram, coefficients, residual, penalty, is_dead)
        new = np.flatnonzero((coefficients != 0) & ~is_in)
        entered += new[np.argsort(-np.abs(coefficients[new]), kind="stable")].tolist()
        is_in[new] = True
    rest = np.flatnonzero(~np.isin(np.arange(units), entered))
    entered += rest[np.argsort(-np.abs(residual[rest]) * ~is_dead[rest], kind="stable")].tolist()
    order = np.asarray(entered[::-1], dtype=np.int64)
    return _limited(order, _scalar_refit_errors(gram, entered), most)


def _descend(
    gram: np.ndarray, coefficients: np.ndarray, residual: np.ndarray, penalty: float, dead: np.ndarray
) -> None:
    """Minimise the LASSO objective for one penalty, in place; columns have norm 1."""
    everything = np.flatnonzero(~dead)
    for _ in range(_SWEEPS):
        largest = _sweep(gram, coefficients, residual, penalty, everything)
        if largest <= _TOLERANCE:
            return
        for _ in range(_SWEEPS):  # entered units only, until they settle
            if _sweep(gram, coefficients, residual, penalty, np.flatnonzero(coefficients)) <= _TOLERANCE:
                break


def _sweep(
    gram: np.ndarray, coefficients: np.ndarray, residual: np.ndarray, penalty: float, which: np.ndarray
) -> float:
    """Update coefficients one after the other; return the largest change."""
    largest = 0.0
    for index in which:
        old = coefficients[index]
        raw = residual[index] + old
        if old == 0 and abs(raw) <= penalty:
            continue
        new = np.sign(raw) * max(abs(raw) - penalty, 0.0)
        if new != old:
            residual -= gram[:, index] * (new - old)
            coefficients[index] = new
            largest = max(largest, abs(new - old))
    return largest


def _scalar_refit_errors(gram: np.ndarray, entered: list[int]) -> np.ndarray:
    """Return (U + 1,) errors of F from the units kept, each with its best factor, by the number of units removed."""
    units = len(gram)
    ridge = _RIDGE * max(float(gram.diagonal().mean()), 1e-300)
    arranged = gram[np.ix_(entered, entered)] + ridge * np.eye(units)
    lower = np.linalg.cholesky(arranged)
    explained = np.cumsum(np.linalg.solve(lower, gram.sum(1)[entered]) ** 2)
    energy = float(gram.sum())
    errors = np.append(np.maximum(energy - explained[::-1], 0.0), energy)  # removed: 0, 1, ..., U
    errors[0] = 0.0
    return np.maximum.accumulate(errors)


class _Selected:
    """Reader whose input units are added one after the other.

    Args:
        stats: Statistics of the reader.
        inputs: (units, n) unknowns of each unit.

    Attributes:
        error: Squared error of the outputs without any of the units, over their energy.
    """

    def __init__(self, stats: ReaderStats, inputs: Tensor) -> None:
        columns = inputs.flatten()
        outside = torch.ones(len(stats.gram), dtype=torch.bool)
        outside[columns] = False
        gram, weight = stats.gram[columns][:, columns], stats.weight[:, columns].T
        across = stats.gram[columns][:, outside]
        if outside.any():  # inputs from other groups, and the constant, are kept and refitted
            gram = gram - across @ torch.linalg.solve(stats.gram[outside][:, outside], across.T)
        self.inputs = torch.arange(len(columns)).reshape(inputs.shape)
        self.energy = max(stats.energy, 1e-12)
        self.gram = gram.clone()
        self.cross = gram @ weight  # (n, outputs) products of the residual of each input and the outputs
        self.ridge = _RIDGE * max(float(gram.diagonal().mean()), 1e-300)
        self.error = float((weight * self.cross).sum()) / self.energy

    def gains(self, units: np.ndarray) -> Tensor:
        """Return (units,) the fall of the error when each unit is added."""
        inputs = self.inputs[torch.from_numpy(units)]
        blocks = self.gram[inputs[:, :, None], inputs[:, None, :]]
        blocks = blocks + self.ridge * torch.eye(blocks.shape[1], dtype=blocks.dtype)
        rows = self.cross[inputs]
        gains: Tensor = (torch.linalg.solve(blocks, rows) * rows).sum((1, 2)) / self.energy
        return gains

    def add(self, unit: int) -> float:
        """Add a unit, and return the fall of the error."""
        inputs = self.inputs[unit]
        block = self.gram[inputs][:, inputs] + self.ridge * torch.eye(len(inputs), dtype=self.gram.dtype)
        columns, rows = self.gram[:, inputs], self.cross[inputs]
        found = torch.linalg.solve(block, rows)
        gain = float((found * rows).sum()) / self.energy
        factor = torch.linalg.solve(block, columns.T)
        self.cross.addmm_(columns, found, alpha=-1)
        self.gram.addmm_(columns, factor, alpha=-1)
        return gain


def _limited(order: np.ndarray, errors: np.ndarray, most: int, scales: np.ndarray | None = None) -> Ranking:
    """Return a ranking whose errors never fall, and are constant beyond `most` removed units."""
    errors = np.maximum.accumulate(errors)
    errors[most + 1 :] = errors[most]
    return Ranking(order, errors, scales)
