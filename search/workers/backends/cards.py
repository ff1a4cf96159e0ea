"""GPUs that are kept for the workers of a pool, each by a Ray placement group of its own.

Left to itself, Ray puts workers of a fraction of a GPU all on the first card of a node, and a new
worker on the very card on which the last one failed. A placement group holds one card (or the cards
of one worker that takes several) on one node, whoever runs there, so that cards fill evenly and a
card that is set aside stays out of use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends.placement import Node, place, workers_by_card

#: Ray counts resources in steps of this size, and rounds.
RAY_STEP = 1e-4


@dataclass(eq=False)
class Card:
    """One GPU, or those of one worker that takes several.

    Attributes:
        id: Unique in the pool.
        node: Where it is.
        group: The placement group that holds it.
        workers: Number of workers that share it.
        name: For people; says which GPU once a worker has answered from there.
        set_aside: Whether no worker is started there any more.
    """

    id: str
    node: Node
    group: Any
    workers: int
    name: str
    set_aside: bool = False

    def options(self, ray: Any, section: WorkersSection, *, holds: bool = False) -> dict[str, Any]:
        """Options of an actor that runs there.

        Args:
            ray: Ray, connected.
            section: What each worker takes.
            holds: Whether it only holds weights for the workers.
        """
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        worker, holder = gpu_shares(section.gpus_each, self.workers)
        return {
            "num_gpus": holder if holds else worker,
            "scheduling_strategy": strategy(self.group, 0),
        }


class Cards:
    """The cards that a pool has reserved.

    Args:
        ray: Ray, connected.
        section: How many workers, and what each takes.
    """

    def __init__(self, ray: Any, section: WorkersSection) -> None:
        self._ray = ray
        self._section = section
        self._cards: list[Card] = []
        self._made = 0

    @property
    def usable(self) -> list[Card]:
        """Cards on which workers may run."""
        return [card for card in self._cards if not card.set_aside]

    @property
    def all_set_aside(self) -> bool:
        """Whether there are cards, and none may be used."""
        return bool(self._cards) and not self.usable

    def follow(self, nodes: Sequence[Node]) -> list[Card]:
        """Release the cards of nodes that have left, and reserve those that are missing.

        Returns:
            The cards that were released; Ray has ended the workers there.
        """
        alive = {node.id for node in nodes}
        gone = [card for card in self._cards if card.node.id not in alive]
        for card in gone:
            self._ray.util.remove_placement_group(card.group)
        self._cards = [card for card in self._cards if card.node.id in alive]
        count = self._section.count
        missing = None if count is None else count - sum(card.workers for card in self.usable)
        if missing is None or missing > 0:
            free = [self._free_part(node) for node in nodes]
            for placement in place(free, self._section, missing):
                for workers in workers_by_card(placement, self._section):
                    self._cards.append(self._reserved(placement.node, workers))
        return gone

    def close(self) -> None:
        """Release all cards."""
        for card in self._cards:
            self._ray.util.remove_placement_group(card.group)
        self._cards = []

    def _free_part(self, node: Node) -> Node:
        """What of a node is not reserved."""
        own = [card for card in self._cards if card.node.id == node.id]
        workers = sum(card.workers for card in own)
        return replace(
            node,
            cpus=node.cpus - workers * self._section.cpus,
            gpus=node.gpus - len(own) * max(1.0, self._section.gpus_each),
        )

    def _reserved(self, node: Node, workers: int) -> Card:
        bundle = {
            "CPU": workers * self._section.cpus,
            "GPU": max(1.0, self._section.gpus_each),
        }
        on_node = [{"ray.io/node-id": node.id}]
        group = self._ray.util.placement_group([bundle], bundle_label_selector=on_node)
        self._made += 1
        return Card(str(self._made), node, group, workers, f"a GPU of {node.name}")


def gpus_for_ray(each: float) -> float:
    """GPUs of a worker, in Ray's steps: thirds and sevenths must fit as often as they should."""
    return each if each >= 1 else math.floor(each / RAY_STEP + 1e-6) * RAY_STEP


def gpu_shares(each: float, workers: int) -> tuple[float, float]:
    """Shares of a card of a worker, and of the process that holds weights for several of them.

    Ray shows a card to those alone who take a share of it, and keeps them within the card's
    placement group. So the holder takes the least share there is, and each worker leaves as much.
    """
    worker = gpus_for_ray(each)
    return (worker, 0.0) if workers == 1 else (round(worker - RAY_STEP, 4), RAY_STEP)


def whereabouts(ray: Any) -> tuple[str, tuple[str, ...]]:
    """The id of this process's node, and the GPUs that Ray has given to the process."""
    gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
    return str(ray.get_runtime_context().get_node_id()), gpus


def card_name(node: Node, gpus: Sequence[str]) -> str:
    """What people call the GPUs of a worker."""
    return f"GPU {' and '.join(gpus)} of {node.name}"


def workers_on(cards: Sequence[Card | None]) -> Counter[str]:
    """Number of workers by the id of their card."""
    return Counter(card.id for card in cards if card is not None)
