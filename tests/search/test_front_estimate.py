"""Fronts as estimated from all trials: nearer to the truth than the scores they were chosen for."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from mergesearch.search.cli.main import app
from mergesearch.search.front import choose_leaders, hypervolume, nondominated
from mergesearch.search.front_estimate import MOST, Array, Rows, estimated_around
from mergesearch.search.report.caveats import caveats
from mergesearch.search.report.writing import as_json
from mergesearch.search.runs.opened import Run
from mergesearch.search.study.estimated_front import estimated_trials
from mergesearch.search.study.problem import study_normaliser
from tests.search.studies import analytic, run_in

#: The study of this file is made once, by one worker.
pytestmark = pytest.mark.xdist_group("front_estimate")

ERROR = 0.08
REFERENCE = np.array([1.2, 1.2])


def bowls(points: np.ndarray) -> np.ndarray:
    centres = (0.25, 0.75)
    return np.stack([2 * np.mean((points - centre) ** 2, axis=1) for centre in centres], axis=1)


def noisy(seed: int, dim: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, true losses and observed losses of 150 trials."""
    rng = np.random.default_rng(seed)
    points = rng.random((150, dim))
    true = bowls(points)
    return points, true, true + ERROR * rng.standard_normal(true.shape)


def test_the_estimated_front_is_nearer_to_the_true_one() -> None:
    for seed in range(3):
        points, true, seen = noisy(seed)
        members = np.flatnonzero(nondominated(seen))
        estimated = estimated_losses(points, seen, np.full(seen.shape, ERROR), members)
        assert estimated is not None
        claimed, shrunk, real = (
            hypervolume(losses, REFERENCE) for losses in (seen[members], estimated, true[members])
        )
        assert abs(shrunk - real) < 0.5 * abs(claimed - real)


def test_certain_losses_are_left_alone() -> None:
    points, true, _ = noisy(0)
    members = np.array([3, 1, 77])
    estimated = estimated_losses(points, true, np.zeros(true.shape), members)
    np.testing.assert_allclose(estimated, true[members], atol=1e-4)


def test_without_errors_or_neighbours_there_is_no_estimate() -> None:
    points, _, seen = noisy(0)
    errors = np.full(seen.shape, ERROR)
    members = np.array([0])
    assert estimated_losses(points[:9], seen[:9], errors[:9], members) is None
    assert estimated_losses(points, seen, np.full(seen.shape, np.nan), members) is None
    assert estimated_losses(np.zeros(points.shape), seen, errors, members) is None


def test_members_by_the_estimates_are_worth_more() -> None:
    for seed in range(3):
        points, true, seen = noisy(seed)
        observed = np.flatnonzero(nondominated(seen))
        around = estimated_around(points, seen, np.full(seen.shape, ERROR), observed)
        assert around is not None
        rows, estimates = around
        chosen = rows[nondominated(estimates)]
        assert hypervolume(true[chosen], REFERENCE) > hypervolume(true[observed], REFERENCE)


def test_of_many_trials_the_nearest_to_the_members_are_estimated() -> None:
    points = np.random.default_rng(0).random((2 * MOST, 2))
    members = np.array([7, 1])
    around = estimated_around(points, bowls(points), np.full(points.shape, ERROR), members)
    assert around is not None
    rows, _ = around
    nearest = np.linalg.norm(points[:, None] - points[members], axis=2).min(axis=1)
    assert len(rows) == MOST
    assert nearest[rows].max() <= np.delete(nearest, rows).min()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    evaluator = {
        "kind": "synthetic",
        "problem": "quadratic_tasks",
        "objectives": 2,
        "items": 40,
        "noise": 0.05,
    }
    study = analytic(strategy="nsga2", evaluators=[evaluator], trials=60)
    return run_in(study, tmp_path_factory.mktemp("front") / "run")


def test_a_study_reports_both_fronts(run: Run) -> None:
    data = run.report_data()
    estimate = data.front_estimate
    assert estimate is not None
    assert set(estimate.values) <= {record.number for record in data.front}
    assert estimate.estimated < estimate.observed
    assert as_json(data)["front_estimate"]["estimated"] == estimate.estimated
    assert any("hypervolume" in line and "estimated" in line for line in caveats(data))


def test_a_study_chooses_front_and_leaders_by_the_estimates(run: Run) -> None:
    objectives = run.plan.objectives
    estimates = estimated_trials(run.log.records, objectives)
    verdict = run.verdict
    assert verdict is not None
    numbers = np.array([*estimates])
    assert set(verdict.front_estimated) == {
        *numbers[nondominated(np.array([*estimates.values()]))].tolist()
    }
    assert set(verdict.front_estimated) != set(verdict.front)
    nominees = [n for n in estimates if run.log.records[n].kind != "anchor"]
    normaliser = study_normaliser(run.plan, run.log.records)
    losses = np.array([estimates[number] for number in nominees])
    scalars = normaliser.scalarise(losses, run.plan.weights)
    leaders = choose_leaders(losses, scalars, normaliser, 3)
    assert verdict.leaders == tuple(nominees[row] for row in leaders)


def test_a_preference_picks_a_member_by_its_estimate(run: Run) -> None:
    estimates = estimated_trials(run.log.records, run.plan.objectives)
    for m, name in enumerate(("task 1", "task 2")):
        best = min(estimates, key=lambda number: estimates[number][m])
        assert run.preferred([f"{name}=1"]).number == best


def test_the_command_lists_both_fronts(run: Run) -> None:
    shown = CliRunner().invoke(app, ["show", str(run.folder.path), "--front", "--json"])
    trials = json.loads(shown.output)
    verdict = run.verdict
    assert verdict is not None
    members = set(verdict.front_estimated)
    assert {trial["number"] for trial in trials} == members
    both = members & set(verdict.front)
    assert {trial["number"] for trial in trials if trial["observed_front"]} == both
    report = as_json(run.report_data())
    assert set(report["front"]) == members
    assert set(report["front_observed"]) == set(verdict.front)
    assert trials[0]["estimated"].keys() == trials[0]["values"].keys()
    assert (
        "by their own scores only"
        in CliRunner().invoke(app, ["show", str(run.folder.path), "--front"]).output
    )
    assert "estimated task 1" in (run.folder.path / "report.html").read_text()


def test_runs_of_older_versions_keep_the_observed_front(run: Run) -> None:
    data = run.report_data()
    assert data.verdict is not None
    older = replace(data, verdict=replace(data.verdict, front_estimated=()))
    assert older.recommended == older.front
    estimate = older.front_estimate
    assert estimate is not None
    assert not estimate.recommended


def estimated_losses(points: Array, losses: Array, errors: Array, members: Rows) -> Array | None:
    """Estimated losses of the members alone ``(members, objectives)``."""
    around = estimated_around(points, losses, errors, members)
    return None if around is None else around[1][np.searchsorted(around[0], members)]
