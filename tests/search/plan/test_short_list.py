"""Which operators ``operator: auto`` measures, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import InputError
from mergesearch.search.cli.check import describe_plan
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.plan.survey import Choice
from mergesearch.spaces.blend_space import WEIGHTS
from tests.search.conftest import model_study
from tests.search.studies import analytic, spec_of


@pytest.fixture
def plan_of(tmp_path: Path, pico_models: Path, pico_items: Path) -> Any:
    def plan(operator: Any = "auto", choice: Choice | None = None, **sections: Any) -> Plan:
        data = {"budget": {"trials": 80}} | sections
        study = model_study(pico_models, pico_items, operator=operator, **data)
        return plan_study(spec_of(study, tmp_path), choice=choice)

    return plan


def calibration(items: Path) -> dict[str, Any]:
    inputs = {"pixel_values": "pixels"}
    model_class = "AutoModelForImageClassification"
    return {"data": str(items), "model_class": model_class, "inputs": inputs, "split": "search"}


def reasons(plan: Plan) -> dict[str, str]:
    assert plan.survey is not None
    return {one.name: one.reason for one in plan.survey.listed}


def test_operators_that_need_items_are_listed_with_the_reason(plan_of: Any) -> None:
    plan = plan_of()
    assert plan.survey.measured == ("iso_cts", "tsv", "wudi", "iso_c", "optmerge", "knots")
    assert "operator.calibration" in reasons(plan)["regmean_pp"]
    lines = "\n".join(describe_plan(plan))
    assert "measures iso_cts, tsv" in lines
    assert "not regmean_pp: needs items" in lines


def test_items_bring_in_operators_that_run_the_experts(plan_of: Any, pico_items: Path) -> None:
    plan = plan_of({"name": "auto", "calibration": calibration(pico_items), "most": 2})
    assert plan.survey.measured == ("regmean_pp", "iso_cts")
    assert reasons(plan)["tsv"] == "enough others are measured"
    assert {"regmean_pp 0.7", "regmean_pp 1", "iso_cts 1.05", "iso_cts 1.5"} < {
        anchor.name for anchor in plan.anchors
    }


def test_a_small_budget_measures_fewer(plan_of: Any) -> None:
    assert len(plan_of(budget={"trials": 24}).survey.measured) == 3
    assert len(plan_of(budget={"seconds": 3600}).survey.measured) == 6


def test_preparation_that_would_take_too_long_is_left_out(plan_of: Any) -> None:
    everything = plan_of({"name": "auto", "minutes": 30})
    seconds = {one.name: one.seconds for one in everything.survey.listed}
    least = min(seconds[name] for name in everything.survey.measured)
    plan = plan_of({"name": "auto", "minutes": 1.5 * least / 60})
    assert len(plan.survey.measured) == 1
    assert "expected to prepare" in reasons(plan)["knots"] + reasons(plan)["iso_cts"]


def test_a_choice_makes_the_space_around_its_leader(plan_of: Any) -> None:
    plan = plan_of(choice=Choice(("tsv", "iso_cts"), (0.7, 1.05)))
    assert not plan.undecided
    rows = plan.space.start.reshape(3, -1)
    assert (rows[:2] == 0.7).all()
    assert (rows[2] == 0.0).all()
    assert (plan.space.lower.reshape(3, -1)[2] == WEIGHTS[0]).all()
    assert plan.space.names[0].startswith("left/")
    assert plan.space.names[-1].startswith("to iso_cts/")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"operator": {"name": "auto", "kept": 2}}, "operator.kept: expected one of among"),
        ({"operator": {"name": "auto", "keep": 0}}, "operator.keep"),
        ({"operator": {"name": "auto", "among": ["slerp"]}}, "rows are added to the base"),
        ({"operator": {"name": "auto", "among": ["regmean"]}}, "operator.calibration"),
        ({"operator": "auto", "anchors": "none"}, "anchors: expected default"),
        ({"operator": "auto", "space": {"start": 0.3}}, "space.start: expected none"),
        ({"operator": "auto", "space": {"granularity": "global"}}, "task or finer"),
        ({"operator": "auto", "strategy": "m2n2", "space": {}}, "searches coefficients"),
    ],
)
def test_refuses_what_it_cannot_choose_for(
    plan_of: Any, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(**sections)


def test_refuses_problems_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="merges of base and experts"):
        plan_study(spec_of(analytic(operator="auto"), tmp_path))
