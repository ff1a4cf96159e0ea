"""The contract of every operator: its declarations hold for tensors of all shapes and dtypes.

A new member of ``OPERATORS`` runs through all of it; see ``CONTRIBUTING.md`` for the steps.
Identities that an operator does not declare must fail, and are so documented.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import Field, Layout, RecipeError
from mergesearch.merging.in_memory import merge_stream
from mergesearch.merging.operators import IDENTITIES, OPERATORS, Operator, Options, TensorSource
from mergesearch.search.testing.operators import Tensors
from tests.merging.operators.adapted import as_adapters
from tests.merging.operators.calibrated import AS_DATA, calibration

SHAPES: dict[str, tuple[int, ...]] = {
    "block.0.weight": (6, 5),
    "block.0.square.weight": (5, 5),
    "block.10.bias": (7,),
    "scale": (),
    "column": (9, 1),
}
EXPERTS = 3
#: Of the families for which a declared identity has to hold.
SEEDS = (0, 1, 3_735_928_559)

#: What operators with required hyperparameters are given, made from the experts of a family.
REQUIRED: dict[str, Callable[[Sequence[Tensors]], dict[str, Any]]] = {
    "layer_swap": lambda _experts: {"bottom": 1, "top": 0},
    "concrete": lambda experts: {"calibration": calibration(experts), "steps": 2},
    "fisher": lambda experts: {"calibration": calibration(experts)},
    "pleas": lambda experts: {"calibration": calibration(experts)},
    "regmean": lambda experts: {"calibration": calibration(experts)},
    "regmean_pp": lambda experts: {"calibration": calibration(experts)},
    "dop": lambda experts: {"order": [expert.name for expert in experts], "steps": 9},
    "opcm": lambda experts: {"order": [expert.name for expert in experts]},
}

#: Numbers of experts that an operator is tried with, where it does not take any.
COUNTS: dict[str, int] = {
    "layer_swap": 2,
    "opcm_add": 2,
    "slerp": 1,
}

#: What operators that take no full checkpoints are given instead, made from the base and experts of
#: a family.
SOURCES: dict[str, Callable[[TensorSource, Sequence[TensorSource]], Sequence[TensorSource]]] = {
    "lora_sparse": as_adapters,
}


Family = tuple[Tensors, list[Tensors]]


@dataclass(frozen=True)
class Case:
    """An operator with hyperparameters, and how many experts it is tried with."""

    operator: Operator
    hyperparameters: Options
    identities: frozenset[str]

    @property
    def experts(self) -> int:
        return COUNTS.get(self.operator.name, EXPERTS)

    def options(self, experts: Sequence[Tensors]) -> dict[str, Any]:
        required = REQUIRED.get(self.operator.name, lambda _experts: {})(experts)
        return self.operator.complete({**required, **self.hyperparameters})

    def defaults(self, family: Family) -> list[float]:
        options = self.options(family[1])
        count = len(family[1])
        return [self.operator.default(count, options)] * self.operator.directions(count, options)

    def coefficients(self, family: Family, values: Sequence[float]) -> list[float]:
        """The values, one per expert, as coefficients; their maximum if experts are fused."""
        directions = self.operator.directions(len(family[1]), self.options(family[1]))
        return (
            list(values)[:directions]
            if directions == len(family[1])
            else [max(values)] * directions
        )

    def sources(self, family: Family) -> Sequence[TensorSource]:
        return SOURCES.get(self.operator.name, lambda _base, experts: experts)(*family)

    def fits(self, experts: int) -> bool:
        least, most = self.operator.experts
        return least <= experts and (most is None or experts <= most)


def make_family(
    experts: int = EXPERTS, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Family:
    generator = torch.Generator().manual_seed(seed)
    base = Tensors(
        "base",
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()},
    )

    def fine_tuned(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor + 0.1 * torch.randn(tensor.shape, generator=generator)).to(dtype)

    return base, [base.map(fine_tuned, f"expert {place}") for place in range(experts)]


def layout_of(base: Tensors, dtype: str = "float32") -> Layout:
    return Layout.build({name: (tuple(t.shape), dtype) for name, t in base.tensors.items()})


def merged(
    case: Case, family: Family, coefficients: Sequence[float], dtype: str = "float32"
) -> dict[str, torch.Tensor]:
    base, experts = family
    layout = layout_of(base, dtype)
    field = Field.constant(layout.size, coefficients)
    sources = case.sources(family)
    return dict(
        merge_stream(base, sources, case.operator.name, case.options(experts), field, layout)
    )


def changes(case: Case, family: Family, coefficients: Sequence[float]) -> np.ndarray:
    """merged − base, flat, in float64."""
    result = merged(case, family, coefficients)
    return torch.cat(
        [(t.double() - family[0].read(n).double()).reshape(-1) for n, t in result.items()]
    ).numpy()


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[n].numpy().tobytes() == other[n].numpy().tobytes() for n in one
    )


ROUNDING = 1e-6  # a few units in the last place of fp32 numbers near 1
VALUES = [0.1, 0.5, 0.3]


def base_at_zero(case: Case, seed: int) -> bool:
    family = make_family(case.experts, seed=seed)
    return identical(
        merged(case, family, case.coefficients(family, [0.0] * EXPERTS)), family[0].tensors
    )


def expert_at_one_hot(case: Case, seed: int) -> bool:
    # A base of 1 and an expert of 2^-30: their difference does not fit fp32.
    base, experts = make_family(case.experts, seed=seed)
    family = (
        base.map(lambda _, t: torch.ones_like(t)),
        [e.map(lambda _, t: t * 2**-30) for e in experts],
    )
    rows = np.eye(case.experts)
    return all(
        identical(merged(case, family, case.coefficients(family, row)), family[1][k].tensors)
        for k, row in enumerate(rows)
    )


def expert_near_one_hot(case: Case, seed: int) -> bool:
    family = make_family(case.experts, seed=seed)
    return all(
        distance(merged(case, family, case.coefficients(family, row)), family[1][k].tensors)
        < ROUNDING
        for k, row in enumerate(np.eye(case.experts))
    )


def single_expert(case: Case, seed: int) -> bool:
    if not case.fits(1):
        return False
    family = make_family(1, seed=seed)
    return distance(merged(case, family, [1.0]), family[1][0].tensors) < ROUNDING


def identical_experts(case: Case, seed: int) -> bool:
    base, experts = make_family(case.experts, seed=seed)
    copies = [experts[0].map(lambda _, t: t, expert.name) for expert in experts]
    return (
        distance(merged(case, (base, copies), case.defaults((base, copies))), experts[0].tensors)
        < ROUNDING
    )


def permutation(case: Case, seed: int) -> bool:
    base, experts = make_family(case.experts, seed=seed)
    order = (
        [2, 0, 1][-case.experts :] if case.experts == EXPERTS else list(range(case.experts))[::-1]
    )
    shuffled = (base, [experts[k] for k in order])
    coefficients = VALUES[: case.experts]
    one = merged(case, (base, experts), case.coefficients((base, experts), coefficients))
    other = merged(case, shuffled, case.coefficients(shuffled, [coefficients[k] for k in order]))
    return distance(one, other) < ROUNDING


def linearity(case: Case, seed: int) -> bool:
    family = make_family(case.experts, seed=seed)
    one, other = (
        np.array(case.coefficients(family, values)) for values in (VALUES, [0.7, -0.2, 0.4])
    )
    expected = 2 * changes(case, family, one) - 3 * changes(case, family, other)
    return bool(
        np.allclose(
            changes(case, family, 2 * one - 3 * other), expected, rtol=0, atol=10 * ROUNDING
        )
    )


def homogeneity(case: Case, seed: int) -> bool:
    base, experts = make_family(case.experts, seed=seed)
    scaled = [e.map(lambda name, t: base.read(name) + 4 * (t - base.read(name))) for e in experts]
    coefficients = case.coefficients((base, experts), VALUES)
    expected = 4 * changes(case, (base, experts), coefficients)
    return bool(
        np.allclose(
            changes(case, (base, scaled), coefficients), expected, rtol=0, atol=10 * ROUNDING
        )
    )


def zero_vector(case: Case, seed: int) -> bool:
    if not case.fits(case.experts + 1):
        return False
    base, experts = make_family(case.experts, seed=seed)
    family = (base, experts)
    padded = (base, [*experts, base.map(lambda _, t: t, "idle")])
    without = merged(case, family, case.coefficients(family, VALUES))
    return (
        distance(merged(case, padded, case.coefficients(padded, [*VALUES, 0.7])), without)
        < ROUNDING
    )


def default_ignores_zero_vector(case: Case, seed: int) -> bool:
    if not case.fits(case.experts + 1):
        return False
    base, experts = make_family(case.experts, seed=seed)
    padded = (base, [*experts, base.map(lambda _, t: t, "idle")])
    without = merged(case, (base, experts), case.defaults((base, experts)))
    return distance(merged(case, padded, case.defaults(padded)), without) < ROUNDING


CHECKS: dict[str, Callable[[Case, int], bool]] = {
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

CASES = [
    pytest.param(Case(o, options, identities), id=o.name + suffix)
    for o in OPERATORS.values()
    for options, identities, suffix in [
        ({}, o.identities, ""),
        (o.plain, o.plain_identities, " plain"),
    ]
    if not suffix or o.plain
]


def test_every_identity_has_a_check() -> None:
    assert set(CHECKS) == set(IDENTITIES)


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("case", CASES)
def test_declares_exactly_the_identities_that_hold(case: Case, identity: str) -> None:
    check = CHECKS[identity]
    if identity not in case.identities:
        assert not check(case, 0), f"{case.operator.name} has the identity {identity}: declare it"
        return
    for seed in SEEDS:
        assert check(case, seed), f"seed {seed}"


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))
class TestOperator:
    def test_every_operator_reaches_the_base(self, operator: Operator) -> None:
        assert "base_at_zero" in operator.identities

    def test_order_sensitive_means_that_permutation_does_not_hold(self, operator: Operator) -> None:
        if operator.experts[1] != 1:
            assert operator.order_sensitive == ("permutation" not in operator.identities)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
    def test_keeps_names_shapes_dtypes_and_inputs(self, operator: Operator, dtype: str) -> None:
        case = Case(operator, {}, frozenset())
        base, experts = make_family(case.experts, dtype=getattr(torch, dtype))
        copies = [source.map(lambda _, t: t.clone()) for source in (base, *experts)]
        result = merged(case, (base, experts), case.defaults((base, experts)), dtype)
        assert {n: (t.shape, t.dtype) for n, t in result.items()} == {
            n: (t.shape, t.dtype) for n, t in base.tensors.items()
        }
        assert all(bool(torch.isfinite(tensor).all()) for tensor in result.values())
        for source, copy in zip((base, *experts), copies, strict=True):
            assert all(torch.equal(source.read(name), copy.read(name)) for name in SHAPES)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_rows_are_wide_and_shaped_like_the_base(
        self, operator: Operator, dtype: torch.dtype
    ) -> None:
        case = Case(operator, {}, frozenset())
        base, experts = make_family(case.experts, dtype=dtype)
        options = case.options(experts)
        basis = operator.prepare(base, case.sources((base, experts)), **options)
        assert basis.directions == operator.directions(case.experts, options)
        assert (basis.angles is not None) == (basis.form == "slerp")
        for name in reversed(SHAPES):  # in any order
            rows = basis.rows(name)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert [(row.shape, row.dtype) for row in rows] == [
                (base.read(name).shape, wide)
            ] * basis.directions

    def test_experts_equal_to_the_base_change_nothing(self, operator: Operator) -> None:
        # All task vectors 0: no division by a norm, a spectrum or a count of zero.
        case = Case(operator, {}, frozenset())
        base, experts = make_family(case.experts)
        still = (base, [base.map(lambda _, t: t.clone(), expert.name) for expert in experts])
        assert distance(merged(case, still, case.defaults(still)), base.tensors) < ROUNDING

    def test_same_inputs_give_the_same_bits(self, operator: Operator) -> None:
        case = Case(operator, {}, frozenset())
        state = torch.random.get_rng_state()
        results = []
        for _ in range(2):
            family = make_family(case.experts)
            results.append(merged(case, family, case.coefficients(family, VALUES)))
        assert identical(*results)
        assert torch.equal(torch.random.get_rng_state(), state)

    @pytest.mark.parametrize("experts", [1, 2, 3, 4, 8])
    def test_default_lies_within_bounds(self, operator: Operator, experts: int) -> None:
        case = Case(operator, {}, frozenset())
        options = case.options(make_family(experts)[1])
        low, high = operator.bounds(experts, options)
        assert low <= operator.default(experts, options) <= high
        assert low < high
        assert operator.directions(experts, options) >= 1
        assert operator.copies(experts) > experts

    def test_refuses_hyperparameters_that_it_does_not_have(self, operator: Operator) -> None:
        with pytest.raises(
            RecipeError, match=f"operator {operator.name}: unknown hyperparameter 'no_such'"
        ):
            operator.complete({"no_such": 1})

    def test_options_survive_json(self, operator: Operator) -> None:
        options = Case(operator, {}, frozenset()).options(
            make_family(COUNTS.get(operator.name, EXPERTS))[1]
        )
        if operator.needs:  # a model in memory is for callers in Python only
            options = operator.complete({**options, "calibration": AS_DATA})
        assert operator.complete(json.loads(json.dumps(options))) == options

    def test_says_what_it_is(self, operator: Operator) -> None:
        assert OPERATORS[operator.name] is operator
        assert operator.summary
        assert operator.paper.split()[1].rstrip(",").isdigit()
        assert operator.scope in "ERTGS"
        assert operator.prepare.__doc__
        required = REQUIRED.get(operator.name, lambda _: {})(make_family()[1])
        assert set(operator.complete({**required, **operator.plain})) == set(
            operator.hyperparameters
        )
        assert ("seed" in operator.hyperparameters) == operator.stochastic
