"""Studies whose objectives are no means of items: intervals are paired, also when read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators.items import RESAMPLES
from mergesearch.search.report.gains import anchor_intervals
from mergesearch.search.report.headline import headline
from mergesearch.search.report.saved import saved_data
from mergesearch.search.runs.opened import Run, open_run
from tests.search.conftest import model_study
from tests.search.studies import run_in

#: Of the second evaluator, each over two domains.
OTHERS = [
    {"name": "worst", "metric": "cross_entropy", "reduce": "worst"},
    {"name": "middle", "metric": "cross_entropy", "reduce": "geometric_mean"},
]


def study(models: Path, items: Path) -> dict[str, Any]:
    data = model_study(models, items, budget={"trials": 8}, strategy={"name": "sobol"})
    first = data["evaluators"][0]
    plain = [{"name": "mean", "metric": "accuracy"}]
    return data | {"evaluators": [first | {"objectives": plain}, first | {"objectives": OTHERS}]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pico_models: Path, pico_items: Path) -> Run:
    return run_in(study(pico_models, pico_items), tmp_path_factory.mktemp("study") / "run")


def test_every_objective_has_a_paired_interval(run: Run) -> None:
    data = run.report_data()
    intervals = anchor_intervals(data)
    assert {each.objective for each in intervals} == {"mean", "worst", "middle"}
    assert all(each.paired for each in intervals)
    assert not any("unpaired" in line for line in headline(data))
    for score in run.verdict.scores["test"].values():  # type: ignore[union-attr]
        assert {name: len(each) for name, each in score.resampled.items()} == {
            "worst": RESAMPLES,
            "middle": RESAMPLES,
        }
        assert np.median(score.resampled["worst"]) == pytest.approx(score.values["worst"], rel=0.2)


def test_a_run_that_is_read_back_says_the_same(run: Run) -> None:
    intervals = anchor_intervals(run.report_data())
    folder = run.folder.path
    assert anchor_intervals(open_run(folder).report_data()) == intervals
    saved = saved_data(folder)
    assert saved is not None
    assert anchor_intervals(saved) == intervals


@pytest.mark.slow
def test_another_run_of_the_study_has_the_same_intervals(
    run: Run, tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    again = run_in(study(pico_models, pico_items), tmp_path / "run")
    assert anchor_intervals(again.report_data()) == anchor_intervals(run.report_data())


def test_trials_of_the_search_keep_no_resamples(run: Run) -> None:
    journal = (run.folder.path / "journal.log").read_text(encoding="utf-8")
    lines = [line for line in journal.splitlines() if "resampled" in line]
    assert len(lines) >= 2 * len(run.report_data().anchors)
    assert all("score:" in line for line in lines)
