"""A run: one study in one folder. Starts, resumes, reads, reports and exports it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators import Candidate, Measurement, Split
from evaluators.spec import build_evaluator
from merging import InputError, MergesearchError, RunFolderError
from merging.family import open_family
from search.backends import open_backend
from search.budget import busy_seconds
from search.dashboard import note_markdown
from search.drain import Drain
from search.fidelity import NeverStop, measure_in_stages
from search.lease import Lease
from search.observing import observing
from search.packing import decode_array, encode_array
from search.patience import Patience, reason
from search.plan import Plan, plan_study
from search.record import TrialRecord, Verdict
from search.report import ReportData, trial_dict, write_report
from search.run_folder import RunFolder
from search.selection import parse_preference, preferred
from search.start import begin_at, find_start
from search.storage import open_engine, open_storage, read_storage
from search.study import Event, Study, study_normaliser
from search.study_file import EXECUTION_KEYS, StudySpec, differences, evaluation_digest, listed
from search.tables import sentences
from search.trackers import check_installed
from search.trial_log import TrialLog, study_note
from search.worker import NODE_CACHE, Worker, WorkerSpec

if TYPE_CHECKING:
    from search.storage import Storage


@dataclass(frozen=True)
class Run:
    """A run opened for reading."""

    folder: RunFolder
    plan: Plan
    log: TrialLog

    @property
    def verdict(self) -> Verdict | None:
        """The final choice, or None while the study is unfinished."""
        return self.log.verdict()

    def trial(self, number: int | None) -> TrialRecord:
        """A trial by number; None means the winner.

        Raises:
            RunFolderError: If there is no such trial, or no winner yet.
        """
        if number is None:
            verdict = self.verdict
            if verdict is None:
                raise RunFolderError(
                    f"{self.folder.path}: expected a finished study, found {len(self.log.records)} trials and no "
                    "winner yet; finish it with `mergesearch run`, or choose one with --trial"
                )
            return self.log.records[verdict.winner]
        if not 0 <= number < len(self.log.records):
            raise RunFolderError(
                f"{self.folder.path}: expected a trial from 0 to {len(self.log.records) - 1}, received {number}"
            )
        return self.log.records[number]

    def preferred(self, pairs: Sequence[str]) -> TrialRecord:
        """The member of the front that suits ``NAME=WEIGHT`` pairs best, by its values on the search items.

        Raises:
            InputError: If the pairs do not fit the objectives.
            RunFolderError: If no trial is complete.
        """
        preference = parse_preference(pairs, self.plan.objectives)
        normaliser = study_normaliser(self.plan, self.log.records)
        found = preferred(self.log.records, self.plan.objectives, preference, normaliser)
        if found is None:
            raise RunFolderError(f"{self.folder.path}: expected a complete trial, found none")
        return found

    def report_data(self) -> ReportData:
        """What the report and the result table are made of."""
        return report_data(self.folder, self.plan, self.log)


def storage_location(spec: StudySpec, folder: RunFolder) -> str | Path:
    """Where the trial log is: the study's storage URL, or the journal in the run folder.

    ``${NAME}`` in the URL is filled in from the environment here, and only here, so that a password never reaches the
    run folder.
    """
    return os.path.expandvars(spec.storage) if spec.storage else folder.journal


def run_study(
    spec: StudySpec,
    path: Path,
    notify: Callable[[Event], None] = lambda event: None,
    *,
    trust_log: bool = False,
    drain: Drain | None = None,
    metrics: str | None = None,
) -> Run:
    """Run a study in a folder, or resume it where it stands; writes the report whatever happens after the start.

    Args:
        spec: The resolved study.
        path: The run folder.
        notify: Called with each event.
        trust_log: Go on from the recorded points even where replay does not reproduce them.
        drain: Asks the study to stop; it then ends with KeyboardInterrupt once the trials that run have finished.
        metrics: ``HOST:PORT`` or ``PORT`` to serve Prometheus metrics at.

    Raises:
        InputError: If anything the user gave is wrong.
        StudyFailedError: If the study cannot go on; what was told is kept and the same call resumes.
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
        patience = Patience(spec.driver.patience_seconds, lambda text: notify(Event("warning", text)))
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
def _only_driver(spec: StudySpec, location: str | Path, patience: Patience) -> Iterator[Callable[[], None]]:
    """The study's lease, where it is in a database that other drivers reach; what to call before a write."""
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
        notify(Event("warning", f"no report: {reason(error)}; run the same command again to write it"))


