"""A study that runs while its progress is shown and signals are obeyed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from mergesearch.evaluators.spec.evaluators import build_evaluator
from mergesearch.search.observers.progress import make_observer
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import Run
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.study.graceful_stop import GracefulStop


def run_and_show(
    spec: StudySpec,
    path: Path,
    style: str,
    say_draining: Callable[[float], None] = lambda seconds: None,
    *,
    trust_log: bool = False,
    retry_failed: bool = False,
    metrics: str | None = None,
) -> Run:
    """Run a study in a folder, or resume it.

    Args:
        spec: The resolved study.
        path: The run folder.
        style: How progress is shown: ``rich``, ``plain``, ``json`` or ``quiet``.
        say_draining: Called at the first interrupt with the seconds that running trials have.
        trust_log, retry_failed, metrics: As for :func:`mergesearch.search.runs.driver.run_study`.

    Raises:
        KeyboardInterrupt: If it was interrupted; the same call resumes.
    """
    evaluator = build_evaluator(spec.evaluators, Path())
    observe, close = make_observer(style, [objective.name for objective in evaluator.objectives])
    drain = GracefulStop()
    seconds = spec.driver.drain_seconds
    with ExitStack() as stack:
        stack.callback(close)
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            stack.enter_context(drain.on_signals(seconds, lambda: say_draining(seconds)))
        return run_study(
            spec,
            path,
            observe,
            trust_log=trust_log,
            retry_failed=retry_failed,
            graceful_stop=drain,
            metrics=metrics,
        )
