"""Repetition of actions that fail for a while.

A disk is full, a storage server restarts, a network drops: all of these may pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mergesearch.merging import StudyFailedError

T = TypeVar("T")

#: Seconds between the first two attempts, and at most between any two.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0


@dataclass(frozen=True)
class RetryPolicy:
    """Repeats an action that fails for a reason that may pass.

    Attributes:
        seconds: How long to go on trying.
        warn: Called with a message when waiting begins and when it is over.
        clock: Seconds that only ever grow.
        sleep: Lets some seconds pass.
    """

    seconds: float = 300.0
    warn: Callable[[str], None] = lambda text: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __call__(
        self, action: Callable[[], T], transient: tuple[type[Exception], ...], what: str
    ) -> T:
        """Repeat ``action`` until it succeeds; a repetition after a failure must be safe.

        Args:
            action: What to do.
            transient: Exceptions that may pass; others are raised at once.
            what: Name of what is waited for, in messages.

        Raises:
            StudyFailedError: If it still fails after ``seconds``.
        """
        began = self.clock()
        pause = FIRST_PAUSE
        waited = False
        while True:
            try:
                result = action()
            except transient as error:
                elapsed = self.clock() - began
                if elapsed >= self.seconds:
                    raise StudyFailedError(
                        f"{what}: expected it to come back within {self.seconds:g} s, received: "
                        f"{reason(error)}; no recorded result is lost, the same command goes on "
                        "(driver.patience_seconds sets how long to wait)"
                    ) from error
                if not waited:
                    self.warn(f"{what}: {reason(error)}; trying again for up to {self.seconds:g} s")
                    waited = True
                self.sleep(min(pause, max(self.seconds - elapsed, 0.0)))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if waited:
                    self.warn(f"{what}: answers again after {self.clock() - began:.1f} s")
                return result


def reason(error: BaseException) -> str:
    """The innermost cause in one line; libraries wrap it in general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(getattr(error, "orig", None) or error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
