"""Stopping by Ctrl-C or SIGTERM: first gracefully, then at once.

After the first signal no trial begins; running trials may finish and are recorded. A second signal,
or the end of the grace period, interrupts whatever runs: no recorded result is lost then either.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class GracefulStop:
    """A request to stop the study once its running trials have finished.

    Attributes:
        requested: Whether the study is to start no more trials.
        listeners: Called by the handler of the first signal; they may do no more than wake a wait.
    """

    def __init__(self) -> None:
        self.requested = False
        self.listeners: list[Callable[[], None]] = []

    @contextmanager
    def on_signals(
        self, seconds: float, notify: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """While inside, SIGINT and SIGTERM request a stop; main thread only.

        Args:
            seconds: How long running trials may take to finish; 0 interrupts at once.
            notify: Called at the first signal.
        """

        def first(signum: int, frame: Any) -> None:
            if self.requested or seconds <= 0:
                interrupt(signum, frame)
            self.requested = True
            for listener in self.listeners:
                listener()
            signal.setitimer(signal.ITIMER_REAL, seconds)
            notify()

        def interrupt(signum: int, frame: Any) -> NoReturn:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

        handled = {signal.SIGINT: first, signal.SIGTERM: first, signal.SIGALRM: interrupt}
        before = {number: signal.signal(number, handler) for number, handler in handled.items()}
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)
