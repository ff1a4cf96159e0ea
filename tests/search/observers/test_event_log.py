"""The structured log: what a line holds, rotation, full disks, and secrets that never reach it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import StudyFailedError
from mergesearch.search.observers.event_log import EventLog
from mergesearch.search.redact import redact, redacted
from mergesearch.search.runs.driver import run_study
from mergesearch.search.study.events import Event
from tests.search.studies import analytic, spec_of

TOKEN = "hf_" + "aB3" * 11


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_event_of_a_study_is_a_line_with_what_a_trial_came_to(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "sphere", "host:1")
    run = run_study(spec_of(analytic(trials=20), tmp_path), tmp_path / "run", log.observe)
    log.close()
    written = lines(tmp_path / "events.jsonl")
    trials = [line for line in written if line["event"] == "trial"]
    assert [line["number"] for line in trials] == [record.number for record in run.log.records]
    for line, record in zip(trials, run.log.records, strict=True):
        assert line["values"] == dict(record.values)
        assert line["seconds"].keys() == record.seconds.keys()
        assert (line["kind"], line["state"], line["worker"]) == (
            record.kind,
            record.state,
            record.worker,
        )
    assert {line["phase"] for line in trials} == {"anchors", "search", "recommendation"}
    scores = [line for line in written if line["event"] == "score"]
    assert {line["split"] for line in scores} == {"validation", "test"}
    assert run.verdict is not None
    for line in scores:  # the split's own values, which are none of the search
        score = run.verdict.scores[line["split"]][line["number"]]
        assert (line["values"], line["errors"]) == (dict(score.values), dict(score.errors))
        assert line["values"] != dict(run.log.records[line["number"]].values)
    assert all(line["study"] == "sphere" and line["driver"] == "host:1" for line in written)
    warned = [line for line in written if line["level"] != "info"]
    assert ["budget.trials" in str(line) for line in warned] == [True]  # few trials for a strategy
    assert datetime.fromisoformat(written[0]["time"]).utcoffset() == timedelta(0)
    assert written[0]["time"][-5] == "."  # milliseconds
    assert log.dropped == 0


def test_failures_have_a_level_and_no_traceback(tmp_path: Path) -> None:
    faulty = {"kind": "synthetic", "problem": "sphere", "faults": {"nan": 0.3, "error": 0.2}}
    log = EventLog(tmp_path / "events.jsonl", "sphere", "host:1")
    run_study(
        spec_of(analytic(trials=40, evaluators=[faulty], anchors="none"), tmp_path),
        tmp_path / "run",
        log.observe,
    )
    found = {
        (line["failure"]["kind"], line["level"])
        for line in lines(tmp_path / "events.jsonl")
        if line.get("failure")
    }
    assert found == {("infeasible", "warning"), ("error", "error")}
    assert "Traceback" not in (tmp_path / "events.jsonl").read_text()


def test_a_resumed_study_goes_on_in_the_same_file(tmp_path: Path) -> None:
    faulty = {"kind": "synthetic", "problem": "sphere", "faults": {"error": 1.0}}
    spec = spec_of(
        analytic(trials=40, evaluators=[faulty], max_consecutive_failures=3, anchors="none"),
        tmp_path,
    )
    for _ in range(2):
        log = EventLog(tmp_path / "events.jsonl", "sphere", "host:1")
        with pytest.raises(StudyFailedError):
            run_study(spec, tmp_path / "run", log.observe)
        log.close()
    assert [
        line["number"] for line in lines(tmp_path / "events.jsonl") if line["event"] == "trial"
    ] == list(range(6))


def test_full_files_are_moved_aside_and_only_three_are_kept(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "s", "host:1", max_bytes=2000)
    for number in range(100):
        log.observe(Event("warning", f"line {number}"))
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["events.jsonl", *(f"events.jsonl.{n}" for n in (1, 2, 3))]
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    kept = [
        line["message"]
        for name in (*reversed(files[1:]), files[0])
        for line in lines(tmp_path / name)
    ]
    assert kept == [f"line {number}" for number in range(100 - len(kept), 100)]


FULL_DISK = """
import resource, sys
from pathlib import Path
from mergesearch.search.observers.event_log import EventLog
from mergesearch.search.study.events import Event
log = EventLog(Path(sys.argv[1]), "s", "host:1")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
log.observe(Event("warning", "before"))
resource.setrlimit(resource.RLIMIT_FSIZE, (Path(sys.argv[1]).stat().st_size + 40, hard))
for number in range(5):
    log.observe(Event("warning", f"lost {number}"))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.observe(Event("warning", "after"))
