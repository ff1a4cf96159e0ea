"""The space contract. Every row of the table of kinds is tested, by its example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mergesearch.merging import Field, Layout, Recipe, Source
from mergesearch.merging.operators import get_operator
from mergesearch.spaces import GRANULARITIES, DifferentiableSpace, Space
from mergesearch.spaces.request import SpaceRequest
from mergesearch.spaces.spec import KINDS, SpaceKind, SpaceSpec, build_space, kind_of

DEFAULT = 0.4
BLOCKS = 5
NAMES = [
    *(
        f"transformer.h.{b}.{n}"
        for b in range(BLOCKS)
        for n in ("ln_1.weight", "attn.c_attn.weight", "mlp.c_fc.weight")
    ),
    *("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight", "extra.scale"),
]
LAYOUT = Layout.build({name: ((3, 5 + index), "float32") for index, name in enumerate(NAMES)})
EXPERTS = ("first", "second", "third")

#: More sections of kinds that any strategy searches, beside the example of each kind.
SECTIONS: dict[str, dict[str, Any]] = {
    **{granularity: {"granularity": granularity} for granularity in GRANULARITIES},
    **{
        f"{basis}{' modules' * modules}{' ends' * (ends == 'curve')}": {
            "depth": {"basis": basis, "modules": modules, "ends": ends}
        }
        for basis in ("linear", "dct", "bspline")
        for modules in (False, True)
        for ends in ("own", "curve")
    },
    "shared dct": {"granularity": "global", "depth": {"basis": "dct", "size": 3}},
    "clipped dct": {"depth": {"basis": "dct", "size": 5, "clip": True}},
    "one spline": {"depth": {"basis": "bspline", "size": 1}},
    "all splines": {"depth": {"basis": "bspline", "size": BLOCKS}},
    "block without head": {"granularity": "block", "exclude": ["lm_head"]},
    "curve without head": {"depth": {"basis": "linear"}, "exclude": ["lm_head", r"\.ln_"]},
    "chunk": {"granularity": "chunk", "chunks": {"total": 3.0}},
    "chunk with held tensors": {
        "granularity": "chunk",
        "chunks": {"concentration": 2.0},
        "exclude": ["lm_head"],
    },
    "box": {"dim": 3},
    "large box": {"dim": 40},
}


@dataclass(frozen=True)
class Case:
    """A section, what the strategy searches, and the operator of the merges."""

    section: dict[str, Any]
    searched: str = "coefficients"
    operator: str = "task_arithmetic"

    @property
    def layout(self) -> Layout | None:
        return None if "dim" in self.section else LAYOUT

    @property
    def template(self) -> Recipe:
        sources = tuple(Source(name, name) for name in EXPERTS)
        operator = get_operator(self.operator)
        directions = operator.directions(len(EXPERTS), operator.complete({}))
        field = Field.constant(LAYOUT.size, [0.0] * directions)
        return Recipe(Source("base", "base"), sources, self.operator, field)


def example(kind: SpaceKind) -> Case:
    return Case(dict(kind.example), kind.searched, kind.operator or "task_arithmetic")


CASES = {f"kind {kind.name}": example(kind) for kind in KINDS} | {
    name: Case(section) for name, section in SECTIONS.items()
}
#: Those whose points are coefficients, or stand for them smoothly.
COEFFICIENTS = [
    name
    for name, case in CASES.items()
    if case.searched == "coefficients" and "bits" not in case.section
]


def gram(boundaries: np.ndarray) -> np.ndarray:
    """Inner products of base and task vectors that some weights have."""
    vectors = np.random.default_rng(1).standard_normal(
        (len(boundaries) - 1, 1 + len(EXPERTS), 2 + len(EXPERTS))
    )
    return vectors @ vectors.transpose(0, 2, 1)


def make(case: Case) -> Space:
    return build_space(
        SpaceSpec(**case.section),
        case.template,
        case.layout,
        default_bounds=(-0.2, 1.5),
        default_start=DEFAULT,
        searched=case.searched,
        change_sums=lambda: np.random.default_rng(0).random((len(EXPERTS), len(NAMES))),
        gram=gram,
    )


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def space(case: Case) -> Space:
    return make(case)


def sample(space: Space, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(space.lower, space.upper)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
class TestKinds:
    def test_the_example_is_of_its_kind(self, kind: SpaceKind) -> None:
        case = example(kind)
        request = SpaceRequest(
            SpaceSpec(**case.section),
            case.template,
            case.layout,
            default_bounds=(0.0, 1.0),
            default_start=DEFAULT,
            searched=kind.searched,
        )
        assert kind_of(request) is kind

    def test_keys_are_those_of_the_section(self, kind: SpaceKind) -> None:
        assert set(kind.example) <= kind.keys <= set(SpaceSpec.model_fields)


@pytest.mark.parametrize("case", CASES, indirect=True)
class TestSpaceContract:
    def test_one_name_per_coordinate(self, space: Space) -> None:
        dim = len(space.names)
        assert dim >= 1
        assert len(set(space.names)) == dim
        for array in (space.lower, space.upper, space.start):
            assert array.shape == (dim,)
            assert array.dtype == np.float64
            assert np.all(np.isfinite(array))

    def test_bounds_hold_the_start(self, space: Space) -> None:
        assert np.all(space.lower < space.upper)
        assert np.all(space.lower <= space.start)
        assert np.all(space.start <= space.upper)

    def test_decode_is_deterministic(self, case: Case) -> None:
        one = make(case)
        two = make(case)
        point = sample(one, 1)
        recipe = one.decode(point)
        assert recipe.field.values.tobytes() == two.decode(point.copy()).field.values.tobytes()
        assert recipe.digest == one.decode(point).digest == two.decode(point).digest

    def test_decode_has_the_field_of_the_point(self, space: Space) -> None:
        assert space.decode(sample(space, 2)).field == space.field(sample(space, 2))

    def test_recipe_and_point_are_independent(self, space: Space) -> None:
        point = sample(space, 3)
        kept = point.copy()
        recipe = space.decode(point)
        np.testing.assert_array_equal(point, kept)
        point[:] = 0.0
        assert recipe.field == space.field(kept)

    def test_encode_is_exact_or_none(self, space: Space) -> None:
        for seed in range(5):
            field = space.field(sample(space, seed))
            point = space.encode(field)
            if point is not None:
                assert space.field(point) == field

    def test_encode_holds_the_start(self, space: Space) -> None:
        field = space.field(space.start)
        point = space.encode(field)
        assert point is not None
        assert space.field(point) == field

    def test_refine_to_itself(self, space: Space) -> None:
        point = sample(space, 6)
        refined = space.refine(point, space)
        np.testing.assert_allclose(
            space.field(refined).values, space.field(point).values, rtol=0, atol=1e-12
        )

    def test_summary_is_small_finite_and_named_alike(self, space: Space) -> None:
        summaries = [space.summary(sample(space, seed)) for seed in range(3)]
        summaries.append(space.summary_of(space.field(space.start)))
        assert len({tuple(summary) for summary in summaries}) == 1
        assert 1 <= len(summaries[0]) <= 16
        assert all(
            isinstance(v, float) and np.isfinite(v)
            for summary in summaries
            for v in summary.values()
        )
        assert summaries[0] != summaries[1]

    def test_table_adds_up(self, space: Space, case: Case) -> None:
        rows = space.table()
        assert sum(row.coefficients for row in rows) == len(space.names)
        if case.layout is not None:
            assert sum(row.parameters for row in rows) == LAYOUT.parameters
            assert sorted({name for row in rows for name in row.tensors}) == sorted(NAMES)


@pytest.mark.parametrize("case", COEFFICIENTS, indirect=True)
class TestCoefficientContract:
    def test_start_is_the_default_coefficient(self, space: Space, case: Case) -> None:
        values = space.decode(space.start).field.values
        allowed = {DEFAULT, 0.0} if case.section.get("exclude") else {DEFAULT}
        assert set(values.ravel().tolist()) == allowed

    def test_decode_changes_the_field_alone(self, space: Space) -> None:
        recipe = space.decode(sample(space, 2))
        assert recipe.field == space.field(sample(space, 2))
        assert recipe.with_field(space.field(space.start)) == space.decode(space.start)

    def test_every_coordinate_matters(self, space: Space) -> None:
        base = space.field(space.start)
        for index in range(len(space.names)):
            moved = space.start.copy()
            moved[index] += 0.01
            assert space.field(moved) != base, space.names[index]

    def test_encode_gives_the_start_back(self, space: Space) -> None:
        point = space.encode(space.field(space.start))
        assert point is not None
        np.testing.assert_array_equal(point, space.start)

    def test_pull_back_is_the_derivative_of_the_field(self, space: Space) -> None:
        assert isinstance(space, DifferentiableSpace)
        point = sample(space, 4)
        rng = np.random.default_rng(5)
        step = 1e-6
        gradient = rng.standard_normal(space.field(point).values.shape)
        pulled = space.pull_back(point, gradient)
        assert pulled.shape == point.shape
        for index, unit in enumerate(np.eye(point.size)):
            up = space.field(point + step * unit).values
            down = space.field(point - step * unit).values
            assert pulled[index] == pytest.approx(
                float(np.sum(gradient * (up - down)) / (2 * step)), rel=1e-6, abs=1e-8
            )
