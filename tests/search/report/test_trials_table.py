"""The table of trials beside the page."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from mergesearch.search.cli.main import app
from mergesearch.search.report.coefficients import mean_coefficients
from mergesearch.search.report.saved import saved_text
from mergesearch.search.report.trials_table import trials_csv, trials_parquet
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


def test_parquet_has_the_same_table_with_types():
    data = make_study(2)
    lines = [*csv.reader(io.StringIO(trials_csv(data)))]
    table = parquet.read_table(io.BytesIO(trials_parquet(data)))
    assert table.column_names == lines[0]
    rows = [["" if v is None else str(v) for v in row.values()] for row in table.to_pylist()]
    assert rows == lines[1:]
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types["trial"] == "int64"
    assert types["feasible"] == "bool"
    assert {types[name] for name in ("accuracy", "test accuracy error")} == {"double"}
    assert types["failure"] == "string"


def test_a_run_gives_its_table_from_its_folder_alone(tmp_path: Path):
    data = make_study(2)
    run = tmp_path / "run"
    run.mkdir()
    (run / "report_data.json").write_text(saved_text(data))
    for ending, expected in ((".parquet", trials_parquet(data)), (".csv", trials_csv(data))):
        table = tmp_path / f"trials{ending}"
        told = CliRunner().invoke(app, ["report", str(run), "--trials", str(table)])
        assert told.output == f"trials: {table}\n"
        content = table.read_bytes()
        assert content == (expected if isinstance(expected, bytes) else expected.encode())
    assert [*run.iterdir()] == [run / "report_data.json"]
    told = CliRunner().invoke(app, ["report", "nowhere", "--trials", "trials.xlsx"])
    assert str(told.exception) == "trials.xlsx: expected a name that ends in .csv or .parquet"
