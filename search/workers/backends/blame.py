"""Who is at fault when a device breaks: its card, or the task that ran there."""

from __future__ import annotations

from mergesearch.merging.tensors.device_errors import is_assertion

#: Errors after which a card is set aside, and cards after which a task is at fault.
LIMIT = 2


class Blame:
    """Counts the device errors of cards and tasks.

    A card is at fault after :data:`LIMIT` errors. A task is at fault once it has met errors on
    :data:`LIMIT` cards that have failed nobody else, one of which has answered another task: where
    no card has ever answered, all of them may be broken. The errors of a guilty task count against
    no card. Where it had to run on the same card again, it is also at fault if the card has
    answered another task between its errors, or if a kernel refused what it was given, which is
    no defect of a card.

    The card ``""`` stands for workers without one, and is never at fault.
    """

    def __init__(self) -> None:
        self._cards: dict[str, list[str]] = {}  # task -> cards of its errors
        self._tasks: dict[str, list[str]] = {}  # card -> tasks of its errors
        self._answered: set[tuple[str, str]] = set()  # (task that met an error, card since)
        self._working: set[str] = set()  # cards that have answered a task

    def add(self, task: str, card: str, message: str) -> bool:
        """Note a device error; returns whether the task is at fault."""
        self._cards.setdefault(task, []).append(card)
        self._tasks.setdefault(card, []).append(task)
        guilty = self._is_guilty(task, card, message)
        if guilty:
            for met in set(self._cards.pop(task)):
                self._tasks[met] = [other for other in self._tasks[met] if other != task]
        return guilty

    def succeed(self, task: str, card: str) -> None:
        """Note that a card answered a task."""
        self._cards.pop(task, None)
        self._working.add(card)
        self._answered |= {(other, card) for other in self._tasks.get(card, ()) if other != task}

    def cards_of(self, task: str) -> frozenset[str]:
        """Cards on which a task has met errors."""
        return frozenset(self._cards.get(task, ()))

    def is_bad(self, card: str) -> bool:
        """Whether a card has met too many errors."""
        return bool(card) and len(self._tasks.get(card, ())) >= LIMIT

    def _is_guilty(self, task: str, card: str, message: str) -> bool:
        met = self._cards[task]
        if not card:
            return met.count(card) >= LIMIT
        if met.count(card) > 1 and (is_assertion(message) or (task, card) in self._answered):
            return True
        alone = {each for each in met if set(self._tasks[each]) == {task}}
        return len(alone) >= LIMIT and not alone.isdisjoint(self._working)
