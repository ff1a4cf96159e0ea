"""Runs the studies of an experiment and writes its tables: what the experiments share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

ROOT = Path(__file__).parents[1]
#: Half width of a 95 % interval of a mean in standard errors, by number of seeds (Student's t).
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Named(Protocol):
    """A case with the name of its run folder."""

    @property
    def name(self) -> str:
        """The name."""


AnyCase = TypeVar("AnyCase", bound=Named)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval over seeds."""
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return float(array.mean()), math.nan
    return float(array.mean()), T95.get(array.size, 1.96) * float(array.std(ddof=1)) / math.sqrt(
        array.size
    )


def mean_and_half(values: Sequence[float], digits: int = 1) -> str:
    """Mean and half width of its 95 % interval over seeds; the mean alone of one seed."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures from ``path`` if they are there; otherwise they are made and written there."""
    if path.is_file():
        finished: dict[str, Any] = json.loads(path.read_text())
        return finished
    figures = make()
    path.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def folder_name(title: str) -> str:
    """The name of a run folder or file that stands for a title."""
    return "".join(char if char.isalnum() else "-" for char in title)


def write_between(path: Path, start: str, stop: str, text: str) -> None:
    """Put a text between two marks of a page."""
    before, _, rest = path.read_text().partition(start)
    path.write_text(f"{before}{start}\n\n{text}\n\n{stop}{rest.partition(stop)[2]}")


def run_in_pairs(
    cases: Sequence[AnyCase], run: Callable[[AnyCase], dict[str, Any]]
) -> dict[AnyCase, dict[str, Any]]:
    """Figures of every case, two at a time on one thread each.

    A case that fails is reported and left out.
    """
    from experiments.zoo.building import silence_transformers

    results = {}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    with ProcessPoolExecutor(2, get_context("spawn"), silence_transformers) as pool:
        waiting = {pool.submit(run, case): case for case in cases}
        for future in as_completed(waiting):
            case = waiting[future]
            try:
                results[case] = future.result()
                print(f"{len(results)}/{len(cases)} {case.name}", flush=True)
            except Exception as error:
                print(f"FAILED {case.name}: {type(error).__name__}: {error}", flush=True)
    return results
