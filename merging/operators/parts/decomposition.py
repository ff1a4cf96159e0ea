"""Singular value decompositions and numerical ranks of single matrices.

Singular vectors have no sign and, where singular values repeat, no direction: formulas use them in
pairs only.

Matrices of up to ``PRECISE_UP_TO`` elements, and fp64 ones, are decomposed by LAPACK's ``?gesdd``.
Larger ones, in fp32, go one of three ways, all through eigenvectors of the smaller Gram matrix:

* Of low rank (LoRA, or an unchanged expert): the range is found by multiplication with random
  columns, and what is left outside it is measured to be numerically zero (Halko 2011, "Finding
  structure with randomness", Algorithm 4.1).
* The largest half, or fewer: products and eigenvectors in fp32, as long as the least of the
  singular values is not far below the largest. An error of 1e-7 of the largest eigenvalue is then
  one of at most 1e-3 of the least eigenvalue.
* All, or values that fall far: products and eigenvectors in fp64, which is more exact than
  ``sgesdd`` down to the least singular value that counts as above zero.

Random columns for a given number of singular values (Halko 2011, Algorithm 4.4) were tried and not
taken: changes by fine-tuning have flat spectra, on which four power iterations with half as many
columns again are off by 8 % and no faster than this.

``fast`` sends every fp32 matrix of more than ``FAST_FROM`` elements these ways (decision 31).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergesearch.merging.operators.parts.eigenvectors import (
    COLUMNS,
    gathered,
    largest_eigenvectors,
    lower_gram,
    projected,
    wide_view,
)
from mergesearch.merging.tensors.place import HOST, Place

if TYPE_CHECKING:
    import torch

#: Matrices of up to this many elements are decomposed in fp64. It takes 1.8 times as long as fp32,
#: under a second at this size, and singular vectors of close singular values come out as exact as
#: the weights are. Larger ones would take minutes more in all; theirs are off by about 1e-5 of the
#: largest singular value.
PRECISE_UP_TO = 1 << 20

#: Matrices of up to this many elements are decomposed precisely even where speed is asked for: it
#: takes a few milliseconds.
FAST_FROM = 1 << 14

#: Eigenvectors in fp32 serve down to this fraction of the largest singular value.
FALLING = 1e-2

#: Low rank is looked for up to this share of the lesser side, and up to this many columns.
LOW_SHARE = 8
LOW_MOST = 512

#: Columns by which the sought rank must stay below that number, and the size of rounding errors in
#: the product with random columns, relative to its largest singular value.
SPARE = 8
NOISE = 1e-5

#: Matrices in fp64 of a Gram matrix's size that its eigenvectors take, with what they are made in.
WORKSPACE = 6


@dataclass(frozen=True, eq=False)
class Svd:
    """A decomposition ``U Σ Vᵀ``: ``left @ diag(values) @ right`` is the matrix.

    Attributes:
        left: ``U``, ``(m, r)``.
        values: Diagonal of ``Σ``, ``(r,)``, decreasing.
        right: ``Vᵀ``, ``(r, n)``.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def top(self, rank: int) -> Svd:
        """The ``rank`` largest, copied so that the rest can be freed."""
        if rank >= len(self.values):
            return self
        return Svd(
            self.left[:, :rank].clone(), self.values[:rank].clone(), self.right[:rank].clone()
        )


def precise(matrix: torch.Tensor, fast: bool = False) -> torch.Tensor:
    """The matrix in the dtype to decompose it in: fp64 up to ``PRECISE_UP_TO`` elements.

    ``fast`` means up to ``FAST_FROM`` elements.
    """
    import torch

    small = matrix.numel() <= _limit(fast)
    return matrix.to(torch.float64 if small or matrix.dtype == torch.float64 else torch.float32)


