"""Opens what a study with human judges needs: the record, the page, and trials that wait."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mergesearch.evaluators.preference.pairing import digest
from mergesearch.search.grammar import counted
from mergesearch.search.judging.address import written_address
from mergesearch.search.judging.backend import Bell, JudgedBackend
from mergesearch.search.judging.bench import Bench
from mergesearch.search.judging.record import JudgingRecord
from mergesearch.search.retry import RetryPolicy
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.study.events import Event
from mergesearch.search.study.graceful_stop import GracefulStop
from mergesearch.search.workers.backends import Backend


class Judges:
    """Lets trials wait for people; without people, they do not.

    Args:
        wrap: Makes of a backend one whose trials wait; None where nothing is judged.
    """

    def __init__(self, wrap: Callable[[Backend], JudgedBackend] | None = None) -> None:
        self._wrap = wrap
        self._wrapped: list[JudgedBackend] = []

    def wrapped(self, backend: Backend) -> Backend:
        """The backend, whose trials wait for choices where any are needed."""
        if self._wrap is None:
            return backend
        self._wrapped.append(self._wrap(backend))
        return self._wrapped[-1]

    def clock(self) -> float:
        """Seconds that grow, but not while nothing but choices is waited for."""
        return time.monotonic() - sum(backend.idle_seconds for backend in self._wrapped)


def is_judged(spec: StudySpec) -> bool:
    """Whether people judge the models of a study."""
    return any(evaluator.kind == "preference" for evaluator in spec.evaluators)


@contextmanager
def judging(
    spec: StudySpec,
    template: str,
    folder: Path,
    notify: Callable[[Event], None],
    graceful_stop: GracefulStop,
    retry: RetryPolicy,
) -> Iterator[Judges]:
    """Serve the judge's page while inside, if people judge.

    Args:
        spec: The study.
        template: Digest of its recipe, which covers the weights of base and experts.
        folder: Its run folder, held by this driver.
        notify: Told the page's address, and when pairs wait.
        graceful_stop: Ends waits for choices.
        retry: How long to wait for room on the disk.

    Raises:
        RunFolderError: If the record of choices was damaged.
        InputError: If the page's port is not free.
    """
    if not is_judged(spec):
        yield Judges()
        return
    from mergesearch.search.judging.serving import served

    bell = Bell()
    record = JudgingRecord(folder)
    record.begin(_digest(spec, template))
    bench = Bench(record, spec.seed)
    with ExitStack() as stack:
        port = spec.driver.judge_port
        url = stack.enter_context(served(bench, port, bell.ring, "driver.judge_port"))
        stack.enter_context(written_address(folder, url))
        graceful_stop.listeners.append(bell.ring)
        stack.callback(graceful_stop.listeners.remove, bell.ring)
        notify(Event("judging", f"judge at {url}"))

        def say(count: int) -> None:
            notify(Event("judging", f"{counted(count, 'pair')} to judge at {url}"))

        ahead = spec.driver.judge_ahead
        yield Judges(
            lambda backend: JudgedBackend(backend, bench, bell, graceful_stop, ahead, retry, say)
        )


def _digest(spec: StudySpec, template: str) -> str:
    """Digest of all that the outputs and the questions about them depend on, but for code."""
    sections = [
        evaluator.model_dump(mode="json", exclude={"source"})
        for evaluator in spec.evaluators
        if evaluator.kind == "preference"
    ]
    return digest(json.dumps([template, spec.seed, sections], sort_keys=True).encode())
