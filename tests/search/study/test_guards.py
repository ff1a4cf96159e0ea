"""Bounds on what programs and functions report: numbers, the base or an expert as the limit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import InputError
from mergesearch.search.cli.check import describe_plan
from mergesearch.search.plan.planning import plan_study
from tests.search.conftest import model_study
from tests.search.studies import run_in, spec_of

#: Scores by the sum of a merge's coefficients: 0 for the base.
PROGRAM = """
import json, sys
request = json.load(sys.stdin)
total = sum(map(sum, request["recipe"]["field"]["values"]))
values = {"gain": total, "harm": 1 + total * total}
asked = [one["name"] for one in request["objectives"]] + request.get("scores", [])
print(json.dumps({"values": {name: values[name] for name in asked}}))
"""
FUNCTION = """
def judge(recipe):
    total = float(recipe.field.values.sum())
    return {"gain": total, "harm": 1 + total * total}
"""
GAIN = [{"name": "gain", "direction": "maximize"}]


def program(folder: Path, **options: Any) -> dict[str, Any]:
    script = folder / "judge.py"
    script.write_text(PROGRAM)
    words = [sys.executable, str(script)]
    return {"kind": "command", "command": words, "model": "none", "objectives": GAIN} | options


def function(folder: Path, **options: Any) -> dict[str, Any]:
    script = folder / "judging.py"
    script.write_text(FUNCTION)
    found = f"{script}:judge"
    return {"kind": "python", "function": found, "model": "none", "objectives": GAIN} | options


def study(models: Path, *evaluators: dict[str, Any], trials: int = 8) -> dict[str, Any]:
    return model_study(models, models, evaluators=[*evaluators]) | {
        "allow_code": True,
        "budget": {"trials": trials},
        "space": {"granularity": "task"},
        "strategy": {"name": "sobol"},
    }


class TestPrograms:
    def test_a_score_that_is_no_objective_is_held_to_the_base(
        self, tmp_path: Path, pico_models: Path
    ) -> None:
        bound = {"metric": "harm", "at_most": "base", "tolerance": 0.25, "unit": "points"}
        data = study(pico_models, program(tmp_path, constraints=[bound]))
        run = run_in(data, tmp_path / "run")
        assert [objective.name for objective in run.plan.objectives] == ["gain"]
        assert run.log.results.references("search") == {"base": {"harm/": 1.0}}
        complete = [record for record in run.log.records if record.state == "complete"]
        for record in complete:
            gain = record.values["gain"]
            assert record.violations == {"harm at most base": pytest.approx(gain * gain - 0.25)}
        assert {record.feasible for record in complete} == {True, False}
        assert run.verdict is not None
        best = max(record.values["gain"] for record in complete if record.feasible)
        assert run.log.records[run.verdict.winner].values["gain"] == best

    @pytest.mark.slow
    def test_numbers_experts_and_objectives_are_limits_too(
        self, tmp_path: Path, pico_models: Path
    ) -> None:
        bounds = [
            {"name": "mild", "metric": "gain", "at_most": 0.5},
            {"metric": "harm", "at_most": "expert left"},
        ]
        data = study(pico_models, program(tmp_path, constraints=bounds))
        run = run_in(data, tmp_path / "run")
        levels = run.log.results.references("search")["expert left"]
        for record in run.log.records:
            gain = record.values["gain"]
            harm = (1 + gain * gain - levels["harm/"]) / max(1.0, levels["harm/"])
            assert record.violations == {
                "mild": pytest.approx(gain - 0.5),
                "harm at most expert left": pytest.approx(harm),
            }


class TestFunctions:
    def test_a_function_may_be_a_guard_alone(self, tmp_path: Path, pico_models: Path) -> None:
        bound = {"metric": "harm", "at_most": "base", "tolerance": 0.25}
        guard = function(tmp_path, objectives=[{"name": "gain", "direction": "maximize"}])
        alone = run_in(study(pico_models, guard | {"constraints": [bound]}), tmp_path / "one")
        (tmp_path / "judging.py").rename(tmp_path / "harming.py")
        harming = tmp_path / "harming.py"
        harming.write_text(FUNCTION.replace('"gain": total, ', ""))
        other = {
            **function(tmp_path, objectives=[]),
            "function": f"{harming}:judge",
            "constraints": [bound],
        }
        apart = run_in(study(pico_models, program(tmp_path), other), tmp_path / "two")
        assert [objective.name for objective in apart.plan.objectives] == ["gain"]
        ours = [record.violations for record in alone.log.records]
        assert [record.violations for record in apart.log.records] == ours
        assert alone.verdict is not None
        assert apart.verdict is not None
        assert alone.verdict.winner == apart.verdict.winner


class TestRefusals:
    def test_a_section_that_asks_for_nothing(self, tmp_path: Path, pico_models: Path) -> None:
        data = study(pico_models, program(tmp_path, objectives=[]))
        with pytest.raises(InputError, match="at least one, or constraints, received neither"):
            spec_of(data, tmp_path)

    def test_an_expert_that_is_none_of_the_study(self, tmp_path: Path, pico_models: Path) -> None:
        bound = {"metric": "harm", "at_most": "expert middle"}
        data = study(pico_models, program(tmp_path, constraints=[bound]))
        with pytest.raises(InputError, match="relative to 'expert middle': expected one of"):
            plan_study(spec_of(data, tmp_path))

    def test_check_prints_a_tolerance_with_its_unit(
        self, tmp_path: Path, pico_models: Path, pico_items: Path
    ) -> None:
        bound = {"metric": "harm", "at_most": "base", "tolerance": 0.25, "unit": "points"}
        data = study(pico_models, program(tmp_path, constraints=[bound]))
        [line] = [
            one
            for one in describe_plan(plan_study(spec_of(data, tmp_path)))
            if one.startswith("bounds")
        ]
        assert line.endswith("harm at most base (tolerance 0.25 points)")
        data = model_study(pico_models, pico_items)
        bounds = [{"metric": "accuracy", "at_least": "base", "tolerance": 0.02}]
        data["evaluators"][0]["constraints"] = bounds
        [line] = [
            one
            for one in describe_plan(plan_study(spec_of(data, tmp_path)))
            if one.startswith("bounds")
        ]
        told = "accuracy at least base (tolerance 0.02 of accuracy (a share from 0 to 1))"
        assert line.endswith(told)


def test_older_sections_keep_their_form(tmp_path: Path, pico_models: Path) -> None:
    spec = spec_of(study(pico_models, program(tmp_path), function(tmp_path)), tmp_path)
    assert "constraints" not in json.dumps(spec.to_dict()["evaluators"])
