"""Preparing on a card: its rows are those of main memory, in memory that it is allowed."""

from __future__ import annotations

import gc
from itertools import product
from typing import Any

import pytest
import torch

from mergesearch.merging.family.basis import prepare_basis
from mergesearch.merging.family.special_tensors import SpecialTensors
from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.operators.parts import decomposition
from mergesearch.merging.operators.parts.counting import BINS
from mergesearch.merging.operators.parts.decomposition import decompose
from mergesearch.merging.operators.parts.gram import regressed
from mergesearch.merging.operators.parts.magnitudes import kth_largest, magnitude_histogram
from mergesearch.merging.operators.parts.polar import polar
from mergesearch.merging.tensors.place import HOST, Place, place_here
from tests.pretend.device import NAME, Cards

#: Too little for a formula, enough for the eigenvectors of the largest Gram matrix.
ALLOWANCE = 6 * 8 * 40 * 40
#: Counts lie beside what is allowed, in two tensors.
BINS_IN_BYTES = 2 * 8 * BINS
SHAPES = {"w": (48, 40), "wide": (30, 64), "norm": (40,)}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every matrix as a large one."""
    monkeypatch.setattr(decomposition, "PRECISE_UP_TO", 0)


def rows_of(operator: str, place: Place, **options: Any) -> dict[str, list[torch.Tensor]]:
    states = [{name: draw(*shape, seed=9 * k) for name, shape in SHAPES.items()} for k in range(4)]
    base, *experts = [MappingSource(str(k), state, list(SHAPES)) for k, state in enumerate(states)]
    chosen = OPERATORS[operator]
    full = chosen.complete(options)
    basis = prepare_basis(chosen, base, experts, full, SpecialTensors(), place)
    return {name: basis.rows(name) for name in SHAPES}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("tsv", {}),
    ("tsv", {"rank": "full"}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("knots", {}),
    ("opcm", {"order": ["1", "2", "3"], "matrices": "all"}),
    ("optmerge", {"matrices": "all"}),
    ("wudi", {"matrices": "all"}),
    ("doge", {"matrices": "all", "steps": 3}),
    ("pcb", {}),
    ("ties", {}),
]


@pytest.mark.parametrize("allowance", [None, ALLOWANCE])
def test_rows_are_those_of_main_memory(large: None, cards: Cards, allowance: int | None) -> None:
    for operator, options in CASES:
        here = rows_of(operator, HOST, **options)
        with cards.counting() as counted, cards.peak() as peak:
            there = rows_of(operator, Place(NAME, allowance), **options)
        # Without room for the formula, what is left of this one are products and eigenvectors.
        assert counted.operations > 0 or (operator == "wudi" and allowance), operator
        assert allowance is None or peak[0] <= allowance + BINS_IN_BYTES, operator
        for name, rows in here.items():
            for ours, theirs in zip(rows, there[name], strict=True):
                assert theirs.device.type == "cpu"
                torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)


def test_small_matrices_never_leave_main_memory(cards: Cards) -> None:
    here = rows_of("tsv", HOST)
    with cards.counting() as counted:
        there = rows_of("tsv", Place(NAME))
    assert counted.operations == 0
    assert all(torch.equal(*pair) for pair in zip(here["w"], there["w"], strict=True))


def test_decompositions_fit_into_what_is_allowed(large: None, cards: Cards) -> None:
    for matrix in (draw(60, 40), draw(40, 60)):
        place = Place(NAME, ALLOWANCE)
        with cards.peak() as peak:
            svd = decompose(matrix, None, torch.Generator(), place)
            factor = polar(matrix, matrix.dtype, place)
        assert 0 < peak[0] <= ALLOWANCE
        torch.testing.assert_close(svd.left * svd.values @ svd.right, matrix, rtol=0, atol=1e-5)
        torch.testing.assert_close(factor, polar(matrix, matrix.dtype), rtol=0, atol=1e-5)


def test_counts_and_ranks_have_the_same_bits(cards: Cards) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for dtype, signed in product(dtypes, (False, True)):
        numbers = draw(3001).to(dtype)
        place = Place(NAME, 30_000)  # several pieces
        halves = [("a", numbers[:1500]), ("b", numbers[1500:])]
        here = magnitude_histogram(lambda: halves, signed=signed)  # noqa: B023
        there = magnitude_histogram(lambda: halves, signed=signed, place=place)  # noqa: B023
        assert (here.counts == there.counts).all()
        for rank in (1, 2, 1500, 3001):
            expected = kth_largest(lambda: halves, rank, signed=signed)  # noqa: B023
            assert kth_largest(lambda: halves, rank, signed=signed, place=place) == expected  # noqa: B023
            on_card = [("a", numbers.to(NAME))]
            assert kth_largest(lambda: on_card, rank, signed=signed) == expected  # noqa: B023


def test_regressions_are_those_of_main_memory(large: None, cards: Cards) -> None:
    deltas = [draw(12, 8, seed=k) for k in range(2)]
    inputs = [draw(30, 8, seed=5 + k) for k in range(2)]
    grams = [{"gram_of_dim_1": one.T @ one / 30} for one in inputs]
    with cards.counting() as counted:
        there = regressed(deltas, grams, 0.9, Place(NAME))
    assert counted.operations > 0
    torch.testing.assert_close(there, regressed(deltas, grams, 0.9), rtol=0, atol=1e-6)


def test_the_place_is_the_accelerator_with_most_of_its_free_memory(cards: Cards) -> None:
    gc.collect()  # what earlier tests left in cycles holds memory of the card
    cards.limit(1_000_000)
    place = place_here()
    assert (place.device, place.allowance) == (NAME, 800_000)
    assert place_here("cpu") == HOST
    cards.count(0)
    assert place_here() == HOST
