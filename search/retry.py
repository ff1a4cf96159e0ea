"""Waiting for what comes back: a full disk, a storage server that restarts, a network that
drops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mergesearch.merging import StudyFailedError

T = TypeVar("T")

#: Seconds between the first two tries, and at most between any two.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0


@dataclass(frozen=True)
class RetryPolicy:
    """Tries again what failed for a reason that may pass.

    Attributes:
        seconds: How long to go on trying.
        warn: TrialResult once when waiting begins and once when it is over.
        clock, sleep: Seconds that only ever grow, and how to let some pass.
    """

    seconds: float = 300.0
    warn: Callable[[str], None] = lambda text: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __call__(
        self, action: Callable[[], T], transient: tuple[type[Exception], ...], what: str
    ) -> T:
        """Do ``action`` until it succeeds; it must be safe to do it again after it failed.

        Args:
            action: What to do.
            transient: Exceptions that may pass; others are raised at once.
            what: Names the thing waited for, in messages.

        Raises:
            StudyFailedError: If it still fails after ``seconds``.
        """
        began = self.clock()
        pause = FIRST_PAUSE
        waited = False
        while True:
            try:
                done = action()
            except transient as error:
                past = self.clock() - began
                if past >= self.seconds:
                    raise StudyFailedError(
                        f"{what}: expected it to come back within {self.seconds:g} s, received: "
                        f"{reason(error)}; "
                        "nothing told is lost, the same command goes on (driver.patience_seconds "
                        "sets how long to wait)"
                    ) from error
                if not waited:
                    self.warn(f"{what}: {reason(error)}; trying again for up to {self.seconds:g} s")
                    waited = True
                self.sleep(min(pause, max(self.seconds - past, 0.0)))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if waited:
                    self.warn(f"{what}: answers again after {self.clock() - began:.1f} s")
                return done


def reason(error: BaseException) -> str:
    """The innermost cause in one line: libraries wrap it in general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(getattr(error, "orig", None) or error)


def first_line(error: BaseException) -> str:
    """What an error says first, or its name if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
