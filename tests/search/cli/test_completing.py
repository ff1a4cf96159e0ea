"""Shells complete runs, recipes, keys of the study file, strategies and operators."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
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

PROGRAM = Path(sys.executable).with_name("mergesearch")


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


#: What is typed before the tab key, END, which shows whether a space follows, and the new line.
TYPED = {
    "run study.yaml --set strategy=cma_e": ["run", "study.yaml", "--set", "strategy=cma_es", "END"],
    "run s.yaml --set seed=1 --set=operator.name=tie": [
        *("run", "s.yaml", "--set", "seed=1", "--set=operator.name=ties", "END"),
    ],
    "run study.yaml --set budget.tr": ["run", "study.yaml", "--set", "budget.trials=END"],
    "show runs/le": ["show", "runs/league/END"],
}


@pytest.mark.slow
def test_bash_completes_after_an_equals_sign(folder: Path) -> None:
    """A real bash at a terminal, in which a tab key is pressed."""
    told = "".join(f"mergesearch {line}\tEND\x01printf '<%s>' \x05; echo\n" for line in TYPED)
    script = folder / "complete.sh"
    setting = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1"
    shown = f'"$({setting} mergesearch --show-completion bash)"'
    script.write_text(f"PATH={PROGRAM.parent}:$PATH\neval {shown}\n")
    outer, inner = pty.openpty()
    command = ["bash", "--noprofile", "--rcfile", str(script), "-i"]
    environment = os.environ | {"TERM": "dumb", "INPUTRC": "/dev/null", "COLUMNS": "1000"}
    shell = subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, cwd=folder, env=environment
    )
    os.close(inner)
    os.write(outer, f"{told}exit\n".encode())
    output = b""
    with suppress(OSError):  # Linux's way to say that the other side is closed
        while read := os.read(outer, 65536):
            output += read
    assert shell.wait() == 0
    lines = [line for line in output.decode().splitlines() if line.startswith("<mergesearch>")]
    words = [re.findall("<(.*?)>", line)[1:] for line in lines]
    assert words == list(TYPED.values())
