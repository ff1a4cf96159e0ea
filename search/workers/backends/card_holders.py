"""The actors that hold base and rows on the cards that several workers share.

A card of one worker has none: its worker uploads its own. The driver follows the state of each
card's copy (:mod:`mergesearch.merging.resident.sharing.protocol`): workers load once the copy is
ready, and all end when its holder dies, since on CUDA they would read memory that is undefined.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mergesearch.merging.resident.sharing.protocol import SharedCopy
from mergesearch.merging.tensors.accelerator import ACCELERATOR
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends.cards import Card
from mergesearch.search.workers.backends.remote_holder import holder_factory
from mergesearch.search.workers.backends.worker_actor import WorkerActor
from mergesearch.search.workers.messages import Failure, WorkerSpec

#: Seconds within which Ray tells of two processes that died together.
TOGETHER_SECONDS = 1.0


class CardHolders:
    """The holders of a pool and the states of their copies.

    Args:
        ray: Ray, connected.
        section: How many workers, and what each takes.
        spec: What they are built from.

    Attributes:
        holding: Actors whose copy is ready.
    """

    def __init__(self, ray: Any, section: WorkersSection, spec: WorkerSpec) -> None:
        self.holding: list[WorkerActor] = []
        self._ray = ray
        self._applies = 0 < section.gpus_each < 1 and has_weights_on_card(spec)
        self._create = holder_factory(ray, spec)
        self._copies: defaultdict[str, SharedCopy] = defaultdict(SharedCopy)  # by card
        self._losses: Counter[str] = Counter()  # by card, since it last answered a task

    def is_missing(self, card: Card) -> bool:
        """Whether a card should have a holder and has none."""
        return self._shared(card) and self._copies[card.id].state in ("empty", "gone")

    def create(self, card: Card | None, options: dict[str, Any]) -> Any:
        """Start the holder of a card, with these options of Ray."""
        assert card is not None
        self._copies[card.id].begin()
        return self._create(options)

    def is_awaited_by(self, actor: WorkerActor) -> bool:
        """Whether an actor has to wait until the copy that it reads is there."""
        return self._reads(actor) and self._copies[actor.card_id].state != "ready"

    def arguments_of(self, actor: WorkerActor) -> list[Any]:
        """What an actor is told beyond what all are told: a worker, the handle of its copy."""
        if actor.holds:
            return []
        return [self._copies[actor.card_id].attach() if self._reads(actor) else None]

    def admit(self, actor: WorkerActor) -> Failure | None:
        """Let the workers of a card have what its holder has loaded.

        Returns:
            The failure of a device that broke meanwhile.

        Raises:
            RayError: If it died or could not load.
        """
        offered = self._ray.get(actor.loaded)
        if isinstance(offered, Failure):
            self.drop(actor)
            return offered
        self._copies[actor.card_id].finish(offered)
        actor.loaded = actor.handle.hold.remote()
        self.holding.append(actor)
        return None

    def drop(self, actor: WorkerActor) -> None:
        """Note that a holder ended before its copy was ready; other actors are not ours."""
        if actor.holds:
            self._copies[actor.card_id].end()

    def is_lost(self, card: str) -> bool:
        """Whether the holder of a card is dead, or dies within a second."""
        refs = [actor.loaded for actor in self.holding if actor.card_id == card]
        return bool(refs and self._ray.wait(refs, timeout=TOGETHER_SECONDS)[0])

    def lose(self, card: Card) -> list[WorkerActor]:
        """Note that the copy of a card is lost, and hand out its holder."""
        lost = [actor for actor in self.holding if actor.card is card]
        self.holding = [actor for actor in self.holding if actor.card is not card]
        self._copies[card.id].end()
        self._losses[card.id] += 1
        return lost

    def losses(self, card: Card) -> int:
        """How often a card lost its copy since it last answered a task."""
        return self._losses[card.id]

    def succeed(self, card: str) -> None:
        """Note that a card has answered a task."""
        self._losses.pop(card, None)

    def forget(self, gone: Collection[Card]) -> None:
        """Forget the holders of cards that are no more."""
        self.holding = [actor for actor in self.holding if actor.card not in gone]

    def _shared(self, card: Card | None) -> bool:
        return self._applies and card is not None and card.workers > 1

    def _reads(self, actor: WorkerActor) -> bool:
        return not actor.holds and self._shared(actor.card)


def has_weights_on_card(spec: WorkerSpec) -> bool:
    """Whether workers merge a resident model on a card."""
    from mergesearch.evaluators.spec.evaluators import build_evaluator, parse_evaluators

    if spec.device != ACCELERATOR or not spec.template.experts:
        return False
    return build_evaluator(parse_evaluators(spec.evaluators), Path()).model_class is not None
