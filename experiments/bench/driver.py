"""Measures the CPU time of a trial in the driver: ask, log and tell, without an evaluation."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from mergesearch.search.runs.driver import run_study
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.study.events import Event

DIM = 1000
TRIALS = 5000
#: Mean CPU time over this many trials before each mark.
WINDOW = 100
MARKS = (100, 500, 1000, 2000, 3000, 4000, 5000)


def study_of(dimensions: int, trials: int, strategy: str = "cma_es") -> dict[str, Any]:
    """A study without weights, whose evaluation takes no time and which has no anchors."""
    return {
        "name": "driver",
        "space": {"dim": dimensions, "bounds": [0.0, 1.0], "start": 0.3},
        "strategy": strategy,
        "evaluators": [{"kind": "synthetic", "problem": "sphere"}],
        "budget": {"trials": trials},
        "anchors": "none",
    }


def measure() -> dict[str, Any]:
    """CPU milliseconds of a trial at several sizes of the log, and of opening the finished log."""
    study = study_of(DIM, TRIALS + 2)
    clock: dict[int, float] = {}

    def note(event: Event) -> None:
        if (
            event.kind == "trial"
            and event.record is not None
            and event.record.tell_index is not None
        ):
            clock[event.record.tell_index + 1] = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        run_study(resolve(validate(study, "bench"), Path(folder)), Path(folder) / "run", note)
        size = (Path(folder) / "run" / "journal.log").stat().st_size
    cost = {
        mark: 1e3 * (clock[mark] - clock[max(1, mark - WINDOW)]) / (mark - max(1, mark - WINDOW))
        for mark in MARKS
    }
    return {
        "dim": DIM,
        "ms_cpu_per_trial": {mark: round(value, 2) for mark, value in cost.items()},
        "growth": round(cost[MARKS[-1]] / cost[MARKS[0]], 2),
        "journal_kB_per_trial": round(size / TRIALS / 1e3, 1),
    }


def main() -> None:
    """Print the figures and whether they hold the bar: at most 5 ms, flat."""
    figures = measure()
    print(f"driver cost per trial, d = {DIM}, log included (CPU ms, mean of {WINDOW} trials)")
    for mark, value in figures["ms_cpu_per_trial"].items():
        print(f"  at {mark:>5} trials  {value:6.2f} ms")
    print(
        f"  growth 100 -> {TRIALS}: {figures['growth']}x; journal "
        f"{figures['journal_kB_per_trial']} kB per trial"
    )
    print(json.dumps({"driver": figures}))


if __name__ == "__main__":
    main()
