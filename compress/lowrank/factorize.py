"""Factors of one kernel, and the distance of their product from it.

    scheme    matrix or tensor          layers, in order
    nc        N x (C kh kw)             kh x kw conv C -> r, then 1 x 1 conv r -> N
    nc2, nc4  k of N x (C/k kh kw)      kh x kw conv C -> k r in k groups, then 1 x 1 conv k r -> N; k = 2, 4
    vh        (C kh) x (N kw)           kh x 1 conv C -> r, then 1 x kw conv r -> N
    tucker2   N x C x kh x kw           1 x 1 conv C -> r1, kh x kw conv r1 -> r2, 1 x 1 conv r2 -> N
    svd       N x C                     two 1 x 1 convs or two linear layers

Relative error = ||(W - W') L||_F / ||W L||_F, where L L^T are the second moments of the layer's inputs: the root mean
square error of its outputs over their size. Without moments L = 1, and it is the error of the kernel. The batch norm is
not folded into the kernel first, because folding was measured to be worse (ResNet-20 on CIFAR-10 at 0.55 of its MACs,
before fine-tuning, without moments: 79.9 % top-1 raw, 76.6 % folded).

Sources: nc as in trained rank pruning (Xu et al., IJCAI 2020, arXiv:2004.14566), with the outputs' principal directions
as in Zhang et al. 2016 (arXiv:1505.06798), section 3.1; nc2 and nc4, which cut the input channels into equal slices of
one rank, Liebenwein et al. 2021 (arXiv:2107.11442); vh Jaderberg et al. 2014 (arXiv:1405.3866); tucker2 Kim et al. 2016
(arXiv:1511.06530).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from compress.errors import UnsupportedLayer

SCHEMES = ("nc", "vh", "tucker2", "svd", "nc2", "nc4")
SLICES = {"nc": 1, "svd": 1, "nc2": 2, "nc4": 4}
_RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of a layer's inputs to one output.

    Attributes:
        matrix: (n, n), mean of x x^T over images and positions; n = C, or C kh kw in the order of the flattened kernel.
        kernel: (C,) or (C, kh, kw), shape of the inputs to one output.
    """

    matrix: Tensor
    kernel: tuple[int, ...]

    @cached_property
    def whole(self) -> Tensor:
        """(n, n) root of the moments of all inputs."""
        return _root(self.matrix)

    def slices(self, count: int) -> tuple[Tensor, ...]:
        """Return the roots of the moments of `count` equal slices of the input channels."""
        if count == 1:
            return (self.whole,)
        size = len(self.matrix) // count
        return tuple(_root(self.matrix[at : at + size, at : at + size]) for at in range(0, len(self.matrix), size))

    @cached_property
    def columns(self) -> Tensor:
        """(C kh, C kh) root of the moments of one kernel column's inputs, averaged over the columns."""
        channels, height, width = self.kernel
        cells = self.matrix.double().reshape(*self.kernel, *self.kernel)
        return _root(torch.einsum("chwdgw->chdg", cells).reshape(channels * height, channels * height) / width)

    @cached_property
    def points(self) -> Tensor:
        """(C, C) root of the moments of one kernel point's inputs, averaged over the points."""
        _, height, width = self.kernel
        cells = self.matrix.double().reshape(*self.kernel, *self.kernel)
        return _root(torch.einsum("chwdhw->cd", cells) / (height * width))


def _root(moments: Tensor) -> Tensor:
    """Return a lower triangular L with L L^T nearly the moments."""
    matrix = moments.double()
    ridge = _RIDGE * float(matrix.diagonal().mean())
    root: Tensor = torch.linalg.cholesky(matrix + (ridge or 1.0) * torch.eye(len(matrix), dtype=torch.float64))
    return root


@dataclass(frozen=True, slots=True)
class Factors:
    """A kernel as a chain of smaller ones.

    Attributes:
        weights: One weight for each thin layer, in forward order, in the dtype of the kernel.
        relative_error: Relative error of the product of the weights.
    """

    weights: tuple[Tensor, ...]
    relative_error: float


