"""The course of a study: anchors, search, recommendation, choice of the winner.

There is no algorithm in it. A trial's journey: the strategy suggests a point; it is recorded as
RUNNING; a worker merges and evaluates; the result is recorded, then told to the strategy. State is
a function of the record: a resumed study replays its log through a freshly seeded strategy, runs
again the trials that were in flight, and goes on as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mergesearch.merging import StudyFailedError
from mergesearch.search.front import Normaliser
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.study_attributes import SEARCHED
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.record.trial_record import TrialRecord, Verdict, standing_failures
from mergesearch.search.strategies.base import Strategy
from mergesearch.search.strategies.table import build_strategy, check_options
from mergesearch.search.study.asking import ask_again, ask_anchor, ask_recommended
from mergesearch.search.study.attempts import known_before_search, trials_of_search
from mergesearch.search.study.budget import BudgetTracker
from mergesearch.search.study.context import StudyContext
from mergesearch.search.study.early_stopping import EarlyStopping, anchor_rule, check_fidelity
from mergesearch.search.study.estimated_front import estimated_front, estimated_trials
from mergesearch.search.study.events import Event
from mergesearch.search.study.graceful_stop import GracefulStop
from mergesearch.search.study.horizon import Horizon
from mergesearch.search.study.known_merges import KnownMerges
from mergesearch.search.study.measuring import Measurer
from mergesearch.search.study.posterior import posterior_losses
from mergesearch.search.study.problem import study_normaliser, study_problem
from mergesearch.search.study.reference_scores import reference_mismatches
from mergesearch.search.study.replay import Replay, one_blas_thread
from mergesearch.search.study.reporting import TrialReporter, check_anchors, first_failure
from mergesearch.search.study.restoring import Restorer
from mergesearch.search.study.searching import SearchPhase
from mergesearch.search.study.selection import choose_leaders, choose_winner, front_numbers
from mergesearch.search.study.task_pump import TaskPump
from mergesearch.search.workers.backends import Backend


class Study:
    """Runs one study to its verdict, from wherever its log stands.

    Args:
        plan: The checked study.
        log: Its trial log, open for writing.
        backend: Where trials run.
        notify: Called with each event, once what it is about is recorded.
        trust_log: Go on from the recorded points even where replay does not reproduce them.
        graceful_stop: Asks the study to stop once its running trials have finished.
        retry_failed: Measure trials that failed again, before the search goes on.
        clock: Seconds that the budget counts.
    """

    def __init__(
        self,
        plan: Plan,
        log: TrialLog,
        backend: Backend,
        notify: Callable[[Event], None] = lambda event: None,
        *,
        trust_log: bool = False,
        graceful_stop: GracefulStop | None = None,
        retry_failed: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._log = log

        def announce(event: Event) -> None:
            log.once_recorded(lambda: notify(event))

        self._notify = announce
        self._trust_log = trust_log
        self._retry_failed = retry_failed
        self._context = StudyContext(
            plan=plan,
            log=log,
            pump=TaskPump(backend, log, graceful_stop or GracefulStop()),
            reporter=TrialReporter(announce, plan.spec.max_consecutive_failures),
            notify=announce,
            known=KnownMerges(plan.evaluator, log.records),
        )
        self._measurer = Measurer(self._context)
        self._budget = BudgetTracker(
            plan.spec.budget,
            log.records,
            lambda count: plan.evaluator.cost("search", count),
            reserve=0 if log.get_attr(SEARCHED) else plan.recommended_trials,
            clock=clock,
        )
        self._horizon = Horizon(plan, log, lambda: self._budget.expected(backend.slots))

    def run(self) -> Verdict:
        """Run, or finish, the study.

        Raises:
            ReplayError: If the log does not follow from the study and seed.
            StudyFailedError: After too many failures in a row, or when no trial has succeeded.
        """
        self.measure_anchors()
        items = self._plan.evaluator.size("search")
        check_fidelity(self._plan.spec.fidelity, self._log.records, items)
        self._warn_of_mismatches()
        with one_blas_thread():
            strategy = self._search(items)
            self._measure_recommendation(strategy)
        return self._conclude(study_normaliser(self._plan, self._log.records))

    def measure_anchors(self) -> None:
        """Measure what a study knows before it searches: references and anchors.

        Raises:
            StudyFailedError: If the base or every anchor failed.
        """
        self._measurer.measure_references("search")
        self._measure_anchors(self._plan.evaluator.size("search"))

    def _measure_anchors(self, items: int) -> None:
        """Measure the known merges that the search is compared with."""
        known = known_before_search(self._log.records)
        recorded = {record.name: record for record in known if record.kind == "anchor"}
        records = [
            recorded.get(anchor.name) or ask_anchor(self._plan, self._log, anchor)
            for anchor in self._plan.anchors
        ]
        if self._retry_failed and not self._context.records("search"):
            records = [self._again(record) for record in records]
        running = [record for record in records if record.state == "running"]
        rule = anchor_rule(self._plan.spec.fidelity, items)

        def check() -> None:
            check_anchors(self._log.records)

        self._measurer.measure_trials("anchors", running, len(self._plan.anchors), rule, check)
        check()

    def _again(self, record: TrialRecord) -> TrialRecord:
        """Another attempt at a trial, where it failed; else the trial itself."""
        return ask_again(self._plan, self._log, record) if record.state == "failed" else record

    def _warn_of_mismatches(self) -> None:
        for line in reference_mismatches(
            self._log.records, self._plan.objectives, self._plan.spec.reference_scores
        ):
            self._notify(Event("warning", line))

    def _search(self, items: int) -> Strategy:
        """Spend the budget on what a strategy asks for, after a replay of what it asked before."""
        section = self._plan.strategy
        records = self._log.records
        self._horizon.note_change()
        anchors = known_before_search(records)
        normaliser = study_normaliser(self._plan, anchors)
        problem = study_problem(self._plan, anchors, normaliser, self._horizon.first)
        options = check_options(section.name, section.options)
        strategy = build_strategy(section.name, options, problem, self._plan.spec.seed)
        early_stopping = EarlyStopping(self._plan, normaliser, items)
        replay = Replay(
            self._plan,
            normaliser,
            items,
            trust_log=self._trust_log,
            restorer=Restorer(self._context, self._measurer, early_stopping, self._budget),
        )
        gradient_steps = replay.run(
            strategy, problem, trials_of_search(records), self._horizon.changes
        )
        SearchPhase(
            self._context,
            self._measurer,
            strategy,
            self._budget,
            early_stopping,
            self._horizon.last,
            gradient_steps,
            retry_failed=self._retry_failed,
        ).run()
        return strategy

    def _measure_recommendation(self, strategy: Strategy) -> None:
        """Measure the point that the strategy itself recommends; the budget kept a trial for it.

        After a change of the budget it recommends again.
        """
        records = self._context.records("recommended")
        running = [record for record in records if record.state == "running"]
        if self._retry_failed:
            failed = standing_failures(records)
            running += [ask_again(self._plan, self._log, each) for each in failed]
        self._budget.release()
        begun = self._horizon.begun
        due = strategy.recommends and all(each.number < begun for each in records)
        if due and (not begun or self._budget.has_room(None)):
            known = {record.point.tobytes() for record in records if record.point is not None}
            running += [
                ask_recommended(self._plan, self._log, point, self._context.known)
                for point in strategy.best()[:1]
                if point.tobytes() not in known
            ]
        self._measurer.measure_trials("recommendation", running, len(running))

    def _conclude(self, normaliser: Normaliser) -> Verdict:
        """Choose the winner on validation items and report it once on test items."""
        plan = self._plan
        records = self._log.records
        section = plan.spec.selection
        with one_blas_thread():
            estimates = estimated_trials(records, plan.objectives)
        leaders = choose_leaders(
            records,
            plan.objectives,
            plan.weights,
            normaliser,
            section.leaders,
            section.confidence,
            estimates,
        )
        anchors = [
            record.number
            for record in records
            if record.kind == "anchor" and record.state == "complete"
        ]
        if not anchors and (plan.anchors or not leaders):
            raise StudyFailedError(_without_anchors(leaders, first_failure(records)))
        self._measurer.measure_references("validation")
        validation = self._measurer.evaluate("validation", sorted({*anchors, *leaders}))
        with one_blas_thread():
            posterior = posterior_losses(
                records,
                leaders,
                validation,
                plan.objectives,
                plan.weights,
                normaliser,
                plan.space.upper - plan.space.lower,
            )
        winner = choose_winner(validation, plan.objectives, plan.weights, normaliser, posterior)
        if winner is None:
            raise StudyFailedError(
                "no leader could be evaluated on the validation items; see `mergesearch show "
                "--failed`"
            )
        self._measurer.measure_references("test")
        repetition = self._measurer.repetition(winner, section.repeats)
        test = self._measurer.evaluate("test", sorted({*anchors, winner}), repetition)
        verdict = Verdict(
            winner=winner,
            front=front_numbers(records, plan.objectives),
            leaders=tuple(leaders),
            scores={"validation": validation, "test": test},
            front_estimated=estimated_front(records, plan.objectives, estimates),
        )
        self._log.results.set_verdict(verdict)
        return verdict


def _without_anchors(leaders: Sequence[int], failure: str) -> str:
    """Why a study without a complete anchor has no winner: there is nothing that it beats."""
    if not leaders:
        return f"no trial succeeded; the first failure: {failure}"
    listed = ", ".join(str(number) for number in leaders)
    return (
        f"no anchor could be measured, so nothing is known that a winner is better than: {failure};"
        f" the best trials are {listed} (`mergesearch export RUN --trial {leaders[0]}`), and "
        "`mergesearch show --failed` lists the failures"
    )
