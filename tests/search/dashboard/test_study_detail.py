"""Answers about a study that are not the dashboard's own say what its own say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import optuna_dashboard
import pytest

from mergesearch.evaluators import Measurement
from mergesearch.search.dashboard import study_detail, trial_json
from mergesearch.search.dashboard.access import Access
from mergesearch.search.dashboard.answers import Answer, finite_json
from mergesearch.search.dashboard.best_trials import best_trials
from mergesearch.search.dashboard.serving import build_application
from mergesearch.search.dashboard.shared_answers import NOBODY
from mergesearch.search.dashboard.shown_storage import shown_storage
from mergesearch.search.dashboard.study_detail import StudyDetails
from mergesearch.search.record.storage import Storage, open_storage
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.workers.messages import Failure, Outcome
from tests.search.dashboard.test_dashboard import OBJECTIVES, TEMPLATE


def environ(study: int) -> dict[str, Any]:
    return {"PATH_INFO": f"/api/studies/{study}", **NOBODY}


def by_dashboard(storage: Storage, study: int) -> dict[str, Any]:
    """The dashboard's own answer, but for the best trials, of which it does not know the bounds."""
    detail = finite_json(Answer.of(optuna_dashboard.wsgi(storage), environ(study)).body)
    return in_order(detail | {"best_trials": best_trials(detail)})


def in_order(detail: dict[str, Any]) -> dict[str, Any]:
    """A detail whose parameters of one name stand in one order; the dashboard has them in a set."""
    detail["union_search_space"].sort(key=json.dumps)
    return detail


def by_us(details: StudyDetails, study: int) -> dict[str, Any]:
    made = details.of(study, environ(study))
    assert made is not None
    trials = [json.loads(each) for each in made.trials]
    return in_order(json.loads(made.answer.body) | {"trials": trials})


def record(location: str | Path, objectives: int = 2, trials: int = 12) -> TrialLog:
    """A record with trials of all kinds, of which the last one runs."""
    used = OBJECTIVES[:objectives]
    log = TrialLog(open_storage(location), "ours", used, lambda point: TEMPLATE, TEMPLATE)
    rng = np.random.default_rng(0)
    for number in range(trials):
        kind = "anchor" if number < 2 else "search"
        log.ask(
            kind,
            TEMPLATE,
            name="base" if number < 2 else "",
            suggestion=number,
            # One beyond the bounds makes them wider, for itself alone.
            summary={"x": 3.0 if number == 5 else float(rng.random()), "y": 0.25},
            notes={"tau": 0.5} if number % 3 else {},
            bounds=(0, 1),
        )
        values = {each.name: float(rng.integers(4)) for each in used}
        missed = {2: 0.5, 3: -0.5, 4: float("inf")}.get(number, 0.0)
        measured = Measurement(values, violations={"bound": missed} if number > 1 else {})
        failed = Outcome("", None, Failure("error", "out of memory", ""), {})
        if number < trials - 1:
            log.tell(number, failed if number == 6 else Outcome("", measured, None, {}), number)
    return log


def test_all_kinds_of_our_trials_are_described_as_the_dashboard_does(tmp_path: Path) -> None:
    for objectives, location in ((1, f"sqlite:///{tmp_path}/study.db"), (2, tmp_path / "a.log")):
        record(location, objectives)
        storage = shown_storage(location)
        study = storage.get_all_studies()[0]._study_id
        described = by_us(StudyDetails(storage), study)
        assert described == by_dashboard(storage, study)
        assert len(described["trials"]) == 12
        assert described["best_trials"]


def others(storage: Storage) -> optuna.Study:
    """A study of somebody else, with all that the dashboard shows of trials."""
    study = optuna.create_study(storage=storage, study_name="theirs", sampler=sampler())
    study.enqueue_trial({"x": 0.5})
    for number in range(12):
        trial = study.ask()
        trial.suggest_float("x", 0, 1, step=0.25 if number == 3 else None)
        if number == 4:
            trial.suggest_categorical("kind", ["a", None])
            trial.suggest_int("count", 1, 9)
        if number == 5:
            trial.report(1.0, 0)
            trial.report(float("nan"), 1)
        if number == 2:
            optuna_dashboard.save_note(trial, "noted")
        trial.set_user_attr("about", {"nested": [number]} if number == 6 else number / 2)
        study.tell(trial, {7: float("inf"), 8: -float("inf")}.get(number, number / 3))
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING))
    return study


def sampler() -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=0)


def test_studies_of_others_are_described_as_the_dashboard_does() -> None:
    storage = optuna.storages.InMemoryStorage()
    study = others(storage)
    optuna_dashboard.save_note(study, "of the study")
    described = by_us(StudyDetails(storage), study._study_id)
    assert described == by_dashboard(storage, study._study_id)
    assert described["trials"][2]["note"]["body"] == "noted"
    assert described["best_trials"][0]["number"] == 8
    assert [each["name"] for each in described["union_search_space"]].count("x") == 2


def test_an_ended_trial_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    log = record(url)
    storage = shown_storage(url)
    details = StudyDetails(storage)
    written: list[int] = []

    def counted(study_id: int, trial: optuna.trial.FrozenTrial) -> bytes | None:
        written.append(trial.number)
        return trial_json.plain_json(study_id, trial)

    monkeypatch.setattr(study_detail, "plain_json", counted)
    by_us(details, 1)
    assert written == list(range(12))
    written.clear()
    measured = Measurement({each.name: 3.0 for each in OBJECTIVES})
    log.tell(11, Outcome("", measured, None, {}), 11)
    assert by_us(details, 1) == by_dashboard(storage, 1)
    assert set(written) == {4, 11}  # an infinite violation is no plain number
    note = optuna.load_study(study_name="ours", storage=open_storage(url)).trials[7]
    storage.set_study_system_attr(1, f"dashboard:{note._trial_id}:note_ver", 1)
    storage.set_study_system_attr(1, f"dashboard:{note._trial_id}:note_str:0", "later")
    assert by_us(details, 1)["trials"][7]["note"]["body"] == "later"


def test_a_dashboard_that_writes_trials_in_another_way_writes_them_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    record(url)
    storage = shown_storage(url)
    described = trial_json._described
    monkeypatch.setattr(
        trial_json, "_described", lambda *about: described(*about) | {"artifacts": None}
    )
    assert StudyDetails(storage).of(1, environ(1)) is None
    body = Answer.of(build_application(storage, Access(), None, {}), environ(1)).body
    assert in_order(json.loads(body)) == by_dashboard(storage, 1)


def test_a_study_without_plain_trials_is_left_to_the_dashboard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = optuna.storages.InMemoryStorage()
    details = StudyDetails(storage)
    study = others(storage)._study_id
    assert details.of(study, environ(study)) is not None
    monkeypatch.setattr(study_detail, "FEW", 3)
    assert details.of(study, environ(study)) is None
    assert details.of(99, environ(99)) is None
