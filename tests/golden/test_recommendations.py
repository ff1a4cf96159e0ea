"""Strategies still recommend what they recommended; see ``make golden``."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from mergesearch.search.strategies.table import STRATEGIES
from tests.golden.write import DIMENSIONS, FILE, SENSITIVE, recommendation

with FILE.open() as file:
    RECORDED = [
        (row[0], int(row[1]), [float(value) for value in row[2:]])
        for row in list(csv.reader(file))[1:]
    ]


def test_every_strategy_is_recorded() -> None:
    """In every dimension, but for those that it refuses."""
    recorded = {(name, dim) for name, dim, _ in RECORDED}
    assert {name for name, _ in recorded} == set(STRATEGIES)
    missing = {(name, dim) for name in STRATEGIES for dim in DIMENSIONS} - recorded
    assert all(recommendation(name, dim) is None for name, dim in missing - SENSITIVE)


@pytest.mark.parametrize(("name", "dim", "figures"), RECORDED)
def test_recommendation_is_the_recorded_one(name: str, dim: int, figures: list[float]) -> None:
    point = recommendation(name, dim)
    assert point is not None
    # Loose enough for another BLAS, far tighter than any change of algorithm.
    np.testing.assert_allclose([*point[:3], point.mean()], figures, rtol=1e-5, atol=1e-7)
