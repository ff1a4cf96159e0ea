"""`mergesearch add`: one more expert for a finished merge, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.search.cli.test_cli import mergesearch


def test_adds_an_expert_and_says_so(tmp_path: Path, pico_models: Path) -> None:
    left, right, base = (str(pico_models / name) for name in ("left", "right", "base"))
    out = tmp_path / "both"
    code, text, err = mergesearch("add", left, right, "--base", base, "--out", str(out))
    assert (code, err) == (0, "")
    assert text.startswith(f"added right to 1 expert in {out}, ")
    assert json.loads((out / "continual.json").read_text())["joined"] == 2
    assert (out / "config.json").is_file()


def test_an_expert_without_a_base_is_wrong_input(tmp_path: Path, pico_models: Path) -> None:
    left, right = (str(pico_models / name) for name in ("left", "right"))
    code, _, err = mergesearch("add", left, right, "--out", str(tmp_path / "both"))
    assert code == 2
    assert "give --base to begin with an expert" in err