def applicable_schemes(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the schemes that make sense for a kernel of this shape, (N, C) or (N, C, kh, kw).

    >>> applicable_schemes((8, 4, 3, 3)), applicable_schemes((8, 4, 1, 3)), applicable_schemes((8, 4))
    (('nc', 'vh', 'tucker2', 'nc2', 'nc4'), ('nc', 'tucker2', 'nc2', 'nc4'), ('svd',))
    >>> applicable_schemes((8, 6, 1, 1)), applicable_schemes((8, 3, 3, 3))
    (('svd', 'nc2'), ('nc', 'vh', 'tucker2'))
    """
    if len(shape) == 2:
        return ("svd",)
    sliced = tuple(scheme for scheme in ("nc2", "nc4") if shape[1] % SLICES[scheme] == 0)
    if shape[2:] == (1, 1):
        return ("svd", *sliced)
    return (*(("nc", "vh", "tucker2") if min(shape[2:]) > 1 else ("nc", "tucker2")), *sliced)


def full_ranks(shape: tuple[int, ...], scheme: str) -> tuple[int, ...]:
    """Return the ranks at which a scheme is exact for a kernel of this shape.

    The ranks are along (C, N) for "tucker2"; the rank is per slice for "nc2" and "nc4".

    >>> full_ranks((8, 4, 3, 3), "nc"), full_ranks((8, 4, 3, 3), "vh"), full_ranks((8, 4, 3, 3), "tucker2")
    ((8,), (12,), (4, 8))
    >>> full_ranks((64, 8, 3, 3), "nc4")
    (18,)
    """
    outputs, inputs, *kernel = shape
    height, width = kernel or (1, 1)
    if scheme == "vh":
        return (min(inputs * height, outputs * width),)
    if scheme == "tucker2":
        return min(inputs, outputs * height * width), min(outputs, inputs * height * width)
    return (min(outputs, inputs // SLICES[scheme] * height * width),)


def check_ranks(shape: tuple[int, ...], scheme: str, ranks: tuple[int, ...]) -> None:
    """Check that a scheme and its ranks fit a kernel of this shape.

    Raises:
        UnsupportedLayer: The scheme or the ranks do not fit.
    """
    if scheme not in applicable_schemes(shape):
        choices = ", ".join(applicable_schemes(shape))
        raise UnsupportedLayer(f"A kernel of shape {shape} can be factorised by {choices}, got '{scheme}'.")
    full = full_ranks(shape, scheme)
    if len(ranks) != len(full) or not all(1 <= rank <= most for rank, most in zip(ranks, full, strict=True)):
        raise UnsupportedLayer(f"Ranks of '{scheme}' for shape {shape} must be from 1 to {full}, got {ranks}.")


def singular_values(weight: Tensor, scheme: str, moments: Moments | None = None) -> tuple[np.ndarray, ...]:
    """Return the spectra that a scheme truncates, each falling and >= 0, float64.

    With moments, the lost energy of a spectrum is the layer outputs' lost energy: exactly for "nc", "svd" and side N of
    "tucker2"; for "vh", the side C of "tucker2", "nc2" and "nc4" as if different columns, points or slices of the
    kernel read unrelated inputs.

    Args:
        weight: (N, C) or (N, C, kh, kw), finite.
        scheme: One that applies to this shape.
        moments: Second moments of the layer's inputs; None measures the kernel.

    Returns:
        One spectrum; for "tucker2" the spectra of the unfoldings along C and along N. For "nc2" and "nc4", entry j is
        the root of the sum of squares of the j-th singular values of all slices.
    """
    kernel = weight.detach().double()
    if SLICES.get(scheme, 1) > 1:
        return (np.sqrt(np.square(_slice_values(kernel, SLICES[scheme], moments)).sum(axis=0)),)
    matrices: tuple[Tensor, ...]
    if scheme == "tucker2":
        matrices = (
            _weighed(_unfold_inputs(kernel), moments.points if moments else None),
            _seen(kernel.flatten(1), moments),
        )
    elif scheme == "vh":
        matrices = (_weighed(_to_columns(kernel), moments.columns if moments else None),)
    else:
        matrices = (_seen(kernel.flatten(1), moments),)
    return tuple(torch.linalg.svdvals(matrix).cpu().numpy() for matrix in matrices)


def norm_bounds(weight: Tensor, scheme: str, moments: Moments | None = None) -> np.ndarray | None:
    """Return bounds of the operator norm of the residual, over the norm of the kernel, by rank.

    With k slices W_i of W the bound of rank j is sqrt(k) * max_i sigma_{j+1}(W_i) / sigma_1(W); the residual's norm is
    never above it. The paper leaves out the root, and its value is no bound for k > 1. With moments, norms are measured
    on the outputs, and the factor is k, because slices may read correlated inputs.

    Args:
        weight: (N, C) or (N, C, kh, kw), finite.
        scheme: One that applies to this shape.
        moments: Second moments of the layer's inputs; None measures the kernel.

    Returns:
        (full + 1,) for ranks from 0 to the full one, falling, 0 at the end; None for "vh" and "tucker2", whose matrices
        differ from the layer's.

    Source: Liebenwein et al. 2021, "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
        Decomposition", NeurIPS, arXiv:2107.11442, section 3; corrected are the root and, against the released code, the
        index: rank j loses sigma_{j+1}.
    """
    if scheme not in SLICES:
        return None
    kernel, slices = weight.detach().double(), SLICES[scheme]
    values = _slice_values(kernel, slices, moments)
    top = float(values.max() if slices == 1 else _slice_values(kernel, 1, moments).max())
    bounds = np.append(values.max(axis=0), 0.0) * (slices**0.5 if moments is None else slices)
    return bounds / top if top > 0 else np.zeros_like(bounds)


def _slice_values(kernel: Tensor, slices: int, moments: Moments | None) -> np.ndarray:
    """Return (slices, full rank) the falling singular values of each slice of the input channels, float64."""
    roots = moments.slices(slices) if moments else (None,) * slices
    parts = zip(kernel.chunk(slices, 1), roots, strict=True)
    rows = [torch.linalg.svdvals(_through(part.flatten(1), root)).cpu().numpy() for part, root in parts]
    return np.stack(rows)


def factorize(weight: Tensor, scheme: str, ranks: tuple[int, ...], moments: Moments | None = None) -> Factors:
    """Return the factors of a kernel, balanced: all sides of a product carry an equal share of its singular values.

    Args:
        weight: (N, C) or (N, C, kh, kw), finite, any floating dtype; the SVD runs in float64.
        scheme: "nc", "vh", "tucker2", "svd", "nc2" or "nc4".
        ranks: One rank, per slice for "nc2" and "nc4"; (r1, r2) along (C, N) for "tucker2".
        moments: Second moments of the layer's inputs; the factors then approximate its outputs rather than the kernel.

    Raises:
        UnsupportedLayer: Scheme or ranks do not fit the shape.
    """
    check_ranks(tuple(weight.shape), scheme, ranks)
    kernel = weight.detach().double()
    factors = _tucker(kernel, ranks, moments) if scheme == "tucker2" else _truncate(kernel, scheme, ranks[0], moments)
    weights = tuple(factor.to(weight.dtype).contiguous() for factor in factors)
    missed = multiply(weights, scheme) - kernel
    norm, lost = (float(torch.linalg.vector_norm(_seen(part.flatten(1), moments))) for part in (kernel, missed))
    return Factors(weights, lost / norm if norm > 0 else 0.0)


def multiply(weights: tuple[Tensor, ...], scheme: str) -> Tensor:
    """Return the kernel that a chain of factors equals, float64, (N, C) or (N, C, kh, kw)."""
    parts = [weight.detach().double() for weight in weights]
    if scheme == "tucker2":
        return torch.einsum("nb,bahw,ac->nchw", parts[2][..., 0, 0], parts[1], parts[0][..., 0, 0])
    if scheme == "vh":
        return torch.einsum("nrw,rch->nchw", parts[1][:, :, 0, :], parts[0][..., 0])
    slices = SLICES[scheme]
    pairs = zip(parts[1].chunk(slices, 1), parts[0].chunk(slices), strict=True)
    products = [left.flatten(1) @ right.flatten(1) for left, right in pairs]
    shape = parts[1].shape[0], *parts[0].shape[1:]
    return torch.cat([product.reshape(shape) for product in products], 1)


def main_directions(weight: Tensor, scheme: str, ranks: tuple[int, ...]) -> Tensor:
    """Return a sub-gradient of the nuclear norm of a kernel that has the given ranks, in its shape, float64.

    It is U V^T of the leading singular vectors, slice by slice for "nc2" and "nc4"; for "tucker2" it is the sum over
    both unfoldings.
    """
    kernel = weight.detach().double()

    def directions(matrix: Tensor, rank: int) -> Tensor:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        product: Tensor = left[:, :rank] @ right[:rank]
        return product

    if scheme == "vh":
        outputs, inputs, height, width = kernel.shape
        folded = directions(_to_columns(kernel), ranks[0]).reshape(inputs, height, outputs, width)
        return folded.permute(2, 0, 1, 3)
    slices = kernel.chunk(SLICES.get(scheme, 1), 1)
    by_outputs = torch.cat([directions(part.flatten(1), ranks[-1]).reshape(part.shape) for part in slices], 1)
    if scheme != "tucker2":
        return by_outputs
    by_inputs = directions(_unfold_inputs(kernel), ranks[0])
    return by_outputs + by_inputs.reshape(kernel.transpose(0, 1).shape).transpose(0, 1)


def _truncate(kernel: Tensor, scheme: str, rank: int, moments: Moments | None) -> tuple[Tensor, ...]:
    if scheme == "vh":
        outputs, inputs, height, width = kernel.shape
        left, right = _balanced(*_projected(_to_columns(kernel), rank, moments.columns if moments else None))
        first = left.T.reshape(rank, inputs, height, 1)
        return first, right.reshape(rank, outputs, 1, width).transpose(0, 1)
    slices = SLICES[scheme]
    roots = moments.slices(slices) if moments else (None,) * slices
    lefts, rights = [], []
    for part, root in zip(kernel.chunk(slices, 1), roots, strict=True):
        left = _signed_svd(_through(part.flatten(1), root))[0][:, :rank]
        left, right = _balanced(left, left.T @ part.flatten(1))
        lefts.append(left)
        rights.append(right.reshape(rank, *part.shape[1:]))
    ones = (1,) * (kernel.ndim - 2)
    return torch.cat(rights), torch.cat(lefts, 1).reshape(len(kernel), -1, *ones)


def _tucker(kernel: Tensor, ranks: tuple[int, ...], moments: Moments | None) -> tuple[Tensor, Tensor, Tensor]:
    """Truncate the higher-order SVD along C and N; error^2 <= sum of both tails."""
    inputs, rest = _projected(_unfold_inputs(kernel), ranks[0], moments.points if moments else None)
    sizes = torch.linalg.vector_norm(inputs, dim=0)
    inputs, rest = inputs / sizes, rest * sizes[:, None]
    outputs = _main_outputs(kernel, ranks[1], moments)
    core = torch.einsum("nb,anhw->bahw", outputs, rest.reshape(ranks[0], len(kernel), *kernel.shape[2:]))
    share = _share_of_slices(core, 1, 1 / 3)
    core, inputs = core / share[None, :, None, None], inputs * share
    share = _share_of_slices(core, 0, 1 / 2)
    core, outputs = core / share[:, None, None, None], outputs * share
    return inputs.T[..., None, None], core, outputs[..., None, None]


def _main_outputs(kernel: Tensor, rank: int, moments: Moments | None) -> Tensor:
    """Return (N, rank) orthonormal directions of the outputs that hold most of their energy."""
    return _signed_svd(_seen(kernel.flatten(1), moments))[0][:, :rank]


def _projected(matrix: Tensor, rank: int, root: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (rows, rank) and (rank, columns) factors, whose product is nearest to a matrix weighted by a root."""
    left = _signed_svd(_weighed(matrix, root))[0][:, :rank]
    right = left.T @ _weighed(matrix, root)
    return (left if root is None else torch.linalg.solve_triangular(root.T, left, upper=True)), right


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return two factors with the same product, in which columns and matching rows are equally long."""
    lengths = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    root = torch.where(lengths[0] * lengths[1] > 0, (lengths[1] / lengths[0]).sqrt(), torch.ones_like(lengths[0]))
    return left * root, right / root[:, None]


def _seen(matrix: Tensor, moments: Moments | None) -> Tensor:
    """Return a kernel, (N, n), weighted so that its energy equals the outputs'."""
    return _through(matrix, None if moments is None else moments.whole)


def _through(matrix: Tensor, root: Tensor | None) -> Tensor:
    return matrix if root is None else matrix @ root


def _weighed(matrix: Tensor, root: Tensor | None) -> Tensor:
    """Return an unfolded kernel with its rows, which are inputs, weighted by a root of their moments."""
    return matrix if root is None else root.T @ matrix


def _share_of_slices(core: Tensor, axis: int, exponent: float) -> Tensor:
    """Return the magnitudes that a factor takes over from the core: first a third, then half of the rest."""
    share = torch.linalg.vector_norm(core.transpose(0, axis).flatten(1), dim=1) ** exponent
    return torch.where(share > 0, share, torch.ones_like(share))


def _signed_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD with the largest entry of each left vector positive, so that it is unique."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return left * signs, values, right * signs.T


def _to_columns(kernel: Tensor) -> Tensor:
    outputs, inputs, height, width = kernel.shape
    return kernel.permute(1, 2, 0, 3).reshape(inputs * height, outputs * width)


def _unfold_inputs(kernel: Tensor) -> Tensor:
    return kernel.transpose(0, 1).flatten(1)
