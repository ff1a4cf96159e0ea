"""Going on by the commands that a user types: other budgets, mended scorers, hints."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mergesearch.search.cli.resuming import resume_command
from mergesearch.search.runs.opened import open_run
from tests.commands import run_command
from tests.search.studies import write_study
from tests.search.study.test_going_on import SCORER, mend, scored
from tests.waiting import PATIENT


def test_the_hint_repeats_what_was_given() -> None:
    assert resume_command(Path("study.yaml"), None, []) == "mergesearch run study.yaml"
    given = ["budget.trials=80", 'experts=["a b", c]']
    hint = resume_command(Path("my study.yaml"), Path("runs/2"), given, "auto", trust_log=True)
    assert hint == (
        "mergesearch run 'my study.yaml' --run runs/2 --set budget.trials=80 "
        "--set 'experts=[\"a b\", c]' --address auto --trust-log"
    )


def run(study: Path, folder: Path, *more: str) -> tuple[int, str]:
    """Exit code and messages of ``mergesearch run``."""
    done = subprocess.run(
        run_command(study, folder, *more, progress="quiet"),
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENT,
        cwd=study.parent,
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("database", [False, True])
def test_a_mended_scorer_is_accepted_for_the_trials_that_failed(
    tmp_path: Path, database: bool
) -> None:
    storage = {"storage": f"sqlite:///{tmp_path / 'log.db'}"} if database else {}
    data = scored(tmp_path, 0.28, trials=14, **storage)
    study = write_study(data, tmp_path)
    folder = tmp_path / "run"
    assert run(study, folder)[0] == 0
    mended = SCORER.replace("raise ValueError", "return value if value else ValueError")
    (tmp_path / "scorer.py").write_text(mended)
    code, errors = run(study, folder)
    assert code == 2
    assert "expected the functions that its trials were measured with" in errors
    assert "--retry-failed accepts functions that were mended" in errors
    code, errors = run(study, folder, "--retry-failed", "--set", "budget.trials=16")
    assert code == 0, errors
    again = open_run(folder)
    assert sum(record.retry_of is None for record in again.log.records) == 16
    assert {r.state for r in again.log.records if r.retry_of is not None} == {"complete"}
    assert "keep the scores of the earlier code" in "\n".join(again.report_data().warnings)
    # From now on it is the code of the study.
    assert run(study, folder, "--set", "budget.trials=16")[0] == 0


@pytest.mark.slow
def test_a_study_that_cannot_measure_its_anchors_ends_with_code_1(tmp_path: Path) -> None:
    study = write_study(scored(tmp_path, 9.0, trials=9), tmp_path)
    code, errors = run(study, tmp_path / "run")
    assert code == 1
    [line] = [line for line in errors.splitlines() if line.startswith("mergesearch: error: ")]
    assert "no anchor could be measured, of 1: " in line
    assert "the tokenizer is missing" in line
    mend(tmp_path)
    assert run(study, tmp_path / "run")[0] == 1
    assert run(study, tmp_path / "run", "--retry-failed")[0] == 0
