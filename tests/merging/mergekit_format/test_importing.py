"""mergekit's configurations as recipes: values of tensors, methods, and what cannot be said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mergesearch.merging import InputError
from mergesearch.merging.mergekit_format.importing import Imported, import_mergekit
from mergesearch.merging.mergekit_format.settings import Place, setting_problem, value_at
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.recipe_file import load_recipe, recipe_text
from mergesearch.spaces.groups import groupings_by_name, groups_by_name

Llama = Mapping[str, Path]


@pytest.fixture
def llama(pico: Callable[[str], Any]) -> Llama:
    family = pico("llama")
    return {"BASE": family.base, "ONE": family.experts[0], "TWO": family.experts[1]}


def imported(data: Mapping[str, Any], folder: Path) -> Imported:
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(dict(data)))
    return import_mergekit(path, groupings_by_name)


def recipe_of(data: Mapping[str, Any], folder: Path) -> Recipe:
    """The recipe that a configuration becomes, read back from its file."""
    found = imported(data, folder)
    assert found.problems == ()
    (folder / "recipe.yaml").write_text(recipe_text(found.recipe))
    return load_recipe(folder / "recipe.yaml", groups_by_name)


def at(recipe: Recipe, name: str, folder: Path) -> list[float]:
    """Coefficients of a tensor."""
    from mergesearch.merging.checkpoints.opening import open_checkpoint
    from mergesearch.merging.family.preflight import layout_of

    start = layout_of(open_checkpoint(str(folder))).by_name[name].start
    return [float(value) for value in recipe.field.at([start])[:, 0]]


@pytest.mark.parametrize(
    ("setting", "name", "depth", "expected"),
    [
        (0.3, "any", 0.0, 0.3),
        ("3e-1", "any", 0.0, 0.3),
        ([0, 1], "any", 0.25, 0.25),
        ([0, 1, 0.5], "any", 0.75, 0.75),
        ([0, 1, 0.5], "any", 1.0, 0.5),
        ([True, False], "any", 0.9, 1.0),  # truth values step
        ([{"filter": "layers.1", "value": 2}, {"value": 3}], "layers.11.w", 0.0, 2.0),
        ([{"filter": "mlp", "value": [0, 1]}, {"filter": "*", "value": 5}], "mlp.w", 0.5, 0.5),
        ({"filter": "mlp", "value": 1}, "attn.w", 0.0, None),
    ],
)
def test_values_are_those_of_mergekit(
    setting: Any, name: str, depth: float, expected: float | None
) -> None:
    assert setting_problem(setting) is None
    assert value_at(setting, Place(name, depth=depth)) == expected


@pytest.mark.parametrize(
    "setting", [[], "much", {"filter": "mlp"}, [{"value": 1, "when": 2}], [{"value": []}], None]
)
def test_what_is_no_setting(setting: Any) -> None:
    assert setting_problem(setting) is not None


ONE_AND_TWO = [{"model": "a/one"}, {"model": "b/two"}]


def weighted(one: float, two: float) -> list[dict[str, Any]]:
    return [
        {**model, "parameters": {"weight": weight}}
        for model, weight in zip(ONE_AND_TWO, (one, two), strict=True)
    ]


#: Method, models, parameters -> operator, hyperparameters, coefficients.
METHODS: list[tuple[str, Any, dict[str, Any], str, dict[str, Any], Any]] = [
    ("linear", weighted(1, 3), {}, "average", {}, {"one": 0.25, "two": 0.75}),
    ("task_arithmetic", weighted(0.4, 0.2), {"lambda": 2}, "task_arithmetic", {}, [0.8, 0.4]),
    ("task_arithmetic", weighted(3, 1), {"normalize": True}, "task_arithmetic", {}, [0.75, 0.25]),
    (
        *("ties", weighted(1, 0.5), {"density": 0.5}, "ties"),
        {"density": 0.5, "scope": "tensor", "merge": "weighted_mean", "mode": "live"},
        [1, 0.5],
    ),
    (
        *("ties", weighted(2, 2), {"density": 0.5, "lambda": 0.3}, "ties"),
        {"density": 0.5, "scope": "tensor", "merge": "mean", "mode": "frozen"},
        0.3,
    ),
    (
        *("dare_ties", weighted(2, 2), {"density": 0.3}, "dare_ties"),
        {"drop": 0.7, "rescale": "l1", "vectors": "drop", "merge": "sum", "mode": "frozen"},
        2.0,
    ),
    (
        *("dare_linear", weighted(1, 2), {"density": 0.3, "rescale": False}, "dare"),
        {"drop": 0.7, "rescale": "none", "vectors": "drop"},
        [1, 2],
    ),
    (
        *("della_linear", weighted(1, 2), {"density": 0.6}, "della_linear"),
        {"density": 0.6, "epsilon": 0.15, "rescale": "l1", "vectors": "drop"},
        [1, 2],
    ),
    (
        *("breadcrumbs_ties", weighted(1, 1), {"density": 0.5, "normalize": True}, "breadcrumbs"),
        {"density": 0.5, "gamma": 0.01, "scope": "tensor", "vectors": "trim", "elect": True},
        1.0,
    ),
    ("model_stock", ONE_AND_TWO, {}, "model_stock", {}, 1.0),
    (
        *("sce", ONE_AND_TWO, {"select_topk": 0.2}, "sce"),
        {"topk": 0.2, "select_applies_to": "deltas"},
        1.0,
    ),
    ("slerp", ONE_AND_TWO[:1], {"t": 0.3}, "slerp", {}, 0.3),
]


@pytest.mark.parametrize("case", METHODS, ids=lambda case: str(case[0]))
def test_methods_are_operators(case: Any, tmp_path: Path) -> None:
    method, models, parameters, operator, options, coefficients = case
    base: dict[str, Any] = {"model": "org/base"}
    base |= {"parameters": {"weight": 0.0}} if method == "linear" else {}
    data = {
        "merge_method": method,
        "base_model": "org/base",
        "models": [base, *models],
        "parameters": parameters,
    }
    found = imported(data, tmp_path)
    assert found.problems == ()
    assert found.recipe["operator"] == operator
    assert found.recipe.get("hyperparameters", {}) == options
    if isinstance(coefficients, list):
        coefficients = dict(zip(("one", "two"), coefficients, strict=True))
    assert found.recipe["coefficients"] == pytest.approx(coefficients)
    assert found.recipe["base"] == "org/base"  # no file of it was opened


def test_gradients_run_over_the_blocks_and_start_outside_them(llama: Llama, tmp_path: Path) -> None:
    data = {
        "merge_method": "task_arithmetic",
        "base_model": str(llama["BASE"]),
        "models": [
            {"model": str(llama["ONE"]), "parameters": {"weight": [0.2, 0.8]}},
            {
                "model": str(llama["TWO"]),
                "parameters": {"weight": [{"filter": "q_proj", "value": 1}, {"value": 0}]},
            },
        ],
    }
    recipe = recipe_of(data, tmp_path)
    base = llama["BASE"]
    assert at(recipe, "model.embed_tokens.weight", base) == [0.2, 0.0]
    assert at(recipe, "model.layers.0.mlp.up_proj.weight", base) == [0.2, 0.0]
    assert at(recipe, "model.layers.1.self_attn.q_proj.weight", base) == [0.8, 1.0]
    assert at(recipe, "model.norm.weight", base) == [0.2, 0.0]  # after the blocks, at depth 0


def test_filters_are_written_as_patterns(llama: Llama, tmp_path: Path) -> None:
    weight = [{"filter": "mlp.up", "value": 0.1}, {"filter": "mlp", "value": 0.2}, {"value": 0.3}]
    data = {
        "merge_method": "task_arithmetic",
        "base_model": str(llama["BASE"]),
        "models": [{"model": str(llama["ONE"]), "parameters": {"weight": weight}}],
    }
    assert imported(data, tmp_path).recipe["coefficients"] == {
        r".*mlp\.up.*": 0.1,
        r"(?!.*(?:mlp\.up)).*mlp.*": 0.2,
        "default": 0.3,
    }
    weight[1]["value"] = [0.2, 0.6]
    coefficients = imported(data, tmp_path).recipe["coefficients"]
    assert len(coefficients) == 7  # two filters and the rest in two blocks, and what lies outside
    base = llama["BASE"]
    recipe = recipe_of(data, tmp_path)
    assert at(recipe, "model.layers.1.mlp.up_proj.weight", base) == [0.1]
    assert at(recipe, "model.layers.1.mlp.down_proj.weight", base) == [0.6]
    assert at(recipe, "model.layers.1.self_attn.q_proj.weight", base) == [0.3]
    assert at(recipe, "lm_head.weight", base) == [0.3]


def slices(llama: Llama, *ranges: tuple[int, int]) -> dict[str, Any]:
    """Slices whose number is the weight of the first expert; the second is in the last alone."""
    found: list[dict[str, Any]] = []
    for number, (start, stop) in enumerate(ranges, 1):
        source = {"model": str(llama["ONE"]), "layer_range": [start, stop]}
        found.append({"sources": [source], "parameters": {"weight": number / 4}})
    last = {"model": str(llama["TWO"]), "layer_range": [*ranges[-1]], "parameters": {"weight": 1}}
    found[-1]["sources"].append(last)
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(llama["BASE"]),
        "slices": found,
    }


def test_slices_give_blocks_their_parameters(llama: Llama, tmp_path: Path) -> None:
    recipe = recipe_of(slices(llama, (0, 1), (1, 2)), tmp_path)
    base = llama["BASE"]
    assert at(recipe, "model.embed_tokens.weight", base) == [0.25, 0.0]
    assert at(recipe, "model.layers.0.mlp.up_proj.weight", base) == [0.25, 0.0]
    assert at(recipe, "model.layers.1.mlp.up_proj.weight", base) == [0.5, 1.0]
    assert at(recipe, "lm_head.weight", base) == [0.5, 1.0]


def test_blocks_stay_in_their_places(llama: Llama, tmp_path: Path) -> None:
    problems = imported(slices(llama, (0, 1), (0, 2)), tmp_path).problems
    assert problems[0].startswith(
        "slices: expected the 2 blocks of the base one after the other, received 0:1, 0:2"
    )


def test_linear_needs_no_base(llama: Llama, tmp_path: Path) -> None:
    data = {"merge_method": "linear", "models": weighted(1, 1), "parameters": {"weight": 1.0}}
    found = imported(data, tmp_path)
    assert found.recipe["base"] == "a/one"
    assert found.recipe["experts"] == {"two": "b/two"}
    assert found.recipe["coefficients"] == 0.5


def test_every_problem_is_one_line_with_its_key(tmp_path: Path) -> None:
    data = {
        "merge_method": "ties",
        "base_model": "org/base",
        "models": [
            {"model": "a/one", "parameters": {"weight": 1, "density": 0.5}, "layer_range": [0, 2]},
            {"model": "b/two", "parameters": {"wieght": 1, "density": 0.9}},
        ],
        "parameters": {"rescale": True, "lambda": 2},
        "tokenizer": {"source": "a/one", "pad_to_multiple_of": 64},
        "chat_template": "chatml",
        "dtype": "int8",
        "paramters": {},
    }
    found = imported(data, tmp_path)
    assert all("\n" not in line for line in found.problems)
    keys = sorted(line.split(":")[0] for line in found.problems)
    assert keys == sorted(
        [
            *("chat_template", "dtype", "models[0].layer_range", "paramters"),
            *("parameters.density", "parameters.lambda", "parameters.rescale"),
            *("parameters.wieght", "tokenizer.pad_to_multiple_of", "tokenizer_source", "weight"),
        ]
    )
    assert found.recipe["operator"] == "ties"  # what can be said is there


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "tise"}, "did you mean 'ties'"),
        ({"merge_method": "passthrough"}, "it stacks blocks of several models"),
        ({"base_model": None}, "base_model: expected a model for ties"),
        ({"models": []}, "expected exactly one of models, slices and modules, received none"),
        ({"models": [{}]}, r"models\[0\].model: expected a model"),
        ({"merge_method": "slerp"}, "expected 1 to 1 beside org/base for slerp, received 2"),
        ({"models": None, "modules": {"text": {}}}, "modules: expected models or slices"),
    ],
)
def test_what_is_no_merge_of_ours(changes: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    data = {"merge_method": "ties", "base_model": "org/base", "models": weighted(1, 1)}
    with pytest.raises(InputError, match=message):
        imported({**data, **changes}, tmp_path)


def test_tokenizers_and_dtypes(tmp_path: Path) -> None:
    data = {
        "merge_method": "task_arithmetic",
        "base_model": "org/base@main",
        "models": [{"model": {"model": {"path": "a/one", "revision": "v2"}}}, {"model": "b/one"}],
        "parameters": {"weight": 0.5},
        "tokenizer_source": "union",
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    found = imported(data, tmp_path)
    assert found.recipe["special"] == {"vocabulary": "union"}
    assert found.dtype == "bfloat16"
    assert found.recipe["experts"] == {"one": "a/one@v2", "one-2": "b/one"}
    assert imported({**data, "tokenizer_source": "base"}, tmp_path).recipe["special"] == {
        "vocabulary": "base"
    }


def test_coefficients_are_finite_numbers_of_one_kind(llama: Llama, tmp_path: Path) -> None:
    data = {
        "merge_method": "slerp",
        "base_model": str(llama["BASE"]),
        "models": [{"model": str(llama["ONE"])}],
        "parameters": {"t": {"filter": "mlp", "value": 0.5}},
    }
    found = imported(data, tmp_path)
    assert found.problems == ("parameters.t: expected a value at every tensor, received none",)
    values = np.array(list(found.recipe["coefficients"].values()), float)
    assert np.isfinite(values).all()
