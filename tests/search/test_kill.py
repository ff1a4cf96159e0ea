"""SIGKILL of the real command at seeded random moments: nothing told is lost, nothing is asked twice, same end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from search.run import open_run
from tests.search.studies import analytic, fingerprint, write_study

TRIALS = 60
#: Slow enough that a kill lands inside the search, wherever the seed puts it.
STUDY = analytic(
    "kill",
    trials=TRIALS,
    evaluators=[{"kind": "synthetic", "problem": "sphere", "items": 20, "noise": 0.05, "seconds": 0.02}],
)


def command(study: Path, folder: Path) -> list[str]:
    return [sys.executable, "-m", "search", "run", str(study), "--run", str(folder), "--progress", "quiet"]


def told(folder: Path) -> dict[int, tuple]:
    """Finished trials as the journal holds them now."""
    try:
        run = open_run(folder)
    except Exception:  # killed before the run existed
        return {}
    return {entry[0]: entry for entry in fingerprint(run) if entry[5] != "running"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, list[tuple], object]:
    """Seconds, trials and verdict of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    study = write_study(STUDY, folder)
    started = time.monotonic()
    subprocess.run(command(study, folder / "run"), check=True, capture_output=True, timeout=120)
    run = open_run(folder / "run")
    return time.monotonic() - started, fingerprint(run), run.verdict


def kill_and_resume(seed: int, tmp_path: Path, undisturbed: tuple[float, list[tuple], object]) -> int:
    """Kill up to three times at random moments, then let it finish; returns how many kills hit a live driver."""
    seconds, expected, verdict = undisturbed
    rng = np.random.default_rng(seed)
    study, folder, hits = write_study(STUDY, tmp_path), tmp_path / "run", 0
    before: dict[int, tuple] = {}
    for _ in range(int(rng.integers(1, 4))):
        process = subprocess.Popen(command(study, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(float(rng.uniform(0.3, 1.0)) * seconds * 0.9)
        hits += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = told(folder)
        assert {n: after[n] for n in before} == before, "a told trial was lost or changed"
        before = after
    subprocess.run(command(study, folder), check=True, capture_output=True, timeout=120)
    run = open_run(folder)
    assert fingerprint(run) == expected
    assert run.verdict == verdict
    points = [record.point.tobytes() for record in run.log.records if record.point is not None]
    assert len(set(points)) == len(points)
    return hits


@pytest.mark.parametrize("seed", range(5))
def test_killed_driver_resumes_exactly(seed: int, tmp_path: Path, undisturbed: tuple) -> None:
    kill_and_resume(seed, tmp_path, undisturbed)


@pytest.mark.slow
def test_killed_driver_resumes_exactly_many_times(tmp_path: Path, undisturbed: tuple) -> None:
    hits = 0
    for seed in range(100, 124):
        (tmp_path / str(seed)).mkdir()
        hits += kill_and_resume(seed, tmp_path / str(seed), undisturbed)
    assert hits >= 20


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interruption_is_clean_and_resumable(signum: int, tmp_path: Path, undisturbed: tuple) -> None:
    seconds, expected, verdict = undisturbed
    study, folder = write_study(STUDY, tmp_path), tmp_path / "run"
    process = subprocess.Popen(command(study, folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(0.6 * seconds)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from here" in errors
    assert "Traceback" not in errors
    assert (folder / "report.html").is_file()
    subprocess.run(command(study, folder), check=True, capture_output=True, timeout=120)
    run = open_run(folder)
    assert (fingerprint(run), run.verdict) == (expected, verdict)


def test_children_of_a_killed_ray_driver_die_with_it(tmp_path: Path) -> None:
    import psutil

    data = STUDY | {"name": "ray-kill", "workers": {"backend": "ray", "count": 2}}
    study = write_study(data, tmp_path)
    process = subprocess.Popen(command(study, tmp_path / "run"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while len(told(tmp_path / "run")) < 5 and time.monotonic() < deadline:
        time.sleep(0.3)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("ray" in " ".join(child.cmdline()) for child in children)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert [child.cmdline() for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    before = told(tmp_path / "run")
    subprocess.run(command(study, tmp_path / "run"), check=True, capture_output=True, timeout=180)
    run = open_run(tmp_path / "run")
    after = {entry[0]: entry for entry in fingerprint(run)}
    assert {n: after[n] for n in before} == before
    assert len(run.log.records) == TRIALS
    assert all(record.state == "complete" for record in run.log.records)
