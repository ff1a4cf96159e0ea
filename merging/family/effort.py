"""How long preparing takes: an operator's decompositions and products, at measured rates.

Counts follow :mod:`mergesearch.merging.operators.parts.decomposition`, with s the lesser and l the
greater side of a matrix: products are multiplications and additions, and eigenvectors are s³ units.
Left out are the runs of the experts that data operators make, and learning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mergesearch.merging.family.rates import Rates
from mergesearch.merging.operators import members_of
from mergesearch.merging.operators.base import Operator
from mergesearch.merging.operators.parts.eigenvectors import BLOCKS
from mergesearch.merging.operators.parts.matrices import Selection, matrices_in
from mergesearch.merging.tensors.layout import Layout

if TYPE_CHECKING:
    from mergesearch.merging.tensors.source import Options

#: Bytes of a stored element.
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

#: Share of a Gram matrix that is worked out: blocks up to the diagonal.
_LOWER = (BLOCKS + 1) / (2 * BLOCKS)


@dataclass(frozen=True)
class Work:
    """What preparing does with matrices, in the units of :class:`Rates`.

    Attributes:
        multiply: fp32 operations.
        multiply_wide: fp64 operations.
        few: s³ of some eigenvectors.
        every: s³ of all eigenvectors.
        moved: Bytes to the device and back.
    """

    multiply: float = 0.0
    multiply_wide: float = 0.0
    few: float = 0.0
    every: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.multiply + other.multiply,
            self.multiply_wide + other.multiply_wide,
            self.few + other.few,
            self.every + other.every,
            self.moved + other.moved,
        )

    def times(self, count: float) -> Work:
        """The work of so many."""
        return Work(
            self.multiply * count,
            self.multiply_wide * count,
            self.few * count,
            self.every * count,
            self.moved * count,
        )


def largest_vectors(shape: tuple[int, int], rank: int) -> Work:
    """The ``rank`` largest singular vectors of a matrix."""
    s, length = sorted(shape)
    if 2 * rank > s:
        return all_vectors(shape)
    return Work(multiply=2 * s * length * (_LOWER * s + rank), few=s**3)


def all_vectors(shape: tuple[int, int]) -> Work:
    """All singular vectors of a matrix."""
    s, length = sorted(shape)
    return Work(multiply_wide=2 * s * s * length * (_LOWER + 1), every=s**3)


def polar_factor(shape: tuple[int, int]) -> Work:
    """The polar factor of a matrix."""
    s, length = sorted(shape)
    wide = 2 * s * s * (_LOWER * length + s)
    return Work(multiply=2 * s * s * length, multiply_wide=wide, every=s**3)


def product(*sides: int) -> Work:
    """Matrix products ``(a, b) @ (b, c) @ ...``, from the left."""
    first, *rest = sides
    pairs = pairwise(rest)
    return Work(multiply=sum(2.0 * first * inner * outer for inner, outer in pairs))


#: (shape, experts, options) -> what an operator does with one matrix.
MatrixWork = Callable[[tuple[int, int], int, "Options"], Work]


def _tsv(shape: tuple[int, int], experts: int, options: Options) -> Work:
    m, n = shape
    rank = min(shape) // experts if options["rank"] == "share" else min(shape)
    own = largest_vectors(shape, rank) + product(m, rank, n)
    joined = rank * experts
    return own.times(experts) + polar_factor((m, joined)) + polar_factor((n, joined))


def _iso_c(shape: tuple[int, int], experts: int, _options: Options) -> Work:
    m, n = shape
    s = min(shape)
    return all_vectors(shape) + (product(s, m, n) + product(m, s, n)).times(experts)


def _iso_cts(shape: tuple[int, int], experts: int, options: Options) -> Work:
    m, n = shape
    s = min(shape)
    each = max(1, int(s * (1 - options["common"]) / experts))
    own = largest_vectors(shape, each) + product(s, m, n) + product(m, s, n)
    joined = polar_factor((m, s)) + polar_factor((n, s)) + product(m, s, n)
    return all_vectors(shape) + own.times(experts) + joined


def _knots(shape: tuple[int, int], experts: int, _options: Options) -> Work:
    m, n = shape
    rank = min(m, experts * n)
    shared = Work(multiply_wide=2 * _LOWER * rank * m * n * experts, every=rank**3)
    return shared + (product(rank, m, n) + product(m, rank, n)).times(experts)


def _opcm(shape: tuple[int, int], experts: int, _options: Options) -> Work:
    m, n = shape
    s = min(shape)
    cleaned = 2.0 * (2 * s * m * n + s * s * n + m * s * s)  # Uᵀ τ V, and U X Vᵀ
    return (all_vectors(shape) + Work(multiply_wide=cleaned)).times(experts - 1)


def _dop(shape: tuple[int, int], experts: int, options: Options) -> Work:
    m, n = shape
    s = min(shape)
    # Four products for each of two losses; or all eigenvectors of both sides.
    step = Work(multiply_wide=16.0 * s * m * n)
    fixed = Work(multiply_wide=4.0 * (m + n) * m * n, every=float(m**3 + n**3))
    descent = fixed if options["balance"] == "fixed" else step.times(options["steps"])
    return (all_vectors(shape).times(2) + descent).times(experts - 1)


def _svc(shape: tuple[int, int], experts: int, options: Options) -> Work:
    m, n = shape
    s = min(shape)
    merged = _tsv(shape, experts, {"rank": "share"}) if options["method"] == "tsv" else Work()
    return (
        merged + all_vectors(shape) + (product(s, m, n).times(2) + product(m, s, n)).times(experts)
    )


def _wudi(shape: tuple[int, int], experts: int, _options: Options) -> Work:
    m, n = shape
    s = min(n, experts * m)
    spectrum = Work(multiply_wide=2.0 * s * s * experts * m, every=s**3)
    return spectrum + product(m, n, s, n).times(2 * experts)


def _optmerge(shape: tuple[int, int], experts: int, options: Options) -> Work:
    m, n = shape
    rank = max(1, min(shape) // experts)
    s = min(n, experts * rank)
    kinds = 2 if options["form"] == "full" else 1
    own = largest_vectors(shape, rank).times(kinds) + product(m, n, s, n) + product(m, rank, n)
    spectrum = Work(multiply_wide=2.0 * s * n * n, every=s**3)
    return own.times(experts) + spectrum


def _doge(shape: tuple[int, int], experts: int, options: Options) -> Work:
    m, n = shape
    s = min(shape)
    kept = s // options["subspace"]
    step = product(m, n, 1).times(2 * experts) + product(kept, m, n) + product(m, kept, n)
    own = largest_vectors(shape, s // experts).times(experts)
    return own + largest_vectors((m, s), kept) + step.times(options["steps"])


def _regmean(shape: tuple[int, int], experts: int, _options: Options) -> Work:
    m, n = shape
    return Work(multiply_wide=n**3 / 3 + 4.0 * experts * m * n * n)


#: What operators do with matrices; those that are not listed read and write.
MATRIX_WORK: Mapping[str, MatrixWork] = {
    "tsv": _tsv,
    "iso_c": _iso_c,
    "iso_cts": _iso_cts,
    "knots": _knots,
    "opcm": _opcm,
    "opcm_add": _opcm,
    "wudi": _wudi,
    "optmerge": _optmerge,
    "doge": _doge,
    "dop": _dop,
    "svc": _svc,
    "pleas": _regmean,
    "regmean": _regmean,
    "regmean_pp": _regmean,
}


def preparation_seconds(
    operator: Operator,
    layout: Layout,
    experts: int,
    rates: Rates,
    options: Options | None = None,
    threads: int = 1,
) -> float:
    """How long an operator prepares a family, without the runs of experts that some make.

    Args:
        operator: Which operator.
        layout: Tensors of the base, which the experts share.
        experts: Number of experts.
        rates: Of the machine, of one thread or one card.
        options: Hyperparameters; its defaults where they are missing.
        threads: Tensors that are worked on at once in main memory.
    """
    stored = sum(spec.size * _BYTES[spec.dtype] for spec in layout.tensors) * (experts + 1)
    seconds = _passes(operator) * stored / rates.read
    work = matrix_work(operator, layout, experts, options or {})
    at_once = threads if rates.move is None else 1
    return seconds + _seconds(work, rates) / at_once


def matrix_work(operator: Operator, layout: Layout, experts: int, options: Options) -> Work:
    """What an operator does with all matrices of a family; a blend, what its members do."""
    if operator.name == "blend":
        each = (matrix_work(one, layout, experts, {}) for one in members_of(options))
        return sum(each, Work())
    if operator.name not in MATRIX_WORK:
        return Work()
    defaults = {name: each.default for name, each in operator.hyperparameters.items()}
    full = {**defaults, **options}
    selection = Selection.chosen(layout, full)
    work = MATRIX_WORK[operator.name]
    total = Work()
    for spec in layout.tensors:
        for part in matrices_in(spec.name, spec.shape, selection):
            moved = Work(moved=8.0 * experts * part.shape[0] * part.shape[1])
            total += work(part.shape, experts, full) + moved
    return total


def _passes(operator: Operator) -> int:
    """How often sources are read: once more, or twice, where statistics come first."""
    return {"G": 3, "S": 2}.get(operator.scope, 1)


def _seconds(work: Work, rates: Rates) -> float:
    return (
        work.multiply / rates.multiply
        + work.multiply_wide / rates.multiply_wide
        + work.few / rates.few
        + work.every / rates.every
        + (0.0 if rates.move is None else work.moved / rates.move)
    )
