"""A backend whose trials also wait for a person, while its workers go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue

from mergesearch.evaluators import Measurement
from mergesearch.search.judging.bench import Bench
from mergesearch.search.retry import RetryPolicy
from mergesearch.search.study.graceful_stop import GracefulStop
from mergesearch.search.workers.backends import Backend
from mergesearch.search.workers.messages import Outcome, Task


class Bell:
    """Wakes the driver; anything may ring it, also a signal's handler while the driver waits."""

    def __init__(self) -> None:
        self._rings: SimpleQueue[None] = SimpleQueue()  # its put may interrupt its get

    def ring(self) -> None:
        """Wake the driver, now or when it next waits."""
        self._rings.put(None)

    def wait(self) -> None:
        """Wait until it rings."""
        self._rings.get()


class JudgedBackend:
    """Hands outputs to the bench, and holds an outcome back until its pairs are judged.

    A worker is free once it has made the outputs. So that the person need not wait for the next
    ones, up to ``ahead`` search trials wait beside those that workers run. Outcomes on held-out
    items are handed out together once all of them are judged, so that one fit of all choices
    compares the leaders.

    Args:
        backend: Where tasks run.
        bench: Knows outputs and choices.
        bell: Rings with every choice.
        graceful_stop: Ends a wait for choices at once: the pairs stay open for the next session.
        ahead: How many search trials may wait for choices while more are run.
        retry: How long to wait for room on the disk.
        say: Called with the number of open pairs when there are new ones to wait for.
    """

    def __init__(
        self,
        backend: Backend,
        bench: Bench,
        bell: Bell,
        graceful_stop: GracefulStop,
        ahead: int,
        retry: RetryPolicy,
        say: Callable[[int], None],
    ) -> None:
        self._backend = backend
        self._bench = bench
        self._bell = bell
        self._graceful_stop = graceful_stop
        self._ahead = ahead
        self._retry = retry
        self._say = say
        self._working: dict[str, Task] = {}
        self._waiting: dict[str, tuple[Task, Outcome]] = {}
        self._told = 0  # open pairs when last looked at
        self.idle_seconds = 0.0  # of the driver, while nothing but choices was waited for

    @property
    def slots(self) -> int:
        """How many tasks to keep submitted at a time: those at work, and those that may wait."""
        searched = sum(task.split == "search" for task, _ in self._waiting.values())
        held_out = len(self._waiting) - searched
        return self._backend.slots + held_out + min(searched, self._ahead)

    def submit(self, task: Task) -> None:
        """Hand the task on."""
        self._working[task.id] = task
        self._backend.submit(task)

    def wait(self) -> list[Outcome]:
        """Wait until an outcome is complete, or more tasks may be submitted.

        While workers run, their outcomes are waited for, and choices that came meanwhile are seen
        then.

        Raises:
            KeyboardInterrupt: If a stop was asked for and only choices are waited for.
        """
        before = self.slots
        while True:
            complete: list[Outcome] = []
            if self._working:
                for outcome in self._backend.wait():
                    complete += self._received(outcome)
            complete += self._judged()
            if complete or self.slots > before:
                return complete
            if not self._working:
                self._wait_for_choices()

    def close(self) -> None:
        """Stop all workers; what waits for choices runs again in the next session."""
        self._waiting.clear()
        self._backend.close()

    def _received(self, outcome: Outcome) -> list[Outcome]:
        """An outcome that needs no choices; of others the outputs go to the bench."""
        task = self._working.pop(outcome.task)
        measured = outcome.measurement
        if measured is None or not measured.exhibits:
            return [outcome]
        reference = task.references is None
        if not reference or task.id == "base":
            self._retry(
                lambda: self._register(task, measured, base=reference), (OSError,), "judging.jsonl"
            )
        if reference:
            return [replace(outcome, measurement=replace(measured, exhibits={}))]
        self._waiting[task.id] = task, outcome
        return []

    def _register(self, task: Task, measured: Measurement, *, base: bool) -> None:
        for objective, exhibit in measured.exhibits.items():
            recipe = task.recipe.digest
            self._bench.register(objective, task.split, recipe, exhibit, base=base)

    def _judged(self) -> list[Outcome]:
        """The outcomes that need no more choices, with their values."""
        judged = {name for name, each in self._waiting.items() if self._is_judged(*each)}
        held_out = {name for name, (task, _) in self._waiting.items() if task.split != "search"}
        if self._working or held_out - judged:
            judged -= held_out
        done = [each for name, each in self._waiting.items() if name in judged]
        for task, _ in done:
            del self._waiting[task.id]
        return [self._valued(*each) for each in done]

    def _is_judged(self, task: Task, outcome: Outcome) -> bool:
        assert outcome.measurement is not None
        return all(
            self._bench.judged(objective, task.split, task.recipe.digest)
            for objective in outcome.measurement.exhibits
        )

    def _valued(self, task: Task, outcome: Outcome) -> Outcome:
        """The outcome with the strengths that the choices give it."""
        measured = outcome.measurement
        assert measured is not None
        strengths = {
            objective: self._bench.strength(objective, task.split, task.recipe.digest)
            for objective in measured.exhibits
        }
        values = {name: strength.value for name, strength in strengths.items()}
        errors = {name: strength.error for name, strength in strengths.items()}
        return replace(outcome, measurement=_with(measured, values, errors))

    def _wait_for_choices(self) -> None:
        if self._graceful_stop.requested:
            raise KeyboardInterrupt
        view = self._bench.view()
        count = view.total - view.done
        if count > self._told:
            self._say(count)
        self._told = count
        began = time.monotonic()
        try:
            self._bell.wait()
        finally:
            self.idle_seconds += time.monotonic() - began


def _with(measured: Measurement, values: dict[str, float], errors: dict[str, float]) -> Measurement:
    return replace(
        measured,
        values={**measured.values, **values},
        errors={**measured.errors, **errors},
        exhibits={},
    )
