"""Progress of a study: a live line on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from mergesearch.merging.foreign.shown import all_shown, message_cut, printable
from mergesearch.search.grammar import counted
from mergesearch.search.record.trial_record import Score, TrialRecord
from mergesearch.search.redact import redacted
from mergesearch.search.study.events import Event
from mergesearch.search.workers.loading import left_text

#: Plain output: best so far, time left and what is loaded at most once in so many seconds.
PLAIN_SECONDS = 5.0
#: Kinds of events that are printed as text.
TEXT_EVENTS = ("warning", "workers", "metrics", "judging")


def make_observer(
    style: str, objectives: list[str]
) -> tuple[Callable[[Event], None], Callable[[], None]]:
    """An observer for ``rich``, ``plain``, ``json`` or ``quiet``, and the function that ends it."""
    if style == "rich":
        live = RichProgress(objectives)
        return live.observe, live.close
    if style == "plain":
        return PlainProgress(objectives).observe, lambda: None
    if style == "json":
        return _json_lines, lambda: None
    return lambda event: None, lambda: None


def default_style(stream: TextIO | None = None) -> str:
    """``rich`` on a terminal, else ``plain``."""
    return "rich" if (stream or sys.stderr).isatty() else "plain"


class PlainProgress:
    """Lines such as ``search 40/120  trial 47: accuracy 0.8125``, one for every trial.

    Every few seconds a line ends with the best so far and the time that is left.
    """

    def __init__(self, objectives: list[str]) -> None:
        self._objectives = objectives
        self._pace = Pace()
        self._shown = -PLAIN_SECONDS  # when something was printed
        self._told = -PLAIN_SECONDS  # when best and time left were

    def observe(self, event: Event) -> None:
        """Print warnings, phases and results, and what is loaded every few seconds."""
        if event.kind in TEXT_EVENTS:
            self._print(f"{event.kind}: {event.text}")
        elif event.kind == "loading":
            if time.monotonic() - self._shown >= PLAIN_SECONDS:
                self._print(f"{event.kind}: {event.text}")
        elif event.kind == "phase":
            self._pace = Pace(event.done)
            total = f" ({event.done} of {event.total} done)" if event.total else ""
            self._print(f"{event.text}{total} ...")
        elif event.kind in ("trial", "score"):
            count = f"{event.done}/{event.total}" if event.total else f"{event.done}"
            line = f"{event.text} {count}  {describe(event, self._objectives)}"
            self._print(f"{line}{self._standing(event)}")

    def _standing(self, event: Event) -> str:
        """Best so far and time left, every few seconds."""
        now = time.monotonic()
        if now - self._told < PLAIN_SECONDS or event.done == event.total:
            return ""
        self._told = now
        told = [*_best(event, self._objectives), *self._pace.left(event)]
        return f"  ({'; '.join(told)})" if told else ""

    def _print(self, text: str) -> None:
        print(message_cut(printable(text)), file=sys.stderr, flush=True)
        self._shown = time.monotonic()


class RichProgress:
    """A progress bar per phase, with the latest result and the best so far beside it."""

    def __init__(self, objectives: list[str]) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._objectives = objectives
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[latest]}", markup=False),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._loading: Any = None
        self._progress.start()

    def observe(self, event: Event) -> None:
        """Move the bar."""
        if event.kind == "phase":
            self._begin(event)
        elif event.kind in TEXT_EVENTS:
            self._print(f"{event.kind}: {event.text}")
        elif event.kind == "loading":
            self._show_loading(event)
        else:
            self._show(event)

    def _print(self, text: str) -> None:
        """A line above the bars, as it is: brackets in it are no markup."""
        self._progress.console.print(message_cut(printable(text)), highlight=False, markup=False)

    def _begin(self, event: Event) -> None:
        """End the bar of the phase before, and begin one."""
        self._end()
        self._task = self._progress.add_task(
            event.text, total=event.total or None, completed=event.done, latest=""
        )

    def _end(self) -> None:
        """A phase without a count, such as opening, is over when the next begins."""
        if self._task is None:
            return
        (task,) = (each for each in self._progress.tasks if each.id == self._task)
        if task.total is None:
            self._progress.update(
                self._task, total=task.completed or 1, completed=task.completed or 1
            )
        self._progress.stop_task(self._task)

    def _show(self, event: Event) -> None:
        """Move the bar of a phase by a trial, and keep the line of one that failed."""
        text = describe(event, self._objectives)
        if event.kind == "trial" and event.record is not None and event.record.state == "failed":
            self._print(f"{event.text}: {text}")
        if self._task is not None:
            latest = printable("  ".join([*_best(event, self._objectives), text]))
            self._progress.update(self._task, completed=event.done, latest=latest[:80])

    def _show_loading(self, event: Event) -> None:
        """Move the bar of what is loaded before the first trial."""
        if self._loading is None:
            self._loading = self._progress.add_task("loading", total=None, latest="")
        self._progress.update(
            self._loading, total=event.total or None, completed=event.done, latest=event.text[:60]
        )

    def close(self) -> None:
        """Restore the terminal."""
        self._end()
        self._progress.stop()


class Pace:
    """How fast a phase goes on.

    Args:
        done: What was done when it began.
    """

    def __init__(self, done: int = 0) -> None:
        self._done = done
        self._began = time.monotonic()

    def left(self, event: Event) -> list[str]:
        """The time that is left, in words; nothing while it cannot be known."""
        new = event.done - self._done
        if new < 1 or event.total <= event.done:
            return []
        seconds = (time.monotonic() - self._began) / new * (event.total - event.done)
        return [left_text(seconds)]


def _best(event: Event, objectives: list[str]) -> list[str]:
    """The best value of each objective so far, at most three of them."""
    known = [f"{name} {event.best[name]:.4g}" for name in objectives[:3] if name in event.best]
    more = ", ..." if known and len(objectives) > 3 else ""
    return [f"best {', '.join(known)}{more}"] if known else []


def describe(event: Event, objectives: list[str]) -> str:
    """The trial of an event in a few words."""
    record = event.record
    if record is None:
        return ""
    name = record.name or f"trial {record.number}"
    if event.kind == "score":
        return f"{name}: {_values(event.score, objectives)}"
    if record.failure is not None:
        return f"{name}: {record.failure.kind}: {record.failure.message}"
    return f"{name}: {_values(record, objectives)}{_told(record)}"


def _told(record: TrialRecord) -> str:
    """Why a trial was not measured on all items, in brackets."""
    if record.stopped is not None:
        return f" (stopped after {counted(record.stopped, 'item')})"
    return "" if record.same_as is None else f" (the merge of trial {record.same_as}, known)"


def _values(measured: TrialRecord | Score | None, objectives: list[str]) -> str:
    """Values by objective; that there are none where measuring failed."""
    if measured is None:
        return "failed"
    known = (name for name in objectives if name in measured.values)
    return "  ".join(f"{name} {measured.values[name]:.4g}" for name in known)


def _json_lines(event: Event) -> None:
    data: dict[str, Any] = {
        "event": event.kind,
        "phase": event.text,
        "done": event.done,
        "total": event.total,
    }
    if event.record is not None:
        record = event.record
        data |= {
            "trial": record.number,
            "name": record.name,
            "state": record.state,
            "values": dict(record.values),
        }
        if event.kind == "score":
            data["state"] = "failed" if event.score is None else "complete"
            data["values"] = {} if event.score is None else dict(event.score.values)
        data["failure"] = None if record.failure is None else record.failure.message
        if record.same_as is not None:
            data["same_as"] = record.same_as
    print(json.dumps(all_shown(redacted(data))), file=sys.stderr, flush=True)
