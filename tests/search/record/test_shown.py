"""What the dashboard shows of a study: the same attributes as by its own functions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import optuna_dashboard
from optuna_dashboard.artifact import get_artifact_path

from mergesearch.search.record.shown import PART, Shown
from mergesearch.search.record.storage import StorageAccess
from mergesearch.search.retry import RetryPolicy

#: Notes one after the other: several parts, a part that is just full, fewer parts, none.
NOTES = ("a" * (2 * PART + 1), "b" * PART, "**c**", "", "é" * (PART + 1))
FIGURES: tuple[dict[str, Any], ...] = ({"data": list(range(2000))}, {"data": [], "layout": {}})


def study_and_trial() -> tuple[optuna.Study, int]:
    """A study in memory, and the id of its trial."""
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage(), study_name="digits")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    return study, study.get_trials()[0]._trial_id


def shown(study: optuna.Study, trial_id: int) -> Shown:
    """What our writer writes to."""
    access = StorageAccess(RetryPolicy(), lambda: None)
    return Shown(study._storage, study._study_id, access, {0: trial_id})


def attributes(study: optuna.Study) -> dict[str, Any]:
    """All that the study's storage has of it beside trials."""
    return dict(study._storage.get_study_system_attrs(study._study_id))


def test_notes_and_figures_are_those_of_the_dashboards_own_functions() -> None:
    ours, our_trial = study_and_trial()
    theirs, their_trial = study_and_trial()
    writer = shown(ours, our_trial)
    # One of Optuna's own trials would be asked for parameters.
    trial = SimpleNamespace(
        storage=theirs._storage,
        study=SimpleNamespace(_study_id=theirs._study_id),
        _trial_id=their_trial,
    )
    for note in NOTES:
        writer.set_note(note)
        writer.set_note(note.upper(), 0)
        optuna_dashboard.save_note(theirs, note)
        optuna_dashboard.save_note(trial, note.upper())
        assert attributes(ours) == attributes(theirs)
        assert optuna_dashboard.get_note(ours) == note
    for figure in FIGURES:
        writer.set_figure("front", figure)
        text = json.dumps(figure, separators=(",", ":"))
        drawn: Any = SimpleNamespace(to_json=lambda text=text: text)
        optuna_dashboard.save_plotly_graph_object(theirs, drawn, graph_object_id="front")
        assert attributes(ours) == attributes(theirs)


def test_files_have_the_addresses_of_the_dashboard(tmp_path: Path) -> None:
    study, trial_id = study_and_trial()
    addresses = shown(study, trial_id).attach({"recipe.yaml": "base: b\n"}, tmp_path)
    [meta] = optuna.artifacts.get_all_artifact_meta(study)
    assert addresses == {"recipe.yaml": get_artifact_path(study, meta.artifact_id)}