def open_run(path: Path) -> Run:
    """Open a run for reading, beside a live driver or after it.

    Raises:
        RunFolderError: If there is no run in the folder.
    """
    folder = RunFolder(path)
    spec = folder.load()
    storage = read_storage(storage_location(spec, folder))

    # Recipes are identified by the content that was measured, which the log knows.
    plan = plan_study(spec, study_note(storage, spec.name, "fingerprints") or (), folder.arenas)
    return Run(folder, plan, _open_log(storage, plan, create=False))


def worker_spec(plan: Plan, folder: RunFolder) -> WorkerSpec:
    """What workers of this study are built from."""
    section = plan.spec.workers
    return WorkerSpec(
        template=plan.template,
        evaluators=tuple(evaluator.model_dump(mode="json") for evaluator in plan.spec.evaluators),
        arenas=section.cache or str(folder.arenas if section.address is None else NODE_CACHE),
        threads=section.threads,
        device="cuda" if section.gpus else "cpu",
        shards=max(int(section.gpus), 1),
        space=plan.differentiable_space,
    )


def rescore(run: Run, record: TrialRecord, exported: Path) -> tuple[Split, Measurement, bool]:
    """Load an exported model with transformers and score it on the items that the record has scores for.

    Returns:
        The split, the new measurement, and whether its values equal the recorded ones exactly.
    """
    import torch

    from merging.binding import load_model
    from merging.routed_bundle import load

    # As in the worker: other threads or another device may round differently.
    spec = worker_spec(run.plan, run.folder)
    torch.set_num_threads(spec.threads)
    evaluator = build_evaluator(run.plan.spec.evaluators, Path())
    evaluator.open()
    model: Any = None
    if record.recipe.routing:
        model = load(exported)
    elif evaluator.model_class is not None:
        model = load_model(str(exported), evaluator.model_class)
    if model is not None and torch.cuda.is_available():
        model = model.to(spec.device)
    verdict = run.verdict
    tested = {} if verdict is None else verdict.scores.get("test", {})
    split: Split = "test" if record.number in tested else "search"
    recorded: Mapping[str, float] = tested[record.number].values if split == "test" else record.values
    candidate = Candidate(record.recipe, model, references=run.log.references(split))
    # As it was evaluated, in the same stages: batches of another size may round differently.
    stages = sorted(record.rungs) if split == "search" else ()
    watched = measure_in_stages(lambda items: evaluator.evaluate(candidate, split, items), NeverStop(tuple(stages)))
    measurement = watched.measurement
    return split, measurement, dict(measurement.values) == dict(recorded)


def export_bundle(
    run: Run, record: TrialRecord, out: Path, *, facts: Mapping[str, str], overwrite: bool, threads: int
) -> None:
    """Write a trial whose merge depends on its input, as :func:`merging.routed_bundle.load` reads it."""
    from merging.routed_bundle import write_bundle

    assert run.plan.evaluator.model_class is not None
    routed = Worker(worker_spec(run.plan, run.folder)).routed(record.recipe)
    write_bundle(
        record.recipe,
        routed,
        out,
        model_class=run.plan.evaluator.model_class,
        facts=facts,
        overwrite=overwrite,
        threads=threads,
    )


