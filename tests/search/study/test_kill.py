"""SIGKILL of the real command at seeded random moments.

No recorded result is lost, no point is asked twice, and the end is the same.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import open_run
from tests.commands import run_command
from tests.contracts.problems import CASES
from tests.search.strategies.every_strategy import label, study_of
from tests.search.studies import analytic, fingerprint, spec_of, write_study
from tests.waiting import PATIENT, wait_for

TRIALS = 60
#: Slow enough that a kill lands inside the search, wherever the seed puts it.
STUDY = analytic(
    "kill",
    trials=TRIALS,
    evaluators=[
        {"kind": "synthetic", "problem": "sphere", "items": 20, "noise": 0.05, "seconds": 0.02}
    ],
)


def finished_trials(folder: Path) -> dict[int, tuple]:
    """Finished trials as the journal holds them now."""
    try:
        run = open_run(folder)
    except Exception:  # killed before the run existed
        return {}
    return {entry[0]: entry for entry in fingerprint(run) if entry[5] != "running"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[tuple], object]:
    """Size of the journal in lines, trials and verdict of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    study = write_study(STUDY, folder)
    subprocess.run(
        run_command(study, folder / "run"), check=True, capture_output=True, timeout=PATIENT
    )
    run = open_run(folder / "run")
    return lines(folder / "run"), fingerprint(run), run.verdict


def lines(folder: Path) -> int:
    """Lines in the journal."""
    journal = folder / "journal.log"
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def start_and_signal(
    study: Path, folder: Path, at_line: int, delay: float, signum: int, *more: str
) -> tuple[int, str]:
    """Start the command, and signal it ``delay`` seconds after its journal reaches a size.

    Returns:
        Exit code and messages.
    """
    process = subprocess.Popen(
        run_command(study, folder, *more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while lines(folder) < at_line and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=PATIENT)
    return process.returncode, errors


def kill_and_resume(seed: int, tmp_path: Path, undisturbed: tuple[int, list[tuple], object]) -> int:
    """Kill up to three times at random moments, then let it finish.

    Returns:
        How many kills hit a live driver.
    """
    total, expected, verdict = undisturbed
    rng = np.random.default_rng(seed)
    study = write_study(STUDY, tmp_path)
    folder = tmp_path / "run"
    hits = 0
    before: dict[int, tuple] = {}
    for moment in np.sort(rng.integers(0, total, int(rng.integers(1, 4)))):
        code, _ = start_and_signal(
            study, folder, int(moment), float(rng.uniform(0, 0.03)), signal.SIGKILL
        )
        hits += code == -signal.SIGKILL
        after = finished_trials(folder)
        assert {n: after[n] for n in before} == before, "a finished trial was lost or changed"
        before = after
    subprocess.run(run_command(study, folder), check=True, capture_output=True, timeout=PATIENT)
    run = open_run(folder)
    assert fingerprint(run) == expected
    assert run.verdict == verdict
    points = [record.point.tobytes() for record in run.log.records if record.point is not None]
    assert len(set(points)) == len(points)
    return hits


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2, 3, 4))]
)
def test_killed_driver_resumes_exactly(seed: int, tmp_path: Path, undisturbed: tuple) -> None:
    kill_and_resume(seed, tmp_path, undisturbed)


