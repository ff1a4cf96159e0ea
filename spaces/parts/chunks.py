"""Tensors cut into chunks, more of them where a merge changes most.

Zhang 2025, "Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided
Layer Chunking" (arXiv 2509.25712). The importance of tensor l is its share of
``Σ_k |α_k| Σ_i |τ_k,l,i|``, and it gets ``m_l = floor(B N I_l^κ / Σ_j I_j^κ)`` chunks, N being the
number of tensors. A tensor of no chunk keeps the coefficient that it starts with. Differences from
the paper:

* Chunks are ``floor(s n / m)`` to ``floor((s + 1) n / m)``, as even as can be. The authors' chunks
  of ``ceil(n / m)`` may be fewer than m, which leaves coefficients that nothing depends on.
* α is where the search begins rather than the result of a first search over whole tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Layout
from mergesearch.spaces.groups import Group, group_tensors

_Array = npt.NDArray[np.float64]


def importance(sums: _Array, coefficients: _Array) -> _Array:
    """Share of each tensor in the size of the merge's change ``(tensors,)``.

    All shares are equal where nothing changes.

    Args:
        sums: Σ |task vector| of every expert and tensor ``(K, tensors)``.
        coefficients: α of every expert ``(K,)``; all 0 counts as all 1.
    """
    weights = np.abs(coefficients) if np.any(coefficients) else np.ones(len(sums))
    sizes = weights @ sums
    total = float(sizes.sum())
    return sizes / total if total > 0 else np.full(sizes.size, 1.0 / sizes.size)


def chunk_counts(
    share: _Array,
    elements: Sequence[int],
    total: float,
    concentration: float,
    *,
    most: int | None,
    remainder: bool,
) -> npt.NDArray[np.int64]:
    """Chunks of every tensor ``(tensors,)``, never more than it has elements.

    Args:
        share: Importance of each tensor, summing to 1.
        elements: Elements of each tensor.
        total: B, chunks in all as a multiple of the number of tensors.
        concentration: κ; 0: the same number everywhere, above 1: more where much changes.
        most: Chunks of one tensor at most.
        remainder: Hand out what rounding down leaves over, the largest fractions first.
    """
    powered = share**concentration
    wanted = total * share.size * powered / powered.sum()
    # 7 * (1 / 7) is a little less than 1; what is whole up to rounding must not lose a chunk.
    counts = np.floor(wanted + 1e-9).astype(np.int64)
    if remainder:
        left = round(total * share.size) - int(counts.sum())
        counts[np.argsort(counts - wanted, kind="stable")[: max(left, 0)]] += 1
    limit = np.asarray(elements, np.int64)
    return np.asarray(np.minimum(counts, limit if most is None else np.minimum(limit, most)))


def chunk_groups(
    layout: Layout, counts: npt.NDArray[np.int64], exclude: Collection[str] = ()
) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """A group for every chunk, and the tensors of no chunk.

    Args:
        layout: The tensors.
        counts: Chunks of each tensor that is not excluded and not empty, in the order of the
            layout.
        exclude: Names of tensors to leave out.
    """
    whole = tensors_of(layout, exclude)
    chunks = [
        chunk
        for group, count in zip(whole, counts.tolist(), strict=True)
        if count
        for chunk in _cut(group, count)
    ]
    return tuple(chunks), tuple(
        group for group, count in zip(whole, counts.tolist(), strict=True) if not count
    )


def tensors_of(layout: Layout, exclude: Collection[str] = ()) -> list[Group]:
    """The tensors that chunks are cut from."""
    return [group for group in group_tensors(layout, "tensor", exclude) if group.parameters]


def _cut(group: Group, count: int) -> list[Group]:
    if count == 1:
        return [group]
    ((start, end),) = group.ranges
    edges = [start + index * group.parameters // count for index in range(count + 1)]
    return [
        Group(
            name=f"{group.name} {index + 1}/{count}",
            tensors=group.tensors,
            # Padding belongs to the last chunk.
            ranges=((first, end if index == count - 1 else last),),
            parameters=last - first,
            depth=group.depth,
            module=group.module,
            role=group.role,
        )
        for index, (first, last) in enumerate(pairwise(edges))
    ]
