"""Fields of a limited number of segments: one point per field, and the space protocol."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergesearch.merging import Field, InputError, Layout, Recipe, RecipeError, Source
from mergesearch.spaces import (
    SegmentSpace,
    Space,
    SpaceSpec,
    arc_bounds,
    build_space,
    segment_space,
)

LAYOUT = Layout.build(
    {f"block.{b}.{n}": ((5, 9), "float32") for b in range(4) for n in ("attn", "mlp")}
)
SIZE = LAYOUT.size


def make(
    segments: int = 5, directions: int = 2, experts: int = 2, start: float = 0.4
) -> SegmentSpace:
    sources = tuple(Source(name, name) for name in "abcd"[:experts])
    recipe = Recipe(
        Source("base", "base"), sources, "task_arithmetic", Field.constant(SIZE, [0.0] * directions)
    )
    return segment_space(recipe, LAYOUT, segments=segments, low=-0.5, high=2.0, start=start)


@st.composite
def fields(draw: st.DrawFn, most: int = 5, directions: int = 2) -> Field:
    inner = draw(st.sets(st.integers(1, SIZE - 1), max_size=most - 1))
    count = directions * (len(inner) + 1)
    values = draw(st.lists(st.sampled_from([-0.5, 0.0, 0.25, 1.0]), min_size=count, max_size=count))
    return Field(np.array([0, *sorted(inner), SIZE]), np.array(values).reshape(directions, -1))


def accepts(space: Space) -> Space:
    """For the type checker: it is one."""
    return space


class TestPoints:
    @given(field=fields())
    def test_a_field_has_one_point_and_the_point_gives_it_back(self, field: Field) -> None:
        space = make()
        point = space.encode(field)
        assert point is not None
        assert point.shape == (4 + 5 * 2,)
        assert space.field(point) == field.compact()
        same = field.refine([SIZE // 2])  # the same function, written with one segment more
        assert np.array_equal(space.encode(same), point)
        assert np.all((point >= space.lower) & (point <= space.upper))

    @given(seed=st.integers(0, 1000))
    def test_any_point_of_the_box_is_a_field_with_one_canonical_point(self, seed: int) -> None:
        space = make()
        field = space.field(np.random.default_rng(seed).uniform(space.lower, space.upper))
        assert field.segments <= space.segments
        point = space.encode(field)
        assert space.field(point) == field
        assert np.array_equal(space.encode(space.field(point)), point)

    def test_the_order_of_the_coordinates(self) -> None:
        space = make(segments=3)
        point = space.encode(Field(np.array([0, 100, SIZE]), np.array([[0.1, 0.2], [0.3, 0.4]])))
        np.testing.assert_array_equal(point, [100, SIZE, 0.1, 0.2, 0.2, 0.3, 0.4, 0.4])
        assert space.names == (
            *("boundary 1", "boundary 2", "a/segment 1", "a/segment 2", "a/segment 3"),
            *("b/segment 1", "b/segment 2", "b/segment 3"),
        )

    def test_too_many_segments_and_other_shapes_are_not_held(self) -> None:
        space = make(segments=2)
        values = np.array([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])
        assert space.encode(Field(np.array([0, 10, 20, SIZE]), values)) is None
        assert space.encode(Field(np.array([0, 10, 20, SIZE]), values[:, [0, 1, 1]])) is not None
        assert space.encode(Field.constant(SIZE, [0.1])) is None
        assert space.encode(Field.constant(SIZE - 1, [0.1, 0.2])) is None

    def test_boundaries_outside_the_box_or_out_of_order_do_no_harm(self) -> None:
        space = make(segments=4)
        point = np.concatenate([[70.4, np.nan, -3.0], [1, 2, 3, 4], [0, 0, 0, 0]]).astype(float)
        expected = Field(np.array([0, 70, SIZE]), np.array([[2.0, 3.0], [0.0, 0.0]]))
        assert space.field(point) == expected

    def test_neighbours_with_the_same_coefficients_are_one_segment(self) -> None:
        point = np.array([50, 100, 0.5, 0.5, 0.7, 0.1, 0.1, 0.1])
        expected = Field(np.array([0, 100, SIZE]), np.array([[0.5, 0.7], [0.1, 0.1]]))
        assert make(segments=3).field(point) == expected

    def test_numbers_that_are_none_pass_through(self) -> None:
        space = make(segments=2)
        point = space.start.copy()
        point[0] = 100
        point[1] = np.inf
        point[-1] = np.nan
        assert np.isnan(space.field(point).values).any()
        assert np.isinf(space.decode(point).field.values).any()
        with pytest.raises(RecipeError, match="expected 5 coordinates"):
            space.field(point[:-1])

    def test_one_segment_is_one_coefficient_per_direction(self) -> None:
        space = make(segments=1)
        assert space.names == ("a/segment 1", "b/segment 1")
        assert space.field(np.array([0.1, 0.2])) == Field.constant(SIZE, [0.1, 0.2])


class TestSpace:
    def test_the_box_holds_the_start(self) -> None:
        space = accepts(make())
        assert space.field(space.start) == Field.constant(SIZE, [0.4, 0.4])
        assert np.array_equal(space.encode(space.field(space.start)), space.start)
        assert np.all(space.lower < space.upper)
        assert {array.dtype for array in (space.lower, space.upper, space.start)} == {
            np.dtype(np.float64)
        }

    def test_decode_replaces_the_field_alone(self) -> None:
        space = make()
        recipe = space.decode(space.start)
        assert recipe.with_field(space.template.field) == space.template

    def test_refines_to_more_segments_and_from_groups(self) -> None:
        coarse = make(segments=3)
        fine = make(segments=8)
        field = Field(np.array([0, 64, 130, SIZE]), np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]))
        point = coarse.encode(field)
        assert fine.field(coarse.refine(point, fine)) == field
        with pytest.raises(RecipeError, match="up to 2 segments space cannot hold"):
            coarse.refine(point, make(segments=2))
        blocks = build_space(
            SpaceSpec(granularity="block"),
            fine.template,
            LAYOUT,
            default_bounds=(0, 1),
            default_start=0.3,
        )
        by_block = np.arange(len(blocks.names)) / 10
        assert fine.field(blocks.refine(by_block, fine)) == blocks.field(by_block).compact()

    def test_summary_is_of_means(self) -> None:
        space = make()
        third = SIZE // 3
        field = Field(np.array([0, third, SIZE]), np.array([[1.0, 0.0], [0.5, 0.5]]))
        summary = space.summary_of(field)
        assert list(summary) == [
            "segments",
            "expert a",
            "expert b",
            "first third",
            "middle third",
            "last third",
        ]
        assert summary == space.summary(space.encode(field))
        assert summary["segments"] == 2
        assert summary["expert a"] == pytest.approx(third / SIZE)
        assert summary["expert b"] == 0.5
        assert summary["first third"] == pytest.approx(0.75, abs=2 / SIZE)
        assert summary["last third"] == 0.25
        with pytest.raises(RecipeError, match="expected 2 directions"):
            space.summary_of(Field.constant(SIZE, [0.0]))

    def test_summary_stays_small_and_reads_fields_that_are_not_held(self) -> None:
        many = make(segments=2, directions=30)
        assert len(many.summary(many.start)) == 16
        field = Field(np.arange(0, SIZE + 1, SIZE // 8), np.arange(8.0)[None, :].repeat(30, axis=0))
        assert many.encode(field) is None
        assert many.summary_of(field)["segments"] == 8

    def test_table_adds_up(self) -> None:
        (row,) = make().table()
        assert (row.coefficients, row.parameters, row.tensors) == (
            14,
            LAYOUT.parameters,
            LAYOUT.names,
        )

    def test_directions_that_are_no_experts_are_numbered(self) -> None:
        assert make(segments=1, directions=3).names[0] == "direction 0/segment 1"


def test_bounds_of_arcs_hold_base_experts_and_more() -> None:
    assert arc_bounds(0.0, 1.0) == (0.0, 2.0)
    assert arc_bounds(0.3, 3.0) == (0.0, 6.0)
    assert arc_bounds(-1.5, 0.5) == (-3.0, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1.0, "high": 1.0, "start": 1.0}, "space.bounds: expected"),
        ({"low": 0.0, "high": 1.0, "start": 1.5}, "space.start: expected a coefficient in"),
    ],
)
def test_wrong_bounds_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        segment_space(make().template, LAYOUT, segments=2, **options)
