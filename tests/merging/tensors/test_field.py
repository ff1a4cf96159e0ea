"""The field is a piecewise-constant function: every way to cut it leaves the function as it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergesearch.merging import Field, RecipeError

_NUMBERS = st.floats(-4, 4) | st.sampled_from([0.0, -0.0, 0.3, float("inf"), 1e-310])
_VALUES = _NUMBERS | st.just(np.nan)


@st.composite
def fields(draw: st.DrawFn, values: st.SearchStrategy[float] = _VALUES) -> Field:
    inner = draw(st.sets(st.integers(1, 199), max_size=8))
    directions = draw(st.integers(1, 4))
    segments = len(inner) + 1
    rows = st.lists(values, min_size=segments, max_size=segments)
    table = draw(st.lists(rows, min_size=directions, max_size=directions))
    return Field(np.array([0, *sorted(inner), 200]), np.array(table))


def dense(field: Field) -> np.ndarray:
    """Reference: the value at every position, by repetition."""
    return np.repeat(field.values, np.diff(field.boundaries), axis=1)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one, other, equal_nan=True)


@given(fields())
def test_at_agrees_with_repetition(field):
    assert same(field.at(np.arange(field.size)), dense(field))


@given(fields(_NUMBERS), st.sets(st.integers(0, 200), max_size=8))
def test_refine_and_compact_keep_the_function(field, cuts):
    fine = field.refine(sorted(cuts))
    assert set(fine.boundaries) == set(field.boundaries) | cuts
    assert same(dense(fine), dense(field))
    assert same(dense(fine.compact()), dense(field))
    assert fine.compact().segments <= field.segments
    # Whatever was cut before, the compact form is one and the same, and so are recipes' digests.
    assert fine.compact() == field.compact() == field.compact().compact()


@given(fields(), st.integers(0, 199), st.integers(1, 200))
def test_restrict_is_a_slice(field, start, length):
    stop = min(start + length, field.size)
    part = field.restrict(start, stop)
    assert part.size == stop - start
    assert same(dense(part), dense(field)[:, start:stop])


@given(fields())
def test_survives_json_to_the_bit(field):
    again = Field.from_dict(json.loads(json.dumps(field.to_dict())))
    assert again == field
    assert same(np.signbit(again.values), np.signbit(field.values))


@given(fields())
def test_equal_fields_hash_alike(field):
    assert hash(field) == hash(Field(field.boundaries.copy(), field.values.copy()))


def test_constant():
    field = Field.constant(10, [0.5, -1])
    assert (field.directions, field.segments, field.size) == (2, 1, 10)
    assert field.at([0, 9]).tolist() == [[0.5, 0.5], [-1, -1]]


def test_is_frozen():
    field = Field.constant(10, [0.5])
    with pytest.raises(ValueError, match="read-only"):
        field.values[0, 0] = 1


@pytest.mark.parametrize(
    ("boundaries", "values"),
    [
        ([0, 5], [1.0]),
        ([0, 5], [[1.0, 2.0]]),
        ([0], [[]]),
        ([1, 5], [[1.0]]),
        ([0, 5, 5], [[1.0, 2.0]]),
        ([0, 6, 5], [[1.0, 2.0]]),
    ],
)
def test_malformed(boundaries, values):
    with pytest.raises(RecipeError, match="field: expected"):
        Field(np.array(boundaries), np.array(values))


def test_refine_stays_inside():
    with pytest.raises(RecipeError, match=r"within 0\.\.10"):
        Field.constant(10, [1.0]).refine([11])


def test_unknown_keys():
    with pytest.raises(RecipeError, match="'boundaries' and 'values'"):
        Field.from_dict({"boundaries": [0, 1], "values": [[1]], "more": 1})
