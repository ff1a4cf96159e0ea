"""Studies that choose their operators: where they begin, what a kill does, what an export gives."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergesearch.merging.export.folder import export_model
from mergesearch.search.record.study_attributes import OPERATORS_CHOSEN
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exported import rescore
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.study.problem import study_normaliser, study_problem
from tests.commands import run_command
from tests.search.conftest import model_study
from tests.search.studies import fingerprint, spec_of, write_study
from tests.search.study.test_kill import lines, start_and_signal
from tests.waiting import PATIENT

TRIALS = 18


@pytest.fixture(scope="module")
def study(pico_models: Path, pico_items: Path) -> dict[str, Any]:
    """Two operators, of which one runs the experts."""
    calibration = {
        "data": str(pico_items),
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
        "split": "search",
        "samples": 8,
    }
    operator = {"name": "auto", "among": ["regmean", "tsv"], "calibration": calibration}
    budget = {"trials": TRIALS}
    return model_study(pico_models, pico_items, operator=operator, strategy="cma_es", budget=budget)


@pytest.fixture(scope="module")
def whole(study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    return run_study(spec_of(study, folder), folder / "run")


def test_search_begins_at_the_leader_bit_for_bit(whole: Run, tmp_path: Path) -> None:
    survey = whole.plan.survey
    assert survey is not None
    assert survey.decided
    leader = f"{survey.choice.members[0]} {survey.choice.coefficients[0]:.3g}"
    normaliser = study_normaliser(whole.plan, whole.log.records)
    problem = study_problem(whole.plan, whole.log.records, normaliser, 5)
    assert np.array_equal(problem.start, whole.plan.space.start)
    assert len(problem.anchors) >= 2  # the leader, and the other member at its best coefficient
    anchor = next(record for record in whole.log.records if record.name == leader)
    folders = [
        export_model(recipe, tmp_path / name).folder
        for name, recipe in (
            ("anchor", anchor.recipe),
            ("start", whole.plan.space.decode(problem.start)),
        )
    ]
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_export_of_a_search_trial_scores_what_was_recorded(whole: Run, tmp_path: Path) -> None:
    record = next(record for record in whole.log.records if record.kind == "search")
    assert np.any(record.recipe.field.values[-1])  # another operator has a part in it
    exported = export_model(record.recipe, tmp_path / "model").folder
    assert rescore(whole, record, exported).agreement.identical


def cut(folder: Path, at_line: int, into: Path) -> Path:
    """The run as a kill would have left it when its journal had so many lines."""
    shutil.copytree(folder, into)
    journal = (into / "journal.log").read_bytes().splitlines(keepends=True)
    (into / "journal.log").write_bytes(b"".join(journal[:at_line]))
    return into


def decision_line(folder: Path) -> int:
    """Line of the journal, from 1, that records the operators."""
    text = (folder / "journal.log").read_text().splitlines()
    key = f"mergesearch:{OPERATORS_CHOSEN}"
    return 1 + next(index for index, line in enumerate(text) if key in line)


@pytest.mark.parametrize(
    "moment",
    [
        "measuring",
        "searching",
        pytest.param("measured", marks=pytest.mark.slow),
        pytest.param("decided", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_exactly_in_either_phase(
    whole: Run, study: dict[str, Any], tmp_path: Path, moment: str
) -> None:
    decided = decision_line(whole.folder.path)
    at = {
        "measuring": decided // 2,
        "measured": decided - 1,
        "decided": decided,
        "searching": decided + 12,
    }[moment]
    folder = cut(whole.folder.path, at, tmp_path / "run")
    opened = open_run(folder)
    assert opened.plan.undecided == (moment in ("measuring", "measured"))
    again = run_study(spec_of(study, tmp_path), folder)
    assert fingerprint(again) == fingerprint(whole)
    assert again.verdict == whole.verdict
    assert fingerprint(open_run(folder)) == fingerprint(whole)


@pytest.mark.slow
def test_a_killed_driver_resumes_exactly_in_either_phase(
    whole: Run, study: dict[str, Any], tmp_path: Path
) -> None:
    decided = decision_line(whole.folder.path)
    file = write_study(study, tmp_path)
    folder = tmp_path / "run"
    hits = 0
    for moment in (decided // 2, decided + 12):
        code, _ = start_and_signal(file, folder, moment, 0.0, signal.SIGKILL)
        hits += code == -signal.SIGKILL
    assert hits, "no kill hit a live driver"
    assert lines(folder) < lines(whole.folder.path)
    subprocess.run(run_command(file, folder), check=True, capture_output=True, timeout=PATIENT)
    assert fingerprint(open_run(folder)) == fingerprint(whole)


@pytest.mark.slow
def test_a_larger_budget_leaves_the_choice_as_it_was(study: dict[str, Any], tmp_path: Path) -> None:
    """With so many trials from the beginning, a third operator would have been measured."""
    among = {**study["operator"], "among": ["regmean", "tsv", "iso_c"]}
    data = study | {"operator": among}
    first = run_study(spec_of(data, tmp_path), tmp_path / "run")
    more = data | {"budget": {"trials": 30}}
    grown = run_study(spec_of(more, tmp_path), tmp_path / "run")
    assert fingerprint(grown)[: len(first.log.records)] == fingerprint(first)
    assert len(grown.log.records) == 30
    assert grown.plan.survey == first.plan.survey
    again = open_run(tmp_path / "run")
    assert [anchor.name for anchor in again.plan.anchors] == [a.name for a in first.plan.anchors]
    assert again.plan.spec.budget.trials == 30
