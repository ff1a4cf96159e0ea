"""Which experts of a block become one, and how many each block keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.merging.mixture.statistics import LayerStatistics, Numbers, cosines

#: Members of a group, the leader first.
Group = tuple[int, ...]
#: Number of the cluster of each expert, ``(experts,)``.
Labels = npt.NDArray[np.intp]
#: Rounds of a clustering, at most; it ends as soon as no expert moves.
ROUNDS = 100


@dataclass(frozen=True)
class Slot:
    """One expert of the smaller block.

    Attributes:
        expert: The one in whose place it stands.
        group: Number of the group whose weights it has.
        rows: Experts whose rows of the router it takes, the first one's alone or their mean.
    """

    expert: int
    group: int
    rows: tuple[int, ...]


def by_usage(usage: Numbers) -> list[int]:
    """Experts from the most to the least used; equals in their order."""
    return [int(index) for index in np.argsort(-usage, kind="stable")]


def most_used(statistics: LayerStatistics, count: int) -> list[Group]:
    """The most used experts, each alone; the others are in no group."""
    return [(expert,) for expert in sorted(by_usage(statistics.usage)[:count])]


def around_dominant(statistics: LayerStatistics, count: int) -> list[Group]:
    """Groups around the most used experts; others join whose logits theirs resemble most.

    Li 2024, "Merge, Then Compress". The authors' code for single layers takes the
    expert of number i for the i-th most used one; here it is the one that the paper names.
    """
    ranked = by_usage(statistics.usage)
    dominant = ranked[:count]
    similar = cosines(statistics.logits)
    groups: dict[int, list[int]] = {leader: [leader] for leader in dominant}
    for expert in ranked[count:]:
        leader = dominant[int(np.argmax(similar[expert, dominant]))]
        groups[leader].append(expert)
    return [tuple(groups[leader]) for leader in sorted(groups)]


def by_outputs(statistics: LayerStatistics, count: int) -> list[Group]:
    """Clusters of experts whose outputs point the same way: K-means by cosine.

    Li 2025, "Sub-MoE", adaptive expert clustering. The outputs of an expert on all tokens are one
    vector; centres are means of unit vectors, so that inner products are all that is needed. The
    paper leaves the start open. Here each expert in turn begins, the next ones being those least
    like all before, and the best end is kept: there is nothing to draw.
    """
    similar = cosines(statistics.outputs)
    ends = [_k_means(similar, _spread(similar, first, count)) for first in range(len(similar))]
    labels = max(ends, key=lambda end: round(_agreement(similar, end), 12))
    ranked = by_usage(statistics.usage)
    found: dict[int, list[int]] = {}
    for expert in ranked:
        found.setdefault(int(labels[expert]), []).append(expert)
    return sorted((tuple(members) for members in found.values()), key=lambda group: group[0])


def _spread(similar: Numbers, first: int, count: int) -> list[int]:
    """Experts that begin clusters: ``first``, and then the one least like all before."""
    chosen = [first]
    while len(chosen) < count:
        nearest = similar[:, chosen].max(axis=1)
        nearest[chosen] = np.inf
        chosen.append(int(np.argmin(nearest)))
    return chosen


def _k_means(similar: Numbers, centres: Sequence[int]) -> Labels:
    """Number of the cluster of each expert, ``(experts,)``; none is empty."""
    labels: Labels = np.argmax(similar[:, centres], axis=1)
    labels[list(centres)] = np.arange(len(centres))
    for _ in range(ROUNDS):
        members = np.eye(len(centres))[labels]
        sums = similar @ members  # inner products with the sum of each cluster
        norms = np.sqrt(np.maximum(np.diag(members.T @ sums), 1e-300))
        nearest = np.argmax(sums / norms, axis=1)
        # An expert that is alone stays: a cluster without members would be lost.
        alone = members.sum(axis=0)[labels] == 1
        moved = np.where(alone, labels, nearest)
        if len(np.unique(moved)) < len(centres) or (moved == labels).all():
            break
        labels = moved
    return labels


def _agreement(similar: Numbers, labels: Labels) -> float:
    """Sum over clusters of the length of their sums of unit vectors."""
    members = labels[:, None] == np.unique(labels)[None, :]
    return float(np.sqrt(np.maximum(np.diag(members.T @ similar @ members), 0.0)).sum())


def counts_by_usage(layers: Sequence[LayerStatistics], total: int) -> list[int]:
    """Experts that each block keeps: those among the most used of the whole model.

    Li 2024, "Merge, Then Compress": one threshold of usage for all blocks. Every block keeps one.

    Args:
        layers: Statistics of all blocks.
        total: Experts that all blocks keep together.
    """
    counts = [1] * len(layers)
    rest = [
        (-float(statistics.usage[expert]), index, expert)
        for index, statistics in enumerate(layers)
        for expert in by_usage(statistics.usage)[1:]
    ]
    for _, index, _ in sorted(rest)[: total - len(layers)]:
        counts[index] += 1
    return counts


def slots_of(groups: Sequence[Group], usage: Numbers, stored: int, *, mean: bool) -> list[Slot]:
    """The experts of a block that stores ``stored`` of them, in the order of the old ones.

    Where there are fewer groups than that, the most used of the other members keep their own row of
    the router, which then leads to a copy of their group's weights.

    Args:
        groups: The groups.
        usage: Of all experts of the block.
        stored: Experts that are stored: at least one for each group.
        mean: Whether the leader's row becomes the mean of all rows that are left out.
    """
    of = {expert: number for number, group in enumerate(groups) for expert in group}
    leaders = {group[0] for group in groups}
    others = [expert for expert in by_usage(usage) if expert in of and expert not in leaders]
    kept = leaders | set(others[: stored - len(groups)])
    slots = []
    for expert in sorted(kept):
        left = [member for member in groups[of[expert]] if member not in kept]
        folded = left if mean and expert in leaders else []
        slots.append(Slot(expert, of[expert], (expert, *folded)))
    return slots
