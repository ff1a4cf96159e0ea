"""The loop of a study: anchors, search, recommendation, honest choice. No algorithm in it.

A trial's journey: the strategy suggests a point; it is recorded as RUNNING; a worker merges and
evaluates; the result is recorded, then told. State is a function of the record: a resumed study
replays its log through a freshly seeded strategy, runs again what was in flight, and goes on as if
nothing had happened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from mergesearch.evaluators import Measurement, Split
from mergesearch.evaluators.objectives import References
from mergesearch.merging import Recipe, ReplayError, StudyFailedError
from mergesearch.search.fidelity.rules import EarlyStopRule
from mergesearch.search.front import Normaliser, to_losses
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.record.trial_record import Kind, Score, TrialRecord, Verdict
from mergesearch.search.strategies.base import Point, Problem, Strategy, Suggestion, TrialResult
from mergesearch.search.strategies.table import build_strategy, check_options
from mergesearch.search.study.budget import BudgetTracker
from mergesearch.search.study.early_stopping import EarlyStopping, anchor_watch, told_losses
from mergesearch.search.study.events import Event
from mergesearch.search.study.graceful_stop import GracefulStop
from mergesearch.search.study.problem import study_normaliser, study_problem
from mergesearch.search.study.reference_scores import reference_mismatches
from mergesearch.search.study.replay import REPLAY_TOLERANCE, _one_blas_thread
from mergesearch.search.study.selection import choose_leaders, choose_winner, front_numbers
from mergesearch.search.workers.backends import Backend
from mergesearch.search.workers.gradient_steps import GradientSteps
from mergesearch.search.workers.messages import Failure, Outcome, Task


class Study:
    """Runs one study to its verdict, from wherever its log stands.

    Args:
        plan: The checked study.
        log: Its trial log, open for writing.
        backend: Where trials run.
        notify: Called with each event.
        trust_log: Go on from the recorded points even where replay does not reproduce them.
        drain: Asks the study to stop.
    """

    def __init__(
        self,
        plan: Plan,
        log: TrialLog,
        backend: Backend,
        notify: Callable[[Event], None] = lambda event: None,
        *,
        trust_log: bool = False,
        drain: GracefulStop | None = None,
    ) -> None:
        self._plan = plan
        self._log = log
        self._backend = backend
        self._notify = notify
        self._trust_log = trust_log
        self._drain = drain or GracefulStop()
        self._failures_in_a_row = 0
        self._gradient_steps: dict[int, GradientSteps] = {}  # of the trials that have no result yet
        self._references: dict[Split, References] = {}
        self._purse = BudgetTracker(
            plan.spec.budget,
            log.records,
            lambda count: plan.evaluator.cost("search", count),
            reserve=0 if log.get_attr("searched") else plan.recommended_trials,
        )

    def run(self) -> Verdict:
        """Run, or finish, the study.

        Raises:
            ReplayError: If the log does not follow from the study and seed.
            StudyFailedError: After too many failures in a row, or when no trial has succeeded.
        """
        self._measure_references("search")
        self._measure_anchors()
        normaliser = self._normaliser = study_normaliser(self._plan, self._log.records)
        self._stopping = EarlyStopping(self._plan, normaliser, self._items)
        self._stopping.check_responses(self._log.records)
        for line in reference_mismatches(
            self._log.records, self._plan.objectives, self._plan.spec.reference_scores
        ):
            self._notify(Event("warning", line))
        with _one_blas_thread():
            strategy, problem = self._rebuild(normaliser)
            self._search(strategy, problem.budget)
            self._measure_recommendation(strategy)
        return self._conclude(normaliser)

    # --- phases
    # ------------------------------------------------------------------------

    def _measure_references(self, split: Split) -> None:
        """Measure the models that objectives are relative to, each once on every split in the life
        of the study.
        """
        known = self._log.references(split)
        waiting = deque(
            name for name in sorted(self._plan.evaluator.references()) if name not in known
        )
        total = len(waiting)
        if waiting:
            self._notify(Event("phase", f"references on {split} items", done=0, total=total))

        def next_task() -> Task | None:
            if not waiting:
                return None
            name = waiting.popleft()
            return Task(name, self._plan.reference(name), split, references=None)

        def finish(outcome: Outcome) -> None:
            if outcome.measurement is None:
                failure = outcome.failure
                reason = "" if failure is None else f"{failure.message}\n{failure.detail}".rstrip()
                raise StudyFailedError(
                    f"{outcome.task} could not be measured on {split} items: {reason}"
                )
            self._log.set_reference(split, outcome.task, outcome.measurement.means)

        self._pump(next_task, finish)
        self._references[split] = self._log.references(split)

    def _measure_anchors(self) -> None:
        recorded = {record.name: record for record in self._records("anchor")}
        every = [
            recorded.get(anchor.name) or self._ask("anchor", anchor.name)
            for anchor in self._plan.anchors
        ]
        waiting = deque(record for record in every if record.state == "running")
        self._measure("anchors", waiting, len(self._plan.anchors))

    def _search(self, strategy: Strategy, expected: int) -> None:
        records = self._records("search")
        waiting = deque(record for record in records if record.state == "running")
        tells = sum(record.tell_index is not None for record in records)
        timed = self._plan.search_trials is None
        total = 0 if timed or any(record.item_count is not None for record in records) else expected
        over = bool(self._log.get_attr("searched"))
        self._notify(Event("phase", "search", done=tells, total=total))

        def next_task() -> Task | None:
            nonlocal over, total
            if waiting:
                return self._search_task(waiting.popleft())
            suggestions = strategy.ask(1) if not over and self._purse.allows() else []
            if not suggestions:
                return None
            suggestion = suggestions[0]
            if not self._purse.allows(suggestion.items, self._gradient_items(suggestion)):
                over = True
                return None
            if suggestion.items is not None:
                total = 0  # how many will fit depends on their sizes
            record = self._ask("search", "", suggestion.point, suggestion, tells)
            self._keep_gradient_steps(record, suggestion)
            return self._search_task(record)

        def finish(outcome: Outcome) -> None:
            nonlocal tells
            record = self._log.tell(int(outcome.task), outcome, tells, self._estimates(outcome))
            self._gradient_steps.pop(record.number, None)
            self._purse.note_end(record)
            tells += 1
            strategy.tell([self._told(record)])
            self._report(record, outcome.failure, tells, total)

        self._pump(next_task, finish)
        if not over and self._plan.recommended_trials and not strategy.best():
            # Nothing to recommend: what was kept back for it goes to the search.
            self._purse.release()
            self._pump(next_task, finish)
        self._log.set_attr("searched", True)

    def _search_task(self, record: TrialRecord) -> Task:
        gradient_steps = self._gradient_steps.get(record.number)
        task = self._task(record)
        watch = None if record.item_count is not None else self._watch(record)
        return replace(
            task,
            point=None if gradient_steps is None else record.point,
            gradient_steps=gradient_steps,
            watch=watch,
        )

    def _watch(self, record: TrialRecord) -> EarlyStopRule | None:
        """The rule that may stop a search trial, by what is known when it is handed out."""
        assert record.suggestion is not None
        return self._stopping.watch(record.suggestion, self._log.records)

    def _estimates(self, outcome: Outcome) -> dict[str, float] | None:
        """What a stopped trial would have scored on all items."""
        if outcome.stopped is None or outcome.measurement is None:
            return None
        return self._stopping.estimates(outcome.measurement, outcome.stopped, self._log.records)

    def _keep_gradient_steps(self, record: TrialRecord, suggestion: Suggestion) -> None:
        if suggestion.gradient_steps is not None:
            self._gradient_steps[record.number] = suggestion.gradient_steps

    def _gradient_items(self, suggestion: Suggestion) -> int:
        """Items that a suggestion's gradient steps look at."""
        gradient_steps = suggestion.gradient_steps
        return (
            0
            if gradient_steps is None
            else gradient_steps.batches * self._plan.evaluator.batch_cost(gradient_steps.rule.batch)
        )

    def _item_count(self, items: int | None) -> int | None:
        """How many items to evaluate on; None for all, also where more are asked for than there
        are.
        """
        return None if items is None or items >= self._items else items

    @cached_property
    def _items(self) -> int:
        """Number of search items; counting them may read files, so it is done once."""
        return self._plan.evaluator.size("search")

    def _measure_recommendation(self, strategy: Strategy) -> None:
        recorded = self._records("recommended")
        waiting = deque(record for record in recorded if record.state == "running")
        # The budget kept back one trial for this.
        if not recorded and strategy.recommends:
            waiting.extend(self._ask("recommended", "", point) for point in strategy.best()[:1])
        self._measure("recommendation", waiting, len(waiting))

    def _conclude(self, normaliser: Normaliser) -> Verdict:
        plan = self._plan
        records = self._log.records
        section = plan.spec.selection
        leaders = choose_leaders(
            records, plan.objectives, plan.weights, normaliser, section.leaders, section.confidence
        )
        anchors = [
            record.number
            for record in records
            if record.kind == "anchor" and record.state == "complete"
        ]
        if not leaders and not anchors:
            raise StudyFailedError(
                f"no trial succeeded; the first failure: {_first_failure(records)}"
            )
        contenders = sorted({*anchors, *leaders})
        self._measure_references("validation")
        validation = self._evaluate("validation", contenders)
        winner = choose_winner(validation, plan.objectives, plan.weights, normaliser)
        if winner is None:
            raise StudyFailedError(
                "no leader could be evaluated on the validation items; see `mergesearch show "
                "--failed`"
            )
        self._repeat(winner, section.repeats)
        self._measure_references("test")
        test = self._evaluate("test", sorted({*anchors, winner}))
        verdict = Verdict(
            winner=winner,
            front=front_numbers(records, plan.objectives),
            leaders=tuple(leaders),
            scores={"validation": validation, "test": test},
        )
        self._log.set_attr(
            "verdict", {"winner": winner, "front": verdict.front, "leaders": verdict.leaders}
        )
        return verdict

    def _repeat(self, winner: int, times: int) -> None:
        """Evaluate the winner on the search items again: what moves between the two is noise of the
        machine.
        """
        record = self._log.records[winner]
        waiting = deque(
            range(
                len(self._log.get_attr("repeats") or []), times if record.state == "complete" else 0
            )
        )
        if waiting:
            self._notify(Event("phase", "repeating the winner", done=0, total=len(waiting)))

        def next_task() -> Task | None:
            return (
                replace(self._task(record), id=f"repeat {waiting.popleft()}") if waiting else None
            )

        def finish(outcome: Outcome) -> None:
            values = None if outcome.measurement is None else dict(outcome.measurement.values)
            self._log.set_attr("repeats", [*(self._log.get_attr("repeats") or []), values])

        self._pump(next_task, finish)

    # --- running tasks
    # ------------------------------------------------------------------------

    def _measure(self, phase: str, waiting: deque[TrialRecord], total: int) -> None:
        """Run recorded trials that have no result yet and that no strategy learns from."""
        done = total - len(waiting)
        if waiting:
            self._notify(Event("phase", phase, done=done, total=total))

        def finish(outcome: Outcome) -> None:
            nonlocal done
            done += 1
            record = self._log.tell(int(outcome.task), outcome, None)
            self._report(record, outcome.failure, done, total)

        watch = anchor_watch(self._plan.spec.fidelity, self._items) if phase == "anchors" else None

        def next_task() -> Task | None:
            return replace(self._task(waiting.popleft()), watch=watch) if waiting else None

        self._pump(next_task, finish)

    def _evaluate(self, split: Split, numbers: Sequence[int]) -> dict[int, Score]:
        """Scores of trials on held-out items; each is evaluated once in the life of the study."""
        waiting = deque(number for number in numbers if not self._log.score(split, number)[0])
        done = len(numbers) - len(waiting)
        if waiting:
            self._notify(Event("phase", split, done=done, total=len(numbers)))

        def next_task() -> Task | None:
            return self._task(self._log.records[waiting.popleft()], split) if waiting else None

        def finish(outcome: Outcome) -> None:
            nonlocal done
            done += 1
            number = int(outcome.task)
            measured = outcome.measurement
            score = None if measured is None else score_of(measured)
            self._log.set_score(split, number, score)
            self._notify(Event("score", split, self._log.records[number], done, len(numbers)))

        self._pump(next_task, finish)
        scores = {number: self._log.score(split, number)[1] for number in numbers}
        return {number: score for number, score in scores.items() if score is not None}

    def _pump(
        self, next_task: Callable[[], Task | None], finish: Callable[[Outcome], None]
    ) -> None:
        """Keep the backend's slots full until there are no more tasks; results in finishing order.

        Raises:
            KeyboardInterrupt: When asked to stop, once what was in flight has finished.
        """
        in_flight = 0
        over = False
        outcomes: list[Outcome] = []
        while True:
            # Results and what is asked after them reach the disk at once; no work begins before
            # that.
            fresh: list[Task] = []
            with self._log.batched_writes():
                for outcome in outcomes:
                    in_flight -= 1
                    finish(outcome)
                while not self._drain.requested and in_flight < self._backend.slots:
                    task = next_task()
                    over = task is None
                    if task is None:
                        break
                    fresh.append(task)
                    in_flight += 1
            for task in fresh:
                self._backend.submit(task)
            if not in_flight and self._drain.requested:
                raise KeyboardInterrupt
            if not in_flight and over:
                return
            outcomes = self._backend.wait()

    def _report(self, record: TrialRecord, failure: Failure | None, done: int, total: int) -> None:
        self._notify(Event("trial", record.kind, record, done, total))
        # An infeasible merge is an answer (the search goes on); errors and lost workers may mean a
        # broken setting.
        broken = failure is not None and failure.kind != "infeasible"
        self._failures_in_a_row = self._failures_in_a_row + 1 if broken else 0
        if (
            failure is not None
            and self._failures_in_a_row >= self._plan.spec.max_consecutive_failures
        ):
            raise StudyFailedError(
                f"{self._failures_in_a_row} trials failed in a row, the last (trial "
                f"{record.number}) with "
                f"{failure.message}\n{failure.detail}".rstrip()
            )

    # --- the record
    # ------------------------------------------------------------------------

    def _records(self, kind: Kind) -> list[TrialRecord]:
        return [record for record in self._log.records if record.kind == kind]

    def _ask(
        self,
        kind: Kind,
        name: str = "",
        point: Point | None = None,
        suggestion: Suggestion | None = None,
        tells: int = 0,
    ) -> TrialRecord:
        space = self._plan.space
        if point is None:
            anchor = next(anchor for anchor in self._plan.anchors if anchor.name == name)
            recipe = anchor.recipe
        else:
            recipe = space.decode(point)
        return self._log.ask(
            kind,
            recipe,
            name=name,
            point=point,
            suggestion=None if suggestion is None else suggestion.id,
            tells_at_ask=tells,
            item_count=None if suggestion is None else self._item_count(suggestion.items),
            gradient_items=0 if suggestion is None else self._gradient_items(suggestion),
            notes={} if suggestion is None else suggestion.notes,
            summary=self._summary(recipe, point),
            bounds=(float(space.lower.min()), float(space.upper.max())),
        )

    def _summary(self, recipe: Recipe, point: Point | None) -> dict[str, float]:
        """The numbers that dashboards show; none for an anchor of another operator than the
        study's.
        """
        if point is not None:
            return self._plan.space.summary(point)
        own = recipe.basis_key == self._plan.template.basis_key
        return self._plan.space.summary_of(recipe.field) if own else {}

    def _told(self, record: TrialRecord) -> TrialResult:
        assert record.suggestion is not None  # search trials only
        assert record.point is not None
        values = record.estimates or record.values
        losses = to_losses(values, self._plan.objectives) if values else None
        if losses is not None:
            losses = told_losses(losses, record.violations, self._normaliser)
        items = {} if record.stopped is not None else dict(record.items)
        return TrialResult(
            record.suggestion,
            record.point,
            losses,
            items,
            record.item_count,
            record.gradient_result,
            record.stopped,
        )

    def _task(self, record: TrialRecord, split: Split = "search") -> Task:
        item_count = record.item_count if split == "search" else None
        return Task(
            str(record.number),
            record.recipe,
            split,
            item_count,
            references=self._references.get(split, {}),
        )

    def _rebuild(self, normaliser: Normaliser) -> tuple[Strategy, Problem]:
        """A freshly seeded strategy, brought to where the log stands, and what it was told of the
        study.
        """
        section = self._plan.strategy
        problem = study_problem(self._plan, self._log.records, normaliser, self._suggestions())
        options = check_options(section.name, section.options)
        strategy = build_strategy(section.name, options, problem, self._plan.spec.seed)
        self._replay(strategy, problem)
        return strategy, problem

    def _suggestions(self) -> int:
        """How many suggestions the strategy is told to expect: the same in every session."""
        if self._plan.search_trials is not None:
            return self._plan.search_trials
        noted: int | None = self._log.get_attr("suggestions")
        if noted is None:
            noted = self._purse.expected(self._backend.slots)
            self._log.set_attr("suggestions", noted)
        return noted

    def _replay(self, strategy: Strategy, problem: Problem) -> None:
        """Repeat the recorded interleaving of asks and tells."""
        asks = deque(self._records("search"))
        tells = sorted(
            (r for r in asks if r.tell_index is not None), key=lambda r: r.tell_index or 0
        )
        width = np.maximum(problem.upper - problem.lower, np.finfo(float).tiny)
        for place in range(len(tells) + 1):
            while asks and asks[0].tells_at_ask == place:
                self._check_replayed(asks.popleft(), strategy, width)
            if place < len(tells):
                strategy.tell([self._told(tells[place])])
        if asks:
            raise ReplayError(
                f"trial {asks[0].number} was asked after {asks[0].tells_at_ask} results, the log "
                "holds fewer"
            )

    def _check_replayed(self, record: TrialRecord, strategy: Strategy, width: Point) -> None:
        suggestions = strategy.ask(1)
        assert record.point is not None
        same = (
            len(suggestions) == 1
            and suggestions[0].id == record.suggestion
            and self._item_count(suggestions[0].items) == record.item_count
            and bool(
                np.all(np.abs(suggestions[0].point - record.point) <= REPLAY_TOLERANCE * width)
            )
        )
        if not same and not self._trust_log:
            raise ReplayError(
                f"trial {record.number}: expected the recorded point, replay gave another; the log "
                "was written by "
                "other versions or on another machine (see environment.json); `mergesearch run "
                "--trust-log` goes on "
                "from the record"
            )
        if suggestions and record.state == "running":
            self._keep_gradient_steps(record, suggestions[0])


def score_of(measured: Measurement) -> Score:
    """What is recorded of a re-evaluation."""
    return Score(measured.values, measured.errors, measured.items, measured.violations)


def _first_failure(records: Sequence[TrialRecord]) -> str:
    return next(
        (record.failure.message for record in records if record.failure is not None),
        "none recorded",
    )