def decompose(
    matrix: torch.Tensor,
    rank: int | None = None,
    draws: torch.Generator | None = None,
    place: Place = HOST,
    known: torch.dtype | None = None,
    fast: bool = False,
) -> Svd:
    """The thin singular value decomposition of finite numbers, in their dtype, fp32 or fp64.

    Of a large matrix, vectors of numerically zero singular values may be missing or zero.

    Args:
        matrix: ``(m, n)``.
        rank: How many of the largest singular values are wanted; None for all.
        draws: For random columns, by which low rank is found; None not to look for it.
        place: Where a large matrix is decomposed, unless it lies on an accelerator.
        known: Dtype of the numbers that it was made from, if that is less than its own.
        fast: Whether a matrix counts as large from ``FAST_FROM`` elements on.
    """
    if is_large(matrix, known, fast):
        with place.turn:
            return _decompose_large(matrix, rank, draws, roomy(place, matrix))
    svd = _decompose_whole(matrix)
    return svd if rank is None else svd.top(rank)


def is_large(matrix: torch.Tensor, known: torch.dtype | None = None, fast: bool = False) -> bool:
    """Whether a matrix, made from numbers of a dtype, is decomposed through a Gram matrix."""
    import torch

    return (known or matrix.dtype) != torch.float64 and matrix.numel() > _limit(fast)


def _limit(fast: bool) -> int:
    """Elements up to which a matrix is decomposed precisely."""
    return min(FAST_FROM, PRECISE_UP_TO) if fast else PRECISE_UP_TO


def _decompose_whole(matrix: torch.Tensor) -> Svd:
    import torch

    try:
        return Svd(*torch.linalg.svd(matrix, full_matrices=False))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # LAPACK's divide and conquer gives up on some matrices with many equal singular values, as
        # joined singular vectors have; in fp64, and the other way round, it has not been seen to.
        right, values, left = torch.linalg.svd(matrix.double().T, full_matrices=False)
        return Svd(*(factor.to(matrix.dtype) for factor in (left.T, values, right.T)))


def _decompose_large(
    matrix: torch.Tensor, rank: int | None, draws: torch.Generator | None, place: Place
) -> Svd:
    import torch

    size = min(matrix.shape)
    count = size if rank is None else min(rank, size)
    low = None if draws is None else decompose_low_rank(matrix, draws, place)
    if low is not None:
        return low.top(count)
    # An accelerator has enough fp64, and its eigenvectors in fp32 are less exact.
    few = 2 * count <= size and matrix.dtype == torch.float32
    if few and place.device_of(matrix).type == "cpu":
        values, vectors = largest_eigenvectors(lower_gram(matrix, torch.float32, place), count)
        if float(values[-1]) >= FALLING**2 * float(values[0]):
            return _from_side(matrix, vectors, place)
    _, vectors = largest_eigenvectors(lower_gram(matrix, torch.float64, place), count)
    return _from_side(matrix, vectors, place)


def _from_side(matrix: torch.Tensor, vectors: torch.Tensor, place: Place) -> Svd:
    """The decomposition of a matrix from singular vectors ``(s, r)`` of its lesser side."""
    import torch

    other = projected(matrix, vectors, place)
    values, order = other.norm(dim=0).sort(descending=True)
    other = (other / values.clamp_min(torch.finfo(values.dtype).tiny))[:, order]
    own = vectors.to(matrix.device)[:, order]
    return _oriented(matrix, own, values, other)


def _oriented(
    matrix: torch.Tensor, own: torch.Tensor, values: torch.Tensor, other: torch.Tensor
) -> Svd:
    """The decomposition from vectors ``(s, r)`` of the lesser side and those of the greater."""
    left, right = (own, other) if matrix.shape[0] <= matrix.shape[1] else (other, own)
    return Svd(left.to(matrix.dtype), values.to(matrix.dtype), right.T.to(matrix.dtype))


def left_of_grams(matrices: Sequence[torch.Tensor], place: Place) -> Svd:
    """Left singular vectors and values of large matrices side by side, with an empty right.

    Args:
        matrices: ``(m, n)`` each, m no more than n.
        place: Where it is worked out.
    """
    import torch

    place = roomy(place, matrices[0])
    gram = lower_gram(matrices[0], torch.float64, place)
    for matrix in matrices[1:]:
        gram += lower_gram(matrix, torch.float64, place)
    squares, vectors = largest_eigenvectors(gram, len(gram))
    first = matrices[0]
    left = vectors.to(first.device, first.dtype)
    values = squares.clamp_min(0).sqrt().to(first.device, first.dtype)
    return Svd(left, values, first[:0])


