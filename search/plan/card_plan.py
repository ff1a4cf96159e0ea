"""The plan of a study's cards: what fits, and which setting would make it fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.resident.card_memory import INTERPOLATING, WeightBytes
from mergesearch.search.grammar import counted
from mergesearch.search.plan.batch_memory import BatchBytes
from mergesearch.search.plan.card_needs import (
    CardBytes,
    CardSettings,
    Demand,
    NodeBytes,
    card_bytes,
    node_bytes,
)
from mergesearch.search.plan.cards import PlannedCard

#: A setting in words, and the fields of :class:`CardSettings` that it changes.
Change = tuple[str, dict[str, Any]]
#: Share of a card that weights may take where a model lies on several.
WEIGHTS_SHARE = 0.8
#: Workers of one card that are tried.
MOST_WORKERS = 16


@dataclass(frozen=True)
class CardPlan:
    """How a study lies on the cards of one node.

    Attributes:
        demand: What it computes with.
        settings: Under which it was planned.
        card: Each of the cards.
        count: Their number.
    """

    demand: Demand
    settings: CardSettings
    card: PlannedCard
    count: int

    @cached_property
    def cards(self) -> tuple[CardBytes, ...]:
        """Bytes on each card of one worker, or on the one that workers share."""
        return tuple(card_bytes(self.demand, self.settings, self.card))

    @cached_property
    def weights(self) -> WeightBytes:
        """Bytes of base, rows and merged weights."""
        return self.demand.weights(self.settings.rows)

    @cached_property
    def batch(self) -> BatchBytes:
        """The largest batch of one worker."""
        return self.demand.batch(self.weights.itemsize, self.settings.divisor)

    @cached_property
    def node(self) -> NodeBytes:
        """Bytes of the node."""
        return node_bytes(self.demand, self.settings, self.count)

    @property
    def fullest(self) -> CardBytes:
        """Bytes on the card that holds most."""
        return max(self.cards, key=lambda card: card.total)

    @property
    def peak(self) -> int:
        """Bytes that the fullest card holds at most."""
        return self.fullest.total

    @property
    def fits(self) -> bool:
        """Whether no card holds more than it can.

        The layers of a model over several cards are spread under a limit of their own, that of
        :func:`mergesearch.merging.resident.device_map.device_map`.
        """
        if self.settings.gpus > self.count or self.peak > self.card.usable:
            return False
        weights = max(card.base + card.rows + card.merged for card in self.cards)
        return self.settings.gpus == 1 or weights <= WEIGHTS_SHARE * self.card.total

    @cached_property
    def most_workers(self) -> int:
        """Workers that fit on each card; 0 if none does, and at most one where each has several."""
        if self.settings.gpus > 1 or not self._under(per_gpu=1).fits:
            return int(self.fits)
        fitting = (n for n in range(MOST_WORKERS, 0, -1) if self._under(per_gpu=n).fits)
        return next(fitting)

    def advice(self) -> tuple[str, ...]:
        """Settings that would fit, each alone; if none does, two together; empty if none do."""
        return tuple(self._fitting(self._changes()) or self._fitting(self._pairs())[:1])

    def _fitting(self, changes: Iterable[Change]) -> list[str]:
        """The smallest change of each kind that fits, those that keep all on the cards first."""
        plans = [(text, self._under(**settings)) for text, settings in changes]
        on_cards = [text for text, plan in plans if plan.fits and not plan.settings.on_host]
        on_host = [
            f"{text} (base and rows in main memory)"
            for text, plan in plans
            if plan.fits and plan.settings.on_host
        ]
        first: dict[str, str] = {}
        for text in [*on_cards, *on_host]:
            first.setdefault(text.split(":")[0], text)
        return list(first.values())

    def _pairs(self) -> Iterator[Change]:
        """Two settings at a time."""
        for (one, first), (other, second) in combinations(self._changes(), 2):
            if first.keys() != second.keys():
                yield f"{one} with {other}", {**first, **second}

    def _changes(self) -> Iterator[Change]:
        """Settings to try, the smallest change of each kind first."""
        for workers in range(self.settings.per_gpu - 1, 0, -1):
            yield f"workers.per_gpu: {workers}", {"per_gpu": workers}
        batch = self.demand.largest_batch
        divisor = 2 * self.settings.divisor
        while batch // divisor >= 1:
            rows = self.demand.batch(self.weights.itemsize, divisor).rows
            yield f"batch_size: {rows}", {"divisor": divisor}
            divisor *= 2
        gpus = 2 * self.settings.gpus
        while gpus <= self.count:
            yield f"workers.gpus: {gpus}", {"gpus": gpus, "per_gpu": 1}
            gpus *= 2
        if self.settings.rows != "int8" and self.demand.operator.name not in INTERPOLATING:
            yield "rows: int8", {"rows": "int8"}

    def _under(self, **changes: Any) -> CardPlan:
        return _planned(self.demand, replace(self.settings, **changes), self.card, self.count)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON, in bytes."""
        return {
            "card": {"name": self.card.name, "total": self.card.total, "usable": self.card.usable},
            "count": self.count,
            "settings": vars(self.settings),
            "fits": self.fits,
            "peak": self.peak,
            "most_workers": self.most_workers,
            "rows": {"by_encoding": self.weights.by_encoding, "exact": self.weights.is_exact},
            "cards": [{**vars(card), "total": card.total} for card in self.cards],
            "batch": vars(self.batch),
            "node": vars(self.node),
            "advice": [] if self.fits else list(self.advice()),
        }


def plan_cards(demand: Demand, settings: CardSettings, card: PlannedCard, count: int) -> CardPlan:
    """Plan a study for ``count`` cards of one node.

    Where a worker has several cards on which base and rows do not fit, these stay in main memory,
    from where no gradients are followed.

    Raises:
        InputError: If a worker has more cards than there are.
    """
    if settings.gpus > count:
        raise InputError(
            f"workers.gpus: expected at most the {counted(count, 'card')}, received "
            f"{settings.gpus}; lower it, or plan for more with --count"
        )
    return _planned(demand, settings, card, count)


def _planned(demand: Demand, settings: CardSettings, card: PlannedCard, count: int) -> CardPlan:
    plan = CardPlan(demand, settings, card, count)
    if plan.fits or settings.gpus == 1 or demand.gradients:
        return plan
    on_host = replace(plan, settings=replace(settings, on_host=True))
    return on_host if on_host.fits else plan
