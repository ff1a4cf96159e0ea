"""Progress of work that takes minutes: who does it reports, who waits for it listens.

Preparing weights goes through many functions that should not all carry a callback. A listener is
set for everything that runs inside a ``with``, on the same thread or on that of
:func:`mergesearch.merging.tensors.parallel.run_single_threaded`; maps of that module report by
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: (items done, items in total or 0 if that is not known, bytes done or 0).
Progress = Callable[[int, int, int], None]

_listener: ContextVar[Progress | None] = ContextVar("mergesearch_progress", default=None)


@contextmanager
def listening(progress: Progress | None) -> Iterator[None]:
    """Hand what is reported inside to ``progress``; None silences it."""
    token = _listener.set(progress)
    try:
        yield
    finally:
        _listener.reset(token)


def report(done: int, total: int = 0, size: int = 0) -> None:
    """Tell the listener, if there is one.

    Args:
        done: Items that are finished.
        total: Items in total; 0 where that is not known.
        size: Bytes of the finished items; 0 where that is not known.
    """
    listener = _listener.get()
    if listener is not None:
        listener(done, total, size)
