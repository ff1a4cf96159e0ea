"""Chunks: balanced, none without elements, more of them where experts change most."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergesearch.merging import Field, InputError, Layout, Recipe, Source
from mergesearch.spaces import CoefficientSpace
from mergesearch.spaces.parts.chunks import chunk_counts, chunk_groups, importance
from mergesearch.spaces.spec import SpaceSpec, build_space

SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(sizes=SHAPES, data=st.data())
def test_chunks_cover_each_tensor_once_and_are_as_even_as_can_be(
    sizes: list[int], data: st.DataObject
) -> None:
    layout = Layout.build(
        {f"h.{index}.w": ((size,), "float32") for index, size in enumerate(sizes)}
    )
    counts = np.array([data.draw(st.integers(0, size)) for size in sizes])
    chunks, held = chunk_groups(layout, counts)
    assert len(chunks) == counts.sum()
    assert sum(group.parameters for group in (*chunks, *held)) == sum(sizes)
    for index, spec in enumerate(layout.tensors):
        own = [chunk for chunk in chunks if chunk.tensors == (spec.name,)]
        assert len(own) == counts[index]
        if own:
            lengths = [chunk.parameters for chunk in own]
            assert max(lengths) - min(lengths) <= 1, "a dead or uneven chunk"
            assert own[0].ranges[0][0] == spec.start
            assert all(one.ranges[0][1] == other.ranges[0][0] for one, other in pairwise(own))


def test_ten_elements_in_seven_chunks_are_seven() -> None:
    # Chunks of ceil(10 / 7) = 2 elements would be five, and two coefficients dead.
    layout = Layout.build({"h.0.w": ((10,), "float32")})
    assert len(chunk_groups(layout, np.array([7]))[0]) == 7


def test_importance_is_the_share_of_the_change() -> None:
    sums = np.array([[1.0, 2.0, 0.0], [3.0, 0.0, 1.0]])
    np.testing.assert_allclose(importance(sums, np.array([0.3, 0.3])), np.array([4, 2, 1]) / 7)
    np.testing.assert_allclose(importance(sums, np.array([1.0, 0.0])), np.array([1, 2, 0]) / 3)
    np.testing.assert_allclose(importance(sums, np.zeros(2)), np.array([4, 2, 1]) / 7)
    np.testing.assert_allclose(importance(np.zeros((2, 4)), np.ones(2)), 0.25)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"total": 2.0, "concentration": 1.0}, [4, 2, 1, 0]),  # floor(8 * (.5, .3, .15, .05))
        ({"total": 2.0, "concentration": 0.0}, [2, 2, 2, 2]),
        (
            {"total": 2.5, "concentration": 1.0, "remainder": True},
            [5, 3, 2, 0],
        ),  # 5, 3, 1.5, .5: one is left, the first takes it
        ({"total": 2.0, "concentration": 1.0, "most": 3}, [3, 2, 1, 0]),
        ({"total": 50.0, "concentration": 1.0}, [10, 10, 10, 5]),
    ],
)
def test_counts(options: dict, expected: list[int]) -> None:
    share = np.array([0.5, 0.3, 0.15, 0.05])
    options = {"most": None, "remainder": False} | options
    assert chunk_counts(share, [10, 10, 10, 5], **options).tolist() == expected


def space(**section: object) -> CoefficientSpace:
    layout = Layout.build({f"h.{index}.w": ((4, 5), "float32") for index in range(4)})
    template = Recipe(
        Source("base", "base"),
        (Source("a", "a"), Source("b", "b")),
        "task_arithmetic",
        Field.constant(80, [0.0, 0.0]),
    )
    made = build_space(
        SpaceSpec.model_validate({"granularity": "chunk", **section}),
        template,
        layout,
        default_bounds=(0.0, 1.0),
        default_start=0.3,
        change_sums=lambda: np.array([[5.0, 3.0, 1.5, 0.5]] * 2),
    )
    assert isinstance(made, CoefficientSpace)
    return made


def test_tensors_of_no_chunk_keep_the_coefficient_they_start_with() -> None:
    made = space(chunks={"total": 1.0}, start=[0.2, 0.4])
    assert made.dim == 2 * (2 + 1)  # floor(4 * (.5, .3, .15, .05)) = 2, 1, 0, 0
    field = made.field(np.full(made.dim, 0.9))
    ends = [made.layout.by_name[name].start for name in ("h.0.w", "h.3.w")]
    np.testing.assert_array_equal(field.at(ends), [[0.9, 0.2], [0.9, 0.4]])
    assert [row.group for row in made.table()][-1] == "held at the start"


def test_the_start_is_one_coefficient_and_a_coarser_point_refines_into_it() -> None:
    made = space(chunks={"total": 8.0})
    assert not made.held
    flat = made.field(made.start).compact()
    assert flat.segments == 1
    assert made.encode(made.field(np.linspace(0, 1, made.dim))) is not None
    assert made.encode(Field.constant(made.layout.size, [0.7, 0.1])) is not None


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"space\.chunks: only"):
        build_space(
            SpaceSpec.model_validate({"granularity": "tensor", "chunks": {}}),
            space().template,
            space().layout,
            default_bounds=(0.0, 1.0),
            default_start=0.3,
        )
    with pytest.raises(InputError, match="at least one chunk"):
        space(chunks={"total": 0.1})
