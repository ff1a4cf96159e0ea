"""The space contract. To add a space: put its ``space:`` section in ``SECTIONS``; it is tested here
without more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergesearch.merging import Field, Layout, Recipe, Source
from mergesearch.spaces import GRANULARITIES, DifferentiableSpace, Space
from mergesearch.spaces.spec import SpaceSpec, build_space

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
LAYOUT = Layout.build({name: ((3, 5 + place), "float32") for place, name in enumerate(NAMES)})
EXPERTS = ("first", "second", "third")

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


@pytest.fixture(params=SECTIONS)
def section(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SECTIONS[request.param]


def make(section: dict[str, Any]) -> Space:
    layout = None if "dim" in section else LAYOUT
    sources = tuple(Source(name, name) for name in EXPERTS)
    field = Field.constant(LAYOUT.size, [0.0] * 3)
    recipe = Recipe(Source("base", "base"), sources, "task_arithmetic", field)
    return build_space(
        SpaceSpec(**section),
        recipe,
        layout,
        default_bounds=(-0.2, 1.5),
        default_start=DEFAULT,
        change_sums=lambda: np.random.default_rng(0).random((len(EXPERTS), len(NAMES))),
    )


@pytest.fixture
def space(section: dict[str, Any]) -> Space:
    return make(section)


def sample(space: Space, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(space.lower, space.upper)


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

    def test_start_is_the_default_coefficient(self, space: Space, section: dict[str, Any]) -> None:
        values = space.decode(space.start).field.values
        allowed = {DEFAULT, 0.0} if section.get("exclude") else {DEFAULT}
        assert set(values.ravel().tolist()) == allowed

    def test_decode_is_deterministic(self, section: dict[str, Any]) -> None:
        one, two = make(section), make(section)
        point = sample(one, 1)
        recipe = one.decode(point)
        assert recipe.field.values.tobytes() == two.decode(point.copy()).field.values.tobytes()
        assert recipe.digest == one.decode(point).digest == two.decode(point).digest

    def test_decode_changes_the_field_alone(self, space: Space) -> None:
        recipe = space.decode(sample(space, 2))
        assert recipe.field == space.field(sample(space, 2))
        assert recipe.with_field(space.field(space.start)) == space.decode(space.start)

    def test_recipe_and_point_are_independent(self, space: Space) -> None:
        point = sample(space, 3)
        kept = point.copy()
        recipe = space.decode(point)
        np.testing.assert_array_equal(point, kept)
        point[:] = 0.0
        assert recipe.field == space.field(kept)

    def test_every_coordinate_matters(self, space: Space) -> None:
        base = space.field(space.start)
        for index in range(len(space.names)):
            moved = space.start.copy()
            moved[index] += 0.01
            assert space.field(moved) != base, space.names[index]

    def test_encode_is_exact_or_none(self, space: Space) -> None:
        for seed in range(5):
            field = space.field(sample(space, seed))
            point = space.encode(field)
            if point is not None:
                assert space.field(point) == field
        found = space.encode(space.field(space.start))
        assert found is not None
        np.testing.assert_array_equal(found, space.start)

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

    def test_table_adds_up(self, space: Space, section: dict[str, Any]) -> None:
        rows = space.table()
        assert sum(row.coefficients for row in rows) == len(space.names)
        if "dim" not in section:
            assert sum(row.parameters for row in rows) == LAYOUT.parameters
            assert sorted({name for row in rows for name in row.tensors}) == sorted(NAMES)

    def test_pull_back_is_the_derivative_of_the_field(self, space: Space) -> None:
        assert isinstance(space, DifferentiableSpace)
        point, rng, step = sample(space, 4), np.random.default_rng(5), 1e-6
        gradient = rng.standard_normal(space.field(point).values.shape)
        found = space.pull_back(point, gradient)
        assert found.shape == point.shape
        for place, unit in enumerate(np.eye(point.size)):
            up, down = (space.field(point + sign * step * unit).values for sign in (1, -1))
            assert found[place] == pytest.approx(
                float(np.sum(gradient * (up - down)) / (2 * step)), rel=1e-6, abs=1e-8
            )
