"""Runs trackers in threads of their own, so that no service can delay or stop a study."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from mergesearch.search.grammar import counted
from mergesearch.search.observers.trackers.base import Status, Tracker
from mergesearch.search.redact import redact
from mergesearch.search.study.events import Event

T = TypeVar("T")
#: Events that may wait for a tracker; more are dropped.
QUEUE_LENGTH = 10_000
#: A tracker is switched off after so many failures in a row.
MAX_FAILURES = 3


def in_background(
    tracker_factory: Callable[[], Tracker],
    notify: Callable[[Event], None],
    *,
    name: str = "tracker",
) -> BackgroundTracker:
    """Open a tracker in a thread and pass events on to it.

    Args:
        tracker_factory: Opens the tracker; called in the thread.
        notify: Takes warnings; called from the thread, and from threads that observe.
        name: Name of the tracker in warnings.
    """
    return BackgroundTracker(tracker_factory, notify, name)


class BackgroundTracker:
    """A tracker behind a bounded queue; :meth:`observe` never waits and never raises.

    Attributes:
        dropped: Events that never reached the tracker: the queue was full, or the tracker is off.
    """

    def __init__(
        self, factory: Callable[[], Tracker], notify: Callable[[Event], None], name: str
    ) -> None:
        self._factory = factory
        self._notify = notify
        self._name = name
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._status: Status | None = None  # set when closing
        self._off = False
        self._late = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._follow, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def observe(self, event: Event) -> None:
        """Queue the event, or drop it where there is no room."""
        if event.kind == "warning":  # no tracker shows them, and they may come from here
            return
        with self._changed:
            room = len(self._waiting) < QUEUE_LENGTH and not self._off
            if room:
                self._waiting.append(event)
                self._changed.notify()
            else:
                self.dropped += 1
            first = not room and not self._off and not self._late
            self._late = self._late or not room
        if first:
            self._warn(f"is {QUEUE_LENGTH} events behind; events are dropped")

    def close(self, status: Status = "finished", timeout: float = 10.0) -> None:
        """Let the tracker finish, for at most ``timeout`` seconds."""
        with self._changed:
            self._status = status
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            lost = self.dropped + len(self._waiting)
        if self._thread.is_alive():
            events = counted(lost, "event")
            self._warn(f"did not finish within {timeout:g} s; {events} may be missing from it")
        elif lost and not self._off:
            verb = "is" if lost == 1 else "are"
            self._warn(f"was too slow; {counted(lost, 'event')} {verb} missing from it")

    def _follow(self) -> None:
        try:
            tracker = self._factory()
        except BaseException as error:  # some clients exit where others raise
            self._switch_off(f"could not be opened: {_short(error)}; the study goes on without it")
            return
        self._pass_on(tracker)
        self._end(tracker)

    def _pass_on(self, tracker: Tracker) -> None:
        failures = 0
        warned = False
        while (event := self._next()) is not None:
            failure = _failure(tracker.observe, event)
            if failure is None:
                failures = 0
                continue
            failures += 1
            if not warned:
                warned = True
                self._warn(f"failed: {failure}")
            if failures == MAX_FAILURES:
                self._switch_off(
                    f"is switched off after {failures} failures in a row, the last: {failure}"
                )
                return

    def _next(self) -> Event | None:
        """The next event; None when closing and all are passed on."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._status is not None)
            return self._waiting.popleft() if self._waiting else None

    def _end(self, tracker: Tracker) -> None:
        """Close the tracker, even if it is switched off: it may still hold a connection."""
        failure = _failure(tracker.close, self._status or "failed")
        if failure is not None and not self._off:
            self._warn(f"could not be closed: {failure}")

    def _switch_off(self, text: str) -> None:
        with self._changed:
            self._off = True
            self.dropped += len(self._waiting)
            self._waiting.clear()
        self._warn(text)

    def _warn(self, text: str) -> None:
        with contextlib.suppress(Exception):
            self._notify(Event("warning", f"tracker {self._name} {text}"))


def _failure(action: Callable[[T], None], argument: T) -> str | None:
    try:
        action(argument)
    except BaseException as error:
        return _short(error)
    return None


def _short(error: BaseException) -> str:
    """An error as one line without secrets: services put whole requests into their errors."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return redact(lines[0])[:300]
