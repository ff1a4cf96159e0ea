"""A report is read back from its run folder alone, and says what the trial log says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mergesearch.merging import RunFolderError
from mergesearch.search.cli.main import app
from mergesearch.search.report.page.html_page import render
from mergesearch.search.report.saved import FILE, LATER, saved_data, saved_text
from mergesearch.search.report.writing import as_json
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.runs.reading import read_run
from tests.search.studies import analytic, run_in

#: The studies of this file are made once, by one worker.
pytestmark = pytest.mark.xdist_group("saved")

TWO = {"kind": "synthetic", "problem": "quadratic_tasks", "objectives": 2, "items": 40}
STUDIES: dict[str, dict[str, Any]] = {
    "one objective": analytic(trials=30),
    "several objectives": analytic(trials=60, evaluators=[TWO], strategy="nsga2"),
}


@pytest.fixture(scope="module", params=STUDIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_in(STUDIES[request.param], tmp_path_factory.mktemp("saved") / "run")


def shown(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["show", str(folder), *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_page_and_all_numbers_are_those_of_the_log(run: Run) -> None:
    read = saved_data(run.folder.path)
    assert read is not None
    logged = run.report_data()
    assert as_json(read) == as_json(logged)
    assert render(read) == render(logged)
    assert saved_text(read) == saved_text(logged)


@pytest.mark.parametrize("options", [(), ("--json",), ("--front",), ("--failed", "--json")])
def test_show_needs_neither_inputs_nor_log(
    run: Run, options: tuple[str, ...], tmp_path: Path
) -> None:
    before = shown(run.folder.path, *options)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / FILE).write_bytes((run.folder.path / FILE).read_bytes())
    assert shown(moved, *options) == before.replace(str(run.folder.path), str(moved))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 0}', '{"format": 1}', "null"])
def test_a_file_that_cannot_be_read_is_as_good_as_none(
    run: Run, damage: str, tmp_path: Path
) -> None:
    expected = as_json(open_run(run.folder.path).report_data())
    saved = run.folder.path / FILE
    content = saved.read_bytes()
    saved.write_text(damage)
    try:
        assert as_json(read_run(run.folder.path)) == expected
    finally:
        saved.write_bytes(content)


def test_a_score_that_tells_no_violations_has_none(run: Run, tmp_path: Path) -> None:
    content = json.loads((run.folder.path / FILE).read_text())
    scores = content["verdict"]["scores"]["validation"].values()
    for score in scores:
        del score["violations"]
    (tmp_path / FILE).write_text(json.dumps(content))
    read = saved_data(tmp_path)
    assert read is not None
    assert read.verdict is not None
    assert all(not score.violations for score in read.verdict.scores["validation"].values())
    assert len(scores) > 0


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no study\.yaml"):
        read_run(tmp_path)


def test_a_run_that_goes_on_has_no_report_that_says_less(tmp_path: Path) -> None:
    run = run_in(analytic(trials=12), tmp_path / "run")
    saved = run.folder.path / FILE
    saved.unlink()
    run_in(analytic(trials=12), tmp_path / "run")
    assert (
        json.loads(saved.read_text())["verdict"]["winner"]
        == open_run(run.folder.path).trial(None).number
    )


def test_what_the_driver_knew_of_weights_and_costs_is_kept(run: Run, tmp_path: Path) -> None:
    row = {"expert": "left", "kind": "fine-tuned", "cosine": 0.9987, "distance": None}
    given = replace(
        run.report_data(),
        untouched="12% of the parameters stay the base's: norms",
        lineages=(row | {"finding": ""},),
        predicted_seconds={"prepare": 95.0},
    )
    (tmp_path / FILE).write_text(saved_text(given))
    read = saved_data(tmp_path)
    assert read is not None
    read = replace(read, run=given.run)
    assert render(read) == render(given)
    page = render(read)
    for told in ("12% of the parameters stay", "fine-tuned", "0.9987", "1 min 35 s"):
        assert told in page


def test_a_file_of_an_older_version_is_read(run: Run, tmp_path: Path) -> None:
    content = json.loads(saved_text(run.report_data()))
    for name in LATER:
        del content[name]
    (tmp_path / FILE).write_text(json.dumps(content))
    read = saved_data(tmp_path)
    assert read is not None
    assert read.lineages == ()
    assert as_json(replace(read, run=str(run.folder.path))) == as_json(run.report_data())
