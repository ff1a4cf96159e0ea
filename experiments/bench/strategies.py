"""Measures the CPU time of strategies in many dimensions, after thousands of results.

``python -m experiments.bench.strategies``

Each runs in a process of its own on one thread: 2,000 dimensions (or the most that it bears), eight
suggestions outstanding, until 5,000 results have been told or its share of the time is over. What
counts is the CPU of an ask and a tell together, averaged over the last results: a model that is
refitted every so often is counted in full.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

DIM = 2000
TRIALS = 5000
OUTSTANDING = 8
WINDOW = 500
SECONDS = 40.0
BAR_MS = 50.0


def measure(name: str) -> dict[str, Any]:
    """Figures of one strategy."""
    from mergesearch.merging import InputError
    from mergesearch.search.strategies.table import STRATEGIES, build_strategy, check_options
    from tests.contracts.problems import make_problem, result_at

    entry = STRATEGIES[name]
    objectives = 2 if entry.objectives == "several" else 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # As many dimensions as it bears: some refuse more than they are good for.
    for dim in (DIM, entry.most, entry.dims[1]):
        problem = make_problem(name, dim or DIM, objectives)
        with contextlib.suppress(InputError):
            strategy = build_strategy(name, check_options(name, {}), problem, 0)
            break
    outstanding = strategy.ask(OUTSTANDING)
    spent: list[float] = []
    started = time.perf_counter()
    rng = np.random.default_rng(0)
    while len(spent) < TRIALS and time.perf_counter() - started < SECONDS:
        done = outstanding.pop(int(rng.integers(len(outstanding))))
        result = result_at(done.point, problem, done.id)
        begun = time.process_time()
        strategy.tell([result])
        outstanding += strategy.ask(1)
        spent.append(time.process_time() - begun)
    window = np.array(spent[-WINDOW:])
    return {
        "dim": problem.dim,
        "told": len(spent),
        "ms": round(1e3 * float(window.mean()), 2),
        "worst_ms": round(1e3 * float(window.max()), 1),
        "MB": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1),
        "slow": entry.slow,
    }


def main() -> None:
    """Print the table, and which strategies exceed 50 ms a trial without declaring it."""
    from mergesearch.search.strategies.table import STRATEGIES

    print(
        f"ask and tell at {DIM} dimensions, mean CPU of the last {WINDOW} of {TRIALS} results (bar "
        f"{BAR_MS:g} ms)"
    )
    figures = {}
    for name in STRATEGIES:
        command = [sys.executable, "-m", "experiments.bench.strategies", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures[name] = row = json.loads(done.stdout.splitlines()[-1])
        verdict = "" if row["ms"] <= BAR_MS else "  says so" if row["slow"] else "  ABOVE THE BAR"
        print(
            f"  {name:<14} d {row['dim']:>5}  told {row['told']:>5}  {row['ms']:8.2f} ms (worst "
            f"{row['worst_ms']:.0f})"
            f"  {row['MB']:7.1f} MB{verdict}",
            flush=True,
        )
    print(json.dumps({"strategies": figures}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
