"""The driver of a run: the one process that starts or resumes a study in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from mergesearch.search.judging.opening import Judges, judging
from mergesearch.search.observers.observing import observing
from mergesearch.search.observers.trackers.opening import check_installed
from mergesearch.search.plan.card_check import check_cards
from mergesearch.search.plan.checks import budget_warning, check_objectives
from mergesearch.search.plan.known import lineage_rows, predicted_seconds
from mergesearch.search.plan.lineage import lineage_warnings, study_lineages
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.study_attributes import LINEAGES, MENDED, PREDICTED, SET_ASIDE
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.report.saved import forget_saved, saved_data
from mergesearch.search.retry import RetryPolicy
from mergesearch.search.runs.corrections import give_up_folder
from mergesearch.search.runs.deciding import decide
from mergesearch.search.runs.going_on import go_on
from mergesearch.search.runs.only_driver import log_of_only_driver
from mergesearch.search.runs.opened import Run
from mergesearch.search.runs.publishing import publish_if_possible
from mergesearch.search.runs.recording import DeviceRecorder
from mergesearch.search.runs.resuming import (
    check_same_code,
    check_same_study,
    check_same_weights,
    with_recorded_start,
    with_recorded_strategy,
)
from mergesearch.search.runs.wiring import worker_spec
from mergesearch.search.spec.code import given_objects
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.study.events import Event
from mergesearch.search.study.graceful_stop import GracefulStop
from mergesearch.search.study.study import Study
from mergesearch.search.workers.backends import check_backend, open_backend
from mergesearch.search.workers.messages import Notice


def run_study(
    spec: StudySpec,
    path: Path,
    notify: Callable[[Event], None] = lambda event: None,
    *,
    trust_log: bool = False,
    retry_failed: bool = False,
    graceful_stop: GracefulStop | None = None,
    metrics: str | None = None,
) -> Run:
    """Run a study in a folder, or resume it where it stands, with the budget that it is given now.

    Once the study has started, the report is written whatever happens.

    Args:
        spec: The resolved study.
        path: The run folder.
        notify: Called with each event.
        trust_log: Go on from the recorded points even where replay does not reproduce them.
        retry_failed: Measure failed trials again.
        graceful_stop: Asks the study to stop; it then ends with KeyboardInterrupt once its running
            trials have finished.
        metrics: ``HOST:PORT`` or ``PORT`` to serve Prometheus metrics at.

    Raises:
        InputError: If anything the user gave is wrong.
        StudyFailedError: If the study cannot go on; recorded results are kept and the same call
            resumes.
    """
    plan = plan_study(spec)
    check_backend(spec.workers, given_objects(spec))
    for text in check_cards(plan):
        notify(Event("warning", text))
    for tracker in spec.trackers:
        check_installed(tracker)
    folder = RunFolder(path)
    # A run that exists was checked when it began, by the rules of that version.
    begun = folder.holds(spec)
    if not begun:
        check_objectives(plan)
    lineages = () if begun else study_lineages(plan)
    unrelated = lineage_warnings(plan, lineages)
    with ExitStack() as stack:
        stack.callback(folder.release)
        recorded = folder.start(
            spec, lambda then: give_up_folder(then, folder), mended=retry_failed
        )
        notify(Event("phase", "opening"))
        # By the name, so that observers which are opened below hear of a storage that is away.
        retry = RetryPolicy(
            spec.driver.patience_seconds, lambda text: notify(Event("warning", text))
        )
        plan, log = stack.enter_context(
            log_of_only_driver(spec, recorded, _fingerprints(plan), folder, retry)
        )
        check_same_study(plan, log, mended=retry_failed)
        check_same_code(plan, log)
        check_same_weights(plan, log)
        go_on(plan, spec, recorded, log, folder, retry_failed=retry_failed)
        if not plan.undecided:
            plan = with_recorded_start(with_recorded_strategy(plan, log), log)
            plan = replace(plan, spec=spec)
        notify = stack.enter_context(observing(plan, log, folder, notify, metrics))
        stop = graceful_stop or GracefulStop()
        judges = Judges()
        if log.results.verdict() is None:
            template = plan.recorded_template.digest
            judges = stack.enter_context(judging(spec, template, path, notify, stop, retry))
        _warn(plan, unrelated, log, notify)
        if lineages:
            log.set_attr(LINEAGES, lineage_rows(lineages))
            log.set_attr(PREDICTED, predicted_seconds(plan))

        def study_of(plan: Plan, closing: ExitStack, *, retry_failed: bool) -> Study:
            """A study with workers of its own."""
            backend = open_backend(
                spec.workers,
                worker_spec(plan, folder),
                lambda notice: _announce(notice, log, notify),
                spec.driver.patience_seconds,
            )
            closing.callback(backend.close)
            return Study(
                plan,
                log,
                judges.wrapped(DeviceRecorder(backend, folder)),
                notify,
                trust_log=trust_log,
                graceful_stop=stop,
                retry_failed=retry_failed,
                clock=judges.clock,
            )

        if log.results.verdict() is None:
            forget_saved(path)
            try:
                again = retry_failed
                if plan.undecided:
                    with ExitStack() as survey:
                        study_of(plan, survey, retry_failed=again).measure_anchors()
                    plan = with_recorded_strategy(decide(plan, log, folder.arenas), log)
                    plan = replace(plan, spec=spec)
                    again = False
                study_of(plan, stack, retry_failed=again).run()
            finally:
                publish_if_possible(folder, plan, log, notify)
        elif saved_data(path) is None:
            publish_if_possible(folder, plan, log, notify)
    return Run(folder, plan, log)


def _warn(
    plan: Plan, unrelated: Sequence[str], log: TrialLog, notify: Callable[[Event], None]
) -> None:
    """Announce and record what a user should know of the models before they are evaluated."""
    if unrelated:
        log.set_attr("lineage warnings", list(unrelated))
    kept = [*(log.get_attr("lineage warnings") or ()), *(log.get_attr(MENDED) or ())]
    kept += log.get_attr("repaired") or ()
    warnings = [*kept, *plan.warnings]
    for line in (*warnings, *budget_warning(plan)):
        notify(Event("warning", line))
    if warnings:
        log.set_attr("warnings", warnings)


def _announce(notice: Notice, log: TrialLog, notify: Callable[[Event], None]) -> None:
    """Tell observers what a backend says; a card that is set aside is also recorded."""
    if notice.kind != "set aside":
        notify(Event(notice.kind, notice.text, done=notice.done, total=notice.total))
        return
    log.set_attr(SET_ASIDE, [*(log.get_attr(SET_ASIDE) or ()), notice.text])
    notify(Event("warning", f"set aside after device errors: {notice.text}"))


def _fingerprints(plan: Plan) -> list[str]:
    """Content hashes of base and experts; every weight is read once."""
    return [] if plan.family is None else [each.fingerprint() for each in plan.family.sources]
