"""Experiment 25: how time grows with parameters, experts, dimensions, trials and workers.

``python -m experiments.e0025_growth``

Merges are those of ``combine`` on random arenas, on one thread. Trials are those of the real driver
with the real journal on an analytic problem, whose evaluation takes no time. A cluster is simulated
around the same driver: tasks occupy a GPU for a drawn time on a virtual clock, on which the time
that the driver itself takes between them passes too. Tables go into
``experiments/0025-growth/README.md``.
"""

from __future__ import annotations

import cProfile
import heapq
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from experiments.bench.combine import TENSORS, best_seconds
from experiments.bench.driver import study_of
from experiments.running import ROOT, write_between
from mergesearch.merging import Field, Layout
from mergesearch.merging.kernels.dispatch import combine
from mergesearch.search.runs import driver
from mergesearch.search.runs.driver import run_study
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.study.events import Event
from mergesearch.search.workers.backends.inline import Inline
from mergesearch.search.workers.messages import Outcome, Task, WorkerSpec

README = ROOT / "experiments" / "0025-growth" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
PARAMETERS = (1_000_000, 10_000_000, 100_000_000, 500_000_000)
EXPERTS = (1, 2, 4, 8, 16)
DIMENSIONS = (10, 100, 500, 2000)
TRIALS = (100, 1000, 10_000)
#: GPUs of the simulated clusters, and trials for each of them.
GPUS = (1, 8, 64, 100, 1000)
TRIALS_EACH = 10
#: Median seconds of an evaluation and the spread of its logarithm: some hundred answers of a model
#: of 8B on one card.
EVALUATION = 60.0
SPREAD = 0.25
#: Parts of the driver's profile that are named.
LARGEST = 7


