"""``make bench-quick``: a minute of ratios, compared with those that are committed.

Every figure is a ratio inside one run, so that a slower machine changes none of them: bytes of a
merge per second against a plain read, a trial's CPU time against that of a fixed loop, a command's
against the import of torch. Both sides take turns and the best time of each counts. A figure that
is worse than the committed one by more than its band fails; one that is better by as much is said,
so that it can be committed with ``--write``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench import combine as combine_bench
from experiments.bench.command import cpu_of, write_study
from experiments.bench.driver import study_of
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.merging.kernels.forms import Form
from mergesearch.search.runs.driver import run_study
from mergesearch.search.spec.study_file import resolve, validate

COMMITTED = Path(__file__).with_name("quick.json")
PARAMETERS = 20_000_000
ROUNDS = 8
TRIALS = 400
#: Steps of the loop that stands for the machine's speed in plain Python.
STEPS = 2_000_000


@dataclass(frozen=True)
class Figure:
    """A ratio of two times; less is better.

    Attributes:
        what: What is divided by what.
        measure: Gives the ratio.
        band: Share by which it may be worse than the committed one; runs on one machine differ by
            less than half of it.
    """

    what: str
    measure: Callable[[], float]
    band: float


def _combine(form: Form) -> float:
    """Seconds of a merge over those of reading what it reads, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    problem = combine_bench.Problem.make(PARAMETERS)
    rows = problem.basis if form == "delta" else problem.trimmed
    basis = torch.from_numpy(problem.basis)
    try:
        seconds = combine_bench.best_seconds(
            {
                "read": lambda: basis.sum(),
                "merge": lambda: combine(
                    problem.base, rows, problem.field, form, problem.out, threads=1
                ),
            },
            ROUNDS,
        )
    finally:
        torch.set_num_threads(before)
    share = len(problem.basis) / (len(problem.basis) + 1)
    return share * seconds["merge"] / seconds["read"]


def _loop() -> float:
    """CPU seconds of a fixed loop."""
    began = time.process_time()
    total = 0
    for step in range(STEPS):
        total += step & 7
    assert total > 0
    return time.process_time() - began


def _driver() -> float:
    """CPU seconds of a study without weights over those of the loop."""
    study = study_of(200, TRIALS)
    times = []
    loops = []
    for number in range(3):
        with tempfile.TemporaryDirectory() as folder:
            spec = resolve(validate(study, "quick"), Path(folder))
            loops.append(_loop())
            began = time.process_time()
            run_study(spec, Path(folder) / "run")
            times.append(time.process_time() - began)
        if number == 0:
            times.clear()  # the first one imports
    return min(times) / min(loops)


def _check() -> float:
    """CPU seconds of ``check`` on headers of 8B parameters over those of importing torch."""
    with tempfile.TemporaryDirectory() as folder:
        study = str(write_study(Path(folder)))
        pairs = [
            (
                cpu_of("-m", "mergesearch", "check", study),
                cpu_of("-c", "import torch"),
            )
            for _ in range(3)
        ]
    return float(min(np.array(pairs)[:, 0]) / min(np.array(pairs)[:, 1]))


FIGURES: Mapping[str, Figure] = {
    "combine": Figure("merge of four experts / read of its bytes", lambda: _combine("delta"), 0.25),
    "live_ties": Figure(
        "live TIES of four / read of its bytes", lambda: _combine("elect_mean"), 0.3
    ),
    "driver": Figure(f"{TRIALS} trials of the driver / {STEPS:,} steps of a loop", _driver, 0.3),
    "check": Figure("check of 8B headers / import of torch", _check, 0.3),
}


def compare(measured: Mapping[str, float], committed: Mapping[str, Any]) -> list[str]:
    """The names of figures that are worse than committed by more than their bands."""
    return [
        name
        for name, ratio in measured.items()
        if name in committed and ratio > committed[name] * (1 + FIGURES[name].band)
    ]


def main() -> None:
    """Measure, print both columns, and end with 1 where a figure is out of its band."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="commit what is measured")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()
    kept = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    committed = kept.get("ratios", {})
    measured = {name: round(figure.measure(), 3) for name, figure in FIGURES.items()}
    worse = compare(measured, committed)
    if options.json:
        print(json.dumps({"measured": measured, "committed": committed, "worse": worse}))
    else:
        _print(measured, committed, worse)
    if options.write:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
        COMMITTED.write_text(json.dumps({"machine": machine, "ratios": measured}, indent=1) + "\n")
    elif worse:
        sys.exit(1)


def _print(measured: Mapping[str, float], committed: Mapping[str, float], worse: list[str]) -> None:
    print(f"{'ratio':<10} {'now':>7} {'committed':>9} {'band':>5}  what")
    for name, ratio in measured.items():
        figure = FIGURES[name]
        before = committed.get(name)
        better = before is not None and ratio * (1 + figure.band) < before
        verdict = "WORSE" if name in worse else "better: --write commits it" if better else ""
        shown = "none" if before is None else f"{before:.3f}"
        print(f"{name:<10} {ratio:>7.3f} {shown:>9} {figure.band:>5.0%}  {figure.what} {verdict}")


if __name__ == "__main__":
    main()
