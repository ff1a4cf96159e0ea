"""Real workers, which only sleep: how busy the driver keeps them, and what they cost.

``python -m experiments.growth.workers COUNT`` runs a study on so many Ray actors of this machine
and prints its figures as a line of JSON. An evaluation sleeps, so that few cores carry many
workers; what actors, Ray and the driver do themselves takes its share of these cores.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from experiments.bench.driver import study_of
from mergesearch.search.runs.driver import run_study
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.study.events import Event

#: Seconds of an evaluation at least, and trials for each worker once all of them are there.
SECONDS = 4.0
TRIALS_EACH = 6
#: Trials for each worker while others still start: so many, and more the more start.
STARTING = 6
#: What a worker takes of Ray's count of CPUs: Ray starts a process for each CPU before it is asked.
CPUS = 0.03


@dataclass
class Watched:
    """What is seen of a study from the driver's process.

    Attributes:
        count: Number of workers.
        ends: Moments at which trials ended, and the driver's CPU seconds by then.
        busy: Seconds of each evaluation, and seconds since its worker's trial before; the latter is
            0 for a worker's first.
        last: Worker -> moment of its latest trial's end.
        complete: Number of trials at which all workers had one.
        kilobytes: Proportional memory of each actor, once all are there.
    """

    count: int
    ends: list[tuple[float, float]] = field(default_factory=list)
    busy: list[tuple[float, float]] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)
    complete: int = 0
    kilobytes: list[float] = field(default_factory=list)

    def note(self, event: Event) -> None:
        """Look at a trial that has ended."""
        if event.kind != "trial" or event.record is None:
            return
        now = time.monotonic()
        worker = event.record.worker
        self.ends.append((now, time.process_time()))
        since = now - self.last.get(worker, now)
        self.busy.append((event.record.seconds["evaluate"], since))
        self.last[worker] = now
        if not self.complete and len(self.last) == self.count:
            self.complete = len(self.ends)
            self.kilobytes = list(_actors())


def _actors() -> Iterable[float]:
    """Proportional memory in kB of the actors that this process has started."""
    for process in psutil.Process(os.getpid()).children(recursive=True):
        if process.name().startswith("ray::RemoteW"):
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            yield float(rollup.partition("Pss:")[2].split()[0])


def measure(count: int) -> dict[str, float]:
    """Run a study on so many actors."""
    watched = Watched(count)
    trials = (STARTING + count // 2 + TRIALS_EACH) * count
    data = study_of(100, trials, "cma_es")
    data["evaluators"][0] |= {"seconds": SECONDS, "spread": 1.5}
    data["workers"] = {"backend": "ray", "count": count, "cpus": CPUS}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        spec = resolve(validate(data, "growth"), Path(folder))
        run_study(spec, Path(folder) / "run", watched.note)
    # From the moment at which all workers have had a trial until trials run out.
    last = trials - 2 * count
    (start, cpu), (stop, later) = watched.ends[watched.complete], watched.ends[last]
    steady = watched.busy[watched.complete + 1 : last + 1]
    done = last - watched.complete
    return {
        "workers": count,
        "trials": done,
        "all_there_after": start - began,
        "busy": sum(own for own, _ in steady) / sum(since for _, since in steady),
        "driver": (later - cpu) / (stop - start),
        "milliseconds": 1e3 * (later - cpu) / done,
        "worker_mb": statistics.median(watched.kilobytes) * 1024 / 1e6,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Print the figures."""
    print(json.dumps(measure(int(sys.argv[1]))))


if __name__ == "__main__":
    main()
