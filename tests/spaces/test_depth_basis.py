"""The three bases of curves over depth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.merging import InputError
from mergesearch.spaces.parts.depth_basis import BASES, Basis, make_basis

SIZES = [
    (terms, blocks)
    for blocks in (1, 2, 3, 5, 6, 12, 32)
    for terms in (1, 2, 3, 4, 6, 9, 32)
    if terms <= blocks
]
CASES = [
    (name, terms, blocks)
    for name in BASES
    for terms, blocks in SIZES
    if name != "linear" or terms == 2
]
FINITE = st.floats(-10, 10)


def de_boor(depth: float, index: int, degree: int, knots: np.ndarray) -> float:
    """Cox-de Boor recursion, written out as a reference."""
    if degree == 0:
        last = (
            knots[index + 1] == knots[-1] and depth == knots[-1] and knots[index] < knots[index + 1]
        )
        return float(knots[index] <= depth < knots[index + 1] or last)
    total = 0.0
    for at, sign in ((index, 1), (index + 1, -1)):
        width = knots[at + degree] - knots[at]
        if width > 0:
            share = (
                (depth - knots[at]) / width if sign > 0 else (knots[at + degree] - depth) / width
            )
            total += share * de_boor(depth, at, degree - 1, knots)
    return total


@pytest.mark.parametrize(("terms", "blocks"), SIZES)
def test_splines_agree_with_the_recursion(terms: int, blocks: int) -> None:
    degree = min(3, terms - 1)
    knots = np.r_[np.zeros(degree), np.linspace(0, 1, terms - degree + 1), np.ones(degree)]
    depths = np.linspace(0, 1, blocks) if blocks > 1 else np.zeros(1)
    expected = [
        [de_boor(depth, index, degree, knots) for index in range(terms)] for depth in depths
    ]
    np.testing.assert_allclose(make_basis("bspline", terms, blocks).matrix, expected, atol=1e-14)


@pytest.mark.parametrize(("terms", "blocks"), SIZES)
def test_splines_are_a_partition_of_unity(terms: int, blocks: int) -> None:
    matrix = make_basis("bspline", terms, blocks).matrix
    assert matrix.min() >= 0
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-14)
    assert np.linalg.matrix_rank(matrix) == terms  # no control point is idle


@pytest.mark.parametrize(("terms", "blocks"), SIZES)
def test_cosines_are_orthogonal_with_unit_root_mean_square(terms: int, blocks: int) -> None:
    matrix = make_basis("dct", terms, blocks).matrix
    np.testing.assert_allclose(matrix.T @ matrix / blocks, np.eye(terms), atol=1e-13)
    assert np.all(matrix[:, 0] == 1.0)


def test_cosines_agree_with_scipy() -> None:
    from scipy.fft import idct

    coordinates = np.random.default_rng(0).normal(size=12)
    scaled = np.r_[coordinates[0], coordinates[1:] / np.sqrt(2)]
    expected = idct(scaled * 24, type=2)
    values = make_basis("dct", 12, 12).evaluate(coordinates[None])[0]
    np.testing.assert_allclose(values, expected, atol=1e-12)


def test_a_line_meets_its_ends() -> None:
    basis = make_basis("linear", 2, 7)
    values = basis.evaluate(np.array([[0.1, 0.7]]))[0]
    assert values[0] == 0.1
    assert values[-1] == 0.7
    np.testing.assert_allclose(np.diff(values), 0.1, atol=1e-15)
    np.testing.assert_allclose(values, 0.1 + 0.6 * np.arange(7) / 6, atol=1e-15)


@pytest.mark.parametrize(("name", "terms", "blocks"), CASES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_evaluate_is_the_product_with_the_matrix(
    name: str, terms: int, blocks: int, data: st.DataObject
) -> None:
    basis = make_basis(name, terms, blocks)  # type: ignore[arg-type]
    x = np.array(
        data.draw(
            st.lists(st.lists(FINITE, min_size=terms, max_size=terms), min_size=1, max_size=3)
        )
    )
    values = basis.evaluate(x)
    np.testing.assert_allclose(values, x @ basis.matrix.T, atol=1e-12)
    np.testing.assert_allclose(basis.solve(values, np.arange(blocks)), x, atol=1e-9)
    if basis.bounding:
        assert np.all(values >= x.min(axis=1, keepdims=True) - 1e-12)
        assert np.all(values <= x.max(axis=1, keepdims=True) + 1e-12)


@pytest.mark.parametrize(("name", "terms", "blocks"), CASES)
@given(value=st.floats(-1e6, 1e6))
@settings(max_examples=20, deadline=None)
def test_constants_are_exact_both_ways(name: str, terms: int, blocks: int, value: float) -> None:
    basis = make_basis(name, terms, blocks)  # type: ignore[arg-type]
    values = np.full((1, blocks), value)
    coordinates = basis.solve(values, np.arange(blocks))
    np.testing.assert_array_equal(coordinates, basis.constant(np.array([value])))
    np.testing.assert_array_equal(basis.evaluate(coordinates), values)


def test_one_bad_control_point_reaches_only_its_blocks() -> None:
    basis = make_basis("bspline", 8, 24)
    coordinates = np.zeros((1, 8))
    coordinates[0, 7] = np.nan
    values = basis.evaluate(coordinates)[0]
    np.testing.assert_array_equal(np.isnan(values), basis.matrix[:, 7] > 0)
    assert 0 < np.isnan(values).sum() < 24


def test_knot_insertion_keeps_the_curve() -> None:
    # 2 spans, each halved
    coarse = make_basis("bspline", 5, 33)
    fine = make_basis("bspline", 7, 33)
    x = np.random.default_rng(1).uniform(size=(3, 5))
    values = coarse.evaluate(x)
    np.testing.assert_allclose(fine.evaluate(fine.solve(values, np.arange(33))), values, atol=1e-12)


def test_bounds_of_cosines_shrink() -> None:
    lower, upper = make_basis("dct", 4, 12).box(0.0, 1.2)
    np.testing.assert_allclose(lower, [0.0, -0.6, -0.4, -0.3])
    np.testing.assert_allclose(upper, [1.2, 0.6, 0.4, 0.3])


@pytest.mark.parametrize(
    ("name", "terms", "blocks", "message"),
    [
        ("dct", 0, 6, "expected 1 to 6 .*received 0"),
        ("bspline", 7, 6, "expected 1 to 6 .*received 7"),
        ("linear", 3, 6, "expected 2 .*received 3"),
        ("linear", 2, 1, "expected 1 to 1 .*received 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    name: str, terms: int, blocks: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_basis(name, terms, blocks)  # type: ignore[arg-type]


def test_deterministic() -> None:
    x = np.random.default_rng(2).normal(size=(4, 6))
    for name in ("dct", "bspline"):
        one, two = (make_basis(name, 6, 12).evaluate(x) for _ in range(2))  # type: ignore[arg-type]
        assert one.tobytes() == two.tobytes()
        assert isinstance(make_basis(name, 6, 12), Basis)  # type: ignore[arg-type]
