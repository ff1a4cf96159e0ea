"""Singular value decompositions, polar factors and numerical ranks of single matrices.

Singular vectors have no sign and, where singular values repeat, no direction: formulas use them in
pairs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Matrices of up to this many elements are decomposed in fp64. It takes 1.8 times as long as fp32,
#: under a second at this size, and singular vectors of close singular values come out as exact as
#: the weights are. Larger ones would take minutes more in all; theirs are off by about 1e-5 of the
#: largest singular value.
PRECISE_UP_TO = 1 << 20


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


def precise(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix in the dtype to decompose it in: fp64 up to ``PRECISE_UP_TO`` elements."""
    import torch

    small = matrix.numel() <= PRECISE_UP_TO
    return matrix.to(torch.float64 if small or matrix.dtype == torch.float64 else torch.float32)


def decompose(matrix: torch.Tensor) -> Svd:
    """The thin singular value decomposition of finite numbers, in their dtype, fp32 or fp64."""
    import torch

    try:
        return Svd(*torch.linalg.svd(matrix, full_matrices=False))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # LAPACK's divide and conquer gives up on some matrices with many equal singular values, as
        # joined singular vectors have; in fp64, and the other way round, it has not been seen to.
        right, values, left = torch.linalg.svd(matrix.double().T, full_matrices=False)
        return Svd(*(factor.to(matrix.dtype) for factor in (left.T, values, right.T)))


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


def polar(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``P Qᵀ`` of ``P Σ Qᵀ``: the nearest matrix whose non-zero singular values are 1.

    Columns that lie in the span of others share it equally; nothing is added outside the span
    (where ``P`` and ``Q`` are arbitrary). Orthonormal columns are returned as they are.

    Args:
        matrix: ``(m, n)``, possibly without columns or rows.
        dtype: Of the numbers that it was made from, for :func:`numerical_rank`.
    """
    if matrix.numel() == 0:
        return matrix
    svd = decompose(matrix)
    kept = svd.top(numerical_rank(svd.values, matrix.shape, dtype))
    return kept.left @ kept.right


def precise_sum(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the matrices, in fp64 where their decomposition is.

    The order of the experts then does not matter.
    """
    total = precise(matrices[0]).clone()
    for matrix in matrices[1:]:
        total += matrix
    return total