def decompose_low_rank(matrix: torch.Tensor, draws: torch.Generator, place: Place) -> Svd | None:
    """The decomposition of a large matrix whose rank is far below its sides, None of any other.

    What lies outside the range of A times random columns is measured: no singular value of it is
    above zero by :func:`numerical_rank`.
    """
    import torch

    wide = wide_view(matrix)
    count = min(len(wide) // LOW_SHARE, LOW_MOST)
    if count <= SPARE:
        return None
    columns = torch.randn((wide.shape[1], count), generator=draws)
    reached = gathered(wide, columns, place)  # A Ω
    triangle = torch.linalg.qr(reached, mode="r").R
    rank = int((_scaled(torch.linalg.svdvals(triangle.double())) > NOISE).sum())
    if rank > count - SPARE:
        return None
    span = _decompose_whole(reached.double()).left[:, :rank].to(matrix.dtype)  # Q
    seen = projected(wide, span, place)  # Bᵀ = Aᵀ Q
    inside = _decompose_whole(seen.double())
    largest = float(inside.values[0]) if rank else 0.0
    limit = torch.finfo(matrix.dtype).eps * max(matrix.shape) * largest
    if _distance(wide, span, seen.to(span.device), place) > limit:
        return None
    # A = Q B = (Q W) Σ Pᵀ for Bᵀ = P Σ Wᵀ
    own = span.to(matrix.device).double() @ inside.right.T.to(matrix.device)
    return _oriented(matrix, own, inside.values, inside.left)


def _scaled(values: torch.Tensor) -> torch.Tensor:
    """Singular values relative to the largest; 0 where all are."""
    import torch

    return values / values[0].clamp_min(torch.finfo(values.dtype).tiny)


def _distance(wide: torch.Tensor, span: torch.Tensor, seen: torch.Tensor, place: Place) -> float:
    """``‖A − Q B‖`` in the Frobenius norm, piece by piece; ``seen`` is ``Bᵀ`` ``(n, r)``."""
    total = 0.0
    step = place.room(2 * len(wide) * wide.element_size(), held=span.nbytes + seen.nbytes)
    step = min(step, COLUMNS)
    for start in range(0, wide.shape[1], step):
        piece = wide[:, start : start + step].to(span.device)
        left = piece - span @ seen[start : start + step].T
        total += float(left.double().square().sum())
    return math.sqrt(total)


def numerical_rank(
    values: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    floor: float = 0.0,
    largest: float | torch.Tensor | None = None,
) -> int:
    """How many singular values are not zero: above ``eps · max(m, n)`` of the largest.

    Args:
        values: ``(s,)``, decreasing.
        shape: Of the matrix.
        dtype: Of the numbers that the matrix was made from: it bounds what is known of it.
        floor: Values up to this fraction of the largest count as zero, too.
        largest: What the values are compared with, if not the first of them.
    """
    import torch

    if values.numel() == 0:
        return 0
    relative = max(torch.finfo(dtype).eps * max(shape), floor)
    return int((values > relative * (values[0] if largest is None else largest)).sum())


def roomy(place: Place, matrix: torch.Tensor) -> Place:
    """The place, or main memory if there is no room for the eigenvectors of a Gram matrix."""
    return place if place.fits(WORKSPACE * 8 * min(matrix.shape) ** 2) else HOST


def precise_sum(matrices: Sequence[torch.Tensor], fast: bool = False) -> torch.Tensor:
    """Sum of the matrices, in fp64 where their decomposition is.

    The order of the experts then does not matter.
    """
    total = precise(matrices[0], fast).clone()
    for matrix in matrices[1:]:
        total += matrix
    return total
