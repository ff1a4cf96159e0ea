"""A run: one study in one folder. Starts, resumes, reads, reports and exports it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.merging import InputError, MergesearchError, RunFolderError
from mergesearch.merging.family.family import open_family
from mergesearch.search.dashboard.serving import note_markdown
from mergesearch.search.observers.observing import observing
from mergesearch.search.observers.trackers.opening import check_installed
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.array_text import decode_array, encode_array
from mergesearch.search.record.lease import Lease
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.storage import open_engine, open_storage
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.report.tables import sentences
from mergesearch.search.report.writing import write_report
from mergesearch.search.retry import RetryPolicy, reason
from mergesearch.search.runs.opened import Run, _open_log, storage_location, worker_spec
from mergesearch.search.runs.warm_start import warm_start_point, with_warm_start
from mergesearch.search.spec.comparison import differences, listed
from mergesearch.search.spec.renamed import with_new_names
from mergesearch.search.spec.sections import EXECUTION_KEYS, StudySpec
from mergesearch.search.study.events import Event
from mergesearch.search.study.graceful_stop import GracefulStop
from mergesearch.search.study.study import Study
from mergesearch.search.workers.backends import open_backend

if TYPE_CHECKING:
    pass


def run_study(
    spec: StudySpec,
    path: Path,
    notify: Callable[[Event], None] = lambda event: None,
    *,
    trust_log: bool = False,
    drain: GracefulStop | None = None,
    metrics: str | None = None,
) -> Run:
    """Run a study in a folder, or resume it where it stands; writes the report whatever happens
    after the start.

    Args:
        spec: The resolved study.
        path: The run folder.
        notify: Called with each event.
        trust_log: Go on from the recorded points even where replay does not reproduce them.
        drain: Asks the study to stop; it then ends with KeyboardInterrupt once the trials that run
            have finished.
        metrics: ``HOST:PORT`` or ``PORT`` to serve Prometheus metrics at.

    Raises:
        InputError: If anything the user gave is wrong.
        StudyFailedError: If the study cannot go on; what was told is kept and the same call
            resumes.
    """
    plan = plan_study(spec)
    for tracker in spec.trackers:
        check_installed(tracker)
    folder = RunFolder(path)
    with ExitStack() as stack:
        folder.start(spec)
        stack.callback(folder.release)
        notify(Event("phase", "opening"))
        plan = plan_study(spec, _fingerprints(plan), folder.arenas)
        patience = RetryPolicy(
            spec.driver.patience_seconds, lambda text: notify(Event("warning", text))
        )
        location = storage_location(spec, folder)
        storage = open_storage(location, patience)
        guard = stack.enter_context(_only_driver(spec, location, patience))
        log = _open_log(storage, plan, patience=patience, guard=guard)
        _check_same(plan, log)
        _check_unchanged(plan, log)
        plan = _begun(plan, log)
        notify = stack.enter_context(observing(plan, log, folder, notify, metrics))
        _warn(plan, log, notify)
        run = Run(folder, plan, log)
        verdict = log.verdict()
        if verdict is None:
            backend = open_backend(
                spec.workers,
                worker_spec(plan, folder),
                lambda text: notify(Event("workers", text)),
                spec.driver.patience_seconds,
            )
            stack.callback(backend.close)
            try:
                Study(plan, log, backend, notify, trust_log=trust_log, drain=drain).run()
            finally:
                _publish_if_possible(run, notify)
        elif not (path / "report.html").is_file():
            _publish_if_possible(run, notify)
    return run


@contextmanager
def _only_driver(
    spec: StudySpec, location: str | Path, patience: RetryPolicy
) -> Iterator[Callable[[], None]]:
    """The study's lease, where it is in a database that other drivers reach; what to call before a
    write.
    """
    if isinstance(location, Path):
        yield lambda: None  # the run folder's lock is enough
        return
    from sqlalchemy.exc import SQLAlchemyError

    lease = Lease(open_engine(location), spec.name, spec.driver.lease_seconds, patience.warn)
    patience(lease.take, (SQLAlchemyError,), "storage")
    try:
        yield lease.check
    finally:
        lease.release()


def _publish_if_possible(run: Run, notify: Callable[[Event], None]) -> None:
    """Write the report; where there is no room for it, what was found is not lost for that."""
    try:
        _publish(run)
    except (OSError, MergesearchError) as error:
        notify(
            Event("warning", f"no report: {reason(error)}; run the same command again to write it")
        )


def _publish(run: Run) -> None:
    """Write the report, and the note that the dashboard shows."""
    if not run.log.records:
        return
    data = run.report_data()
    write_report(data, run.folder.path)
    winner = None if data.winner is None else data.winner.number
    run.log.publish_note(
        note_markdown(
            data.study,
            data.run,
            data.objectives,
            winner=winner,
            front=[record.number for record in data.front] if len(data.objectives) > 1 else [],
            lines=sentences(data),
        )
    )


def _warn(plan: Plan, log: TrialLog, notify: Callable[[Event], None]) -> None:
    """Say, and record, what a user should know of the models before they are evaluated."""
    for line in plan.warnings:
        notify(Event("warning", line))
    if plan.warnings:
        log.set_attr("warnings", list(plan.warnings))


def _begun(plan: Plan, log: TrialLog) -> Plan:
    """The plan with its place to begin, if another run tells it; recorded, so that a resumed study
    needs no other.
    """
    if plan.spec.start is None:
        return plan
    noted: str | None = log.get_attr("start")
    if noted is None:
        noted = encode_array(warm_start_point(plan, plan.spec.start))
        log.set_attr("start", noted)
    return with_warm_start(plan, decode_array(noted))


def _fingerprints(plan: Plan) -> list[str]:
    """Content hashes of base and experts: reads every weight once."""
    if plan.layout is None:
        return []
    return [source.fingerprint() for source in open_family(plan.template).sources]


def _check_same(plan: Plan, log: TrialLog) -> None:
    """Refuse another study of the same name in the same database, from whatever folder it was
    started.
    """
    if plan.spec.storage is None:
        return  # the run folder, which holds the journal, has been checked
    recorded: dict[str, Any] | None = log.get_attr("study")
    ours = {
        key: value
        for key, value in plan.spec.to_dict().items()
        if key not in (*EXECUTION_KEYS, "storage")
    }
    if recorded is None:
        log.set_attr("study", ours)
        return
    changed = differences(with_new_names(recorded), ours)
    if changed:
        raise RunFolderError(
            f"storage: expected the study that it holds under the name {plan.spec.name!r}, "
            "received one that "
            f"differs in {listed(changed)}; restore these keys or choose another name"
        )


def _check_unchanged(plan: Plan, log: TrialLog) -> None:
    """Refuse to resume on other weights than the recorded trials were measured with."""
    sources = (plan.template.base, *plan.template.experts)
    prints = [source.fingerprint for source in sources]
    recorded: list[str] | None = log.get_attr("fingerprints")
    if plan.layout is None:
        return
    if recorded is None:
        log.set_attr("fingerprints", prints)
        return
    for source, now, then in zip(sources, prints, recorded, strict=True):
        if now != then:
            raise InputError(
                f"{source.path}: expected the weights that the recorded trials used ({then[:12]}), "
                "received others "
                f"({now[:12]}); restore them or choose another --run"
            )
