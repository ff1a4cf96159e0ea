"""Validation items that the search uses instead: which they are, and columns with and without them.

The search fits its own items, the less the more of them there are. The final choice compares a few
merges, and needs fewer items than a search that compares hundreds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.items import balanced_order

Mask = npt.NDArray[np.bool_]


def lent_items(domains: npt.NDArray[np.str_], share: float) -> Mask:
    """Which validation items are lent ``(items,)``: a fixed choice, in proportion to the domains.

    At least one item of every domain is kept.

    Args:
        domains: Domain of each item ``(items,)``.
        share: Part of the items to lend, from 0 to less than 1.
    """
    # The first items of the order are one of each domain.
    kept = max(len(domains) - round(share * len(domains)), len(np.unique(domains)))
    lent = np.ones(len(domains), dtype=np.bool_)
    lent[balanced_order(domains)[:kept]] = False
    return lent


def rows_of(values: Any, chosen: Mask) -> Any:
    """The chosen rows of a column, an array ``(items, ...)`` or a list."""
    if isinstance(values, np.ndarray):
        return values[chosen]
    return [value for value, kept in zip(values, chosen, strict=True) if kept]


def joined(first: Any, second: Any) -> Any:
    """Two columns as one, the rows of the first before those of the second."""
    arrays = isinstance(first, np.ndarray) and isinstance(second, np.ndarray)
    if not arrays:
        return [*first, *second]
    if first.dtype != object and second.dtype != object and first.shape[1:] == second.shape[1:]:
        return np.concatenate([first, second])
    ragged = np.empty(len(first) + len(second), dtype=object)
    ragged[:] = [*first, *second]
    return ragged
