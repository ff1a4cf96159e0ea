"""What a study asks of its judges, told before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import InputError
from mergesearch.search.cli.check import describe_plan, plan_dict
from mergesearch.search.plan.planning import plan_study
from tests.search.judging.judged import judged_study, make_home
from tests.search.studies import spec_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("judged"))


def choices_line(data: dict[str, Any], folder: Path) -> str:
    [line] = [line for line in describe_plan(plan_study(spec_of(data, folder))) if "choice" in line]
    return " ".join(line.split())


def test_check_counts_the_choices(home: Path) -> None:
    line = choices_line(judged_study(home, budget={"trials": 30}), home)
    assert line == (
        "choices preference: about 3 choices a trial; 30 trials need 90, the choice of the winner "
        "up to 9 more"
    )
    # Of the anchors, the base is not judged: it is what others are compared with.
    plan = plan_study(spec_of(judged_study(home, anchors="default", budget={"trials": 30}), home))
    anchors = len(plan.anchors) - 1
    [needed] = plan_dict(plan)["choices"]
    assert needed == {
        "objective": "preference",
        "each": 3,
        "trials": 29,
        "validation": anchors + 2,
        "test": anchors + 1,
    }


def test_a_budget_of_time_leaves_the_judge_out(home: Path) -> None:
    line = choices_line(judged_study(home, budget={"seconds": 600}), home)
    assert "3 choices a trial; the time of the budget leaves out the time that choices take" in line


def test_rules_that_need_scores_of_items_are_refused(home: Path) -> None:
    with pytest.raises(InputError, match="expected evaluators with item scores"):
        plan_study(spec_of(judged_study(home, fidelity="race"), home))
    with pytest.raises(InputError, match=r"selection\.lend: expected evaluators whose items"):
        plan_study(spec_of(judged_study(home, selection={"lend": 0.5}), home))


def test_prompts_that_cannot_be_read_are_refused_before_weights(home: Path) -> None:
    data = judged_study(home)
    data["evaluators"] = [data["evaluators"][0] | {"prompt": "question"}]
    with pytest.raises(InputError, match="question"):
        plan_study(spec_of(data, home))
    data["evaluators"] = [data["evaluators"][0] | {"prompt": "prompt", "choices": 4}]
    with pytest.raises(InputError, match="choices: expected at most 3, the number of search"):
        plan_study(spec_of(data, home))


def test_code_must_be_allowed(home: Path) -> None:
    evaluator = judged_study(home)["evaluators"][0]
    del evaluator["max_new_tokens"]
    data = judged_study(home, evaluators=[evaluator | {"function": "math:prod"}])
    with pytest.raises(InputError, match="preference runs code that the study names"):
        spec_of(data, home)
