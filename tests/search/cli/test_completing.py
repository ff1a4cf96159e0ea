"""Shells complete runs, recipes, keys of the study file, strategies and operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergesearch.search.cli.completing import (
    complete_run,
    complete_setting,
    complete_source,
    complete_topic,
)
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.strategies.table import STRATEGIES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("runs/digits", "runs/skills", "runs/league/first"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "study.yaml").touch()
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "recipe.json").touch()
    (tmp_path / "by-hand.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs(folder: Path) -> None:
    assert complete_run("") == ["runs/", "runs/digits", "runs/league/", "runs/skills"]
    assert complete_run("runs/d") == ["runs/digits"]
    assert complete_run("runs/league/") == ["runs/league/first"]
    assert complete_run(f"{folder}/runs/s") == [f"{folder}/runs/skills"]
    assert complete_run("nowhere/") == []


def test_recipes_and_exports_beside_runs(folder: Path) -> None:
    assert complete_source("b") == ["best", "by-hand.yaml"]
    assert complete_source("best/") == ["best/recipe.json"]
    assert complete_source("runs/d") == ["runs/digits"]


def test_keys_of_the_study_file_and_names() -> None:
    assert complete_setting("budget.t") == ["budget.trials="]
    assert "budget." in complete_setting("b")
    assert {word.rstrip("=.") for word in complete_setting("")} == {*StudySpec.model_fields}
    strategies = complete_setting("strategy.name=")
    assert {word.removeprefix("strategy.name=") for word in strategies} == {"auto", *STRATEGIES}
    assert complete_setting("operator=tie") == ["operator=ties"]
    assert complete_setting("nothing.of") == complete_setting("seed=1") == []


def test_topics_of_help() -> None:
    assert "strategy.cma_es" in complete_topic("strategy.c")
    assert "evaluators.command" in complete_topic("evaluators.c")
    assert complete_topic("stu") == ["study"]
    assert complete_topic("nothing.of") == []


def test_a_shell_gets_them(folder: Path) -> None:
    """As the script asks that ``--install-completion`` writes for zsh."""
    environment = os.environ | {
        "_MERGESEARCH_COMPLETE": "complete_zsh",
        "_TYPER_COMPLETE_ARGS": "mergesearch show runs/d",
    }
    command = [str(Path(sys.executable).with_name("mergesearch"))]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert "runs/digits" in told.stdout