def merge_seconds(parameters: int, experts: int) -> float:
    """Seconds of a merge of fp32 rows on one thread; rows are one array, read anew each time."""
    layout = Layout.build(
        {f"layer.{i}.weight": ((parameters // TENSORS,), "float32") for i in range(TENSORS)}
    )
    base = np.random.default_rng(0).standard_normal(layout.size, dtype=np.float32)
    rows = [base + np.float32(k) for k in range(experts)]
    field = Field(np.array([0, layout.size]), np.full((experts, 1), 0.3))
    out = np.zeros_like(base)
    run = best_seconds({"merge": lambda: combine(base, rows, field, "delta", out, threads=1)}, 4)
    return run["merge"]


@dataclass(frozen=True)
class Driven:
    """What the driver took for the trials of one study.

    Attributes:
        milliseconds: CPU time of the last tenth of the trials, each.
        kilobytes: Journal for each trial.
    """

    milliseconds: float
    kilobytes: float


def driven(dimensions: int, trials: int, strategy: str) -> Driven:
    """Run one study in this process."""
    clock: list[float] = []

    def note(event: Event) -> None:
        if event.kind == "trial":
            clock.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        spec = resolve(validate(study_of(dimensions, trials, strategy), "growth"), Path(folder))
        run_study(spec, Path(folder) / "run", note)
        size = (Path(folder) / "run" / "journal.log").stat().st_size
    last = max(trials // 10, 2)
    cost = (clock[-1] - clock[-last]) / (last - 1)
    return Driven(1e3 * cost, size / trials / 1e3)


class SimulatedCluster(Inline):
    """GPUs on a virtual clock, which the driver's own time moves on as well.

    Args:
        spec: What the one real worker is built from; its evaluation takes no time.
        gpus: Tasks at a time.
    """

    def __init__(self, spec: WorkerSpec, gpus: int) -> None:
        super().__init__(spec)
        self.slots = gpus
        self.spans: list[tuple[float, float]] = []
        self.full_until = 0.0
        self.driving_full = 0.0
        self.driving = 0.0
        self.now = 0.0
        self._draw = np.random.default_rng(0)
        self._running: list[tuple[float, int, Task]] = []
        self._count = 0
        self._mark = 0.0

    def _drive(self) -> None:
        """Let the driver's time since the last call pass."""
        spent = time.perf_counter() - (self._mark or time.perf_counter())
        self.now += spent
        self.driving += spent
        self._mark = time.perf_counter()

    def busy(self, until: float) -> float:
        """Share of the GPUs' time in evaluations until a moment."""
        spent = sum(max(min(stop, until) - start, 0.0) for start, stop in self.spans)
        return spent / (self.slots * until)

    def submit(self, task: Task) -> None:
        """Begin a task on a free GPU."""
        self._drive()
        seconds = EVALUATION * float(np.exp(SPREAD * self._draw.standard_normal()))
        self.spans.append((self.now, self.now + seconds))
        self._count += 1
        heapq.heappush(self._running, (self.now + seconds, self._count, task))
        if len(self._running) == self.slots:
            self.full_until = self.now
            self.driving_full = self.driving

    def wait(self) -> list[Outcome]:
        """Give the result of the next task that ends."""
        self._drive()
        end, _, task = heapq.heappop(self._running)
        self.now = max(self.now, end)
        outcome = self._worker.run(task)
        self._mark = time.perf_counter()
        return [outcome]


@dataclass(frozen=True)
class Simulated:
    """A sweep on a simulated cluster.

    Attributes:
        searching: Share of the GPUs' time in evaluations while there are trials for all of them.
        busy: The same until the last ends, with the recommendation and held-out scores.
        driver: Share of the time that the driver works while it searches.
        milliseconds: Of the driver for each trial of the search.
        saturated: GPUs at which the driver would have no time left.
    """

    gpus: int
    trials: int
    searching: float
    busy: float
    driver: float
    milliseconds: float
    saturated: int


def simulated(gpus: int, strategy: str = "cma_es", dimensions: int = 200) -> Simulated:
    """Run a sweep with ten trials for each GPU."""
    clusters: list[SimulatedCluster] = []

    def open_cluster(section: Any, spec: WorkerSpec, *_: Any) -> SimulatedCluster:
        clusters.append(SimulatedCluster(spec, gpus))
        return clusters[-1]

    trials = max(TRIALS_EACH * gpus, 64)
    with tempfile.TemporaryDirectory() as folder:
        data = study_of(dimensions, trials, strategy)
        spec = resolve(validate(data, "growth"), Path(folder))
        with patch.object(driver, "open_backend", open_cluster):
            run_study(spec, Path(folder) / "run")
    (cluster,) = clusters
    each = cluster.driving_full / trials
    return Simulated(
        gpus=gpus,
        trials=trials,
        searching=cluster.busy(cluster.full_until),
        busy=cluster.busy(cluster.now),
        driver=cluster.driving_full / cluster.full_until,
        milliseconds=1e3 * each,
        saturated=round(EVALUATION / each),
    )


def driver_parts(trials: int = 2000) -> list[tuple[str, float]]:
    """Share of the driver's own CPU time by folder of this package and by library, the largest."""
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        spec = resolve(validate(study_of(200, trials, "cma_es"), "growth"), Path(folder))
        profile.runcall(run_study, spec, Path(folder) / "run")
    times: Counter[str] = Counter()
    stats: Any = pstats.Stats(profile)
    for (file, _, _), (_, _, own, _, _) in stats.stats.items():
        times[_part_of(file)] += own
    total = sum(times.values())
    return [(part, spent / total) for part, spent in times.most_common(LARGEST)]


def _part_of(file: str) -> str:
    """``search/record`` for a file of this package, else the name of a library."""
    names = Path(file).parts
    if "site-packages" in names:
        return names[names.index("site-packages") + 1]
    if "mergesearch" in names:
        return "/".join(names[names.index("mergesearch") + 1 :][:2])
    return "Python and its C functions"


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent of a power law through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def tables() -> str:
    """Measure everything, and write it as Markdown."""
    torch.set_num_threads(1)
    by_size = [merge_seconds(n, 4) for n in PARAMETERS]
    by_experts = [merge_seconds(20_000_000, k) for k in EXPERTS]
    lines = ["| merge of | seconds | expected | measured |", "|---|---|---|---|"]
    shown = ", ".join(f"{n / 1e6:g}M: {s:.3g}" for n, s in zip(PARAMETERS, by_size, strict=True))
    expected = "size^1"
    lines.append(
        f"| 4 experts, parameters | {shown} | {expected} | size^{slope(PARAMETERS, by_size):.2f} |"
    )
    shown = ", ".join(f"{k}: {s:.3g}" for k, s in zip(EXPERTS, by_experts, strict=True))
    moved = [k + 2 for k in EXPERTS]
    exponent = slope(moved, by_experts)
    lines.append(f"| 20M parameters, experts | {shown} | (K + 2)^1 | (K + 2)^{exponent:.2f} |")
    lines += ["", "| driver | CPU ms a trial | journal kB |", "|---|---|---|"]
    for strategy in ("sobol", "cma_es"):
        for dimensions in DIMENSIONS:
            one = driven(dimensions, 500, strategy)
            lines.append(_driver_row(f"{strategy}, {dimensions} dimensions, 500 trials", one))
    for trials in TRIALS:
        one = driven(100, trials, "cma_es")
        lines.append(_driver_row(f"cma_es, 100 dimensions, {trials:,} trials", one))
    lines += [
        "",
        "| GPUs | trials | busy, search | busy, all | driver works | ms a trial | driver full at |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for gpus in GPUS:
        row = simulated(gpus)
        lines.append(
            f"| {gpus:,} | {row.trials:,} | {row.searching:.2%} | {row.busy:.1%} | "
            f"{row.driver:.2%} | {row.milliseconds:.2f} | {row.saturated:,} GPUs |"
        )
    listed = ", ".join(f"{name} {share:.0%}" for name, share in driver_parts())
    return "\n".join([*lines, "", f"Where the driver's CPU time goes (profile, cma_es): {listed}."])


def _driver_row(what: str, one: Driven) -> str:
    return f"| {what} | {one.milliseconds:.2f} | {one.kilobytes:.1f} |"


def main() -> None:
    """Measure, and write the tables into the README."""
    text = tables()
    print(text)
    write_between(README, START, STOP, text)


if __name__ == "__main__":
    main()
