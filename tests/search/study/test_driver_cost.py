"""What the driver does for a trial must not grow with the trials before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.bench.driver import study_of
from mergesearch.search.runs.driver import run_study
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.study import searching


def test_a_study_that_stops_no_trial_looks_at_no_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(point: object, earlier: object) -> bool:
        raise AssertionError("it looked at all earlier trials")

    monkeypatch.setattr(searching, "_stopped_before", look)
    run_study(resolve(validate(study_of(2, 5), "cost"), tmp_path), tmp_path / "run")
