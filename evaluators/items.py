"""Fixed and shuffled orders of items: which of them a part, a batch or a resample holds."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Batch, ItemSubset

#: Resamples behind the interval of a value that is no weighted sum over items; a standard error is
#: then known to 3 %.
RESAMPLES = 500


def balanced_order(domains: npt.NDArray[np.str_]) -> npt.NDArray[np.intp]:
    """A fixed random order ``(items,)`` whose every beginning holds the domains in proportion.

    The first items are one of each domain. The order follows from the domains alone, so that all
    workers agree.

    Args:
        domains: Domain of each item ``(items,)``.
    """
    rng = np.random.default_rng(0)
    share = np.empty(len(domains))
    tie = rng.random(len(domains))
    for name in np.unique(domains):
        members = np.flatnonzero(domains == name)
        share[rng.permutation(members)] = np.arange(len(members)) / len(members)
    return np.lexsort([tie, share])


def chosen_indices(domains: npt.NDArray[np.str_], subset: ItemSubset) -> npt.NDArray[np.intp]:
    """Indices of the items of a subset in the split ``(n,)``, rising.

    Args:
        domains: Domain of each item of the split ``(items,)``.
        subset: All, the first so many of the fixed order, or given indices.
    """
    if isinstance(subset, np.ndarray):
        return subset
    return np.sort(balanced_order(domains)[:subset])


def batch_indices(
    domains: npt.NDArray[np.str_], batch: Batch
) -> dict[str, tuple[npt.NDArray[np.intp], int]]:
    """Domain -> indices ``(n,)`` of the items of a batch's share, and the size of the whole batch.

    Indices are those in the split. A domain with fewer items than a batch gives all of them, once.
    A share may be empty.

    Args:
        domains: Domain of each item ``(items,)``.
        batch: Which of them.
    """
    order = balanced_order(domains)
    by_domain = {}
    for index, name in enumerate(np.unique(domains).tolist()):
        pool = order[domains[order] == name][: batch.samples]
        size = len(pool) if batch.size is None else min(batch.size, len(pool))
        first = batch.number * size
        rounds = range(first // len(pool), (first + size - 1) // len(pool) + 1)
        stream = np.concatenate(
            [np.random.default_rng([batch.seed, index, r]).permutation(pool) for r in rounds]
        )
        taken = stream[first - rounds.start * len(pool) :][:size]
        share = taken[batch.share * size // batch.shares : (batch.share + 1) * size // batch.shares]
        by_domain[name] = share, size
    return by_domain


def resamples(domain: str, count: int) -> Iterator[npt.NDArray[np.intp]]:
    """Items of a domain that each of :data:`RESAMPLES` resamples draws with replacement ``(n,)``.

    One item fewer is drawn than there are, so that the spread of a mean over a small domain is not
    too small (Rao and Wu 1988, "Resampling inference with complex survey data", section 2). The
    draws follow from the domain's name and size alone, so that all merges are valued on the same
    resamples, and differences between them are paired.

    Args:
        domain: Its name.
        count: Number of its items.
    """
    rng = np.random.default_rng([zlib.crc32(domain.encode()), count])
    for _ in range(RESAMPLES):
        yield rng.integers(count, size=max(count - 1, 1))
