"""Polar factors: the nearest matrices with orthonormal columns or rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergesearch.merging.operators.parts.decomposition import (
    FALLING,
    decompose,
    is_large,
    numerical_rank,
    roomy,
)
from mergesearch.merging.operators.parts.eigenvectors import (
    largest_eigenvectors,
    lower_gram,
    projected,
)
from mergesearch.merging.tensors.place import HOST, Place

if TYPE_CHECKING:
    import torch


def polar(
    matrix: torch.Tensor, dtype: torch.dtype, place: Place = HOST, fast: bool = False
) -> torch.Tensor:
    """``P Qᵀ`` of ``P Σ Qᵀ``: the nearest matrix whose non-zero singular values are 1.

    Columns that lie in the span of others share it equally; nothing is added outside the span
    (where ``P`` and ``Q`` are arbitrary). Orthonormal columns are returned as they are.

    Args:
        matrix: ``(m, n)``, possibly without columns or rows.
        dtype: Of the numbers that it was made from, for :func:`numerical_rank`.
        place: Where a large matrix is worked on, unless it lies on an accelerator.
        fast: See :func:`decompose`.
    """
    if matrix.numel() == 0:
        return matrix
    if is_large(matrix, None, fast):
        with place.turn:
            return _polar_large(matrix, dtype, roomy(place, matrix), fast)
    svd = decompose(matrix)
    kept = svd.top(numerical_rank(svd.values, matrix.shape, dtype))
    return kept.left @ kept.right


def _polar_large(
    matrix: torch.Tensor, dtype: torch.dtype, place: Place, fast: bool
) -> torch.Tensor:
    """``X (XᵀX)^(-1/2)`` on the span of X, for the lesser side's Gram matrix in fp64.

    ``fast`` tries fp32 where one side is twice the other: singular values are then rarely small.
    """
    import torch

    sides = sorted(matrix.shape)
    wide = not fast or place.device_of(matrix).type != "cpu" or 2 * sides[0] > sides[1]
    squares, vectors = _eigenvectors_of_gram(
        matrix, torch.float64 if wide else torch.float32, place
    )
    if not wide and float(squares[-1]) < FALLING**2 * float(squares[0]):
        squares, vectors = _eigenvectors_of_gram(matrix, torch.float64, place)
    rank = numerical_rank(squares.clamp_min(0).sqrt(), matrix.shape, dtype)
    vectors = vectors[:, :rank]
    root = ((vectors * squares[:rank].rsqrt()) @ vectors.T).to(matrix.dtype)  # (X Xᵀ)^(-1/2)
    del vectors
    factor = projected(matrix, root, place)
    return factor.T if matrix.shape[0] <= matrix.shape[1] else factor


def _eigenvectors_of_gram(
    matrix: torch.Tensor, dtype: torch.dtype, place: Place
) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvalues, decreasing, and eigenvectors of the lesser side's Gram matrix."""
    gram = lower_gram(matrix, dtype, place)
    return largest_eigenvectors(gram, len(gram))
