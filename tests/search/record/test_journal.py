"""The journal of one writer: whole lines only, waits for room, one sync for a batch."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from mergesearch.merging import StudyFailedError
from mergesearch.search.record.journal import RunJournal
from mergesearch.search.record.storage import open_storage, read_storage
from mergesearch.search.retry import RetryPolicy
from tests.waiting import PATIENT

#: Fills a file system of its own, as far as it may: a limit on the size of files acts as a full
#: disk does.
FULL = """
import resource, signal, sys
from pathlib import Path
from mergesearch.search.record.journal import RunJournal
from mergesearch.search.retry import RetryPolicy
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
said = []
def sleep(seconds):
    if len(said) == 1 and sys.argv[2] == "freed":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
clock = iter(range(10**6))
journal = RunJournal(Path(sys.argv[1]), RetryPolicy(20, said.append, lambda: next(clock), sleep))
for number in range(60):
    journal.append_logs([{"op_code": 0, "number": number, "text": "x" * 20}])
print("|".join(said))
"""


def log(number: int) -> dict:
    name = f"study {number}"
    return {
        "op_code": 0,
        "worker_id": "test",
        "study_name": name,
        "directions": [1],
        "number": number,
    }


def test_what_is_appended_is_read_back_by_it_and_by_optuna(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    journal = RunJournal(path, RetryPolicy(0))
    for number in range(5):
        journal.append_logs([log(number)])
    assert [entry["number"] for entry in journal.read_logs(4)] == [4]
    assert [entry["number"] for entry in journal.read_logs(2)] == [2, 3, 4]
    journal.append_logs([log(5), log(6)])
    assert [entry["number"] for entry in journal.read_logs(5)] == [5, 6]
    theirs = optuna.storages.journal.JournalFileBackend(str(path))
    assert [entry["number"] for entry in theirs.read_logs(0)] == list(range(7))


def test_a_batch_is_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = RunJournal(tmp_path / "journal.log", RetryPolicy(0))
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    with journal.batched_writes():
        for number in range(5):
            with journal.batched_writes():
                journal.append_logs([log(number)])
        assert not synced
        assert [entry["number"] for entry in journal.read_logs(0)] == list(range(5))
    assert len(synced) == 1
    assert len((tmp_path / "journal.log").read_text().splitlines()) == 5


@pytest.mark.parametrize("freed", ["freed", "never"])
def test_a_full_disk_is_waited_for_and_leaves_whole_lines(tmp_path: Path, freed: str) -> None:
    path = tmp_path / "journal.log"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), freed],
        capture_output=True,
        text=True,
        timeout=PATIENT,
    )
    lines = path.read_bytes()
    assert lines.endswith(b"\n")
    numbers = [json.loads(line)["number"] for line in lines.splitlines()]
    if freed == "freed":
        assert numbers == list(range(60))
        begun, ended = done.stdout.strip().split("|")
        assert os.strerror(errno.EFBIG) in begun
        assert "answers again after" in ended
    else:
        assert numbers == list(range(len(numbers)))
        assert 0 < len(numbers) < 60
        assert "StudyFailedError" in done.stderr
        assert "expected it to come back within 20 s" in done.stderr


def test_a_failed_sync_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the kernel may have dropped the pages, and the next one succeeds."""
    path = tmp_path / "journal.log"
    journal = RunJournal(path, RetryPolicy(5, sleep=lambda seconds: None))
    fsync = os.fsync
    failures = [OSError(errno.EIO, "Input/output error")]

    def failing(fd: int) -> None:
        if failures:
            os.ftruncate(fd, 0)  # the pages are gone
            raise failures.pop()
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    journal.append_logs([log(1), log(2)])
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_reader_beside_the_writer_sees_what_is_synced(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "journal.log")
    study = optuna.create_study(
        storage=storage, study_name="s", sampler=optuna.samplers.RandomSampler(seed=0)
    )
    study.add_trial(optuna.trial.create_trial(value=1.0))
    reader = read_storage(tmp_path / "journal.log")
    assert [t.value for t in reader.get_all_trials(reader.get_study_id_from_name("s"))] == [1.0]


def test_a_retry_policy_says_when_waiting_begins_and_ends() -> None:
    said = []
    tries = iter([OSError("gone"), OSError("gone"), None])

    def action() -> int:
        error = next(tries)
        if error:
            raise error
        return 7

    assert (
        RetryPolicy(60, said.append, sleep=lambda seconds: None)(action, (OSError,), "storage") == 7
    )
    assert [text.split(";")[0] for text in said[:1]] == ["storage: gone"]
    assert said[1].startswith("storage: answers again")
    assert len(said) == 2
    with pytest.raises(ValueError, match="wrong"):
        RetryPolicy(60)(lambda: (_ for _ in ()).throw(ValueError("wrong")), (OSError,), "storage")
    with pytest.raises(StudyFailedError, match=r"within 0 s, received: gone"):
        RetryPolicy(0)(lambda: (_ for _ in ()).throw(OSError("gone")), (OSError,), "storage")
