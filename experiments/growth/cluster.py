"""A cluster of GPUs on a virtual clock around the real driver and its journal."""

from __future__ import annotations

import heapq
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from experiments.bench.driver import study_of
from mergesearch.search.runs import driver
from mergesearch.search.runs.driver import run_study
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.workers.backends.inline import Inline
from mergesearch.search.workers.messages import Outcome, Task, WorkerSpec

TRIALS_EACH = 10
#: Median seconds of an evaluation and the spread of its logarithm: some hundred answers of a model
#: of 8B on one card.
EVALUATION = 60.0
SPREAD = 0.25


@dataclass(frozen=True)
class Evaluated:
    """One evaluation.

    Attributes:
        start, stop: On the virtual clock.
        phase: ``search``, or a split of held-out items; the winner is repeated beside ``test``.
        driven: Seconds that the driver had worked by its start.
    """

    start: float
    stop: float
    phase: str
    driven: float


class SimulatedCluster(Inline):
    """GPUs on a virtual clock, which the driver's own time moves on as well.

    Args:
        spec: What the one real worker is built from; its evaluation takes no time.
        gpus: Tasks at a time.
    """

    def __init__(self, spec: WorkerSpec, gpus: int) -> None:
        super().__init__(spec)
        self.slots = gpus
        self.evaluated: list[Evaluated] = []
        self.now = 0.0
        self._driven = 0.0
        self._draw = np.random.default_rng(0)
        self._running: list[tuple[float, int, Task]] = []
        self._mark = 0.0

    def _drive(self) -> None:
        """Let the driver's time since the last call pass."""
        spent = time.process_time() - (self._mark or time.process_time())
        self.now += spent
        self._driven += spent
        self._mark = time.process_time()

    def submit(self, task: Task) -> None:
        """Begin a task on a free GPU."""
        self._drive()
        stop = self.now + EVALUATION * float(np.exp(SPREAD * self._draw.standard_normal()))
        phase = "test" if task.id.startswith("repeat") else task.split
        self.evaluated.append(Evaluated(self.now, stop, phase, self._driven))
        heapq.heappush(self._running, (stop, len(self.evaluated), task))

    def wait(self) -> list[Outcome]:
        """Give the result of the next task that ends."""
        self._drive()
        end, _, task = heapq.heappop(self._running)
        self.now = max(self.now, end)
        outcome = self._worker.run(task)
        self._mark = time.process_time()
        return [outcome]

    def idle(self, start: float, stop: float) -> float:
        """GPU-seconds without an evaluation between two moments."""
        inside = (min(one.stop, stop) - max(one.start, start) for one in self.evaluated)
        return self.slots * (stop - start) - sum(max(part, 0.0) for part in inside)

    def phases(self) -> tuple[float, float, dict[str, float]]:
        """When the last trial began, how long the driver had worked by then, and when phases end.

        Every GPU works until the last trial begins; the recommendation is measured after all of
        them have ended.
        """
        searched = [one for one in self.evaluated if one.phase == "search"]
        *trials, recommended = sorted(searched, key=lambda one: one.start)
        ends = {"trials": max(one.stop for one in trials), "recommendation": recommended.stop}
        for one in self.evaluated:
            if one.phase != "search":
                ends[one.phase] = max(ends.get(one.phase, 0.0), one.stop)
        return trials[-1].start, trials[-1].driven, ends


@dataclass(frozen=True)
class Simulated:
    """A sweep on a simulated cluster.

    Attributes:
        searching: Share of the GPUs' time in evaluations while there are trials for all of them.
        busy: The same until the last ends, with the recommendation and held-out scores.
        ends: What is missing there: phase of the end -> share of the GPUs' time that they idle
            until it ends.
        driver: Share of the time that the driver works while it searches.
        milliseconds: Of the driver for each trial of the search.
        saturated: GPUs at which the driver would have no time left.
    """

    gpus: int
    trials: int
    searching: float
    busy: float
    ends: dict[str, float]
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
    full_until, driven, phases = cluster.phases()
    whole = gpus * cluster.now
    starts = [full_until, *phases.values()]
    idle = map(cluster.idle, starts, phases.values())
    each = driven / trials
    return Simulated(
        gpus=gpus,
        trials=trials,
        searching=1 - cluster.idle(0.0, full_until) / (gpus * full_until),
        busy=1 - cluster.idle(0.0, cluster.now) / whole,
        ends={phase: one / whole for phase, one in zip(phases, idle, strict=True)},
        driver=driven / full_until,
        milliseconds=1e3 * each,
        saturated=round(EVALUATION / each),
    )