@pytest.mark.slow
def test_killed_driver_resumes_exactly_many_times(tmp_path: Path, undisturbed: tuple) -> None:
    hits = 0
    for seed in range(100, 150):
        (tmp_path / str(seed)).mkdir()
        hits += kill_and_resume(seed, tmp_path / str(seed), undisturbed)
    assert hits >= 40


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES, ids=label)
def test_every_strategy_asks_the_same_points_after_a_kill(
    tmp_path: Path, pico_models: Path, pico_items: Path, name: str, options: dict
) -> None:
    data = study_of(name, options, pico_models, pico_items, seconds=0.01)
    whole = run_study(spec_of(data, tmp_path), tmp_path / "whole")
    total = lines(tmp_path / "whole")
    study = write_study(data, tmp_path)
    folder = tmp_path / "run"
    hits = 0
    for share in (0.4, 0.7):
        code, _ = start_and_signal(study, folder, int(share * total), 0.01, signal.SIGKILL)
        hits += code == -signal.SIGKILL
    assert hits, "no kill hit a live driver"
    subprocess.run(run_command(study, folder), check=True, capture_output=True, timeout=PATIENT)
    assert fingerprint(open_run(folder)) == fingerprint(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_budget_that_grows_across_kills(seed: int, tmp_path: Path) -> None:
    """The strategy is told of it in the middle of its design, at the same place ever after."""
    problem = {"kind": "synthetic", "problem": "quadratic_tasks", "objectives": 2, "seconds": 0.01}
    data = analytic("grow", trials=40, dim=12, strategy="map", evaluators=[problem])
    more = ("--set", "budget.trials=90")
    study = write_study(data, tmp_path)
    folder = tmp_path / "run"
    rng = np.random.default_rng(seed)
    code, _ = start_and_signal(study, folder, 30 + 10 * seed, 0.0, signal.SIGKILL)
    assert code == -signal.SIGKILL
    before = finished_trials(folder)
    shutil.copytree(folder, tmp_path / "undisturbed")
    for moment in np.sort(rng.integers(lines(folder), 400, 3)):
        start_and_signal(study, folder, int(moment), 0.0, signal.SIGKILL, *more)
        after = finished_trials(folder)
        assert {n: after[n] for n in before} == before, "a finished trial was lost or changed"
        before = after
    ends = []
    for one in (folder, tmp_path / "undisturbed"):
        command = run_command(study, one, *more)
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENT)
        run = open_run(one)
        ends.append((fingerprint(run), run.verdict))
        assert len(run.log.records) == 90
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_resumed_study_may_have_other_threads(tmp_path: Path) -> None:
    """Linear algebra rounds otherwise with more threads; what strategies ask must not."""
    problem = {"kind": "synthetic", "problem": "quadratic_tasks", "objectives": 2}
    data = analytic("threads", trials=150, dim=40, strategy="map", evaluators=[problem])
    study = write_study(data, tmp_path)
    folder = tmp_path / "run"
    for threads, kept in (("1", 0.8), ("2", 1.0)):
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        subprocess.run(
            run_command(study, folder),
            check=True,
            capture_output=True,
            timeout=PATIENT,
            env=environment,
        )
        whole = fingerprint(open_run(folder))
        journal = (folder / "journal.log").read_bytes().splitlines(keepends=True)
        (folder / "journal.log").write_bytes(b"".join(journal[: int(kept * len(journal))]))
    assert len(whole) == 150


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interruption_is_clean_and_resumable(
    signum: int, tmp_path: Path, undisturbed: tuple
) -> None:
    total, expected, verdict = undisturbed
    study = write_study(STUDY, tmp_path)
    folder = tmp_path / "run"
    code, errors = start_and_signal(study, folder, total // 2, 0.0, signum)
    assert code == 130
    assert "resumes from here" in errors
    assert "Traceback" not in errors
    assert (folder / "report.html").is_file()
    subprocess.run(run_command(study, folder), check=True, capture_output=True, timeout=PATIENT)
    run = open_run(folder)
    assert (fingerprint(run), run.verdict) == (expected, verdict)


@pytest.mark.parametrize(
    ("drain", "signals"),
    [(3600, 2), *(pytest.param(seconds, 1, marks=pytest.mark.slow) for seconds in (1, 0))],
)
def test_what_takes_too_long_is_left_and_runs_again(
    drain: float, signals: int, tmp_path: Path
) -> None:
    """A second signal, or the end of the grace period, interrupts an evaluation."""
    slow = {"kind": "synthetic", "problem": "sphere", "seconds": 3600}
    data = STUDY | {"name": "slow", "evaluators": [slow], "driver": {"drain_seconds": drain}}
    study = write_study(data, tmp_path)
    folder = tmp_path / "run"
    process = subprocess.Popen(
        run_command(study, folder, "--set", "budget.trials=61"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while (
        b"mergesearch:asked" not in (folder / "journal.log").read_bytes() if lines(folder) else True
    ):
        time.sleep(0.02)
    time.sleep(0.3)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    _, errors = process.communicate(timeout=PATIENT)
    assert process.returncode == 130
    assert ("running trials have" in errors) == (drain > 0)
    again = f"mergesearch run {study} --run {folder} --set budget.trials=61"
    assert f"`{again}` resumes from here" in errors
    assert [record.state for record in open_run(folder).log.records] == ["running"]


#: Ray's own agents notice the loss of their node by polling and leave within about a minute of a
#: SIGKILL.
SLOW_TO_LEAVE = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def start_ray(
    tmp_path: Path, at_least: int
) -> tuple[Path, subprocess.Popen[bytes], list[psutil.Process]]:
    """A run with two Ray workers, some results into it, with all its descendants."""
    study = write_study(
        STUDY | {"name": "ray-kill", "workers": {"backend": "ray", "count": 2}}, tmp_path
    )
    process = subprocess.Popen(
        run_command(study, tmp_path / "run"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(finished_trials(tmp_path / "run")) >= at_least, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any(name(child).startswith("ray::") for child in children)
    return study, process, children


def name(process: psutil.Process) -> str:
    """What a process calls itself; empty once it is gone or a zombie."""
    try:
        return process.cmdline()[0].strip() if process.status() != psutil.STATUS_ZOMBIE else ""
    except (psutil.Error, IndexError):
        return ""


def left_after(children: list[psutil.Process], seconds: float) -> list[str]:
    """Names of descendants that are still there after some time."""
    deadline = time.monotonic() + seconds
    while any(name(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [name(child) for child in children if name(child)]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_interrupting_a_ray_run_leaves_no_process(tmp_path: Path) -> None:
    _, process, children = start_ray(tmp_path, 5)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENT) == 130
    assert left_after(children, 30) == []


@pytest.mark.slow
def test_a_killed_ray_driver_takes_its_workers_with_it_and_resumes(tmp_path: Path) -> None:
    study, process, children = start_ray(tmp_path, 5)
    process.kill()
    process.wait()
    assert [each for each in left_after(children, 20) if not each.startswith(SLOW_TO_LEAVE)] == []
    assert left_after(children, 120) == []
    before = finished_trials(tmp_path / "run")
    subprocess.run(
        run_command(study, tmp_path / "run"), check=True, capture_output=True, timeout=PATIENT
    )
    run = open_run(tmp_path / "run")
    after = {entry[0]: entry for entry in fingerprint(run)}
    assert {n: after[n] for n in before} == before
    assert len(run.log.records) == TRIALS
    assert all(record.state == "complete" for record in run.log.records)
