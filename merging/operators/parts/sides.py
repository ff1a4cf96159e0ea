"""Singular vectors of one side of a matrix, for formulas that need no others.

Those of the other side would be products as large as the matrix itself: for K task vectors of an
embedding, ``[τ_1 ... τ_K]``, they are K times as large as the embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergesearch.merging.operators.parts.decomposition import Svd, decompose_low_rank, roomy
from mergesearch.merging.operators.parts.eigenvectors import largest_eigenvectors, lower_product
from mergesearch.merging.tensors.place import Place

if TYPE_CHECKING:
    import torch


def decompose_side(matrix: torch.Tensor, draws: torch.Generator, place: Place, left: bool) -> Svd:
    """Singular values of a large matrix, with the vectors of one of its sides.

    The other side has no vectors, unless the matrix is of low rank. Vectors are eigenvectors of the
    Gram matrix of that side, ``(m, m)`` or ``(n, n)``, in fp64.

    Args:
        matrix: ``(m, n)``, fp32.
        draws: For random columns, by which low rank is found.
        place: Where it is worked out.
        left: Whether the vectors are those of the left side; it should be the lesser one.
    """
    import torch

    with place.turn:
        place = roomy(place, matrix)
        low = decompose_low_rank(matrix, draws, place)
        if low is not None:
            return low
        rows = matrix if left else matrix.T
        gram = lower_product(rows, torch.float64, place)
        squares, vectors = largest_eigenvectors(gram, len(gram))
    own = vectors.to(matrix.device, matrix.dtype)
    values = squares.clamp_min(0).sqrt().to(matrix.device, matrix.dtype)
    return Svd(own, values, matrix[:0]) if left else Svd(matrix[:, :0], values, own.T)
