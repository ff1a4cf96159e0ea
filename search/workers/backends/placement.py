"""How many workers fit on which node and on which of its cards; shown before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergesearch.search.spec.sections import WorkersSection


@dataclass(frozen=True)
class Node:
    """A machine of a cluster.

    Attributes:
        name: Its address.
        cpus, gpus: Number of each that it offers to workers.
        id: Ray's own id.
    """

    name: str
    cpus: float
    gpus: float
    id: str = ""

    def holds(self, section: WorkersSection) -> int:
        """How many workers fit on the node."""
        by_cpu = int(self.cpus / section.cpus + 1e-9)
        each = section.gpus_each
        return min(by_cpu, _by_gpu(self.gpus, each)) if each else by_cpu


def _by_gpu(have: float, each: float) -> int:
    """How many workers fit on ``have`` GPUs.

    Workers that share a GPU stay on it; those that take several take whole ones.
    """
    return int(have) * int(1 / each + 1e-9) if each < 1 else int(have / each + 1e-9)


@dataclass(frozen=True)
class Placement:
    """A number of workers on a node."""

    node: Node
    workers: int


def place(nodes: Sequence[Node], section: WorkersSection, count: int | None) -> list[Placement]:
    """Spread workers over nodes as evenly as they fit.

    Args:
        nodes: The nodes of the cluster.
        section: What each worker takes.
        count: Number of workers; None: as many as fit.

    Returns:
        One entry for every node; the workers sum to ``count`` or, where fewer fit, to less.
    """
    capacity = [node.holds(section) for node in nodes]
    placed = [0] * len(nodes)
    left = sum(capacity) if count is None else min(count, sum(capacity))
    while left:
        for index in sorted(range(len(nodes)), key=lambda i: placed[i]):
            if left and placed[index] < capacity[index]:
                placed[index] += 1
                left -= 1
    return [Placement(node, workers) for node, workers in zip(nodes, placed, strict=True)]


def workers_by_card(placement: Placement, section: WorkersSection) -> list[int]:
    """Workers on each card of a node that gets any, as even as can be: ``[2, 2, 1]``.

    Workers of several GPUs have their cards to themselves: ``[1, 1]``.
    """
    each = section.gpus_each
    cards = placement.workers if each >= 1 else min(int(placement.node.gpus), placement.workers)
    return [
        placement.workers // cards + (card < placement.workers % cards) for card in range(cards)
    ]


def report(placements: Sequence[Placement], section: WorkersSection) -> list[str]:
    """Lines for people: the total, then one line for every node."""
    gpus_each = section.gpus_each
    each = f"{section.cpus:g} CPU" + (f" and {gpus_each:g} GPU" if gpus_each else "")
    total = sum(placement.workers for placement in placements)
    nodes = sum(placement.workers > 0 for placement in placements)
    lines = [f"{total} workers of {each} on {nodes} of {len(placements)} nodes"]
    for placement in placements:
        node = placement.node
        workers = placement.workers
        used = len(workers_by_card(placement, section)) * max(1, gpus_each) if gpus_each else 0
        gpus = f", {used:g} of {node.gpus:g} GPUs" if gpus_each or node.gpus else ""
        lines.append(
            f"  {node.name}: {workers} workers, {workers * section.cpus:g} of {node.cpus:g} "
            f"CPUs{gpus}"
        )
    return lines
