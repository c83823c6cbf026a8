"""Removal of inputs from a linear regression, unit by unit, with the weights of the kept inputs refitted.

    losses   rise of the squared error for each kept unit, if it is removed next
    remove   several units at once; the weights and the losses of the kept ones follow

The inverse of the second moments is computed once and never written again. Removed inputs become columns of a panel:
the present inverse is the first one less the panel's products, as in a Cholesky factorisation that looks to the left.
Only the rows of removed inputs and the diagonal blocks of kept units are brought up to date. That is half of the
arithmetic of an update of the complete inverse, in large matrix products.
"""

import torch
from torch import Tensor

_COMPACT = 0.25
_FLOAT32_ABOVE = 1024


class Downdates:
    """Regression whose input units are removed; inputs outside of the units are always kept.

    Args:
        gram: (n, n) float64, positive definite second moments of the inputs.
        weight: (outputs, n) float64, weights with all inputs.
        units: (U, c) unknowns of each unit; no two units share one.
        dtype: Precision of the arithmetic.

    Raises:
        torch.linalg.LinAlgError: The second moments are not positive definite in this precision.

    Source: removal by the inverse Hessian (Hassibi and Stork 1992, "Optimal Brain Surgeon").
    """

    def __init__(self, gram: Tensor, weight: Tensor, units: Tensor, dtype: torch.dtype = torch.float64) -> None:
        count, cells = units.shape
        moments, scale = _scaled_moments(gram, units.flatten())
        # the first axis of weight, blocks and panel are positions of units, without those that were dropped
        self._units, self._is_kept = torch.arange(count), torch.ones(count, dtype=torch.bool)
        self._weight = (weight.T[units] / scale.reshape(count, cells, 1)).to(dtype)
        factor = torch.linalg.cholesky(moments.to(dtype))
        self._inverse = torch.cholesky_inverse(factor).reshape(count * cells, count, cells)
        self._blocks = self._inverse.reshape(count, cells, count, cells).diagonal(dim1=0, dim2=2)
        self._blocks = self._blocks.permute(2, 0, 1).contiguous()  # (U, c, c) of the inverse
        self._panel = torch.empty(count, cells, count * cells, dtype=dtype)
        self._filled = 0

    def losses(self) -> Tensor:
        """Return (kept units,) float64, the rise of the squared error, summed over outputs, for each unit."""
        if self._blocks.shape[1] == 1:
            losses = self._weight.square().sum((1, 2)) / self._blocks.flatten()
        else:
            losses = (torch.linalg.inv(self._blocks) * (self._weight @ self._weight.mT)).sum((1, 2))
        return losses[self._is_kept].double()

    def remove(self, chosen: Tensor) -> None:
        """Remove units, and refit the weights of the kept ones.

        Args:
            chosen: Positions among the kept units, in the order of `losses`.

        Raises:
            torch.linalg.LinAlgError: The precision does not suffice.
        """
        positions = self._is_kept.nonzero().flatten()[chosen]
        rows = self._rows(positions)
        removed = len(rows)
        factor = torch.linalg.cholesky(rows.reshape(removed, -1, self._weight.shape[1])[:, positions].flatten(1))
        taken = torch.linalg.solve_triangular(factor, self._weight[positions].flatten(0, 1), upper=False)
        columns = self._panel[:, :, self._filled : self._filled + removed]
        columns.copy_(torch.linalg.solve_triangular(factor, rows, upper=False).T.reshape(columns.shape))
        self._weight.flatten(0, 1).addmm_(columns.flatten(0, 1), taken, alpha=-1)
        self._blocks.baddbmm_(columns, columns.mT, alpha=-1)
        self._filled += removed
        self._is_kept[positions] = False
        self._blocks[positions] = torch.eye(self._blocks.shape[1], dtype=self._blocks.dtype)  # invertible, not read
        if int(self._is_kept.sum()) < (1 - _COMPACT) * len(self._is_kept):
            self._drop_removed()

    def _rows(self, positions: Tensor) -> Tensor:
        """Return (removed, inputs) rows of the present inverse, for the units at some positions."""
        cells = self._weight.shape[1]
        inputs = (self._units[positions][:, None] * cells + torch.arange(cells)).flatten()
        rows = self._inverse.index_select(0, inputs).index_select(1, self._units).flatten(1)
        panel = self._panel[:, :, : self._filled]
        return rows.addmm_(panel[positions].flatten(0, 1), panel.flatten(0, 1).T, alpha=-1)

    def _drop_removed(self) -> None:
        kept = self._is_kept.nonzero().flatten()
        panel = torch.empty(len(kept), *self._panel.shape[1:], dtype=self._panel.dtype)
        panel[:, :, : self._filled] = self._panel[kept, :, : self._filled]
        self._panel, self._weight, self._blocks = panel, self._weight[kept], self._blocks[kept]
        self._units, self._is_kept = self._units[kept], self._is_kept[kept]


def preferred_dtype(unknowns: int) -> torch.dtype:
    """Return float64, or float32 for so many unknowns that it saves much time."""
    return torch.float32 if unknowns > _FLOAT32_ABOVE else torch.float64


def _scaled_moments(gram: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return (inputs, inputs) second moments that the other inputs do not explain, and (inputs,) factors.

    The factors scale the inputs so that the moments have a diagonal of ones; moments and factors are new tensors.
    """
    is_other = torch.ones(len(gram), dtype=torch.bool)
    is_other[inputs] = False
    others = is_other.nonzero().flatten()
    is_slice = bool((inputs.diff() == 1).all())
    rows = gram[inputs[0] : inputs[-1] + 1] if is_slice else gram.index_select(0, inputs)
    moments = rows[:, inputs[0] : inputs[-1] + 1] if is_slice else rows.index_select(1, inputs)
    factor = torch.linalg.cholesky(gram[others][:, others])
    explained = torch.linalg.solve_triangular(factor, rows[:, others].T, upper=False)
    scale = (moments.diagonal() - explained.square().sum(0)).rsqrt()
    moments = moments * scale
    moments.mul_(scale[:, None])
    explained.mul_(scale)
    return moments.addmm_(explained.T, explained, alpha=-1), scale
