"""`mergesearch init` on machines with cards: trials are timed and run there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.pretend.device import Cards
from tests.search.cli.test_cli import mergesearch


@pytest.mark.parametrize(
    ("count", "workers"), [(1, {"backend": "inline", "gpus": 1}), (2, {"gpus": 1})]
)
def test_a_study_uses_the_cards(
    count: int,
    workers: dict[str, object],
    tmp_path: Path,
    cards: Cards,
    pico_models: Path,
    pico_items: Path,
) -> None:
    cards.count(count)
    out = tmp_path / "study.yaml"
    experts = (pico_models / "left", pico_models / "right")
    given = ("--base", pico_models / "base", "--data", pico_items, "--minutes", 0.02)
    with cards.peak() as peak:
        code, said, err = mergesearch("init", *experts, *given, "--out", out)
    assert code == 0, err
    assert peak[0] > 0
    assert f"cards       {count} x pretend" in said
    assert yaml.safe_load(out.read_text())["workers"] == workers
