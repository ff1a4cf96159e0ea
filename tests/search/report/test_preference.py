"""From a preference to a point of the front, and the rule of ``strategy: auto``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mergesearch.merging import InputError
from mergesearch.search.cli.main import app
from mergesearch.search.front import to_losses
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.report.preference import parse_preference
from mergesearch.search.runs.opened import Run
from mergesearch.search.strategies.auto import choose
from mergesearch.search.study.problem import study_normaliser
from tests.search.studies import analytic, run_in, spec_of

#: The study of this file is made once, by one worker.
pytestmark = pytest.mark.xdist_group("preference")

TWO = {"kind": "synthetic", "problem": "quadratic_tasks", "objectives": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_in(
        analytic(trials=60, evaluators=[TWO], strategy="nsga2"),
        tmp_path_factory.mktemp("preference") / "run",
    )


def test_the_ends_of_the_front_are_the_best_of_each_objective(run: Run) -> None:
    for name in ("task 1", "task 2"):
        best = min(record.values[name] for record in run.log.records if record.state == "complete")
        assert run.preferred([f"{name}=3"]).values[name] == best


def test_a_preference_picks_the_least_weighted_sum_of_normalised_losses(run: Run) -> None:
    scale = study_normaliser(run.plan, run.log.records)
    losses = {
        r.number: scale.normalise(to_losses(r.values, run.plan.objectives)) for r in run.log.records
    }
    for first, second in ((1, 1), (1, 4), (5, 2)):
        chosen = run.preferred([f"task 1={first}", f"task 2={second}"])
        sums = {number: first * loss[0] + second * loss[1] for number, loss in losses.items()}
        assert sums[chosen.number] == pytest.approx(min(sums.values()))


def test_more_weight_never_makes_an_objective_worse(run: Run) -> None:
    values = [
        run.preferred([f"task 1={weight}", "task 2=1"]).values["task 1"]
        for weight in (0, 0.2, 1, 5, 100)
    ]
    assert np.all(np.diff(values) <= 0)
    assert values[0] > values[-1]


@pytest.mark.parametrize(
    "pairs", [["task 3=1"], ["task 1"], ["task 1=-1"], ["task 1=x"], ["task 1=0"], ["task 1=inf"]]
)
def test_wrong_preferences_are_refused(run: Run, pairs: list[str]) -> None:
    with pytest.raises(InputError, match="--prefer"):
        parse_preference(pairs, run.plan.objectives)


def test_the_command_shows_the_preferred_trial(run: Run) -> None:
    from typer.testing import CliRunner

    shown = CliRunner().invoke(
        app, ["show", str(run.folder.path), "--prefer", "task 1=1", "--json"]
    )
    assert shown.exit_code == 0
    (trial,) = json.loads(shown.output)
    assert trial["values"]["task 1"] == run.preferred(["task 1=1"]).values["task 1"]


def test_the_rule_of_auto() -> None:
    assert [choose(dim, 1, 100) for dim in (1, 100, 101, 2000)] == [
        "quadratic",
        "quadratic",
        "cma_es",
        "cma_es",
    ]
    assert [choose(dim, 1, None) for dim in (512, 513)] == ["quadratic", "cma_es"]
    assert [choose(dim, 2, 300) for dim in (2, 256, 257)] == ["map", "map", "sms_emoa"]
    assert choose(20, 4, 20) == "map"
    assert [choose(20, objectives, 19) for objectives in (2, 3, 4)] == [
        "sms_emoa",
        "sms_emoa",
        "nsga3",
    ]
    assert choose(20, 2, None) == "map"


@pytest.mark.parametrize(
    ("dim", "evaluators", "name"),
    [
        (5, [TWO | {"objectives": 1}], "quadratic"),
        (40, [TWO | {"objectives": 1}], "quadratic"),
        (61, [TWO | {"objectives": 1}], "cma_es"),
        (5, [TWO], "map"),
    ],
)
def test_a_study_that_names_no_strategy_gets_the_one_of_the_rule(
    tmp_path: Path, dim: int, evaluators: list, name: str
) -> None:
    data = analytic(dim=dim, evaluators=evaluators, trials=60)
    del data["strategy"]
    assert plan_study(spec_of(data, tmp_path)).strategy.name == name
