"""The stack of bases: each method is a table of coefficients over its rows, to rounding."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from mergesearch.merging import RecipeError, merge
from mergesearch.merging.operators import get_operator
from mergesearch.merging.operators.stack import DENSITIES, StackRows, arc_weights

State = dict[str, torch.Tensor]
SHAPES = {
    "layers.0.mlp.up_proj.weight": (12, 9),
    "layers.1.self_attn.q_proj.weight": (7, 7),
    "norm.bias": (11,),
}
EXPERTS = 3


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


BASE = state(0)
TUNED = [
    {name: BASE[name] + 0.4 * tensor for name, tensor in state(seed).items()}
    for seed in range(1, 1 + EXPERTS)
]


def stacked(column: np.ndarray, densities: list[float] = DENSITIES) -> State:
    return merge(BASE, TUNED, operator="stack", coefficients=column.tolist(), densities=densities)


def assert_close(one: State, other: State) -> None:
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("densities", [[0.5], DENSITIES])
def test_rows_count_and_do_not_overlap(densities: list[float]) -> None:
    rows = StackRows(EXPERTS, len(densities))
    indices = [*range(rows.count)[rows.tasks]]
    for index in range(len(densities)):
        indices += range(rows.count)[rows.trimmed(index)]
    assert [*indices, rows.base] == list(range(rows.count))
    assert get_operator("stack").directions(EXPERTS, {"densities": densities}) == rows.count


def test_task_vectors_are_task_arithmetic() -> None:
    rows = StackRows(EXPERTS, 4)
    column = np.zeros(16)
    column[rows.tasks] = [0.2, -0.4, 0.7]
    assert_close(
        stacked(column),
        merge(BASE, TUNED, operator="task_arithmetic", coefficients=[0.2, -0.4, 0.7]),
    )


@pytest.mark.parametrize("index", range(4))
def test_each_density_is_ties_at_that_density(index: int) -> None:
    rows = StackRows(EXPERTS, 4)
    column = np.zeros(16)
    column[rows.trimmed(index)] = 0.8
    alone = merge(BASE, TUNED, operator="ties", coefficients=0.8, density=DENSITIES[index])
    assert_close(stacked(column), alone)
    other = merge(BASE, TUNED, operator="ties", coefficients=0.8, density=DENSITIES[index - 1])
    assert any(not torch.allclose(alone[name], other[name], atol=1e-3) for name in SHAPES)


def test_the_last_row_is_the_base() -> None:
    column = np.zeros(16)
    column[StackRows(EXPERTS, 4).base] = 0.25
    assert_close(stacked(column), {name: 1.25 * tensor for name, tensor in BASE.items()})


def test_one_expert_is_refused() -> None:
    with pytest.raises(
        RecipeError, match="operator stack: expected at least 2 experts beside the base, received 1"
    ):
        merge(BASE, TUNED[:1], operator="stack")


@pytest.mark.parametrize("densities", [[], [0.0], [20]])
def test_densities_are_fractions(densities: list[float]) -> None:
    with pytest.raises(RecipeError, match="'densities"):
        merge(BASE, TUNED, operator="stack", densities=densities)


# --- arcs
# ----------------------------------------------------------------------------


def products(vectors: np.ndarray) -> np.ndarray:
    """Inner products of the base (first) and the task vectors, from ``(tensors, 1 + K, n)``."""
    return np.einsum("tin,tjn->tij", vectors, vectors)


def family(seed: int = 0, spread: float = 0.5) -> np.ndarray:
    """Base and three task vectors of five tensors ``(5, 4, 30)``."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((5, 4, 30)) * np.array([1.0, spread, spread, spread])[:, None]


def shoemake(one: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """The point of the arc, from its definition."""
    angle = math.acos(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    return (math.sin((1 - share) * angle) * one + math.sin(share * angle) * other) / math.sin(angle)


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(range(3), 2)))
def test_arc_weights_are_shoemakes_on_full_weights(one: int, other: int) -> None:
    vectors = family()
    models = vectors[:, :1] + vectors[:, 1:]
    for share in (0.0, 0.13, 0.5, 0.9, 1.0):
        a, b = arc_weights(products(vectors), one, other, share)
        for tensor in range(5):
            expected = shoemake(models[tensor, one], models[tensor, other], share)
            result = a[tensor] * models[tensor, one] + b[tensor] * models[tensor, other]
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)
    assert np.all(a + b - 1 == 0)  # at an end, and nowhere between:
    middle = np.add(*arc_weights(products(vectors), one, other, 0.5))
    assert np.all(middle > 1.001)


def test_both_ends_are_reached_exactly() -> None:
    for share, expected in ((0.0, (1.0, 0.0)), (1.0, (0.0, 1.0))):
        a, b = arc_weights(products(family()), 0, 2, share)
        assert set(zip(a.tolist(), b.tolist(), strict=True)) == {expected}


def test_an_arc_reads_the_same_from_both_ends() -> None:
    there = arc_weights(products(family()), 0, 1, 0.3)
    back = arc_weights(products(family()), 1, 0, 0.7)
    np.testing.assert_allclose(there, back[::-1], rtol=1e-14)


def test_nearly_parallel_and_zero_tensors_go_straight() -> None:
    near = family(spread=1e-3)
    zero = np.zeros((1, 4, 30))
    for vectors in (near, zero):
        a, b = arc_weights(products(vectors), 0, 1, 0.3)
        assert np.all(a == 0.7)
        assert np.all(b == 0.3)
