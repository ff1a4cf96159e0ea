"""Connects a study with its followers: event log, Prometheus, trackers. None can stop it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from mergesearch.search.observers.event_log import EventLog
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.best_so_far import BestSoFar
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.study.events import Event

Observer = Callable[[Event], None]


@contextmanager
def observing(
    plan: Plan, log: TrialLog, folder: RunFolder, notify: Observer, metrics: str | None = None
) -> Iterator[Observer]:
    """Open everything that follows a study; yields the function to call with each event.

    Args:
        plan: The checked study.
        log: Its trial log; it records the ids of the trackers' runs.
        folder: Its run folder; ``events.jsonl`` is there.
        notify: The user's own observer.
        metrics: ``HOST:PORT`` or ``PORT`` to serve Prometheus metrics at.

    Raises:
        InputError: If metrics cannot be served there.
    """
    observers: list[Observer] = [notify]
    best = BestSoFar(plan.objectives, log.records)

    def observe(event: Event) -> None:
        if event.kind == "trial" and event.record is not None:
            best.add(event.record)
        event = replace(event, best=dict(best.values))
        for observer in observers:
            observer(event)

    with ExitStack() as stack:
        events = EventLog(
            folder.path / "events.jsonl", plan.spec.name, f"{socket.gethostname()}:{os.getpid()}"
        )
        stack.callback(events.close)
        observers.append(events.observe)
        if metrics is not None:
            observers.append(stack.enter_context(_served(plan, log, metrics, observe)))
        for index in range(len(plan.spec.trackers)):
            observers.append(stack.enter_context(_tracked(plan, log, folder, index, observe)))
        yield observe


@contextmanager
def _served(plan: Plan, log: TrialLog, address: str, observe: Observer) -> Iterator[Observer]:
    from mergesearch.search.observers.prometheus import Metrics, serve

    metrics = Metrics(plan.spec.name, plan.objectives, log.records)
    url, close = serve(metrics, address)
    observe(Event("metrics", url))
    try:
        yield metrics.observe
    finally:
        close()


@contextmanager
def _tracked(
    plan: Plan, log: TrialLog, folder: RunFolder, index: int, observe: Observer
) -> Iterator[Observer]:
    """A tracker in a thread of its own; its run's id is recorded before the service is asked."""
    from mergesearch.search.observers.trackers.background import in_background
    from mergesearch.search.observers.trackers.base import Status
    from mergesearch.search.observers.trackers.opening import new_run_id, open_tracker

    spec = plan.spec.trackers[index]
    key = f"tracker {index}"
    records = list(log.records)
    run_id: str | None = log.get_attr(key)
    if run_id is None:
        run_id = new_run_id(plan.spec.name)
        log.set_attr(key, run_id)
    tracker = in_background(
        lambda: open_tracker(
            spec,
            study=plan.spec.name,
            folder=folder.path,
            objectives=plan.objectives,
            resolved=plan.spec.to_dict(),
            run_id=run_id,
            records=records,
        ),
        observe,
        name=spec.name,
    )
    status: Status = "failed"
    try:
        yield tracker.observe
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        tracker.close(status)
