"""``start: {scores: [...]}``: trials of another run are results that a study need not ask for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.merging import InputError, RunFolderError
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.report.caveats import caveats
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.runs.start.scores import find_scores
from mergesearch.search.runs.start.warm_start import started
from mergesearch.search.strategies.base import Problem
from mergesearch.search.study.attempts import known_before_search
from mergesearch.search.study.problem import study_normaliser, study_problem
from tests.search.conftest import model_study
from tests.search.studies import analytic, fingerprint, run_in, spec_of

TRIALS = 16
#: The start is an anchor of both runs.
TAKEN = 29


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run called ``a``, of Sobol points."""
    folder = tmp_path_factory.mktemp("measured") / "a"
    run_in(analytic("a", trials=TAKEN + 1, strategy="sobol"), folder)
    return folder


def _study(run: Path, **sections: Any) -> dict[str, Any]:
    data = analytic("b", trials=TRIALS, strategy="quadratic", start={"scores": [str(run)]})
    return data | sections


def _told(run: Run) -> Problem:
    """The problem that the strategy of a run was told."""
    known = known_before_search(run.log.records)
    return study_problem(run.plan, known, study_normaliser(run.plan, known), TRIALS)


def test_another_strategy_knows_all_trials_and_spends_nothing_on_them(
    measured: Path, tmp_path: Path
) -> None:
    run = run_in(_study(measured), tmp_path / "b")
    taken = [record for record in run.log.records if record.kind == "taken"]
    assert len(taken) == TAKEN
    assert len(run.log.records) == TAKEN + TRIALS
    theirs = {record.recipe.digest: record for record in open_run(measured).log.records}
    for record in taken:
        other = theirs[record.recipe.digest]
        assert record.values == other.values
        assert record.name == f"trial {other.number} of a"
        np.testing.assert_array_equal(record.items["sphere"], other.items["sphere"])
    problem = _told(run)
    assert len(problem.anchors) == TAKEN + 1
    best = min(taken, key=lambda record: record.values["sphere"])
    np.testing.assert_array_equal(problem.start, best.point)
    assert [line for line in caveats(run.report_data()) if "29 trials taken over from a" in line]


@pytest.mark.parametrize("share", [0.3, pytest.param(0.8, marks=pytest.mark.slow)])
def test_an_interrupted_study_goes_on_as_if_nothing_had_happened(
    measured: Path, tmp_path: Path, share: float
) -> None:
    source = tmp_path / "a"
    shutil.copytree(measured, source)
    data = _study(source)
    whole = run_in(data, tmp_path / "b")
    journal = tmp_path / "b" / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    recorded = next(n for n, line in enumerate(lines) if b"taken scores" in line)
    kept = int(share * len(lines))
    journal.write_bytes(b"".join(lines[:kept]))
    if kept > recorded:
        shutil.rmtree(source)
    assert fingerprint(run_in(data, tmp_path / "b")) == fingerprint(whole)


def test_runs_that_changed_meanwhile_are_refused(measured: Path, tmp_path: Path) -> None:
    source = tmp_path / "a"
    shutil.copytree(measured, source)
    data = _study(source)
    run_in(data, tmp_path / "b")
    journal = tmp_path / "b" / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    recorded = next(n for n, line in enumerate(lines) if b"taken scores" in line)
    journal.write_bytes(b"".join(lines[: recorded // 2]))
    shutil.rmtree(source)
    run_in(analytic("a", trials=16, strategy="sobol", seed=8), source)
    with pytest.raises(RunFolderError, match="expected the trials that this run began to take"):
        run_in(data, tmp_path / "b")


def test_what_the_space_does_not_hold_is_left_out_and_counted(measured: Path) -> None:
    narrow = {"dim": 5, "bounds": [0.2, 0.4], "start": 0.3}
    spec = spec_of(_study(measured, space=narrow), measured.parent)
    found = find_scores(plan_study(spec), spec.start.scores)
    assert 0 < len(found.trials) < TAKEN
    assert all((one.point >= 0.2).all() and (one.point <= 0.4).all() for one in found.trials)
    assert f"{TAKEN + 1 - len(found.trials)} left out" in found.notes[0]


def test_scores_and_a_place_to_begin_go_together(measured: Path) -> None:
    start = {"scores": [str(measured)], "run": str(measured), "trial": 4}
    plan = started(plan_study(spec_of(_study(measured, start=start), measured.parent)))
    assert plan.anchors[-1].name == "trial 4 of a"
    np.testing.assert_array_equal(plan.begin, open_run(measured).log.records[4].point)
    assert "28 trials taken over from a" in plan.notes[-1]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"evaluators": [{"kind": "synthetic", "problem": "sphere", "items": 50}]},
            r"a: expected a run that is scored as this study, .* evaluators.0.noise: 0.05 -> 0.0;",
        ),
        ({"start": {"scores": ["nowhere"]}}, "start.scores: .*expected the folder of a run"),
        ({"start": {"trial": 3}}, "start: .*expected one of run, priors, scores"),
        ({"start": {"scores": ["a"], "trial": 3}}, "start: .*expected trial with run only"),
    ],
)
def test_what_cannot_be_taken_is_refused(
    measured: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        started(plan_study(spec_of(_study(measured, **sections), measured.parent)))


def test_a_finer_space_takes_the_trials_of_a_coarse_one_and_other_experts_are_refused(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    def study(**sections: Any) -> dict[str, Any]:
        return model_study(pico_models, pico_items, strategy="sobol") | sections

    coarse = study(name="coarse", space={"granularity": "task"}, budget={"trials": 10})
    first = run_in(coarse, tmp_path / "coarse")
    start = {"scores": [str(tmp_path / "coarse")]}
    second = run_in(study(name="fine", budget={"trials": 8}, start=start), tmp_path / "fine")
    taken = [record for record in second.log.records if record.kind == "taken"]
    searched = {r.recipe.digest: r for r in first.log.records if r.kind != "anchor"}
    assert {record.recipe.digest for record in taken} == set(searched)
    for record in taken:
        assert record.values == searched[record.recipe.digest].values

    models = {"right": str(pico_models / "right"), "left": str(pico_models / "left")}
    with pytest.raises(InputError, match=r"expected a run on the same base and experts.*in right"):
        run_in(study(name="swapped", experts=models, start=start), tmp_path / "swapped")
