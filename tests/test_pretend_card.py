"""The tests in ``pretend/`` pass, in a process of their own.

A device that is registered belongs to the whole process: torch then has an accelerator, and its
first backward pass has to come later.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretend.build import NoCompilerError, library
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_tests_of_the_pretend_card_pass(marks: str, tmp_path: Path) -> None:
    try:
        library()
    except NoCompilerError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "tests.pretend", "tests/pretend", "-m", marks]
    options = ["-n0", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'pretend'}"]
    ended = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=3 * PATIENT
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
