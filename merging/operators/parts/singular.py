"""Singular vectors of task vectors, remembered so that spectral operators share them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.merging.operators.parts.decomposition import (
    Svd,
    decompose,
    is_large,
    left_of_grams,
    precise,
    precise_sum,
)
from mergesearch.merging.operators.parts.matrix_part import MatrixPart
from mergesearch.merging.operators.parts.sides import decompose_side
from mergesearch.merging.tensors.place import Place, place_of
from mergesearch.merging.tensors.source import TensorSource, remembered

if TYPE_CHECKING:
    import torch

#: What is added to keys of results, by whether they were made fast.
_FAST: Mapping[bool, list[str]] = {False: [], True: ["fast"]}


def singular(
    base: TensorSource,
    expert: TensorSource,
    part: MatrixPart,
    matrix: torch.Tensor,
    rank: int | None = None,
    fast: bool = False,
) -> Svd:
    """Singular values and vectors of one expert's task vector.

    Args:
        base: The common base.
        expert: Whose task vector it is.
        part: Which matrix of it.
        matrix: The task vector's part itself.
        rank: Number of singular values that are wanted, the largest; None for all. No more than
            those are kept.
        fast: See :func:`decompose`.
    """

    def compute() -> Svd:
        wide = precise(matrix, fast)
        return decompose(wide, rank, part.draws(), place_of(base), fast=fast)

    key = ["singular vectors of a task vector", *part.key, rank, *_FAST[fast]]
    return _remembered_svd([base, expert], key, compute, matrix.device)


def singular_of_sum(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: MatrixPart,
    matrices: Sequence[torch.Tensor],
    fast: bool = False,
) -> Svd:
    """Singular values and vectors of ``Σ_k τ_k``."""
    key = ["singular vectors of the sum of task vectors", *part.key, *_FAST[fast]]

    def compute() -> Svd:
        total = precise_sum(matrices, fast)
        return decompose(total, None, part.draws(), place_of(base), fast=fast)

    return _remembered_svd([base, *experts], key, compute, matrices[0].device)


def left_of_sum(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: MatrixPart,
    matrices: Sequence[torch.Tensor],
    fast: bool = True,
) -> Svd:
    """:func:`singular_of_sum`, where right singular vectors may be missing."""
    rows, columns = matrices[0].shape
    if rows > columns or not is_large(matrices[0], fast=fast):
        return singular_of_sum(base, experts, part, matrices, fast)
    key = ["left singular vectors of the sum of task vectors", *part.key, *_FAST[fast]]

    def compute() -> Svd:
        total = precise_sum(matrices, fast)
        return decompose_side(total, part.draws(), place_of(base), left=True)

    return _remembered_svd([base, *experts], key, compute, matrices[0].device)


def singular_side_by_side(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: MatrixPart,
    matrices: Sequence[torch.Tensor],
    fast: bool = False,
) -> Svd:
    """Left singular vectors and values of ``[τ_1 ... τ_K]``, ``(m, K n)``, with an empty right.

    Where they are made fast, it may be the left ones that are missing, if m is no less than K n.
    """
    import torch

    key = ["left singular vectors of the task vectors side by side", *part.key, *_FAST[fast]]

    def compute() -> Svd:
        if fast and is_large(matrices[0], fast=True):
            joined = torch.cat([precise(matrix, fast) for matrix in matrices], dim=1)
            less = joined.shape[0] < joined.shape[1]
            return decompose_side(joined, part.draws(), place_of(base), left=less)
        return _side_by_side(matrices, place_of(base))

    return _remembered_svd([base, *experts], key, compute, matrices[0].device)


def _side_by_side(matrices: Sequence[torch.Tensor], place: Place) -> Svd:
    """The same, from triangular factors that take in one expert at a time.

    ``[τ_1 ... τ_K] = Rᵀ Qᵀ`` has the left singular vectors of ``Rᵀ``. Large matrices that are wider
    than high have those of ``Σ_k τ_k τ_kᵀ``.
    """
    import torch

    rows, columns = matrices[0].shape
    if is_large(matrices[0]) and rows <= columns:
        with place.turn:
            return left_of_grams(matrices, place)

    triangle = precise(matrices[0]).T[:0]
    for matrix in matrices:
        triangle = torch.linalg.qr(torch.cat([triangle, precise(matrix).T]), mode="r").R
    svd = decompose(triangle.T)
    return Svd(svd.left, svd.values, svd.right[:, :0])


def _remembered_svd(
    sources: Sequence[TensorSource],
    key: list[Any],
    compute: Callable[[], Svd],
    device: torch.device,
) -> Svd:
    def tensors() -> dict[str, torch.Tensor]:
        svd = compute()
        # As they come from disk, so that products of them have the same bits.
        return {
            "left": svd.left.contiguous(),
            "values": svd.values,
            "right": svd.right.contiguous(),
        }

    factors = remembered(sources, key, tensors)
    left, values, right = (factors[name].to(device) for name in ("left", "values", "right"))
    return Svd(left, values, right)
