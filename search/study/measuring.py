"""Measurements outside the search: references, anchors, and re-evaluations of leaders.

No strategy learns from them. Each is recorded and made once in the life of a study.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from mergesearch.evaluators import Measurement, Split
from mergesearch.evaluators.objectives import References
from mergesearch.merging import StudyFailedError
from mergesearch.search.fidelity.rules import EarlyStopRule
from mergesearch.search.record.trial_record import Score, TrialRecord
from mergesearch.search.study.context import StudyContext
from mergesearch.search.study.events import Event
from mergesearch.search.study.known_merges import answer, measured_trial
from mergesearch.search.study.repetition import Repetition
from mergesearch.search.workers.messages import Outcome, Task

#: A line of a traceback that says where an error was raised.
_PLACE = re.compile(r'File "([^"]+)", line (\d+)')


class Measurer:
    """Measures models and trials of one study."""

    def __init__(self, context: StudyContext) -> None:
        self._context = context
        self._references: dict[Split, References] = {}

    def task(self, record: TrialRecord, split: Split = "search") -> Task:
        """The task that measures a trial on a split."""
        return Task(
            id=str(record.number),
            recipe=record.recipe,
            split=split,
            items=record.item_count if split == "search" else None,
            references=self._references.get(split, {}),
        )

    def measure_references(self, split: Split) -> None:
        """Measure the models that objectives are relative to.

        Raises:
            StudyFailedError: If one of them cannot be measured.
        """
        plan = self._context.plan
        results = self._context.log.results
        known = results.references(split)
        waiting = deque(name for name in sorted(plan.evaluator.references()) if name not in known)
        if waiting:
            self._begin_phase(f"references on {split} items", 0, len(waiting))

        def next_task() -> Task | None:
            if not waiting:
                return None
            name = waiting.popleft()
            return Task(name, plan.reference(name), split, references=None)

        def finish(outcome: Outcome) -> None:
            if outcome.measurement is None:
                raise _unmeasured(outcome, split)
            results.set_reference(split, outcome.task, outcome.measurement.means)

        self._context.pump.run(next_task, finish)
        self._references[split] = results.references(split)

    def measure_trials(
        self,
        phase: str,
        records: Iterable[TrialRecord],
        total: int,
        early_stop_rule: EarlyStopRule | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Run recorded trials that have no result yet.

        Args:
            phase: Name of the phase, for the user.
            records: The trials.
            total: Number of trials of the phase, with those that have a result.
            early_stop_rule: Rule that sees their values at its stages.
            check: Called after each result; raises where the study must stop.
        """
        waiting = deque(records)
        done = total - len(waiting)
        if waiting:
            self._begin_phase(phase, done, total)

        def next_task() -> Task | None:
            while waiting:
                record = waiting.popleft()
                known = answer(record, self._context.log.records)
                if known is None:
                    return replace(self.task(record), early_stop_rule=early_stop_rule)
                finish(known)
            return None

        def finish(outcome: Outcome) -> None:
            nonlocal done
            done += 1
            record = self._context.log.tell(int(outcome.task), outcome, None)
            self._context.reporter.announce(record, done, total)
            check()
            self._context.reporter.count(record)

        self._context.pump.run(next_task, finish)

    def evaluate(
        self, split: Split, numbers: Sequence[int], repetition: Repetition | None = None
    ) -> dict[int, Score]:
        """Evaluate trials on held-out items; those that cannot be evaluated have no score.

        Args:
            split: The items.
            numbers: Of the trials.
            repetition: What is evaluated at the same time, on workers that would idle.
        """
        log = self._context.log
        waiting = deque(number for number in numbers if not log.results.score(split, number)[0])
        done = len(numbers) - len(waiting)
        if waiting:
            self._begin_phase(split, done, len(numbers))

        def next_task() -> Task | None:
            if repetition is not None and repetition.waiting:
                return repetition.next_task()
            while waiting:
                number = waiting.popleft()
                known = self._known_score(split, number, numbers)
                if known is None:
                    return self.task(log.records[number], split)
                record_score(number, known)
            return None

        def finish(outcome: Outcome) -> None:
            if repetition is not None and repetition.owns(outcome):
                repetition.finish(outcome)
                return
            measured = outcome.measurement
            record_score(int(outcome.task), None if measured is None else score_of(measured))

        def record_score(number: int, score: Score | None) -> None:
            nonlocal done
            done += 1
            log.results.set_score(split, number, score)
            event = Event("score", split, log.records[number], done, len(numbers), score)
            self._context.notify(event)

        self._context.pump.run(next_task, finish)
        scores = {number: log.results.score(split, number)[1] for number in numbers}
        return {number: score for number, score in scores.items() if score is not None}

    def _known_score(self, split: Split, number: int, others: Sequence[int]) -> Score | None:
        """The score of another trial of the same merge, if the record says that it is the same."""
        log = self._context.log
        measured = measured_trial(log.records[number])
        for other in others:
            if other != number and measured_trial(log.records[other]) == measured:
                score = log.results.score(split, other)[1]
                if score is not None:
                    return score
        return None

    def repetition(self, winner: int, times: int) -> Repetition:
        """Other evaluations of the winner on the search items, those that have no result yet."""
        log = self._context.log
        repetition = Repetition(log, self.task(log.records[winner]), times)
        if repetition.waiting:
            self._begin_phase("repeating the winner", 0, len(repetition.waiting))
        return repetition

    def _begin_phase(self, name: str, done: int, total: int) -> None:
        self._context.notify(Event("phase", name, done=done, total=total))


def _unmeasured(outcome: Outcome, split: Split) -> StudyFailedError:
    """The error of a reference that failed: the cause, where it was raised, and what to do."""
    failure = outcome.failure
    message = "" if failure is None else " ".join(failure.message.split())
    places = [] if failure is None else _PLACE.findall(failure.detail)
    place = f" ({places[-1][0]}:{places[-1][1]})" if places else ""
    return StudyFailedError(
        f"{outcome.task} could not be measured on {split} items: {message[:300]}{place}; "
        "objectives or bounds are relative to it: mend that, and run again, which goes on from here"
    )


def score_of(measurement: Measurement) -> Score:
    """The score that is recorded of a re-evaluation."""
    return Score(
        measurement.values,
        measurement.errors,
        measurement.items,
        measurement.violations,
        measurement.weights,
        measurement.resampled,
    )
