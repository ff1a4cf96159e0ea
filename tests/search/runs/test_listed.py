"""`mergesearch ls runs`: how each run stands, read without the inputs of its study."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.report.saved import FILE
from mergesearch.search.runs.listed import RunRow, list_runs
from tests.search.studies import analytic, run_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("listed")
    run_in(analytic(trials=8), root / "one")
    return root


def row(folder: Path) -> RunRow:
    (only,) = list_runs(folder)
    return only


def test_a_finished_run_has_a_winner_a_size_and_an_age(folder: Path) -> None:
    found = row(folder)
    assert (found.state, found.trials, Path(found.name).name) == ("finished", 8, "one")
    files = [file for file in (folder / "one").rglob("*") if file.is_file()]
    assert found.bytes == sum(file.stat().st_size for file in files)
    latest = max(file.stat().st_mtime for file in [*files, folder / "one"])
    assert found.changed == latest
    line = found.line(latest + 3 * 86_400)
    assert line.startswith(f"finished, 8 trials, winner: trial {found.winner}, ")
    assert line.endswith(", 3 days ago")


def test_without_its_report_it_is_counted_in_the_log(folder: Path) -> None:
    before = row(folder)
    saved = folder / "one" / FILE
    content = saved.read_bytes()
    saved.unlink()
    try:
        after = row(folder)
    finally:
        saved.write_bytes(content)
    assert (after.state, after.trials, after.winner) == ("finished", 8, before.winner)


def test_a_run_that_a_driver_holds_is_running(folder: Path) -> None:
    run = RunFolder(folder / "one")
    assert run.driver() is None
    holder = RunFolder(folder / "one")
    holder.start(run.load())
    try:
        assert run.driver() == f"process {os.getpid()} on {os.uname().nodename}"
        assert row(folder).state == "running"
    finally:
        holder.release()
    assert row(folder).state == "finished"


@pytest.mark.parametrize("text", ["", "name: [", "name: other", "- 1"])
def test_a_study_that_cannot_be_read_is_told_with_the_reason(tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.yaml").write_text(text)
    found = row(tmp_path)
    assert found.state == "unreadable"
    assert "cannot be read: " in found.line(found.changed)
    assert "\n" not in found.line(found.changed)
