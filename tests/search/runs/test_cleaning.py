"""`mergesearch clean` finds prepared weights by when they were last used."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mergesearch.search.cli.main import app
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.runs.cleaning import unused_weights
from tests.search.conftest import model_study
from tests.search.studies import analytic, run_in

DAY = 86_400.0


def age(files: list[Path], seconds: float) -> None:
    """Make files as old as that."""
    for file in files:
        os.utime(file, (time.time() - seconds,) * 2)


@pytest.fixture
def runs(tmp_path: Path, pico_models: Path, pico_items: Path) -> Path:
    """A run with models, and what it has prepared."""
    study = model_study(pico_models, pico_items) | {"operator": {"name": "ties"}}
    run_in(study | {"budget": {"trials": 8}}, tmp_path / "first")
    return tmp_path


def test_weights_of_a_run_are_kept_until_it_is_gone(runs: Path) -> None:
    assert unused_weights(runs) == []
    arenas = [file for file in (runs / ".arenas").iterdir() if file.suffix == ".arena"]
    assert arenas
    shutil.rmtree(runs / "first")
    dry = CliRunner().invoke(app, ["clean", "--runs", str(runs)])
    assert "unused, removed with --yes" in dry.output
    assert all(file.exists() for file in arenas)
    done = CliRunner().invoke(app, ["clean", "--runs", str(runs), "--yes"])
    assert done.exit_code == 0
    assert {file.name for file in (runs / ".arenas").iterdir()} <= {"lock", "shared"}


def test_weights_of_another_time_belong_to_nobody(runs: Path) -> None:
    old = [file for file in (runs / ".arenas").rglob("*") if file.is_file() and "." in file.name]
    age(old, 30 * DAY)
    found = unused_weights(runs)
    assert {file for each in found for file in each.files} == set(old)
    assert sum(each.bytes for each in found) == sum(file.stat().st_size for file in old)


@pytest.mark.slow
def test_opening_them_marks_them_as_used(runs: Path, pico_models: Path, pico_items: Path) -> None:
    files = [file for file in (runs / ".arenas").rglob("*") if file.is_file() and "." in file.name]
    age(files, 30 * DAY)
    study = model_study(pico_models, pico_items) | {"operator": {"name": "ties"}}
    run_in(study | {"name": "again", "budget": {"trials": 8}}, runs / "second")
    assert not [each for each in unused_weights(runs) if not each.name.startswith("shared/")]


@pytest.mark.slow
def test_nothing_is_unused_while_a_driver_is_at_work(runs: Path) -> None:
    run_in(analytic(trials=8), runs / "other")
    age([file for file in (runs / ".arenas").rglob("*.*") if file.is_file()], 30 * DAY)
    assert unused_weights(runs)
    holder = RunFolder(runs / "other")
    holder.start(holder.load())
    try:
        assert unused_weights(runs) == []
    finally:
        holder.release()
    assert unused_weights(runs)


def test_a_folder_without_runs_has_nothing(tmp_path: Path) -> None:
    assert unused_weights(tmp_path) == []
    assert CliRunner().invoke(app, ["clean", "--runs", str(tmp_path)]).exit_code == 0
