"""Large matrices: decompositions through Gram matrices against whole ones in fp64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.operators.parts import decomposition, eigenvectors
from mergesearch.merging.operators.parts.counting import digit_counts
from mergesearch.merging.operators.parts.decomposition import decompose
from mergesearch.merging.operators.parts.eigenvectors import largest_eigenvectors, lower_gram
from mergesearch.merging.operators.parts.magnitudes import DIGIT, kth_largest, magnitude_histogram
from mergesearch.merging.operators.parts.matrix_part import MatrixPart
from mergesearch.merging.operators.parts.polar import polar
from mergesearch.merging.operators.parts.singular import singular_side_by_side
from mergesearch.merging.tensors.place import HOST, Place, PlacedSource, place_of
from mergesearch.merging.tensors.source import FilteredSource
from tests.merging.operators.parts.families import draw, sources

#: The relative error of a merged matrix that large ones may have, against fp64.
TOLERANCE = 1e-4


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every matrix as a large one."""
    monkeypatch.setattr(decomposition, "PRECISE_UP_TO", 0)


def spiked(m: int, n: int, strength: float, seed: int) -> torch.Tensor:
    """Noise with singular values around 1, under a few of the given strength and less."""
    spikes = draw(m, 5, seed=seed) * strength / torch.arange(1.0, 6.0) / m**0.5
    return (
        draw(m, n, seed=seed + 1) / max(m, n) ** 0.5 + spikes @ draw(5, n, seed=seed + 2) / n**0.5
    )


def relative_error(operator: str, vectors: list[torch.Tensor], **options: Any) -> float:
    """Of the merged matrix, all coefficients 1: as it is, against task vectors in fp64."""
    merged = []
    for dtype in (torch.float32, torch.float64):
        base, *experts = [
            MappingSource(str(k), {"w": vector.to(dtype)}, ["w"])
            for k, vector in enumerate([torch.zeros_like(vectors[0]), *vectors])
        ]
        full = OPERATORS[operator].complete(options)
        rows = OPERATORS[operator].prepare(base, experts, **full).rows("w")
        merged.append(torch.stack([row.double() for row in rows]).sum(0))
    return float((merged[0] - merged[1]).norm() / merged[1].norm())


@pytest.mark.parametrize("strength", [5.0, 3000.0])
@pytest.mark.parametrize("shape", [(120, 160), (160, 120)])
def test_tsv_is_that_of_whole_decompositions(
    large: None, shape: tuple[int, int], strength: float
) -> None:
    vectors = [spiked(*shape, strength, seed=10 * k) for k in range(4)]
    # A long fall of the singular values leaves the last ones that are kept less sure in fp32.
    assert relative_error("tsv", vectors) <= TOLERANCE


@pytest.mark.slow
def test_tsv_of_a_large_matrix_is_that_of_whole_decompositions() -> None:
    vectors = [spiked(1100, 1000, 20.0, seed=10 * k) for k in range(4)]
    assert vectors[0].numel() > decomposition.PRECISE_UP_TO
    assert relative_error("tsv", vectors) <= TOLERANCE


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("tsv", {"rank": "full"}),
        ("iso_c", {}),
        ("iso_cts", {}),
        ("knots", {"inner": "task_arithmetic"}),
        ("opcm", {"order": ["1", "2", "3"], "matrices": "all"}),
        ("optmerge", {"matrices": "all"}),
        ("wudi", {"matrices": "all"}),
    ],
)
def test_operators_are_those_of_whole_decompositions(
    large: None, operator: str, options: dict[str, Any]
) -> None:
    vectors = [spiked(60, 90, 5.0, seed=10 * k) for k in range(3)]
    assert relative_error(operator, vectors, **options) <= TOLERANCE


def test_up_to_the_limit_bits_are_those_of_a_whole_decomposition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = draw(30, 40)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    for limit, same in ((30 * 40, True), (30 * 40 - 1, False)):
        monkeypatch.setattr(decomposition, "PRECISE_UP_TO", limit)
        svd = decompose(matrix, 5, torch.Generator())
        assert torch.equal(svd.left, left[:, :5]) is same
        torch.testing.assert_close(svd.values, values[:5])
        torch.testing.assert_close(
            svd.left * svd.values @ svd.right, left[:, :5] * values[:5] @ right[:5]
        )


