"""The table of operators, the schema of hyperparameters, and each operator against its formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from pydantic import Field as Limits

from mergesearch.merging import Layout, RecipeError, merge
from mergesearch.merging.operators import OPERATORS, Basis, Operator, TensorSource, get_operator


def prepare_trimmed(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    density: Annotated[float, Limits(gt=0, le=1)],
    rule: Literal["mean", "sum"] = "mean",
    seed: int = 0,
) -> Basis:
    raise AssertionError("checking options prepares nothing")


TRIMMED = Operator(
    name="trimmed",
    prepare=prepare_trimmed,
    summary="for these tests",
    paper="Nobody 2024, Nothing",
    family="sparse",
    scope="E",
    identities=frozenset(),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.0),
    experts=(2, 4),
    refuse=lambda layout, experts, options: (
        f"seed {options['seed']}" if options["seed"] > 8 else None
    ),
)


def test_the_signature_is_the_schema() -> None:
    assert list(TRIMMED.hyperparameters) == ["density", "rule", "seed"]
    assert TRIMMED.complete({"density": 0.2}) == {"density": 0.2, "rule": "mean", "seed": 0}
    assert TRIMMED.complete({"density": 1, "rule": "sum", "seed": 3}) == {
        "density": 1,
        "rule": "sum",
        "seed": 3,
    }


LAYOUT = Layout.build({"w": ((4, 4), "float32")})


def test_refuses_what_cannot_work_before_weights_are_read() -> None:
    assert TRIMMED.check(LAYOUT, 2, {"density": 0.2}) == {"density": 0.2, "rule": "mean", "seed": 0}
    with pytest.raises(
        RecipeError, match="operator trimmed: expected 2 to 4 experts beside the base, received 1"
    ):
        TRIMMED.check(LAYOUT, 1, {"density": 0.2})
    with pytest.raises(RecipeError, match="operator trimmed: seed 9"):
        TRIMMED.check(LAYOUT, 2, {"density": 0.2, "seed": 9})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"densty": 0.2},
            "unknown hyperparameter 'densty'; did you mean 'density'. known: density, rule, seed",
        ),
        ({}, "'density' has no default"),
        ({"density": 1.5}, "'density': .*less than or equal to 1, received 1.5"),
        ({"density": "0.2"}, "'density': .*valid number, received '0.2'"),
        ({"density": True}, "'density': .*received True"),
        ({"density": 0.2, "rule": "max"}, "'rule': .*'mean' or 'sum', received 'max'"),
        ({"density": 0.2, "seed": 1.5}, "'seed': .*valid integer, received 1.5"),
    ],
)
def test_refuses_options_outside_the_schema(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"operator trimmed: .*{message}") as caught:
        TRIMMED.complete(options)
    assert "\n" not in str(caught.value)


def test_unknown_operators_list_the_known_ones_and_the_closest() -> None:
    with pytest.raises(
        RecipeError,
        match=r"received 'averge'; did you mean 'average'\? known: average, .*task_arithmetic",
    ):
        get_operator("averge")
    with pytest.raises(RecipeError, match="received 'zzz'; known: average, "):
        get_operator("zzz")


def test_the_table_is_keyed_by_name() -> None:
    assert all(get_operator(name).name == name for name in OPERATORS)


def numbers(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))}


def test_average_is_the_weighted_average() -> None:
    states = [numbers(seed) for seed in range(4)]
    base, *experts = (state["w"].double() for state in states)
    result = merge(states[0], states[1:], operator="average", coefficients=[0.2, 0.3, 0.4])["w"]
    expected = 0.1 * base + 0.2 * experts[0] + 0.3 * experts[1] + 0.4 * experts[2]
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
    uniform = merge(states[0], states[1:], operator="average")["w"]
    np.testing.assert_allclose(uniform, torch.stack(experts).mean(0), rtol=0, atol=1e-6)


def test_task_arithmetic_adds_task_vectors() -> None:
    states = [numbers(seed) for seed in range(3)]
    base, *experts = (state["w"].double() for state in states)
    result = merge(states[0], states[1:])["w"]
    np.testing.assert_allclose(
        result, base + 0.3 * sum(expert - base for expert in experts), rtol=0, atol=1e-6
    )


def test_uniform_average_is_task_arithmetic_at_one_over_the_number_of_experts() -> None:
    states = [numbers(seed) for seed in range(5)]
    soup = merge(states[0], states[1:], operator="average")["w"]
    arithmetic = merge(states[0], states[1:], operator="task_arithmetic", coefficients=1 / 4)["w"]
    np.testing.assert_allclose(soup, arithmetic, rtol=0, atol=1e-6)


def test_bounds_narrow_with_the_number_of_experts() -> None:
    arithmetic = get_operator("task_arithmetic")
    assert arithmetic.bounds(3, {}) == (0.0, 1.5)
    assert arithmetic.bounds(4, {}) == (0.0, 1.0)
