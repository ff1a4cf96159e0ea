"""The course of a study: budget, anchors, failures, fronts, winner, and exact resume."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mergesearch.merging import InputError, ReplayError, RunFolderError, StudyFailedError
from mergesearch.search.record.storage import read_storage
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import open_run
from mergesearch.search.study.budget import busy_seconds
from mergesearch.search.study.events import Event
from mergesearch.search.study.posterior import posterior_losses
from mergesearch.search.study.problem import study_normaliser
from tests.search.studies import analytic, fingerprint, run_in, spec_of

FAULTY = {"kind": "synthetic", "problem": "sphere"}


def test_the_budget_is_spent_exactly(tmp_path: Path) -> None:
    run = run_in(analytic(trials=30), tmp_path / "run")
    assert Counter(record.kind for record in run.log.records) == {
        "anchor": 1,
        "search": 28,
        "recommended": 1,
    }
    assert all(record.state == "complete" for record in run.log.records)


def test_the_winner_is_the_expected_best_of_leaders_that_beat_every_anchor(tmp_path: Path) -> None:
    run = run_in(analytic(trials=200), tmp_path / "run")
    verdict = run.verdict
    assert verdict is not None
    validation = verdict.scores["validation"]
    name = run.plan.objectives[0].name
    space = run.plan.space
    normaliser = study_normaliser(run.plan, run.log.records)
    expected = posterior_losses(
        run.log.records,
        verdict.leaders,
        validation,
        run.plan.objectives,
        run.plan.weights,
        normaliser,
        space.upper - space.lower,
    )
    assert expected is not None
    better = [n for n in expected if validation[n].values[name] < validation[0].values[name]]
    assert verdict.winner == min(better, key=expected.__getitem__)
    assert set(verdict.leaders) <= set(validation)
    assert set(verdict.scores["test"]) == {0, verdict.winner}


def test_search_beats_the_start(tmp_path: Path) -> None:
    """On average over seeds: the noise of 50 items can hide the gain of a single search."""
    winners = []
    for seed in range(3):
        verdict = run_in(analytic(trials=200, seed=seed), tmp_path / str(seed)).verdict
        assert verdict is not None
        test = verdict.scores["test"]
        winners.append(test[verdict.winner].values["sphere"])
    assert np.mean(winners) < 0.5 * test[0].values["sphere"]


def test_failures_count_and_infeasible_trials_do_not_stop_the_search(tmp_path: Path) -> None:
    data = analytic(
        trials=40, evaluators=[FAULTY | {"faults": {"nan": 0.3, "error": 0.1}}], anchors="none"
    )
    run = run_in(data, tmp_path / "run")
    kinds = Counter(record.failure.kind for record in run.log.records if record.failure)
    assert len(run.log.records) == 40
    assert kinds["infeasible"] >= 4
    assert kinds["error"] >= 1
    infeasible = next(
        r.failure for r in run.log.records if r.failure and r.failure.kind == "infeasible"
    )
    assert "objective" in infeasible.message
    error = next(r.failure for r in run.log.records if r.failure and r.failure.kind == "error")
    assert "RuntimeError" in error.detail
    assert run.verdict is not None


def test_too_many_failures_in_a_row_stop_with_the_last_traceback_and_can_be_resumed(
    tmp_path: Path,
) -> None:
    data = analytic(
        trials=40,
        anchors="none",
        evaluators=[FAULTY | {"faults": {"error": 1.0}}],
        max_consecutive_failures=4,
    )
    with pytest.raises(StudyFailedError, match=r"4 trials failed in a row(.|\n)*Traceback"):
        run_in(data, tmp_path / "run")
    assert len(open_run(tmp_path / "run").log.records) == 4
    with pytest.raises(StudyFailedError):
        run_in(data, tmp_path / "run")
    assert len(open_run(tmp_path / "run").log.records) == 8


@pytest.mark.usefixtures("pictures")
def test_several_objectives_give_a_front_without_any_setting(tmp_path: Path) -> None:
    problem = {"kind": "synthetic", "problem": "quadratic_tasks", "objectives": 2}
    run = run_in(analytic(trials=60, evaluators=[problem]), tmp_path / "run")
    verdict = run.verdict
    assert verdict is not None
    names = [objective.name for objective in run.plan.objectives]
    values = {r.number: np.array([r.values[n] for n in names]) for r in run.log.records}
    brute = {
        a
        for a in values
        if not any(np.all(values[b] <= values[a]) and np.any(values[b] < values[a]) for b in values)
    }
    assert set(verdict.front) == brute
    assert len(verdict.front) >= 3
    assert (tmp_path / "run" / "front.png").is_file()


def test_running_a_finished_study_again_changes_nothing(tmp_path: Path) -> None:
    data = analytic(trials=20)
    first = run_in(data, tmp_path / "run")
    before = (tmp_path / "run" / "journal.log").read_bytes()
    second = run_in(data, tmp_path / "run")
    assert fingerprint(first) == fingerprint(second)
    assert (tmp_path / "run" / "journal.log").read_bytes() == before


@pytest.mark.parametrize(
    ("strategy", "step"),
    [
        ("cma_es", 7),
        pytest.param("cma_es", 3, marks=pytest.mark.slow),
        pytest.param("sobol", 3, marks=pytest.mark.slow),
    ],
)
def test_resume_from_every_line_of_the_journal(tmp_path: Path, strategy: str, step: int) -> None:
    """A driver killed after any append, or in one, resumes to the undisturbed result."""
    data = analytic(
        trials=14,
        strategy={"name": strategy},
        evaluators=[FAULTY | {"faults": {"nan": 0.2}, "items": 8, "noise": 0.1}],
        space={"dim": 5, "bounds": [0.0, 1.0], "start": 0.25},  # an anchor that does not fail
    )
    whole = run_in(data, tmp_path / "whole")
    expected = fingerprint(whole)
    verdict = whole.verdict
    journal = (tmp_path / "whole" / "journal.log").read_bytes()
    lines = journal.splitlines(keepends=True)
    rng = np.random.default_rng(0)
    for cut in range(1, len(lines), step):
        folder = tmp_path / f"cut{cut}"
        shutil.copytree(tmp_path / "whole", folder)
        torn = lines[cut][: int(rng.integers(0, len(lines[cut])))]
        (folder / "journal.log").write_bytes(b"".join(lines[:cut]) + torn)
        resumed = run_in(data, folder)
        assert fingerprint(resumed) == expected, f"cut after line {cut}"
        assert resumed.verdict == verdict
        shutil.rmtree(folder)


def test_no_point_is_asked_twice(tmp_path: Path) -> None:
    run = run_in(analytic(trials=60), tmp_path / "run")
    asked = [record.point.tobytes() for record in run.log.records if record.point is not None]
    assert len(set(asked)) == len(asked)


def test_a_changed_study_is_refused_with_the_differing_keys(tmp_path: Path) -> None:
    run_in(analytic(trials=20), tmp_path / "run")
    changed = analytic(trials=25, seed=8)
    with pytest.raises(RunFolderError, match=r"budget\.trials: 20 -> 25; seed: 7 -> 8"):
        run_in(changed, tmp_path / "run")
    # Who does the work may change.
    run_in(analytic(trials=20, workers={"threads": 2}), tmp_path / "run")


def test_a_log_that_does_not_follow_from_the_seed_is_refused_unless_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = analytic(trials=30)
    spec = spec_of(data, tmp_path)
    _stop_after(spec, tmp_path / "run", 12, monkeypatch)
    journal = tmp_path / "run" / "study.yaml"
    journal.write_text(journal.read_text().replace("seed: 7", "seed: 8"))
    other = spec.model_copy(update={"seed": 8})
    with pytest.raises(ReplayError, match=r"trial 1: expected the recorded point.*--trust-log"):
        run_study(other, tmp_path / "run")
    finished = run_study(other, tmp_path / "run", trust_log=True)
    assert finished.verdict is not None
    assert len(finished.log.records) == 30


def _stop_after(spec, folder: Path, tells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a run, as Ctrl-C does, after some results."""

    def interrupt(event: Event) -> None:
        if event.kind == "trial" and event.record.tell_index == tells:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(spec, folder, interrupt)


