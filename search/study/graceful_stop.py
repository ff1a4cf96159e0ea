"""Stopping by Ctrl-C or SIGTERM: first gracefully, then at once.

The first signal stops asking; trials that run may finish and are recorded. A second signal, or the
end of the grace, interrupts whatever runs: that, too, loses nothing that was told.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class GracefulStop:
    """Whether the study is to stop asking."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def on_signals(
        self, seconds: float, notify: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """While inside, SIGINT and SIGTERM drain; main thread only.

        Args:
            seconds: How long trials that run may take to finish; 0 interrupts at once.
            notify: Called at the first signal.
        """

        def first(signum: int, frame: Any) -> None:
            if self.requested or seconds <= 0:
                interrupt(signum, frame)
            self.requested = True
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
