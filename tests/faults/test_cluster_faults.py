"""No result is lost or recorded twice, nothing is left behind, and the winner is the same."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from mergesearch.search.runs.opened import open_run
from tests.cluster import ROOT
from tests.commands import run_command
from tests.faults.scenario import TRIALS, fill, small_disk, tell
from tests.search.studies import analytic, fingerprint, run_in, write_study

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]


def test_a_sweep_survives_what_clusters_do(tmp_path: Path) -> None:
    story = tell(tmp_path)
    assert story.changed == []
    assert story.left == []
    assert story.undisturbed is not None
    records = story.records
    expected = story.undisturbed.log.records
    assert len(records) == TRIALS
    found = [(r.number, r.kind, r.recipe.digest, r.state, tuple(r.values.items())) for r in records]
    assert found == [
        (r.number, r.kind, r.recipe.digest, r.state, tuple(r.values.items())) for r in expected
    ]
    told = [record.tell_index for record in records if record.tell_index is not None]
    assert sorted(told) == list(range(len(told)))
    assert story.verdict is not None
    assert story.verdict == story.undisturbed.verdict
    assert len(story.faults) >= 9
    said = "\n".join(story.said)
    assert "joined the cluster" in said
    assert said.count("trying again for up to 300 s") >= 2
    assert "Traceback" not in said


def test_a_full_disk_stops_the_journal_for_a_while_and_loses_nothing(tmp_path: Path) -> None:
    evaluator = {
        "kind": "synthetic",
        "problem": "sphere",
        "items": 10,
        "noise": 0.05,
        "seconds": 0.02,
    }
    data = analytic("full", trials=150, evaluators=[evaluator])
    undisturbed = run_in(data, tmp_path / "undisturbed")
    study = write_study(data, tmp_path)
    with small_disk(tmp_path / "small") as small:
        if not small:
            pytest.skip("this account may not mount a file system")
        folder = tmp_path / "small" / "run"
        process = subprocess.Popen(
            run_command(study, folder), cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while (
            not (folder / "journal.log").exists()
            or (folder / "journal.log").stat().st_size < 30_000
        ):
            assert process.poll() is None
            time.sleep(0.01)
        filler = fill(tmp_path / "small")
        time.sleep(3)
        assert process.poll() is None
        size = (folder / "journal.log").stat().st_size
        time.sleep(0.5)
        assert (folder / "journal.log").stat().st_size == size, "it waits"
        filler.unlink()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "No space left on device; trying again" in errors
        assert "answers again after" in errors
        assert "Traceback" not in errors
        run = open_run(folder)
        assert (fingerprint(run), run.verdict) == (fingerprint(undisturbed), undisturbed.verdict)
