"""The table of trials beside the page."""

from __future__ import annotations

import csv
import io

import pytest

from mergesearch.search.report.coefficients import mean_coefficients
from mergesearch.search.report.trials_csv import trials_csv
from tests.search.report.test_report import make_study

pytestmark = pytest.mark.xdist_group("report")


def test_every_trial_is_a_line_with_all_that_was_measured():
    data = make_study(2)
    rows = list(csv.DictReader(io.StringIO(trials_csv(data))))
    assert [int(row["trial"]) for row in rows] == [r.number for r in data.records]
    winner = data.winner
    row = rows[winner.number]
    assert float(row["accuracy"]) == winner.values["accuracy"]
    assert float(row["accuracy error"]) == winner.errors["accuracy"]
    test = data.score(winner, "test")
    assert float(row["test cross_entropy"]) == test.values["cross_entropy"]
    assert float(row["merge seconds"]) == winner.seconds["merge"]
    means = mean_coefficients(winner.recipe.field)
    assert [float(row[f"coefficient {name}"]) for name in data.experts] == means.tolist()
    failed = next(r for r in data.records if r.state == "failed")
    assert rows[failed.number]["accuracy"] == rows[failed.number]["coefficient upright"] == ""
    assert rows[failed.number]["failure"] == failed.failure.message
    unmeasured = next(r for r in data.records if data.score(r, "test") is None)
    assert rows[unmeasured.number]["test accuracy"] == ""
