"""Experiment 25: how time and memory grow with parameters, experts, dimensions, trials and workers.

``python -m experiments.e0025_growth [PART ...]``

Merges are those of random rows, and of checkpoints that are holes, on one thread. Trials are those
of the real driver with the real journal on an analytic problem, whose evaluation takes no time.
Workers are real and sleep. A cluster is simulated around the same driver: tasks occupy a GPU for a
drawn time on a virtual clock, on which the CPU time that the driver takes between them passes too.
Parts (all by default) are measured one after the other and kept in
``experiments/0025-growth/figures.json``; tables and plots are made of all that is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments.bench.timing import seconds_of
from experiments.growth.cluster import simulated
from experiments.growth.driving import driver_parts
from experiments.growth.merging import SIZE, by_experts, merge_seconds
from experiments.growth.panels import panels
from experiments.growth.plots import draw
from experiments.growth.process import apart
from experiments.growth.tables import tables
from experiments.running import ROOT, write_between

FOLDER = ROOT / "experiments" / "0025-growth"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
PARAMETERS = (1_000_000, 10_000_000, 100_000_000)
EXPERTS = (1, 2, 4, 8, 16)
#: Of checkpoints that are holes: with one expert, and by experts.
SPARSE = (10_000_000, 100_000_000, 1_000_000_000)
SPARSE_SIZE = 50_000_000
DIMENSIONS = (10, 100, 500, 2000)
TRIALS = (100, 1000, 10_000, 100_000)
#: Of the studies of many trials.
FEW_DIMENSIONS = 10
#: Real ones: 32 take 7 GB of memory.
WORKERS = (1, 2, 4, 8, 16, 32)
#: GPUs of the simulated clusters.
GPUS = (1, 8, 64, 100, 1000)


def measure_merges() -> dict[str, Any]:
    """Seconds of merges by parameters and by experts."""
    return {
        "parameters": [[n, merge_seconds(n, 4)] for n in PARAMETERS],
        "size": SIZE,
        "experts": EXPERTS,
        **by_experts(EXPERTS),
    }


def measure_sparse() -> dict[str, Any]:
    """Time and memory of merges of checkpoints that are holes."""
    module = "experiments.growth.sparse"
    return {
        "parameters": [apart(module, n, 1) for n in SPARSE],
        "experts": [apart(module, SPARSE_SIZE, k) for k in EXPERTS],
    }


def measure_driver() -> dict[str, Any]:
    """What the driver takes for a trial, by dimensions and by trials."""
    module = "experiments.growth.driving"
    by_dimensions = {
        strategy: [apart(module, d, 500, strategy) for d in DIMENSIONS]
        for strategy in ("sobol", "cma_es")
    }
    by_trials = [apart(module, FEW_DIMENSIONS, n, "cma_es") for n in TRIALS]
    return {"dimensions": by_dimensions, "trials": by_trials, "parts": driver_parts()}


def measure_workers() -> dict[str, Any]:
    """How busy real workers are."""
    return {"rows": [apart("experiments.growth.workers", n) for n in WORKERS]}


def measure_cluster() -> dict[str, Any]:
    """How busy GPUs of simulated clusters are, and what a journal waits for the disk."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.open(Path(folder) / "journal", os.O_CREAT | os.O_WRONLY)

        def append() -> None:
            os.write(file, bytes(3000))
            os.fsync(file)

        sync = seconds_of(append, 50)
        os.close(file)
    return {"rows": [asdict(simulated(n)) for n in GPUS], "sync_ms": 1e3 * sync}


PARTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "merges": measure_merges,
    "sparse": measure_sparse,
    "driver": measure_driver,
    "workers": measure_workers,
    "cluster": measure_cluster,
}


def main() -> None:
    """Measure parts, and write tables and plots of all that is kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    chosen = parser.parse_args().parts
    if unknown := sorted({*chosen} - {*PARTS}):
        parser.error(f"expected parts of {', '.join(PARTS)}, received {', '.join(unknown)}")
    torch.set_num_threads(1)
    file = FOLDER / "figures.json"
    kept: dict[str, Any] = {}
    for part in chosen or PARTS:
        measured = PARTS[part]()
        kept = json.loads(file.read_text()) if file.is_file() else {}
        kept[part] = measured
        file.write_text(json.dumps(kept, indent=1) + "\n")
    text = tables(kept)
    print(text)
    write_between(FOLDER / "README.md", START, STOP, text)
    for name, drawn in panels(kept).items():
        draw(FOLDER / name, drawn)


if __name__ == "__main__":
    main()