@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
def test_low_rank_is_found_and_nothing_else_taken_for_it(
    large: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    low = draw(shape[0], 5) @ draw(5, shape[1], seed=1)
    near = low + 1e-3 * draw(*shape, seed=2)
    assert len(decompose(near, None, torch.Generator()).values) == 200
    assert len(decompose(draw(*shape), None, torch.Generator()).values) == 200
    monkeypatch.setattr(decomposition, "lower_gram", None)  # not needed from here on
    svd = decompose(low, None, torch.Generator())
    assert 5 <= len(svd.values) < 25
    torch.testing.assert_close(svd.left * svd.values @ svd.right, low, rtol=0, atol=1e-5)
    torch.testing.assert_close(svd.left.T @ svd.left, torch.eye(len(svd.values)))
    assert len(decompose(0 * low, 3, torch.Generator()).values) == 0


def test_an_unchanged_expert_has_no_directions(large: None) -> None:
    svd = decompose(torch.zeros(20, 30), 5)
    assert not svd.values.any()
    assert not (svd.left * svd.values @ svd.right).any()
    assert not polar(torch.zeros(20, 30), torch.float32).any()


def test_random_columns_depend_on_the_matrix_alone() -> None:
    part = MatrixPart("a.weight", (4, 4))
    numbers = [torch.randn(3, generator=p.draws()) for p in (part, part, MatrixPart("b", (4, 4)))]
    assert torch.equal(numbers[0], numbers[1])
    assert not torch.equal(numbers[0], numbers[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvectors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = draw(50, 70).to(dtype)
    gram = lower_gram(matrix, dtype, HOST)
    whole = matrix @ matrix.T
    expected = np.linalg.eigvalsh(whole.double().numpy())[::-1]
    for given in (None, lambda *_: None):  # LAPACK, and torch where it gives up
        if given is not None:
            monkeypatch.setattr(eigenvectors, "by_lapack", given)
        for count in (1, 12, 50):
            values, vectors = largest_eigenvectors(gram, count)
            assert vectors.shape == (50, count)
            np.testing.assert_allclose(values, expected[:count], rtol=0, atol=1e-3)
            torch.testing.assert_close(whole @ vectors, vectors * values, rtol=0, atol=1e-3)
            torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=dtype))


def test_bits_do_not_depend_on_other_threads() -> None:
    grams = [lower_gram(draw(90, 120, seed=k), torch.float32, HOST) for k in range(6)]
    alone = [largest_eigenvectors(gram, 30)[1] for gram in grams]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda gram: largest_eigenvectors(gram, 30)[1], grams))
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_pieces_add_up(large: None, shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    room = Place("cpu", decomposition.WORKSPACE * 8 * 30 * 30)
    for place in (room, Place("cpu", 1)):
        svd = decompose(matrix, None, torch.Generator(), place)
        torch.testing.assert_close(svd.left * svd.values @ svd.right, matrix, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            polar(matrix, matrix.dtype, place), polar(matrix.double(), torch.float64).float()
        )


def test_side_by_side_has_the_left_vectors_of_the_joined_matrix(large: None) -> None:
    base, experts = sources({"w": (20, 30)}, 3)
    deltas = [draw(20, 30, seed=k) for k in range(3)]
    part = MatrixPart("w", (20, 30))
    svd = singular_side_by_side(base, experts, part, deltas)
    joined = torch.cat(deltas, 1)
    torch.testing.assert_close(svd.values, torch.linalg.svdvals(joined))
    torch.testing.assert_close(
        svd.left.T @ joined @ joined.T @ svd.left, svd.values.square().diag(), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_digits_are_counted_as_in_main_memory(dtype: torch.dtype, signed: bool) -> None:
    numbers = torch.cat([draw(500), torch.tensor([0.0, -0.0, 1e-42, -3e38])]).to(dtype)
    bits = 8 * numbers.element_size()

    def stream() -> list[tuple[str, torch.Tensor]]:
        return [("numbers", numbers)]

    first = magnitude_histogram(stream, signed=signed)
    place = Place("cpu", 4000)
    upper = digit_counts(numbers, bits, signed, bits - DIGIT, None, place)
    assert (upper == first.counts).all()
    value = kth_largest(stream, 40, signed=signed)
    prefix = int(np.nonzero(np.cumsum(upper[::-1])[::-1] >= 40)[0][-1])
    inside = digit_counts(numbers, bits, signed, bits - 2 * DIGIT, prefix, place)
    assert inside.sum() == upper[prefix]
    one = torch.tensor([value], dtype=dtype)
    assert digit_counts(one, bits, signed, bits - DIGIT, None, place)[prefix] == 1


def test_a_place_is_found_below_what_filters_a_source() -> None:
    base, _ = sources({"w": (2, 2)}, 1)
    place = Place("cpu", 7)
    assert place_of(base) == HOST
    placed = PlacedSource(base, place)
    assert place_of(FilteredSource(placed, frozenset())) is place
    assert (placed.name, placed.names, placed.memo, placed.identity) == ("0", ["w"], None, "")
    assert placed.shape("w") == (2, 2)
    assert placed.read("w") is base.read("w") or torch.equal(placed.read("w"), base.read("w"))
