"""Experiment 17: what a lock costs an expert, a merge with it, and a merge after re-alignment.

``python -m experiments.e0017_locked``

Experts of the digits, clip and skills zoos are locked one at a time (``mergesearch lock``, seeds 0
and 1), and merged with the others by task arithmetic at 0.3, as they are and with ``unlock``.
Nothing is searched; figures are of test items. They are kept in ``runs/locked``; the table goes
into ``experiments/0017-locked/README.md``, between its marks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from experiments.running import ROOT, kept, write_between
from experiments.zoo_scores import SCORED, Zoo, mean, one_hot, scores

RUNS = ROOT / "runs" / "locked"
README = ROOT / "experiments" / "0017-locked" / "README.md"
START = "<!-- table: written by the command above -->"
STOP = "<!-- end of table -->"
#: Coefficient of task arithmetic.
SCALE = 0.3
#: Zoo -> how many of its experts are locked, one at a time.
LOCKED = {"digits": 4, "clip": 4, "skills": 2}
SEEDS = (0, 1)


def plain(zoo: Zoo) -> dict[str, Any]:
    """Base, every expert, and the merge of all, none of them locked."""
    rows = {
        **one_hot(zoo),
        "base": [0.0] * len(zoo.experts),
        "merge": [SCALE] * len(zoo.experts),
    }
    return {label: dict(values) for label, values in scores(zoo, zoo.paths, rows).items()}


def locked(zoo: Zoo, name: str, seed: int) -> dict[str, Any]:
    """An expert under a lock: itself, and the merge with it before and after re-alignment."""
    from mergesearch.merging.checkpoints.opening import open_checkpoint
    from mergesearch.merging.export.locking import lock_model
    from mergesearch.merging.lineage.compare import compare_weights

    rows = {"expert": one_hot(zoo)[name], "merge": [SCALE] * len(zoo.experts)}
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / name)
        lock = lock_model(str(zoo.folder / name), Path(path), seed=seed)
        lineage = compare_weights(open_checkpoint(str(zoo.folder / "base")), open_checkpoint(path))
        as_is = scores(zoo, zoo.paths | {name: path}, rows)
        again = scores(zoo, {**zoo.paths, name: {"path": path, "unlock": True}}, rows)
    return {
        "difference": lock.difference,
        "kind": lineage.kind,
        "recovered": lineage.recovered,
        "locked": {label: dict(values) for label, values in as_is.items()},
        "re-aligned": {label: dict(values) for label, values in again.items()},
    }


def row(zoo: Zoo, known: Mapping[str, Any], cases: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The line of a zoo: means over the experts that were locked, and over seeds."""

    def own(label: str) -> float:
        return 100 * float(np.mean([case[label]["expert"][name] for name, case in cases]))

    def merged(label: str) -> float:
        return float(np.mean([mean(case[label]["merge"]) for _, case in cases]))

    def lost(label: str) -> float:
        return 100 * float(np.mean([case[label]["merge"][name] for name, case in cases]))

    alone = 100 * float(np.mean([known[name][name] for name, _ in cases]))
    without = 100 * float(np.mean([known["merge"][name] for name, _ in cases]))
    cells = [
        zoo.name,
        f"{alone:.1f} / {own('locked'):.1f} / {own('re-aligned'):.1f}",
        f"{mean(known['base']):.1f}",
        f"{mean(known['merge']):.1f}",
        f"{merged('locked'):.1f}",
        f"{merged('re-aligned'):.1f}",
        f"{without:.1f} / {lost('locked'):.1f} / {lost('re-aligned'):.1f}",
        f"{sum(case['kind'] == 'locked' for _, case in cases)} of {len(cases)}",
        f"{100 * float(np.mean([case['recovered'] for _, case in cases])):.0f} %",
        f"{max(case['difference'] for _, case in cases):.0e}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| zoo | expert at its task: as it is / locked / re-aligned | base | merge "
    "| with a locked expert | after re-alignment "
    "| the expert's task in the merge: as it is / locked / re-aligned "
    "| told as locked | distance recovered | greatest difference of answers |"
)


def main() -> None:
    """Measure what is not kept, and write the table."""
    from experiments.zoo.building import silence_transformers

    silence_transformers()
    RUNS.mkdir(parents=True, exist_ok=True)
    lines = [HEAD, "|---" * 10 + "|"]
    for label, count in LOCKED.items():
        zoo = SCORED[label]
        known = kept(RUNS / f"{label}.json", partial(plain, zoo))
        cases = [
            (name, kept(RUNS / f"{label}-{name}-{seed}.json", partial(locked, zoo, name, seed)))
            for seed in SEEDS[: 1 if label == "skills" else 2]
            for name in zoo.experts[:count]
        ]
        lines.append(row(zoo, known, cases))
        print(lines[-1], flush=True)
    write_between(README, START, STOP, "\n".join(lines))


if __name__ == "__main__":
    main()
