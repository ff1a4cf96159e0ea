"""The study file: every mistake is one line that names the key, the value and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import InputError
from mergesearch.search.plan.loading import load_study
from mergesearch.search.spec.comparison import differences
from mergesearch.search.spec.study_file import apply_override
from tests.search.studies import analytic, spec_of, write_study


def refusal(data: dict, tmp_path: Path, *overrides: str) -> str:
    path = write_study(data, tmp_path)
    with pytest.raises(InputError) as error:
        load_study(path, overrides)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"budgett": 1},
            (
                "budgett: unknown key; did you mean 'budget'? known: allow_code, allow_unrelated, "
                "anchors,"
            ),
        ),
        (
            {"budget": {"trails": 5}},
            "budget.trails: unknown key; did you mean 'trials'? known: evaluations, seconds,",
        ),
        (
            {"budget": {"trials": 0}},
            "budget.trials: input should be greater than or equal to 1, received 0",
        ),
        (
            {"budget": {}},
            (
                "budget: value error, expected at least one of trials, evaluations, seconds, "
                "worker_hours"
            ),
        ),
        ({"budget": {"seconds": 0}}, "budget.seconds: input should be greater than 0, received 0"),
        (
            {"anchors": "defualt"},
            "anchors: input should be 'default' or 'none', received \"defualt\"",
        ),
        (
            {"workers": {"backend": "rya"}},
            "workers.backend: input should be 'auto', 'inline' or 'ray', received \"rya\"",
        ),
        (
            {"strategy": "cma"},
            (
                "strategy.name: expected a strategy, received 'cma'; did you mean 'cma_es'? known: "
                "adamerging, auto, "
            ),
        ),
        ({"strategy": {"name": "auto", "sigma": 1}}, "strategy.sigma: auto takes no options"),
        (
            {"start": {"rum": "x"}},
            "start.rum: unknown key; did you mean 'run'? known: priors, run, scores, trial",
        ),
        (
            {"strategy": {"name": "cma_es", "sigm": 1}},
            "strategy.sigm: unknown option of cma_es; did you mean 'sigma'? known: covariance, ",
        ),
        ({"operator": "task_aritmetic"}, "operator: "),
        ({"name": "../x"}, "name: string should match pattern"),
        ({"evaluators": []}, "evaluators: list should have at least 1 item"),
        (
            {"evaluators": [{"kind": "synthetic", "problem": "zdt1", "problm": "sphere"}]},
            "evaluators.0.problm: unknown key; did you mean",
        ),
        ({"space": {"dimm": 3}}, "space.dimm: unknown key; did you mean 'dim'? known:"),
        ({"base": "some/base"}, "experts: expected both base and experts"),
        (
            {"experts": ["a/x", "b/x"]},
            "experts: value error, expected experts in folders of different names",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(tmp_path: Path, sections: dict, message: str) -> None:
    text = refusal(analytic() | sections, tmp_path)
    if message == "operator: ":
        assert "task_arithmetic" in text
    else:
        assert text.startswith(message)


def test_what_is_wrong_with_a_whole_section_does_not_repeat_it(tmp_path: Path) -> None:
    section = {"kind": "visual_questions", "data": "questions.csv"}
    assert refusal(analytic() | {"evaluators": [section]}, tmp_path) == (
        "evaluators.0: value error, expected a column of answer or of answers, received neither or "
        "both"
    )


@pytest.mark.parametrize(
    ("sections", "lines"),
    [
        (
            {"budgett": 1, "seed": -1, "evaluators": [{"kind": "synthetic"}]},
            [
                "budgett: unknown key; did you mean 'budget'?",
                "seed: input should be greater than or equal to 0, received -1",
                "evaluators.0.problem: required key is missing",
            ],
        ),
        (
            {"operator": "tise", "strategy": {"name": "cma_es", "sigm": 1}, "base": "some/base"},
            [
                "operator: expected an operator, received 'tise'; did you mean 'ties'?",
                "strategy.sigm: unknown option of cma_es; did you mean 'sigma'?",
                "experts: expected both base and experts",
            ],
        ),
    ],
)
def test_all_mistakes_are_told_at_once(
    tmp_path: Path, sections: dict[str, Any], lines: list[str]
) -> None:
    path = write_study(analytic() | sections, tmp_path)
    with pytest.raises(InputError) as error:
        load_study(path)
    told = str(error.value).splitlines()
    assert len(told) == len(lines)
    for line, wanted in zip(told, lines, strict=True):
        assert line.startswith(f"{path}: {wanted}")


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(InputError, match=r"bad\.yaml: expected YAML"):
        load_study(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="expected a mapping of keys, received list"):
        load_study(tmp_path / "list.yaml")


def test_overrides(tmp_path: Path) -> None:
    path = write_study(analytic() | {"strategy": "cma_es"}, tmp_path)
    spec = load_study(
        path, ["budget.trials=12", "strategy.sigma=0.3", "evaluators.0.noise=0.5", "anchors=none"]
    )
    assert (spec.budget.trials, spec.strategy.options, spec.anchors) == (12, {"sigma": 0.3}, "none")
    assert spec.evaluators[0].noise == 0.5
    for wrong in ("budget.trials", "=3", "name.x.y=1", "evaluators.9.noise=1"):
        with pytest.raises(InputError, match="--set"):
            apply_override(analytic(), wrong)


def test_local_paths_become_absolute_and_hub_names_stay(tmp_path: Path) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    spec = spec_of(
        analytic() | {"base": "models/base", "experts": {"a": "org/name@main"}}, tmp_path
    )
    assert spec.base == str(tmp_path / "models" / "base")
    assert spec.experts == {"a": "org/name@main"}


def test_experts_as_a_list_take_the_folder_names(tmp_path: Path) -> None:
    spec = spec_of(analytic() | {"base": "./b", "experts": ["./x/maths", "./x/code"]}, tmp_path)
    assert list(spec.experts) == ["maths", "code"]


def test_differences_name_keys_and_ignore_who_works() -> None:
    ours = spec_of(analytic(), Path()).to_dict()
    theirs = spec_of(analytic(trials=41, workers={"backend": "ray", "count": 2}), Path()).to_dict()
    assert differences(ours, theirs) == ["budget.trials: 40 -> 41"]
    assert differences(ours, ours) == []


@pytest.mark.parametrize(
    ("section", "distributed"),
    [
        ({}, False),
        ({"threads": 2}, False),
        ({"gpus": 1}, True),
        ({"count": 2}, True),
        ({"address": "auto"}, True),
        ({"backend": "ray"}, True),
        ({"backend": "inline", "count": 2}, False),
    ],
)
def test_asking_for_workers_asks_for_ray(section: dict, distributed: bool) -> None:
    assert spec_of(analytic(workers=section), Path()).workers.distributed == distributed


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="expected YAML"):
        load_study(path)


def test_classes_of_domains_are_those_of_their_experts_where_heads_are_own(tmp_path: Path) -> None:
    names = {"maths": ["sum", "product"], "code": ["c", "python", "rust"]}
    for expert, classes in names.items():
        (tmp_path / expert).mkdir()
        numbers = {name: number for number, name in enumerate(classes)}
        (tmp_path / expert / "config.json").write_text(json.dumps({"label2id": numbers}))
        (tmp_path / f"{expert}.csv").write_text("text,label\n")
    section = {
        "kind": "text_classification",
        "data": {"file": {"maths": "maths.csv", "code": "code.csv"}},
        "text": "text",
        "label": "label",
    }
    study = analytic() | {
        "base": "maths",
        "experts": ["./maths", "./code"],
        "evaluators": [section],
        "special": {"heads": "own"},
    }
    (evaluator,) = spec_of(study, tmp_path).evaluators
    assert evaluator.data.classes == names
    (shared,) = spec_of(study | {"special": {}}, tmp_path).evaluators
    assert shared.data.classes is None
    given = section | {"data": section["data"] | {"classes": {"maths": ["a"], "code": ["b"]}}}
    (kept,) = spec_of(study | {"evaluators": [given]}, tmp_path).evaluators
    assert kept.data.classes == {"maths": ["a"], "code": ["b"]}
