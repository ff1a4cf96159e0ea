"""Turns an optimizer that asks whole generations into one with single questions."""

from __future__ import annotations

from collections.abc import Callable

from experiments.league.libraries.base import Array


class Generations:
    """Hands out a generation point by point; the next one begins when all results are in.

    Args:
        ask: Gives the points of a generation.
        tell: Takes the points of a generation and their losses, in the order of ``ask``.
        best: Gives the recommendation.
    """

    def __init__(
        self,
        ask: Callable[[], list[Array]],
        tell: Callable[[list[Array], list[Array]], None],
        best: Callable[[], Array | None] = lambda: None,
    ) -> None:
        self._ask = ask
        self._tell = tell
        self.best = best
        self._points: list[Array] = []
        self._first = 0
        self._next = 0
        self._losses: dict[int, Array] = {}

    def ask(self) -> tuple[int, Array] | None:
        """A number and a point; None while results are awaited."""
        if self._next == self._first + len(self._points):
            if len(self._losses) < len(self._points):
                return None
            self._turn()
        number = self._next
        self._next += 1
        return number, self._points[number - self._first]

    def tell(self, number: int, losses: Array) -> None:
        """The losses of a point."""
        self._losses[number] = losses

    def _turn(self) -> None:
        if self._points:
            losses = [self._losses[self._first + row] for row in range(len(self._points))]
            self._tell(self._points, losses)
        self._first += len(self._points)
        self._losses = {}
        self._points = self._ask()
