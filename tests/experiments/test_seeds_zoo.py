"""The seeds zoo: models whose units do not line up, and merges of them once they do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import e0016_alignment as experiment
from experiments.zoo import seeds
from experiments.zoo.digits import Training

TINY = replace(
    seeds.Settings(), vit=Training(2, 1e-3, batch=8), resnet=Training(2, 1e-3, batch=8), width=4
)


@pytest.mark.slow
def test_the_zoo_is_reused_and_its_rows_can_be_merged(tmp_path: Path) -> None:
    zoo = seeds.build_seeds(tmp_path / "seeds", TINY)
    made = (zoo / "manifest.json").stat().st_mtime_ns
    assert (seeds.build_seeds(zoo, TINY) / "manifest.json").stat().st_mtime_ns == made
    assert set(json.loads((zoo / "manifest.json").read_text())["accuracy"]) == {*seeds.MODELS}
    seeds.build_seeds(tmp_path / "seeds-wide", replace(TINY, width=6))
    for pair in experiment.PAIRS:
        for row in experiment.ROWS:
            if row.suits(pair):
                assert 0 <= experiment.accuracy(zoo, pair, row, 0.5) <= 1


@pytest.mark.slow
def test_alignment_wins_back_what_averages_lose(tmp_path: Path) -> None:
    zoo = seeds.build_seeds(tmp_path / "seeds")
    pair = experiment.PAIRS[1]
    rows = {row.title: row for row in experiment.ROWS}
    scores = {
        title: experiment.accuracy(zoo, pair, rows[title], 0.5)
        for title in ("as they are", "weight matching", "activation matching")
    }
    assert scores["as they are"] < 0.5
    assert scores["weight matching"] > scores["as they are"] + 0.1
    assert scores["activation matching"] > scores["weight matching"] + 0.05
    assert experiment.accuracy(zoo, pair, rows["PLeaS, data-free, 100 % wider"], 0.5) > 0.9
