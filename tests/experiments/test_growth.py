"""A small cut of experiment 25: idle shares that add up, slopes, and plots."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.growth.cluster import simulated
from experiments.growth.plots import Line, Panel, draw


def test_idle_shares_of_a_simulated_cluster_add_up() -> None:
    row = simulated(5, dimensions=3)
    assert row.trials == 64
    assert list(row.ends) == ["trials", "recommendation", "validation", "test"]
    between = 1 - row.busy - sum(row.ends.values())  # idle while there are trials for all
    assert -1e-9 <= between <= 1 - row.searching + 1e-9
    assert row.searching > 0.999
    assert row.ends["recommendation"] > 0.8 / 30  # four of five idle, in one of some 20 rounds


def test_slopes_are_exponents_and_plots_name_them(tmp_path: Path) -> None:
    line = Line("merges", (1, 2, 4), (3.0, 12.0, 48.0), expected=1)
    assert line.slope == pytest.approx(2)
    first, _, last = line.theory()
    assert last == pytest.approx(4 * first)
    file = tmp_path / "plot.svg"
    draw(file, [Panel("Merges", "parameters", "seconds", [line])])
    assert "merges: slope 2.00, expected 1 (dashed)" in file.read_text()
    before = file.read_bytes()
    draw(file, [Panel("Merges", "parameters", "seconds", [line])])
    assert file.read_bytes() == before
