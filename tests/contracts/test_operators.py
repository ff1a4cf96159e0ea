"""The contract of every operator: what it declares about itself holds, on tensors of every shape and dtype.

A new member of ``OPERATORS`` runs through all of it; see ``CONTRIBUTING.md`` for the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from merging import Field, Layout, RecipeError
from merging.in_memory import merge_stream
from merging.operators import IDENTITIES, OPERATORS, Operator

SHAPES: dict[str, tuple[int, ...]] = {"block.0.weight": (6, 5), "block.10.bias": (7,), "scale": (), "column": (9, 1)}
EXPERTS = 3


@dataclass(frozen=True)
class Tensors:
    """A tensor source in memory."""

    tensors: dict[str, torch.Tensor]

    @property
    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Tensors:
        return Tensors({name: change(name, tensor) for name, tensor in self.tensors.items()})


Family = tuple[Tensors, list[Tensors]]


def make_family(experts: int = EXPERTS, dtype: torch.dtype = torch.float32, seed: int = 0) -> Family:
    generator = torch.Generator().manual_seed(seed)
    base = Tensors({name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()})

    def fine_tuned(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor + 0.1 * torch.randn(tensor.shape, generator=generator)).to(dtype)

    return base, [base.map(fine_tuned) for _ in range(experts)]


def merged(
    operator: Operator, family: Family, coefficients: Sequence[float], dtype: str = "float32"
) -> dict[str, torch.Tensor]:
    base, experts = family
    layout = Layout.build({name: (tuple(t.shape), dtype) for name, t in base.tensors.items()})
    field = Field.constant(layout.size, coefficients)
    return dict(merge_stream(base, experts, operator.name, {}, field, layout))


def changes(operator: Operator, family: Family, coefficients: Sequence[float]) -> np.ndarray:
    """merged − base, flat, in float64."""
    result = merged(operator, family, coefficients)
    return torch.cat([(t.double() - family[0].read(n).double()).reshape(-1) for n, t in result.items()]).numpy()


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(one[n].numpy().tobytes() == other[n].numpy().tobytes() for n in one)


def defaults(operator: Operator, experts: int) -> list[float]:
    return [operator.default(experts)] * operator.directions(experts)


ROUNDING = 1e-6  # a few units in the last place of fp32 numbers near 1


def base_at_zero(operator: Operator) -> bool:
    family = make_family()
    return identical(merged(operator, family, [0.0] * operator.directions(EXPERTS)), family[0].tensors)


def expert_at_one_hot(operator: Operator) -> bool:
    # A base of 1 and an expert of 2^-30: their difference does not fit fp32.
    base, experts = make_family()
    family = (base.map(lambda _, t: torch.ones_like(t)), [e.map(lambda _, t: t * 2**-30) for e in experts])
    return all(identical(merged(operator, family, row), family[1][k].tensors) for k, row in enumerate(np.eye(EXPERTS)))


def expert_near_one_hot(operator: Operator) -> bool:
    base, experts = make_family()
    rows = np.eye(EXPERTS)[:, : operator.directions(EXPERTS)]
    return all(
        distance(merged(operator, (base, experts), row), experts[k].tensors) < ROUNDING for k, row in enumerate(rows)
    )


def single_expert(operator: Operator) -> bool:
    family = make_family(1)
    return distance(merged(operator, family, [1.0]), family[1][0].tensors) < ROUNDING


def identical_experts(operator: Operator) -> bool:
    base, experts = make_family()
    family = (base, [experts[0]] * EXPERTS)
    return distance(merged(operator, family, defaults(operator, EXPERTS)), experts[0].tensors) < ROUNDING


def permutation(operator: Operator) -> bool:
    base, experts = make_family()
    coefficients, order = [0.1, 0.5, 0.3], [2, 0, 1]
    shuffled = (base, [experts[k] for k in order])
    one = merged(operator, (base, experts), coefficients)
    return distance(one, merged(operator, shuffled, [coefficients[k] for k in order])) < ROUNDING


def linearity(operator: Operator) -> bool:
    family = make_family()
    one, other = np.array([0.1, 0.5, 0.3]), np.array([0.7, -0.2, 0.4])
    expected = 2 * changes(operator, family, one) - 3 * changes(operator, family, other)
    return bool(np.allclose(changes(operator, family, 2 * one - 3 * other), expected, rtol=0, atol=10 * ROUNDING))


def homogeneity(operator: Operator) -> bool:
    base, experts = make_family()
    scaled = [e.map(lambda name, t: base.read(name) + 4 * (t - base.read(name))) for e in experts]
    coefficients = [0.1, 0.5, 0.3]
    expected = 4 * changes(operator, (base, experts), coefficients)
    return bool(np.allclose(changes(operator, (base, scaled), coefficients), expected, rtol=0, atol=10 * ROUNDING))


def zero_vector(operator: Operator) -> bool:
    base, experts = make_family()
    without = merged(operator, (base, experts), [0.1, 0.5, 0.3])
    return distance(merged(operator, (base, [*experts, base]), [0.1, 0.5, 0.3, 0.7]), without) < ROUNDING


def default_ignores_zero_vector(operator: Operator) -> bool:
    base, experts = make_family()
    without = merged(operator, (base, experts), defaults(operator, EXPERTS))
    padded = merged(operator, (base, [*experts, base]), defaults(operator, EXPERTS + 1))
    return distance(padded, without) < ROUNDING


CHECKS: dict[str, Callable[[Operator], bool]] = {
    check.__name__: check
    for check in (
        base_at_zero,
        expert_at_one_hot,
        expert_near_one_hot,
        single_expert,
        identical_experts,
        permutation,
        linearity,
        homogeneity,
        zero_vector,
        default_ignores_zero_vector,
    )
}


def test_every_identity_has_a_check() -> None:
    assert set(CHECKS) == set(IDENTITIES)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))
class TestOperator:
    @pytest.mark.parametrize("identity", IDENTITIES)
    def test_declares_exactly_the_identities_that_hold(self, operator: Operator, identity: str) -> None:
        assert CHECKS[identity](operator) == (identity in operator.identities)

    def test_every_operator_reaches_the_base(self, operator: Operator) -> None:
        assert "base_at_zero" in operator.identities

    def test_order_sensitive_means_that_permutation_does_not_hold(self, operator: Operator) -> None:
        assert operator.order_sensitive == ("permutation" not in operator.identities)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
    def test_keeps_names_shapes_dtypes_and_inputs(self, operator: Operator, dtype: str) -> None:
        base, experts = make_family(dtype=getattr(torch, dtype))
        copies = [source.map(lambda _, t: t.clone()) for source in (base, *experts)]
        result = merged(operator, (base, experts), defaults(operator, EXPERTS), dtype)
        assert {n: (t.shape, t.dtype) for n, t in result.items()} == {
            n: (t.shape, t.dtype) for n, t in base.tensors.items()
        }
        for source, copy in zip((base, *experts), copies, strict=True):
            assert all(torch.equal(source.read(name), copy.read(name)) for name in SHAPES)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_rows_are_wide_and_shaped_like_the_base(self, operator: Operator, dtype: torch.dtype) -> None:
        base, experts = make_family(dtype=dtype)
        basis = operator.prepare(base, experts)
        assert basis.directions == operator.directions(EXPERTS)
        for name in reversed(SHAPES):  # in any order
            rows = basis.rows(name)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert [(row.shape, row.dtype) for row in rows] == [(base.read(name).shape, wide)] * basis.directions

    def test_same_inputs_give_the_same_bits(self, operator: Operator) -> None:
        coefficients = np.linspace(0.1, 0.4, operator.directions(EXPERTS)).tolist()
        state = torch.random.get_rng_state()
        one, other = (merged(operator, make_family(), coefficients) for _ in range(2))
        assert identical(one, other)
        assert torch.equal(torch.random.get_rng_state(), state)

    @pytest.mark.parametrize("experts", [1, 2, 3, 4, 8])
    def test_default_lies_within_bounds(self, operator: Operator, experts: int) -> None:
        low, high = operator.bounds(experts)
        assert low <= operator.default(experts) <= high
        assert low < high
        assert operator.directions(experts) >= 1

    def test_refuses_hyperparameters_that_it_does_not_have(self, operator: Operator) -> None:
        with pytest.raises(RecipeError, match=f"operator {operator.name}: unknown hyperparameter 'no_such'"):
            operator.check_options({"no_such": 1})

    def test_says_what_it_is(self, operator: Operator) -> None:
        assert OPERATORS[operator.name] is operator
        assert operator.summary
        assert operator.paper.split()[1].rstrip(",").isdigit()
        assert operator.scope in "ERTGS"
        if operator.stochastic:
            assert "seed" in operator.hyperparameters
