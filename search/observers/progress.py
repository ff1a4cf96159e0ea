"""Progress of a study: a live line on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from mergesearch.search.grammar import counted
from mergesearch.search.redact import redacted
from mergesearch.search.study.events import Event

#: Plain output: at most one line in this many seconds, besides new phases and failures.
PLAIN_SECONDS = 5.0
#: Kinds of events that are printed as text.
TEXT_EVENTS = ("warning", "workers", "metrics")


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
    """Lines such as ``search 40/120  trial 47: accuracy 0.8125``."""

    def __init__(self, objectives: list[str]) -> None:
        self._objectives = objectives
        self._shown = 0.0

    def observe(self, event: Event) -> None:
        """Print warnings, phases, failures, and results every few seconds."""
        if event.kind in TEXT_EVENTS:
            self._print(f"{event.kind}: {event.text}")
        elif event.kind == "loading":
            if time.monotonic() - self._shown >= PLAIN_SECONDS:
                self._print(f"{event.kind}: {event.text}")
        elif event.kind == "phase":
            total = f" ({event.done} of {event.total} done)" if event.total else ""
            self._print(f"{event.text}{total} ...")
        elif event.kind == "trial":
            failed = event.record is not None and event.record.state == "failed"
            last = event.done == event.total
            if failed or last or time.monotonic() - self._shown >= PLAIN_SECONDS:
                count = f"{event.done}/{event.total}" if event.total else f"{event.done}"
                self._print(f"{event.text} {count}  {describe(event, self._objectives)}")

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        self._shown = time.monotonic()


class RichProgress:
    """A progress bar per phase, with the latest result beside it."""

    def __init__(self, objectives: list[str]) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._objectives = objectives
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[latest]}"),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._loading: Any = None
        self._phase = ""
        self._progress.start()

    def observe(self, event: Event) -> None:
        """Move the bar."""
        if event.kind == "phase":
            self._phase = event.text
            total = event.total or None
            self._task = self._progress.add_task(
                event.text, total=total, completed=event.done, latest=""
            )
            return
        if event.kind in TEXT_EVENTS:
            self._progress.console.print(f"{event.kind}: {event.text}", highlight=False)
            return
        if event.kind == "loading":
            self._show_loading(event)
            return
        if event.kind == "trial" and event.record is not None and event.record.state == "failed":
            self._progress.console.print(
                f"{event.text}: {describe(event, self._objectives)}", highlight=False
            )
        if self._task is not None:
            self._progress.update(
                self._task, completed=event.done, latest=describe(event, self._objectives)[:60]
            )

    def _show_loading(self, event: Event) -> None:
        """Move the bar of what is loaded before the first trial."""
        if self._loading is None:
            self._loading = self._progress.add_task("loading", total=None, latest="")
        self._progress.update(
            self._loading, total=event.total or None, completed=event.done, latest=event.text[:60]
        )

    def close(self) -> None:
        """Restore the terminal."""
        self._progress.stop()


def describe(event: Event, objectives: list[str]) -> str:
    """The trial of an event in a few words."""
    record = event.record
    if record is None:
        return ""
    name = record.name or f"trial {record.number}"
    if event.kind == "score":
        return name
    if record.failure is not None:
        return f"{name}: {record.failure.kind}: {record.failure.message}"
    values = "  ".join(
        f"{key} {record.values[key]:.4g}" for key in objectives if key in record.values
    )
    return f"{name}: {values}" + (
        "" if record.stopped is None else f" (stopped after {counted(record.stopped, 'item')})"
    )


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
        data["failure"] = None if record.failure is None else record.failure.message
    print(json.dumps(redacted(data)), file=sys.stderr, flush=True)