log.close()
print(log.dropped)
"""


def test_lines_that_do_not_fit_on_the_disk_are_counted_and_leave_no_half_lines(
    tmp_path: Path,
) -> None:
    # The kernel lets 40 bytes of the line through, as a disk does that fills up in the middle of a
    # write.
    path = tmp_path / "events.jsonl"
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "5", "")
    messages = [(line["event"], line["message"]) for line in lines(path)]
    assert messages == [
        ("warning", "before"),
        ("dropped", "5 lines before this one could not be written"),
        ("warning", "after"),
    ]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_log_that_cannot_be_opened_never_stops_a_study(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "events.jsonl"
    log = EventLog(path, "sphere", "host:1")
    run = run_study(spec_of(analytic(trials=10), tmp_path), tmp_path / "run", log.observe)
    assert run.verdict is not None
    assert log.dropped > 10
    path.parent.mkdir()
    log.close()
    assert [(line["event"], line["dropped"]) for line in lines(path)] == [("dropped", log.dropped)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_device_that_is_full_is_only_counted_and_the_path_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    log = EventLog(path, "s", "host:1")
    log.observe(Event("warning", "lost"))
    assert log.dropped == 1
    path.unlink()
    log.observe(Event("warning", "after"))
    log.close()
    assert [line["event"] for line in lines(path)] == ["dropped", "warning"]
    assert log.dropped == 1


def test_lines_of_several_threads_stay_whole(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "s", "host:1", max_bytes=50_000)
    threads = [
        threading.Thread(
            target=lambda k=k: [log.observe(Event("warning", f"{k} {n}")) for n in range(200)]
        )
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert log.dropped == 0
    seen = {line["message"] for path in tmp_path.iterdir() for line in lines(path)}
    assert len(seen) == 800


def test_secrets_never_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", 'quo"ted/secret')
    log = EventLog(tmp_path / "events.jsonl", "s", "host:1")
    log.observe(
        Event("warning", f'no route to postgresql://me:pa/s@s@db/x with {TOKEN} or quo"ted/secret')
    )
    log.close()
    assert (
        lines(tmp_path / "events.jsonl")[0]["message"]
        == "no route to postgresql://me:***@db/x with *** or ***"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:secret@db:5432/x", "postgresql://me:***@db:5432/x"),
        ("redis://:secret@db", "redis://:***@db"),
        ("a postgresql+psycopg://me:a@b@db/x failed", "a postgresql+psycopg://me:***@db/x failed"),
        ("a://u:one@h and b://u:two@h", "a://u:***@h and b://u:***@h"),
        ("http://localhost:8080/path@1", "http://localhost:8080/path@1"),
        ("org/name@revision, me@example.org", "org/name@revision, me@example.org"),
        (f"token={TOKEN}.", "token=***."),
        ("hf_hub_download is a function", "hf_hub_download is a function"),
    ],
)
def test_what_is_a_secret(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_values_of_secret_variables_are_hidden_and_short_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("API_KEY", "with space&more")
    monkeypatch.setenv("PGPASSWORD", "database-password")
    monkeypatch.setenv("OTHER_SECRET", "short")
    monkeypatch.setenv("TOKENIZER", "not-a-secret")
    text = "with space&more with%20space%26more database-password short not-a-secret"
    assert redact(text) == "*** *** *** short not-a-secret"


def test_a_secret_that_holds_another_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "abcdefgh")
    monkeypatch.setenv("B_KEY", "abcdefgh-tail")
    assert redact("abcdefgh-tail") == "***"


def test_nested_data_is_redacted_and_left_as_it_was() -> None:
    data = {"a": [f"{TOKEN}", 1, None], "b": {"c": ("x://u:pw@h", 2.5)}, TOKEN: True}
    assert redacted(data) == {"a": ["***", 1, None], "b": {"c": ["x://u:***@h", 2.5]}, "***": True}
    assert data["a"][0] == TOKEN  # type: ignore[index]


def test_a_study_is_as_fast_with_the_log_as_without(tmp_path: Path) -> None:
    # One line costs well under a millisecond, else it would be felt by studies whose trials take
    # milliseconds.
    log = EventLog(tmp_path / "events.jsonl", "s", f"host:{os.getpid()}")
    begun = os.times().user
    for _ in range(500):
        log.observe(Event("warning", "x" * 200))
    assert os.times().user - begun < 1.0
