"""Turns an optimizer that calls a function into one with questions, by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np

from experiments.league.libraries.base import Array


class Inverted:
    """One question at a time; none after the optimizer has ended.

    Args:
        run: Calls the function that it is given until it is done, and returns the best point.
    """

    def __init__(self, run: Callable[[Callable[[Array], float]], Array | None]) -> None:
        self._questions: queue.Queue[Array | None] = queue.Queue()
        self._answers: queue.Queue[float] = queue.Queue()
        self._number = 0
        self._waiting = False
        self._over = False
        self._found: Array | None = None
        # It ends with the process: an optimizer whose budget is cut waits for ever.
        threading.Thread(target=self._work, args=(run,), daemon=True).start()

    def ask(self) -> tuple[int, Array] | None:
        """A number and a point; None while its result is awaited, or at the end."""
        if self._waiting or self._over:
            return None
        point = self._questions.get()
        if point is None:
            self._over = True
            return None
        self._waiting = True
        self._number += 1
        return self._number - 1, point

    def tell(self, number: int, losses: Array) -> None:
        """The loss at the point."""
        self._waiting = False
        self._answers.put(float(losses.mean()))

    def best(self) -> Array | None:
        """What the optimizer returned; nothing where it has not ended."""
        return self._found if self._over else None

    def _work(self, run: Callable[[Callable[[Array], float]], Array | None]) -> None:
        def call(point: Array) -> float:
            self._questions.put(np.clip(np.array(point, np.float64), 0.0, 1.0))
            return self._answers.get()

        try:
            self._found = run(call)
        finally:
            self._questions.put(None)
