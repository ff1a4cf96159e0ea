"""How far a worker is with what it needs before its first task, told to its driver."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

#: Least seconds between two reports of a phase, so that reporting costs nothing.
REPORT_SECONDS = 1.0
#: Minutes that are left are said once so many seconds of a phase have passed.
SURE_AFTER_SECONDS = 5.0


@dataclass(frozen=True)
class Loading:
    """How far a worker is.

    Attributes:
        phase: What it does.
        done, total: Items of the phase; a total of 0 is not known.
        size: Bytes that are finished; 0 where that is not known.
        seconds: Since the phase began.
    """

    phase: str
    done: int = 0
    total: int = 0
    size: int = 0
    seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the phase ends, if its items take equally long; None at its beginning."""
        if not self.done or not self.total or self.seconds < SURE_AFTER_SECONDS:
            return None
        return self.seconds * (self.total - self.done) / self.done


def describe_loading(loading: Loading) -> str:
    """A phrase such as ``preparing weights: 12 of 290, 1.2 GB, 4 min left``."""
    parts = []
    if loading.done:
        of = f" of {loading.total}" if loading.total else ""
        parts.append(f"{loading.done}{of}")
    if loading.size:
        parts.append(f"{loading.size / 1e9:.2g} GB")
    left = loading.seconds_left
    if left is not None:
        parts.append(left_text(left))
    return f"{loading.phase}: {', '.join(parts)}" if parts else loading.phase


def left_text(seconds: float) -> str:
    """``4 min left``, ``2.5 h left``, ``less than a minute left``."""
    if seconds < 60:
        return "less than a minute left"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min left"
    return f"{seconds / 3600:.1f} h left"


class LoadingReporter:
    """Sends how far a worker is, from time to time within a phase.

    It is itself a :data:`mergesearch.merging.tensors.progress.Progress`, of the phase.

    Args:
        send: Called with each report; what it raises is the caller's.
        every: Least seconds between two reports within a phase.
    """

    def __init__(
        self,
        send: Callable[[Loading], None] = lambda loading: None,
        every: float = REPORT_SECONDS,
    ) -> None:
        self._every = every
        self._send = send
        self._phase = ""
        self._began = time.monotonic()
        self._sent = 0.0

    def begin(self, phase: str) -> None:
        """Begin a phase."""
        self._phase = phase
        self._began = time.monotonic()
        self._sent = 0.0
        self(0, 0, 0)

    def __call__(self, done: int, total: int, size: int) -> None:
        """Report progress within the phase."""
        now = time.monotonic()
        if now - self._sent < self._every:
            return
        self._sent = now
        self._send(Loading(self._phase, done, total, size, now - self._began))
