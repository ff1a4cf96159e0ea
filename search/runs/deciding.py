"""The decision of a study with ``operator: auto``: made once, recorded, and read ever after."""

from __future__ import annotations

from pathlib import Path

from mergesearch.merging import RunFolderError
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.plan.survey import Choice
from mergesearch.search.record.storage import Storage
from mergesearch.search.record.study_attributes import OPERATORS_CHOSEN, study_attr
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.study.choosing import choose_operators


def with_recorded_choice(plan: Plan, storage: Storage, arenas: Path) -> Plan:
    """The plan with the operators that its study has chosen, if it has."""
    if not plan.undecided:
        return plan
    try:
        recorded = study_attr(storage, plan.spec.name, OPERATORS_CHOSEN)
    except RunFolderError:  # a new study
        return plan
    return plan if recorded is None else _with_choice(plan, Choice.from_dict(recorded), arenas)


def decide(plan: Plan, log: TrialLog, arenas: Path) -> Plan:
    """Choose the operators by the anchors, record them, and plan the search."""
    choice = choose_operators(plan, log.records)
    log.set_attr(OPERATORS_CHOSEN, choice.to_dict())
    return _with_choice(plan, choice, arenas)


def _with_choice(plan: Plan, choice: Choice, arenas: Path) -> Plan:
    template = plan.recorded_template
    fingerprints = [source.fingerprint for source in (template.base, *template.experts)]
    known = fingerprints if all(fingerprints) else []
    return plan_study(plan.spec, known, arenas, choice)
