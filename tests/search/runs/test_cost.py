"""What a study costs: trials, seconds and the bill follow from the cost of one trial."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from mergesearch.search.cli.main import app
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.cost.study_cost import cost_of_study, held_out
from mergesearch.search.runs.cost.trial_cost import OVERHEAD, Cost, bytes_of_trial
from tests.search.conftest import model_study
from tests.search.studies import analytic, spec_of, write_study

#: Two seconds a trial, on a hundred items.
TRIAL = Cost(prepare=10.0, merge=0.5, evaluate=1.5 - OVERHEAD, items=100, timed=100, base={})


def planned(folder: Path, budget: dict[str, Any], **workers: Any) -> Plan:
    """An analytic study without items on other splits."""
    return plan_study(spec_of(analytic(budget=budget, workers=workers), folder))


@pytest.mark.parametrize(
    ("budget", "workers", "trials"),
    [
        ({"trials": 50}, {}, 50),
        ({"seconds": 100}, {}, 50),
        ({"seconds": 100}, {"backend": "ray", "count": 1}, 50),
        ({"worker_hours": 0.1}, {}, 180),
        ({"trials": 50, "seconds": 60}, {}, 30),
    ],
)
def test_trials_follow_from_the_tightest_limit(
    budget: dict[str, Any], workers: dict[str, Any], trials: int, tmp_path: Path
) -> None:
    plan = planned(tmp_path, budget, **workers)
    cost = cost_of_study(plan, TRIAL)
    assert cost.trials == trials
    assert cost.per_hour == pytest.approx(1800)
    assert cost.seconds == pytest.approx(10 + 2 * trials + held_out(plan, TRIAL))
    assert cost.bill is None


def test_the_bill_is_for_what_the_study_occupies(tmp_path: Path) -> None:
    alone = cost_of_study(planned(tmp_path, {"trials": 50}, price_per_hour=3.6), TRIAL)
    assert alone.bill == pytest.approx(3.6 * alone.seconds / 3600)
    two = planned(tmp_path, {"trials": 50}, price_per_hour=3.6, count=2, threads=10_000)
    both = cost_of_study(two, TRIAL)
    assert (both.rented, both.at_a_time) == (2, 1)  # they share what cores there are
    assert both.bill == pytest.approx(2 * alone.bill)


def test_workers_that_share_gpus_rent_whole_ones(pico_models: Path, pico_items: Path) -> None:
    data = model_study(pico_models, pico_items)
    data["workers"] = {"count": 6, "per_gpu": 4, "price_per_hour": 2.0}
    plan = plan_study(spec_of(data, pico_models))
    cost = cost_of_study(plan, TRIAL)
    assert (cost.rented, cost.at_a_time) == (2, 6)


def test_a_merge_reads_base_and_rows_and_writes_a_model(
    pico_models: Path, pico_items: Path
) -> None:
    plan = plan_study(spec_of(model_study(pico_models, pico_items), pico_models))
    tensors = load_file(pico_models / "base" / "model.safetensors").values()
    model = 4 * sum(tensor.numel() for tensor in tensors)
    assert bytes_of_trial(plan) == (3 * model, model)


def test_check_says_what_a_study_costs(pico_models: Path, pico_items: Path, tmp_path: Path) -> None:
    data = model_study(pico_models, pico_items, budget={"trials": 40})
    study = write_study(data | {"workers": {"price_per_hour": 7.0}}, tmp_path)
    said = CliRunner().invoke(app, ["check", str(study)]).output
    assert "--cost times a trial" in said
    timed = CliRunner().invoke(app, ["check", str(study), "--cost"])
    assert timed.exit_code == 0, timed.output
    assert "trials an hour" in timed.output
    assert "for 1 worker at 7 an hour each" in timed.output
    assert "merging ahead during evaluations could save" in timed.output
    assert [each.name for each in tmp_path.iterdir()] == ["study.yaml"]
    told = CliRunner().invoke(app, ["check", str(study), "--cost", "--json"]).stdout
    cost = json.loads(told)["cost"]
    assert cost["trials"] == 40
    assert cost["bill"] == pytest.approx(7.0 * cost["seconds"] / 3600)
    assert cost["trial"]["timed"] == cost["trial"]["items"] > 0


def test_merging_ahead_saves_the_shorter_of_merge_and_evaluation_at_most(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"trials": 50})
    assert cost_of_study(plan, TRIAL).merging_ahead == pytest.approx(0.25)
    short = replace(TRIAL, merge=3.0, evaluate=1.0 - OVERHEAD)
    assert cost_of_study(plan, short).merging_ahead == pytest.approx((1 - OVERHEAD) / 4)


def test_fewer_items_cost_less() -> None:
    assert TRIAL.with_items(50) == replace(TRIAL, items=50, evaluate=TRIAL.evaluate / 2)
