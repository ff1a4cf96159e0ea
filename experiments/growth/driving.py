"""What the driver takes for a trial whose evaluation takes no time, and for opening its record.

``python -m experiments.growth.driving DIMENSIONS TRIALS STRATEGY`` prints the figures of one study
as a line of JSON.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.bench.driver import study_of
from experiments.growth.process import anonymous_mb
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import open_run
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.study.events import Event

#: Parts of the driver's profile that are named.
LARGEST = 7


@dataclass(frozen=True)
class Driven:
    """What the driver took for the trials of one study.

    Attributes:
        dimensions: Of its space.
        trials: In all.
        milliseconds: CPU time of the last tenth of the trials, each.
        kilobytes: Journal for each trial.
        memory: Anonymous memory in kB for each trial, from the first tenth to the end.
        ending: CPU seconds after the last trial: the winner, and the report.
        opening: CPU seconds in which the finished record is opened again.
    """

    dimensions: int
    trials: int
    milliseconds: float
    kilobytes: float
    memory: float
    ending: float
    opening: float


def driven(dimensions: int, trials: int, strategy: str) -> Driven:
    """Run one study in this process."""
    clock: list[float] = []
    memory: list[float] = []
    last = max(trials // 10, 2)

    def note(event: Event) -> None:
        if event.kind == "trial":
            clock.append(time.process_time())
            if len(clock) % last == 0:
                memory.append(anonymous_mb())

    with tempfile.TemporaryDirectory() as folder:
        spec = resolve(validate(study_of(dimensions, trials, strategy), "growth"), Path(folder))
        path = Path(folder) / "run"
        run_study(spec, path, note)
        ended = time.process_time()
        size = (path / "journal.log").stat().st_size
        held = len(open_run(path).log.records)
        opening = time.process_time() - ended
    assert held == len(clock)
    return Driven(
        dimensions=dimensions,
        trials=trials,
        milliseconds=1e3 * (clock[-1] - clock[-last]) / (last - 1),
        kilobytes=size / trials / 1e3,
        memory=1e3 * (memory[-1] - memory[0]) / (last * (len(memory) - 1)),
        ending=ended - clock[-1],
        opening=opening,
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


def main() -> None:
    """Print the figures of one study."""
    dimensions, trials, strategy = sys.argv[1:]
    print(json.dumps(asdict(driven(int(dimensions), int(trials), strategy))))


if __name__ == "__main__":
    main()
