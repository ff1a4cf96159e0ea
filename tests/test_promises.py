"""Promises of the README and of SECURITY.md: every one names tests, and these exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
#: Verbs that inspect, and what they are asked about here.
INSPECTING = ("check", "show", "ls", "compare", "compare-weights", "replay", "status", "doctor")


def rows(page: str) -> list[tuple[str, str]]:
    """Promises and tests of a page's table."""
    text = (ROOT / page).read_text(encoding="utf-8")
    table = text.partition("| promise | test |\n|---|---|\n")[2].partition("\n\n")[0]
    found = []
    for line in table.strip().splitlines():
        promise, tests = line.strip("| ").rsplit(" | ", 1)
        found.append((promise, tests))
    return found


OF_README = rows("docs/promises.md")
OF_SECURITY = rows("SECURITY.md")


def _short(row: tuple[str, str]) -> str:
    return row[0][:60]


def test_there_are_promises() -> None:
    assert len(OF_README) > 25
    assert len(OF_SECURITY) > 20


@pytest.mark.parametrize("row", OF_README, ids=_short)
def test_the_readme_says_so(row: tuple[str, str]) -> None:
    assert row[0] in README


@pytest.mark.parametrize("row", OF_README + OF_SECURITY, ids=_short)
def test_a_promise_names_tests_that_exist(row: tuple[str, str]) -> None:
    named = re.findall(r"`([^`]+)::(\w+)`", row[1])
    assert named
    for file, name in named:
        functions = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        assert any(isinstance(each, ast.FunctionDef) and each.name == name for each in functions), (
            f"{file}::{name}"
        )


def test_every_guarantee_of_the_readme_is_among_them() -> None:
    section = README.partition("## What you can rely on ")[2].partition(" ## ")[0]
    bold = re.findall(r"- (\*\*.+?\*\*)", section)
    assert len(bold) >= 5
    for guarantee in bold:
        assert any(promise.startswith(guarantee) for promise, _ in OF_README), guarantee


def test_what_inspects_has_json() -> None:
    code = (
        "import typer.main; from mergesearch.search.cli.main import app; "
        "commands = typer.main.get_command(app).commands; "
        f"print(*[v for v in {INSPECTING!r} if '--json' not in "
        "[o for p in commands[v].params for o in p.opts]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