def test_an_interrupted_run_leaves_a_report_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = analytic(trials=25)
    _stop_after(spec_of(data, tmp_path), tmp_path / "run", 10, monkeypatch)
    assert (tmp_path / "run" / "report.html").is_file()
    assert open_run(tmp_path / "run").verdict is None
    whole = run_in(data, tmp_path / "whole")
    assert fingerprint(run_in(data, tmp_path / "run")) == fingerprint(whole)


def test_a_second_driver_is_refused_with_the_holder_named(tmp_path: Path) -> None:
    spec = spec_of(analytic(trials=20), tmp_path)
    seen: list[str] = []

    def intrude(event: Event) -> None:
        if event.kind == "trial" and not seen:
            with pytest.raises(RunFolderError) as error:
                run_study(spec, tmp_path / "run")
            seen.append(str(error.value))

    run_study(spec, tmp_path / "run", intrude)
    assert "process " in seen[0]


def test_a_study_starts_at_the_best_anchor(tmp_path: Path) -> None:
    from mergesearch.search.study.problem import study_normaliser, study_problem

    run = run_in(analytic(trials=20), tmp_path / "run")
    problem = study_problem(
        run.plan, run.log.records, study_normaliser(run.plan, run.log.records), 10
    )
    np.testing.assert_array_equal(problem.start, np.full(5, 0.3))


def test_weights_must_name_the_objectives(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"selection\.weights: expected a weight for each of"):
        run_in(analytic(selection={"weights": {"nonsense": 1.0}}), tmp_path / "run")


def test_any_optuna_url_is_a_log(tmp_path: Path) -> None:
    data = analytic(trials=16, storage=f"sqlite:///{tmp_path / 'log.db'}")
    run = run_in(data, tmp_path / "run")
    journal = run_in(analytic(trials=16), tmp_path / "journal-run")
    assert fingerprint(run) == fingerprint(journal)
    assert not (tmp_path / "run" / "journal.log").exists()
    assert fingerprint(open_run(tmp_path / "run")) == fingerprint(run)


def test_secrets_of_a_storage_url_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_NAME", "s3cret")
    run_in(analytic(trials=9, storage=f"sqlite:///{tmp_path}/${{LOG_NAME}}.db"), tmp_path / "run")
    assert (tmp_path / "s3cret.db").is_file()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert b"s3cret" not in path.read_bytes(), path


def test_busy_time_does_not_count_breaks() -> None:
    class Span:
        def __init__(self, start: float, stop: float) -> None:
            self.finished = stop
            self.seconds = {"evaluate": stop - start}

    assert busy_seconds([Span(10, 12), Span(11, 13), Span(100, 101)]) == pytest.approx(4.0)  # type: ignore[list-item]


def test_summaries_stay_few_and_the_point_is_exact(tmp_path: Path) -> None:
    run = run_in(analytic(trials=20, dim=200), tmp_path / "run")
    storage = read_storage(tmp_path / "run" / "journal.log")
    trials = storage.get_all_trials(run.log._study_id, deepcopy=False)
    assert all(len(trial.params) <= 16 for trial in trials)
    again = open_run(tmp_path / "run")
    for before, after in zip(run.log.records, again.log.records, strict=True):
        if before.point is not None:
            assert before.point.tobytes() == after.point.tobytes()
