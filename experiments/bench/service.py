"""Measures driver and record: trials per second, memory, resume, and idle time of workers.

Eight workers are simulated: Ray actors that take a logical CPU each, with an objective that takes
no time, or sleeps. Beside the figures stands what the disk (fsync) or the database (commit) allows
on this machine, in the same run.

Run it with ``python -m experiments.bench.service [--trials 10000] [--postgres URL]``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from experiments.bench.record import committing
from experiments.bench.timing import seconds_of, timed
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import open_run
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.study.events import Event

WORKERS = 8
TRIALS = 10_000


def study(name: str, trials: int, storage: str | None = None, **evaluator: float) -> StudySpec:
    """An analytic study on simulated workers by a Sobol search, which costs the driver little."""
    data: dict[str, Any] = {
        "name": name,
        "space": {"dim": 8, "bounds": [0.0, 1.0], "start": 0.3},
        "strategy": "sobol",
        "evaluators": [{"kind": "synthetic", "problem": "sphere", **evaluator}],
        "budget": {"trials": trials},
        "anchors": "none",
        "workers": {"backend": "ray", "count": WORKERS},
        "selection": {"repeats": 0, "leaders": 1},
    }
    if storage is not None:
        data["storage"] = storage
    return resolve(validate(data, "bench"), Path.cwd())


class Watch:
    """Times and memory of the driver at every told trial."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.times: list[float] = []
        self.memory: dict[int, float] = {}
        self.busy: list[float] = []

    def observe(self, event: Event) -> None:
        """Note a told trial."""
        if event.kind != "trial" or event.record is None or event.record.tell_index is None:
            return
        self.times.append(time.perf_counter())
        self.busy.append(sum(event.record.seconds.values()))
        if len(self.times) % 1000 == 0:
            self.memory[len(self.times)] = self.process.memory_info().rss / 1e6


def throughput(folder: Path, trials: int, storage: str | None = None) -> dict[str, Any]:
    """Trials per second, memory, and seconds to open and to resume the finished record."""
    watch = Watch()
    spec = study("service", trials, storage)
    cpu = time.process_time()
    run_study(spec, folder / "run", watch.observe)
    cpu = time.process_time() - cpu
    figures = {
        "trials": len(watch.times),
        "trials_per_second": (len(watch.times) - 1) / (watch.times[-1] - watch.times[0]),
        "last_thousand_per_second": 999 / (watch.times[-1] - watch.times[-1000])
        if len(watch.times) > 1000
        else None,
        "driver_cpu_ms_per_trial": 1e3 * cpu / trials,
        "memory_MB": watch.memory,
    }
    figures["opening_seconds"], figures["opening_cpu_seconds"] = timed(
        lambda: open_run(folder / "run")
    )
    figures["resume_seconds"] = _resume(folder, spec)
    return figures


def _resume(folder: Path, spec: StudySpec) -> float:
    """Seconds from the command to the first new trial of a journal, or to end a finished study.

    The first new trial comes once Ray has started its workers.
    """
    journal = folder / "run" / "journal.log"
    if spec.storage is None:
        lines = journal.read_bytes().splitlines(keepends=True)
        asked = [index for index, line in enumerate(lines) if b'"op_code":4' in line]
        journal.write_bytes(b"".join(lines[: asked[-WORKERS]]))
    first: list[float] = []

    def note(event: Event) -> None:
        if event.kind in ("trial", "score") and not first:
            first.append(time.perf_counter())

    began = time.perf_counter()
    run_study(spec, folder / "run", note)
    return (first[0] if first else time.perf_counter()) - began


def idle(folder: Path, trials: int = 600) -> dict[str, float]:
    """Share of time that workers wait, with evaluation times that vary by a factor of five."""
    watch = Watch()
    run_study(study("idle", trials, seconds=0.05, spread=5.0), folder / "idle", watch.observe)
    # From the first result to the last: start and end of the pool are not the scheduler's.
    wall = watch.times[-WORKERS] - watch.times[WORKERS]
    busy = sum(watch.busy[WORKERS + 1 : -WORKERS + 1])
    return {"trials": trials, "idle_share": 1 - busy / (WORKERS * wall)}


def fsync_rate(folder: Path) -> float:
    """Appends of 500 bytes, each synced, per second."""
    with (folder / "probe").open("ab", buffering=0) as file:

        def append() -> None:
            file.write(b"x" * 500)
            os.fsync(file.fileno())

        return 1 / seconds_of(append, repeats=300)


def commit_rate(url: str) -> float:
    """Commits of one row per second."""
    with committing(url) as commit:
        return 1 / seconds_of(commit, repeats=300)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument(
        "--postgres", metavar="URL", help="measure a database instead of the journal"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        limit = (
            fsync_rate(folder) if arguments.postgres is None else commit_rate(arguments.postgres)
        )
        figures = throughput(folder, arguments.trials, arguments.postgres)
        figures |= {
            "limit": "fsync" if arguments.postgres is None else "commit",
            "limit_per_second": limit,
        }
        if arguments.postgres is None:
            figures["idle"] = idle(folder)
    print(json.dumps({"service": figures}, indent=1))


if __name__ == "__main__":
    main()
