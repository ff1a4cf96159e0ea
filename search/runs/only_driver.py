"""The trial log of the one process that drives a study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.lease import Lease
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.storage import open_engine, open_storage
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.retry import RetryPolicy
from mergesearch.search.runs.beginning import spec_of_beginning
from mergesearch.search.runs.corrections import discard_corrected
from mergesearch.search.runs.deciding import with_recorded_choice
from mergesearch.search.runs.wiring import open_log, storage_location
from mergesearch.search.spec.sections import StudySpec


@contextmanager
def log_of_only_driver(
    spec: StudySpec,
    recorded: StudySpec,
    fingerprints: Sequence[str],
    folder: RunFolder,
    retry: RetryPolicy,
) -> Iterator[tuple[Plan, TrialLog]]:
    """The study's trial log, open for writing, and its plan with the operators that it has chosen.

    No other driver writes the log meanwhile. The plan is that of the study as it began: operators
    that are measured, and with them the anchors, may follow from the budget.

    Args:
        spec: The study as it is given now.
        recorded: The study of the run folder.
        fingerprints: Content hashes of base and experts.
        folder: The run folder, held by this process.
        retry: How long to wait for a storage that is away.
    """
    location = storage_location(spec, folder)
    storage = open_storage(location, retry)
    with lease(spec, location, retry) as guard:
        if spec.storage is not None:
            discard_corrected(spec, storage)
        beginning = spec_of_beginning(spec, recorded, storage)
        plan = plan_study(beginning, fingerprints, folder.arenas)
        plan = with_recorded_choice(plan, storage, folder.arenas)
        log = open_log(storage, plan, retry=retry, guard=guard)
        try:
            yield plan, log
        finally:
            log.close()


@contextmanager
def lease(
    spec: StudySpec, location: str | Path, retry: RetryPolicy
) -> Iterator[Callable[[], None]]:
    """The study's lease, where it is in a database that other drivers reach.

    Yields:
        A check to be made before every write.
    """
    if isinstance(location, Path):
        yield lambda: None  # the run folder's lock is enough
        return
    from sqlalchemy.exc import SQLAlchemyError

    held = Lease(open_engine(location), spec.name, spec.driver.lease_seconds, retry.warn)
    retry(held.take, (SQLAlchemyError,), "storage")
    try:
        yield held.check
    finally:
        held.release()
