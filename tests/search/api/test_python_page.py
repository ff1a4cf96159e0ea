"""The programs of docs/python.md run, in their order."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "python.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def page(
    tmp_path: Path, pico_models: Path, pico_items: Path, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """A module for the programs, in a folder with models and items."""
    (tmp_path / "models").symlink_to(pico_models)
    (tmp_path / "items").symlink_to(pico_items)
    monkeypatch.chdir(tmp_path)
    page = ModuleType("python_page")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    return page


def run(page: ModuleType, programs: Sequence[str]) -> str:
    """What the programs print."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for program in programs:
            exec(compile(program, str(PAGE), "exec"), vars(page))
    return said.getvalue()


def test_the_first_search_and_its_results(page: ModuleType, tmp_path: Path) -> None:
    [results] = [program for program in PROGRAMS if "best_model()" in program.partition("small")[0]]
    said = run(page, ["import torch", PROGRAMS[0], results])
    assert "Winner: trial" in said
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    trials = vars(page)["trials"]
    assert len(trials) == 24
    assert {"kind", "score", "score error", "seconds"} < {*trials.columns}


@pytest.mark.slow
def test_all_programs_run(page: ModuleType, tmp_path: Path) -> None:
    said = run(page, PROGRAMS)
    assert "Sequential" in said
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {
        "first",
        "race",
        "small",
        "own",
    }


def test_a_first_search_takes_fifteen_lines() -> None:
    assert len(PROGRAMS[0].strip().splitlines()) <= 15
