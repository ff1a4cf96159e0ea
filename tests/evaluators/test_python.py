"""Functions as evaluators: what they may return, splits and parts, and every refusal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.evaluators import Candidate
from mergesearch.evaluators.python import divided
from mergesearch.evaluators.spec.evaluators import build_evaluator
from mergesearch.merging import InputError, MergesearchError, NonFiniteError
from mergesearch.search.spec.study_file import resolve, validate
from tests.evaluators import functions, items
from tests.evaluators.items import candidate_at
from tests.search.studies import analytic

MODULE = "tests.evaluators.functions"


def section(function: str, **options: Any) -> dict[str, Any]:
    name = function if ":" in function else f"{MODULE}:{function}"
    return {"kind": "python", "function": name, "model": "none", **options}


def opened(function: str, **options: Any) -> Any:
    return items.opened(section(function, **options))


def candidate() -> Candidate:
    return candidate_at([0.1, 0.2, 0.3, 0.4])


def test_scores_of_items_become_a_mean_with_its_error() -> None:
    measured = opened("scored", sizes=functions.SIZES).evaluate(candidate(), "search")
    expected = np.array(functions.scored(candidate().recipe, "search"))
    np.testing.assert_array_equal(measured.items["score"], expected)
    assert measured.values["score"] == expected.mean()
    assert measured.errors["score"] == pytest.approx(expected.std() / np.sqrt(expected.size))


def test_only_new_items_are_asked_for_where_the_function_takes_them() -> None:
    evaluator = opened("scored_in_parts", sizes=functions.SIZES)
    one = candidate()
    functions.CALLS.clear()
    evaluator.evaluate(one, "search", 2)
    whole = evaluator.evaluate(one, "search")
    assert [len(items) for items in functions.CALLS] == [2, 4]
    expected = functions.scored(one.recipe, "search")
    np.testing.assert_array_equal(whole.items["score"], expected)


def test_a_part_of_the_items_is_the_beginning_of_a_fixed_order() -> None:
    evaluator = opened("scored", sizes=functions.SIZES)
    part = evaluator.evaluate(candidate(), "search", 3)
    whole = evaluator.evaluate(candidate(), "search")
    indices = part.item_indices["score"]
    np.testing.assert_array_equal(part.items["score"], whole.items["score"][indices])


def test_items_without_splits_are_divided_always_alike() -> None:
    evaluator = opened("undivided")
    parts = {
        split: evaluator.evaluate(candidate(), split).items["score"]
        for split in ("search", "validation", "test")
    }
    assert [part.size for part in parts.values()] == [12, 4, 4]
    together = np.sort(np.concatenate([*parts.values()]))
    np.testing.assert_allclose(together, functions.undivided(candidate().recipe))
    again = divided(20, (0.6, 0.2, 0.2))
    assert all(len(again[split]) == part.size for split, part in parts.items())
    assert evaluator.warnings([]) == [], "its annotation says that it scores items"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("plain", "functions:plain takes no split: its number stands for search, validation and "),
        ("odd", "unless it returns a score for each item (divided 0.6, 0.2, 0.2), its number "),
        ("named", "functions:named takes no split: its number stands for "),
        ("listed", ""),
        ("scored_by_name", ""),
        ("misspelt", "functions:misspelt takes no split: unless it returns a score "),
        ("scored", ""),
    ],
)
def test_a_number_that_stands_for_all_splits_is_warned_of(function: str, said: str) -> None:
    sizes = {"sizes": functions.SIZES} if function == "scored" else {}
    warnings = opened(function, **sizes).warnings([])
    assert len(warnings) == bool(said)
    assert said in "".join(warnings)


def test_a_number_is_the_value() -> None:
    evaluator = opened("plain", objectives=[{"name": "loss", "direction": "minimize"}])
    measured = evaluator.evaluate(candidate(), "test")
    assert measured.values == {"loss": pytest.approx(1.0)}
    assert not measured.items
    assert not measured.errors


@pytest.mark.parametrize(
    ("answer", "value"),
    [(2, 2.0), (np.float32(0.5), 0.5), (torch.tensor(0.25), 0.25), ([True, False] * 9, None)],
)
def test_numbers_of_numpy_and_torch_are_numbers(answer: Any, value: float | None) -> None:
    functions.ANSWER[0] = answer
    measured = opened("odd").evaluate(candidate(), "search")
    expected = measured.items["score"].mean() if value is None else value
    assert measured.values["score"] == expected


def test_inputs_are_given_by_name() -> None:
    once = opened("scored", sizes=functions.SIZES).evaluate(candidate(), "search")
    twice = opened("scored", sizes=functions.SIZES, inputs={"factor": 2.0})
    assert twice.evaluate(candidate(), "search").values["score"] == 2 * once.values["score"]


BAD_ANSWERS = [
    (None, "expected a number or a list of numbers for 'score', received None"),
    ("high", "expected a number or a list of numbers for 'score', received 'high'"),
    ([[1.0]], "expected a number or a list of numbers for 'score', received [[1.0]]"),
    ([], "expected a number or a list of numbers for 'score', received []"),
    ({"accuracy": 1.0}, "missing or unknown: 'accuracy'"),
]


@pytest.mark.parametrize(("answer", "message"), BAD_ANSWERS)
def test_other_answers_fail_the_trial_in_one_line(answer: Any, message: str) -> None:
    functions.ANSWER[0] = answer
    with pytest.raises(MergesearchError, match=re.escape(message)) as caught:
        opened("odd").evaluate(candidate(), "search")
    assert "\n" not in str(caught.value)


def test_scores_that_do_not_fit_are_refused() -> None:
    functions.ANSWER[0] = float("nan")
    with pytest.raises(NonFiniteError, match="odd: 'score'"):
        opened("odd").evaluate(candidate(), "search")
    functions.ANSWER[0] = [1.0]
    with pytest.raises(MergesearchError, match="expected enough items for three splits, received"):
        opened("odd").evaluate(candidate(), "search")
    two = [{"name": name, "direction": "maximize"} for name in ("a", "b")]
    with pytest.raises(MergesearchError, match="a value for each of \\['a', 'b'\\], received list"):
        opened("odd", objectives=two).evaluate(candidate(), "search")
    functions.ANSWER[0] = {"a": [1, 2], "b": [1, 2, 3]}
    with pytest.raises(MergesearchError, match="scores of the same items for every objective"):
        opened("odd", objectives=two).evaluate(candidate(), "search")
    with pytest.raises(MergesearchError, match="expected scores of 7 items for 'score', as sizes"):
        opened("scored", sizes=dict.fromkeys(functions.SIZES, 7)).evaluate(candidate(), "search")


# --- studies -------------------------------------------------------------------------------------


def study(function: str, **options: Any) -> dict[str, Any]:
    return analytic(allow_code=True, evaluators=[section(function, **options)])


REFUSED = [
    (study("plain") | {"allow_code": False}, "evaluators.0: python runs code that the study names"),
    (
        study("no_such_module:f"),
        "expected a module that can be imported, received 'no_such_module'",
    ),
    (study("missing"), "expected a function 'missing' in module 'tests.evaluators.functions'"),
    (study("NUMBER"), "expected a function 'NUMBER' in module 'tests.evaluators.functions'"),
    (study("no_such.py:f"), "No such file or directory"),
    (study("scored", inputs={"speed": 1}), "expected a function of a model, of any of split"),
    (study("plain", sizes=functions.SIZES), "expected a function that takes split beside it"),
    (study("plain", sizes={"search": 3}), "sizes: expected search, validation and test"),
    (study("plain", divide=[1, 0, 0]), "divide: expected three positive shares"),
    (
        study("plain", objectives=[{"name": "a", "direction": "maximize"}] * 2),
        "evaluators.0.objectives: expected unique names, received ['a'] twice",
    ),
    (study("plain") | {"operator": f"{MODULE}:NUMBER"}, "expected an Operator or a class with a"),
    (study("plain") | {"strategy": f"{MODULE}:plain"}, "expected a StrategyInfo or a class with"),
    (
        study("plain") | {"operator": f"{MODULE}:plain", "allow_code": False},
        "operator.name: tests.evaluators.functions:plain runs code that the study names",
    ),
    (study("plain") | {"strategy": f"{MODULE}:gone"}, "strategy.name: expected a function 'gone'"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_a_study_is_refused_in_one_line(data: dict[str, Any], message: str) -> None:
    from mergesearch.search.plan.planning import plan_study

    with pytest.raises(InputError, match=re.escape(message)) as caught:
        plan_study(resolve(validate(data, "study.yaml"), Path.cwd()))
    assert "\n" not in str(caught.value)


def test_a_bare_name_is_no_function() -> None:
    data = analytic(allow_code=True, evaluators=[{"kind": "python", "function": "score"}])
    with pytest.raises(
        InputError, match=r"expected module:name or file\.py:name, received 'score'"
    ):
        validate(data, "study.yaml")


def test_a_worker_refuses_other_code_than_the_study_began_with(tmp_path: Path) -> None:
    (tmp_path / "scoring.py").write_text("def score(recipe):\n    return 1.0\n")
    spec = resolve(validate(study("scoring.py:score"), "study.yaml"), tmp_path)
    build_evaluator(spec.evaluators, Path()).open()
    (tmp_path / "scoring.py").write_text("def score(recipe):\n    return 2.0  # changed\n")
    with pytest.raises(InputError, match="expected the code that the study began with"):
        build_evaluator(spec.evaluators, Path()).open()


def test_a_function_of_a_file_is_found_beside_the_study_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "scoring.py").write_text("def score(recipe):\n    return 1.0\n")
    one = resolve(validate(study("scoring.py:score"), "study.yaml"), tmp_path)
    (tmp_path / "scoring.py").write_text("def score(recipe):\n    return 2.0  # changed\n")
    two = resolve(validate(study("scoring.py:score"), "study.yaml"), tmp_path)
    sources = [spec.evaluators[0].source for spec in (one, two)]
    assert [*sources[0]] == [f"{tmp_path}/scoring.py:score"]
    assert sources[0] != sources[1]
