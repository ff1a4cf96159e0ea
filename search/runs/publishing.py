"""What a run shows: the data of its report, the report files, and the dashboard's note."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from mergesearch.merging import MergesearchError
from mergesearch.search.dashboard.note import note_markdown
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.study_attributes import SET_ASIDE
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.headline import sentences
from mergesearch.search.report.writing import write_report
from mergesearch.search.retry import reason
from mergesearch.search.spec.comparison import evaluation_digest
from mergesearch.search.study.budget import busy_seconds
from mergesearch.search.study.events import Event
from mergesearch.search.study.problem import study_normaliser


def report_data(folder: RunFolder, plan: Plan, log: TrialLog) -> ReportData:
    """The plain data that a report is made of."""
    verdict = log.results.verdict()
    test_scores = {} if verdict is None else verdict.scores.get("test", {})
    has_anchors = any(record.kind == "anchor" for record in log.records)
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
        trials_per_worker=dict(Counter(record.worker for record in log.records if record.worker)),
        scale=study_normaliser(plan, log.records) if has_anchors else None,
        items={number: score.items for number, score in test_scores.items()},
        transductive=plan.evaluator.transductive,
        repeats=log.get_attr("repeats") or (),
        search_items=plan.evaluator.size("search"),
        warnings=tuple(log.get_attr("warnings") or ()),
        set_aside=tuple(log.get_attr(SET_ASIDE) or ()),
    )


def publish(folder: RunFolder, plan: Plan, log: TrialLog) -> None:
    """Write the report, and the note that the dashboard shows; nothing before the first trial."""
    if not log.records:
        return
    data = report_data(folder, plan, log)
    write_report(data, folder.path)
    winner = None if data.winner is None else data.winner.number
    log.publish_note(
        note_markdown(
            data.study,
            data.run,
            data.objectives,
            winner=winner,
            front=[record.number for record in data.recommended]
            if len(data.objectives) > 1
            else [],
            lines=sentences(data),
        )
    )


def publish_if_possible(
    folder: RunFolder, plan: Plan, log: TrialLog, notify: Callable[[Event], None]
) -> None:
    """:func:`publish`; a failure is only a warning, since the record itself is complete."""
    try:
        publish(folder, plan, log)
    except (OSError, MergesearchError) as error:
        notify(
            Event("warning", f"no report: {reason(error)}; run the same command again to write it")
        )
