"""A study none of whose anchors could be measured: nothing is known that a winner would beat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import StudyFailedError
from mergesearch.search.runs.opened import open_run
from tests.search.studies import analytic, run_in

#: No number for a merge whose coefficients are all alike, as those of the anchor are.
SCORER = """
def score(recipe):
    values = recipe.field.values.ravel()
    return float(values.mean()) if values.std() > 0 else float("nan")
"""


def study(folder: Path, scorer: str) -> dict[str, Any]:
    (folder / "scorer.py").write_text(scorer)
    evaluator = {
        "kind": "python",
        "function": "scorer.py:score",
        "objectives": [{"name": "score", "direction": "minimize"}],
        "model": "none",
    }
    return analytic(trials=8, evaluators=[evaluator], strategy="sobol") | {"allow_code": True}


def test_infeasible_anchors_leave_a_study_without_a_winner(tmp_path: Path) -> None:
    told = "no anchor could be measured, so nothing is known that a winner is better than: .*NaN"
    for _ in range(2):  # it says so again where it goes on
        with pytest.raises(StudyFailedError, match=told) as error:
            run_in(study(tmp_path, SCORER), tmp_path / "run")
        assert "\n" not in str(error.value)
    stopped = open_run(tmp_path / "run")
    assert {r.state for r in stopped.log.records if r.kind == "anchor"} == {"failed"}
    assert stopped.verdict is None
    leading = stopped.report_data().leading
    assert leading is not None
    assert f"the best trials are {leading.number}, " in str(error.value)
    assert f"--trial {leading.number}`" in str(error.value)


def test_without_any_value_the_first_failure_is_told(tmp_path: Path) -> None:
    never = SCORER.replace("values.std() > 0", "False")
    with pytest.raises(StudyFailedError, match=r"no trial succeeded; the first failure: .*NaN"):
        run_in(study(tmp_path, never), tmp_path / "run")
    assert open_run(tmp_path / "run").verdict is None
