"""Changes of matrices as products of two factors: joined without loss, or cut to a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergesearch.merging.operators.parts.eigenvectors import (
    largest_eigenvectors,
    lower_gram,
    projected,
)
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.place import HOST
from mergesearch.merging.tensors.source import Factors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class LowRankChange:
    """A change of a matrix as ``left @ right``.

    Attributes:
        left: ``(m, r)``, fp32.
        right: ``(r, n)``, fp32.
        error: What is missing, as a share of the Frobenius norm of the change; 0 where nothing but
            the rounding of the factors is.
    """

    left: torch.Tensor
    right: torch.Tensor
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Number of terms r."""
        return int(self.left.shape[1])


def joined(factors: Factors, part: Field) -> LowRankChange | None:
    """The weighted sum of rows that are low-rank products, as one product.

    ``Σ_k c_k B_k A_k = [c_1 B_1, c_2 B_2, …] @ [A_1; A_2; …]``. Where coefficients change from row
    to row of the matrix they scale rows of the left factor. Terms of coefficient 0 are left out.

    Args:
        factors: Rows of one matrix ``(m, n)``.
        part: Coefficients over its elements.

    Returns:
        None where coefficients change within a row: then the sum is no such product.
    """
    import torch

    m = factors.left.shape[0]
    n = factors.right.shape[1]
    compact = part.compact()
    if np.any(compact.boundaries % n):
        return None
    of_rows = compact.at(np.arange(m) * n)[list(factors.owner)]  # (R, m)
    used = np.flatnonzero(np.any(of_rows != 0, axis=1))
    scale = torch.from_numpy(np.ascontiguousarray(of_rows[used].T))
    columns = torch.from_numpy(used)
    # Scaled in fp64 and rounded once.
    left = (factors.left[:, columns].double() * scale).float()
    return LowRankChange(left, factors.right[columns].float())


def cut(change: LowRankChange, rank: int) -> LowRankChange:
    """The best product of at most ``rank`` terms for a product of more (Eckart and Young 1936)."""
    import torch

    if change.rank <= rank:
        return change
    left, upper = torch.linalg.qr(change.left.double())
    right, lower = torch.linalg.qr(change.right.double().T)
    u, values, v = torch.linalg.svd(upper @ lower.T)
    squares = values.square()
    root = values[:rank].sqrt()
    return LowRankChange(
        (left @ u[:, :rank] * root).float(),
        (root[:, None] * (right @ v[:rank].T).T).float(),
        _share(squares[rank:].sum(), squares.sum()),
    )


def approximated(delta: torch.Tensor, rank: int) -> LowRankChange:
    """The best product of at most ``rank`` terms for a matrix ``(m, n)`` that is not zero.

    Its vectors are those of the smaller Gram matrix in fp64, of which only so many are worked out.
    """
    import torch

    kept = min(rank, *delta.shape)
    values, vectors = largest_eigenvectors(lower_gram(delta, torch.float64, HOST), kept)
    others = projected(delta, vectors, HOST)  # (max(m, n), r)
    whole = torch.linalg.vector_norm(delta, dtype=torch.float64).square()
    root = values.clamp_min(0).sqrt().sqrt()  # of the singular values
    root = torch.where(root > 0, root, 1.0)
    sides = (vectors * root).float(), (others / root).float()
    left, right = sides if delta.shape[0] <= delta.shape[1] else sides[::-1]
    error = _share(whole - others.square().sum(), whole)
    return LowRankChange(left.contiguous(), right.T.contiguous(), error)


def _share(missing: torch.Tensor, whole: torch.Tensor) -> float:
    return float((missing / whole).clamp_min(0).sqrt()) if float(whole) > 0 else 0.0
