"""The quick benchmark fails for what is worse than its band, and for nothing else."""

from __future__ import annotations

import json

import pytest

from experiments.bench.quick import COMMITTED, FIGURES, compare


@pytest.mark.parametrize("name", FIGURES)
def test_only_a_ratio_beyond_its_band_is_worse(name: str) -> None:
    band = FIGURES[name].band
    committed = {name: 2.0}
    assert compare({name: 2.0 * (1 + band) * 0.99}, committed) == []
    assert compare({name: 1.0}, committed) == []
    assert compare({name: 2.0 * (1 + band) * 1.01}, committed) == [name]
    assert compare({name: 100.0}, {}) == []


def test_every_ratio_is_committed() -> None:
    assert json.loads(COMMITTED.read_text())["ratios"].keys() == FIGURES.keys()
