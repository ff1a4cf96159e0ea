"""Budgets: exact counts, stops, reserves, and the same end after an interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergesearch.merging import Field, InputError, Recipe, Source
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.runs.driver import run_study
from mergesearch.search.spec.sections import BudgetSection
from mergesearch.search.study.budget import BudgetTracker, busy_seconds, spent
from tests.search.studies import analytic, fingerprint, run_in, spec_of

RECIPE = Recipe(Source("", ""), (), "task_arithmetic", Field(np.array([0, 1]), np.zeros((1, 1))))


def trial(
    number: int, *, item_count: int | None = None, seconds: float = 0.0, finished: float = 0.0
) -> TrialRecord:
    state = "complete" if finished else "running"
    return TrialRecord(
        number=number,
        kind="search",
        name="",
        suggestion=number,
        point=None,
        merge=RECIPE,
        tells_at_ask=0,
        tell_index=None,
        state=state,
        item_count=item_count,
        seconds={"evaluate": seconds},
        finished=finished,
    )


def cost(item_count: int | None) -> int:
    return 100 if item_count is None else min(item_count, 100)


def test_what_was_spent_counts_parts_failures_and_overlapping_spans() -> None:
    records = [
        trial(0, seconds=4.0, finished=10.0),  # 6 to 10
        trial(1, item_count=25, seconds=3.0, finished=12.0),  # 9 to 12: overlaps by one second
        trial(2, seconds=1.0, finished=100.0),  # after a break
        trial(3),  # still running: counted as asked
    ]
    total = spent(records, cost)
    assert (total.trials, total.evaluations) == (4, 325)
    assert total.seconds == pytest.approx(7.0)
    assert total.worker_hours == pytest.approx(8.0 / 3600)
    assert busy_seconds([]) == 0.0


def test_evaluations_are_never_exceeded_and_never_left_over() -> None:
    records: list[TrialRecord] = []
    budget = BudgetTracker(BudgetSection(evaluations=520), records, cost, reserve=1)
    for item_count in (None, 60, None, None):
        assert budget.allows(item_count)
        records.append(trial(len(records), item_count=item_count))
    # 360 are spent and 100 kept back: 60 are left.
    assert not budget.allows(None)
    assert not budget.allows(61)
    assert budget.allows(60)
    budget.release()
    assert budget.allows(None)


def test_time_stops_asking_and_counts_earlier_sessions() -> None:
    now = [1000.0]
    records = [trial(0, seconds=6.0, finished=50.0)]
    budget = BudgetTracker(
        BudgetSection(seconds=10), records, cost, reserve=0, clock=lambda: now[0]
    )
    now[0] += 3.9
    assert budget.allows()
    now[0] += 0.2
    assert not budget.allows()


def test_worker_hours_add_up_over_workers() -> None:
    records = [trial(0, seconds=1800.0, finished=50.0)]
    budget = BudgetTracker(BudgetSection(worker_hours=1), records, cost, reserve=0)
    assert budget.allows()
    budget.add_finished(trial(1, seconds=1800.0, finished=51.0))
    assert not budget.allows()


def test_the_strictest_limit_holds(tmp_path: Path) -> None:
    section = {"trials": 100, "evaluations": 50 * 20 + 49}
    run = run_in(analytic(budget=section, strategy="cma_es"), tmp_path / "run")
    assert len(run.log.records) == 20
    assert (
        spent(run.log.records, lambda count: run.plan.evaluator.cost("search", count)).evaluations
        == 1000
    )


def test_a_study_limited_by_time_ends_and_resumes_to_the_same_trials(tmp_path: Path) -> None:
    slow = {"kind": "synthetic", "problem": "sphere", "items": 20, "noise": 0.05, "seconds": 0.01}
    data = analytic(budget={"seconds": 0.6}, strategy="cma_es", evaluators=[slow])
    run = run_in(data, tmp_path / "run")
    assert 5 <= len(run.log.records) <= 62
    assert run.verdict is not None
    assert run.log.get_attr("suggestions") >= 1
    assert fingerprint(run_in(data, tmp_path / "run")) == fingerprint(run)


def test_a_search_that_is_over_stays_over(tmp_path: Path) -> None:
    """Killed after the search but before the verdict, a study limited by time asks nothing more."""
    import json

    data = analytic(budget={"worker_hours": 0.3 / 3600}, strategy="sobol", selection={"leaders": 2})
    data["evaluators"] = [
        {"kind": "synthetic", "problem": "sphere", "items": 20, "noise": 0.05, "seconds": 0.01}
    ]
    run = run_in(data, tmp_path / "run")
    journal = tmp_path / "run" / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    searched = next(
        i for i, line in enumerate(lines) if "mergesearch:searched" in json.dumps(json.loads(line))
    )
    journal.write_bytes(b"".join(lines[: searched + 1]))
    assert fingerprint(run_in(data, tmp_path / "run")) == fingerprint(run)


def test_nothing_to_recommend_spends_the_last_trial_on_the_search(tmp_path: Path) -> None:
    all_fail = {"kind": "synthetic", "problem": "sphere", "faults": {"nan": 0.999}}
    data = analytic(
        trials=12,
        anchors="none",
        evaluators=[all_fail],
        strategy={"name": "portfolio", "members": ["sobol"]},
    )
    with pytest.raises(Exception, match="no trial succeeded"):
        run_in(data, tmp_path / "run")
    from mergesearch.search.runs.opened import open_run

    records = open_run(tmp_path / "run").log.records
    assert [record.kind for record in records] == ["search"] * 12


def test_too_small_a_budget_is_refused_in_its_own_unit(tmp_path: Path) -> None:
    spec = spec_of(analytic(budget={"evaluations": 99}, strategy="cma_es"), tmp_path)
    with pytest.raises(
        InputError,
        match=r"budget\.evaluations: expected at least 150 .* 50 evaluations each\), received 99",
    ):
        run_study(spec, tmp_path / "run")
