"""Ranks of changes, counted from base and experts as they are stored, without making differences.

All experts are counted at once, so the base is read once for all of them. The bits of a magnitude
are two digits, as in :mod:`.magnitudes`: the upper 16 say in which bin it lies, the lower 16 where
inside. A sample says which few bins may hold a rank. Then one read finds the number: it counts what
is above these bins, and all bits of what lies in them. Where the sample was wrong or too small, two
reads count one digit each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.kernels.host import stored_numbers
from mergesearch.merging.operators.parts.counting import BINS, DIGIT
from mergesearch.merging.operators.parts.magnitudes import bin_of, count_kept
from mergesearch.merging.operators.parts.task_vectors import is_stored_whole
from mergesearch.merging.tensors.parallel import nested_parallel_map
from mergesearch.merging.tensors.place import place_of
from mergesearch.merging.tensors.source import TensorSource

if TYPE_CHECKING:
    Counts = npt.NDArray[np.int64]
    Lower = npt.NDArray[np.int64] | npt.NDArray[np.uint32]

#: Elements from which on a sample is worth its time.
SAMPLED_FROM = 1 << 19

#: A sample takes runs of so many neighbours, from a 128th of all elements, or from so many.
RUN = 1 << 10
SHARE = 1 / 128
LEAST = 1 << 17

#: How far a rank in the sample may be off, as a fraction of all elements: what neighbours have in
#: common, and what chance does, in standard deviations.
MARGIN = 0.001
DEVIATIONS = 3.0

#: Bins, a quarter of a megabyte for each expert, that may hold a rank.
MOST_BINS = 32

#: Parts of a model that are counted apart, each with counts of its own.
PARTS = 8

#: The least bits of a magnitude that is not finite.
_INFINITY = 0x7F800000


@dataclass(frozen=True, eq=False)
class _Counts:
    """Counts of all experts' magnitudes.

    Attributes:
        upper: ``(experts, 32768)``, by the upper 16 bits, or of no expert.
        lower: ``(experts, bins · 65536)``, of some bins by all bits.
        above: ``(experts,)``, of what is above these bins.
        largest: ``(experts,)``, bits of the largest magnitude.
    """

    upper: Counts
    lower: Lower
    above: Counts
    largest: Counts

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(
            self.upper + other.upper,
            self.lower + other.lower.astype(np.int64),
            self.above + other.above,
            np.maximum(self.largest, other.largest),
        )


def stored_thresholds(
    base: TensorSource, experts: Sequence[TensorSource], names: Sequence[str], density: float
) -> list[float] | None:
    """For every expert, the least magnitude that it keeps of all elements of some tensors.

    Args:
        base: The base.
        experts: The experts.
        names: Tensors that are ranked together.
        density: Fraction of elements that is kept, with the ties of the last one.

    Returns:
        The same numbers as :func:`.magnitudes.kth_largest` finds; None where something is not
        stored in a way that kernels read, or not finite.
    """
    if not place_of(base).is_host or not all(is_stored_whole(experts, name) for name in names):
        return None
    sources = [base, *experts]

    def mapped(name: str) -> list[Any]:
        return [stored_numbers(source.read(name).detach()) for source in sources]

    # One tensor stays mapped while it is read several times.
    read = mapped if len(names) > 1 else {name: mapped(name) for name in names}.__getitem__
    if any(array is None for name in names for array in read(name)):
        return None
    total = sum(math.prod(base.shape(name)) for name in names)
    rank = count_kept(density, total)
    count = partial(_counted, read, names, len(experts))
    found = _from_sample(count, rank, total) if total >= SAMPLED_FROM else None
    return found or _from_two_reads(count, rank)


def _from_sample(count: Callable[..., _Counts], rank: int, total: int) -> list[float] | None:
    """The magnitudes of a rank, from one read after a sample; None where the sample misleads."""
    every = max(1, int(total / max(LEAST, SHARE * total)))
    firsts, bins = _likely_bins(count(upper=True, every=every).upper, rank / total)
    if bins == 0:
        return None
    counts = count(firsts=firsts, bins=bins)
    if (counts.largest >= _INFINITY).any():
        return None
    return _numbers(firsts, counts.lower, rank - counts.above)


def _from_two_reads(count: Callable[..., _Counts], rank: int) -> list[float] | None:
    """The magnitudes of a rank, digit by digit; None where something is not finite."""
    counts = count(upper=True)
    if (counts.largest >= _INFINITY).any():
        return None
    places = np.array([bin_of(upper, rank) for upper in counts.upper])
    firsts, ranks = np.ascontiguousarray(places.T)
    return _numbers(firsts, count(firsts=firsts, bins=1).lower, ranks)


def _numbers(firsts: Counts, lower: Lower, ranks: Counts) -> list[float] | None:
    """For every expert the number of a rank among those of its bins; None if it is not there."""
    from mergesearch.merging.kernels.sparse_numba import find_from_above

    keys = [find_from_above(*of) for of in zip(lower, ranks.tolist(), strict=True)]
    if min(keys) < 0:
        return None
    bits = [(first << DIGIT) + key for first, key in zip(firsts.tolist(), keys, strict=True)]
    return [float(number) for number in np.array(bits, np.uint32).view(np.float32)]


def _likely_bins(upper: Counts, share: float) -> tuple[Counts, int]:
    """For every expert the first bin that may hold a rank, and how many do; 0 if too many."""
    size = int(upper[0].sum())
    margin = MARGIN + DEVIATIONS * math.sqrt(share * (1 - share) / size)
    least, most = (min(max(int(part * size), 1), size) for part in (share - margin, share + margin))
    above = np.array([bin_of(counts, least)[0] for counts in upper])
    below = np.array([bin_of(counts, most)[0] for counts in upper])
    bins = int((above - below).max()) + 1
    return np.minimum(below, upper.shape[1] - bins), bins if bins <= MOST_BINS else 0


def _counted(
    read: Callable[[str], list[Any]],
    names: Sequence[str],
    experts: int,
    firsts: Counts | None = None,
    bins: int = 0,
    upper: bool = False,
    every: int = 1,
) -> _Counts:
    """One read of all tensors, or of one run in ``every``."""
    from mergesearch.merging.kernels.source_numba import addresses_of
    from mergesearch.merging.kernels.sparse_numba import SIDES, UPPER_BINS, count_changes

    begin = np.zeros(experts, np.int64) if firsts is None else firsts

    def count(part: Sequence[str]) -> _Counts:
        total = np.zeros((experts if upper else 0, UPPER_BINS), np.int64)
        lower = np.zeros((experts, bins * BINS), np.uint32)
        found = np.zeros((experts, 2), np.int64)
        for name in part:
            numbers = read(name)
            sides = np.zeros((len(total), SIDES, UPPER_BINS), np.uint32)
            size = numbers[0].size
            where = addresses_of(numbers)
            count_changes(*where, size, RUN, RUN * every, sides, begin, lower, found)
            total += sides.sum(axis=1, dtype=np.int64)
        return _Counts(total, lower, found[:, 0], found[:, 1])

    parts = [names[start::PARTS] for start in range(min(PARTS, len(names)))]
    if len(parts) == 1:
        return count(parts[0])
    first, *others = nested_parallel_map(count, parts)
    return sum(others, first)
