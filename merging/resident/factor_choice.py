"""Which rows are kept as low-rank factors, in an arena and in a merge of single tensors alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from mergesearch.merging.kernels.lowrank import matrix_shape
from mergesearch.merging.tensors.layout import TensorSpec

if TYPE_CHECKING:
    from mergesearch.merging.operators.base import Basis
    from mergesearch.merging.tensors.source import Factors

#: Terms of a product that take as long as one element of a dense row. Measured on two cores of an
#: EPYC with AVX2: 28 ps per term from the cache, 250 ps per element of a row from memory.
TERMS_PER_ROW = 9


#: How much slower a merge may become for each factor that it becomes smaller, and how much at most.
SLOWER_PER_SMALLER = 0.25
SLOWEST = 8.0


def worth_keeping(shape: Sequence[int], rank: int, directions: int) -> bool:
    """Whether the K rows of a tensor are better kept as factors of a total rank R.

    Decided by shapes alone.

    Kept whole, the rows take ``K · m · n`` numbers of memory, and a merge reads them all; kept as
    factors, ``R · (m + n)`` numbers, and a merge adds R terms per element from the cache.
    Evaluation, not merging, takes the time of a trial, and the dense rows of a large model may not
    fit in memory at all: a merge may become slower by a quarter of the factor by which the rows
    become smaller, but at most 8 times. Rank 0, a tensor that no expert changes, is always worth
    it.
    """
    m, n = matrix_shape(shape)
    if rank == 0 or m * n == 0:
        return True
    smaller = directions * m * n / (rank * (m + n))  # K m n / (R (m + n))
    slower = rank / (TERMS_PER_ROW * directions)
    return smaller > 1 and slower <= min(SLOWEST, max(1.0, SLOWER_PER_SMALLER * smaller))


def low_rank_factors(
    basis: Basis, spec: TensorSpec, postprocessed: Collection[str] = ()
) -> Factors | None:
    """The factors of a tensor's rows, if the basis has them and they are :func:`worth_keeping`.

    Args:
        basis: Of an operator.
        spec: The tensor.
        postprocessed: Tensors that are more than a weighted sum, whose rows are always whole.
    """
    if (
        basis.factors is None
        or basis.form != "delta"
        or spec.name in postprocessed
        or spec.size == 0
    ):
        return None
    factors = basis.factors(spec.name)
    if factors is None or not worth_keeping(spec.shape, len(factors.owner), basis.directions):
        return None
    return factors