def report_data(folder: RunFolder, plan: Plan, log: TrialLog) -> ReportData:
    """The plain things that a report is made of."""
    verdict = log.verdict()
    workers: dict[str, int] = {}
    for record in log.records:
        if record.worker:
            workers[record.worker] = workers.get(record.worker, 0) + 1
    tested = {} if verdict is None else verdict.scores.get("test", {})
    return ReportData(
        study=plan.spec.name,
        run=str(folder.path),
        objectives=plan.objectives,
        weights=plan.weights.tolist(),
        records=log.records,
        verdict=verdict,
        layout=plan.layout,
        experts=tuple(expert.name for expert in plan.template.experts),
        names=plan.space.names,
        lower=plan.space.lower,
        upper=plan.space.upper,
        resolved=plan.spec.to_dict(),
        fingerprint=folder.environment() | {"evaluation settings": evaluation_digest(plan.spec)},
        wall_seconds=busy_seconds(log.records),
        trials_per_worker=workers,
        scale=study_normaliser(plan, log.records) if any(r.kind == "anchor" for r in log.records) else None,
        items={number: score.items for number, score in tested.items()},
        transductive=plan.evaluator.transductive,
        repeats=log.noted("repeats") or (),
        search_items=plan.evaluator.size("search"),
        warnings=tuple(log.noted("warnings") or ()),
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


def _open_log(
    storage: Storage,
    plan: Plan,
    *,
    create: bool = True,
    patience: Patience | None = None,
    guard: Callable[[], None] = lambda: None,
) -> TrialLog:
    space = plan.space
    return TrialLog(
        storage,
        plan.spec.name,
        plan.objectives,
        space.decode,
        plan.template,
        keep_fields=plan.entry.space == "mixed",
        create=create,
        patience=patience,
        guard=guard,
    )


def _warn(plan: Plan, log: TrialLog, notify: Callable[[Event], None]) -> None:
    """Say, and record, what a user should know of the models before they are evaluated."""
    for line in plan.warnings:
        notify(Event("warning", line))
    if plan.warnings:
        log.note("warnings", list(plan.warnings))


def _begun(plan: Plan, log: TrialLog) -> Plan:
    """The plan with its place to begin, if another run tells it; recorded, so that a resumed study needs no other."""
    if plan.spec.start is None:
        return plan
    noted: str | None = log.noted("start")
    if noted is None:
        noted = encode_array(find_start(plan, plan.spec.start))
        log.note("start", noted)
    return begin_at(plan, decode_array(noted))


def _fingerprints(plan: Plan) -> list[str]:
    """Content hashes of base and experts: reads every weight once."""
    if plan.layout is None:
        return []
    return [source.fingerprint() for source in open_family(plan.template).sources]


def _check_same(plan: Plan, log: TrialLog) -> None:
    """Refuse another study of the same name in the same database, from whatever folder it was started."""
    if plan.spec.storage is None:
        return  # the run folder, which holds the journal, has been checked
    recorded: dict[str, Any] | None = log.noted("study")
    ours = {key: value for key, value in plan.spec.to_dict().items() if key not in (*EXECUTION_KEYS, "storage")}
    if recorded is None:
        log.note("study", ours)
        return
    changed = differences(recorded, ours)
    if changed:
        raise RunFolderError(
            f"storage: expected the study that it holds under the name {plan.spec.name!r}, received one that "
            f"differs in {listed(changed)}; restore these keys or choose another name"
        )


def _check_unchanged(plan: Plan, log: TrialLog) -> None:
    """Refuse to resume on other weights than the recorded trials were measured with."""
    sources = (plan.template.base, *plan.template.experts)
    prints = [source.fingerprint for source in sources]
    recorded: list[str] | None = log.noted("fingerprints")
    if plan.layout is None:
        return
    if recorded is None:
        log.note("fingerprints", prints)
        return
    for source, now, then in zip(sources, prints, recorded, strict=True):
        if now != then:
            raise InputError(
                f"{source.path}: expected the weights that the recorded trials used ({then[:12]}), received others "
                f"({now[:12]}); restore them or choose another --run"
            )


def as_dict(record: TrialRecord) -> dict[str, Any]:
    """A trial with the reason of its failure, for ``--json``."""
    return trial_dict(record) | {"failure": None if record.failure is None else vars(record.failure)}
