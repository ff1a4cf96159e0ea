"""Orders of neurons that several merges of one mixture share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergesearch.merging.mixture.layers import ExpertWeights
from mergesearch.merging.mixture.weights import neuron_order
from mergesearch.merging.tensors.memo import Memo

if TYPE_CHECKING:
    import torch


@dataclass
class NeuronOrders:
    """Orders of neurons by block, leader and other expert, each found once.

    An assignment takes the longest of all that a merge does, and which experts meet in a group
    depends on the number of groups; so orders are found when they are needed, and kept.

    Attributes:
        key: What identifies the weights, JSON-able.
        memo: Where orders are kept beyond this process; None: nowhere.
    """

    key: Sequence[Any] = ()
    memo: Memo | None = None
    _known: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)

    def of(
        self, block: str, leader: int, other: int, expert: ExpertWeights, reference: ExpertWeights
    ) -> torch.Tensor:
        """The order of the other's neurons, int64 ``(inner,)``.

        Args:
            block: Name of the block.
            leader: Number of the expert whose order is the reference.
            other: Number of the expert whose neurons move.
            expert: Weights of the latter.
            reference: Weights of the leader.
        """
        place = (block, leader, other)
        if place not in self._known:
            self._known[place] = self._kept(place, expert, reference)
        return self._known[place]

    def _kept(
        self, place: tuple[str, int, int], expert: ExpertWeights, reference: ExpertWeights
    ) -> torch.Tensor:
        if self.memo is None:
            return neuron_order(expert, reference)
        key = ["order of neurons", *self.key, *place]
        return self.memo.get(key, lambda: {"order": neuron_order(expert, reference)})["order"]
