"""Experiment 23: operators beside those that they are siblings of, on two zoos.

``python -m experiments.e0023_siblings [--zoos digits clip]``

Nothing is searched but one coefficient for all experts: every operator is scored at its default,
and at the best of five multiples of it by the search items. Figures are of test items. Those that
are finished are kept in ``runs/siblings``; the tables go into the README of
``experiments/0023-siblings``, between its marks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.running import ROOT, folder_name, kept, write_between
from experiments.zoo.calibration import clip_calibration, digits_calibration
from experiments.zoo_scores import SCORED, Zoo, mean, one_hot, scores

RUNS = ROOT / "runs" / "siblings"
README = ROOT / "experiments" / "0023-siblings" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
#: Multiples of the default coefficient.
LINE = (0.4, 0.7, 1.0, 1.4, 2.0)
#: Steps of operators that learn on items.
STEPS = 100

Options = Mapping[str, Any]

#: Zoo -> items on which operators run the experts.
CALIBRATIONS: Mapping[str, Callable[[Path, Path], dict[str, Any]]] = {
    "digits": digits_calibration,
    "clip": clip_calibration,
}
#: Label -> operator. Those of the first block are there to compare with.
ROWS: Mapping[str, Options] = {
    "task arithmetic": {"name": "task_arithmetic"},
    "TIES": {"name": "ties"},
    "TSV": {"name": "tsv"},
    "EMR's unified vector": {"name": "emr"},
    "MagMax": {"name": "magmax"},
    "Localize-and-Stitch, 10 %": {"name": "localize_and_stitch"},
    "Localize-and-Stitch, 40 %": {"name": "localize_and_stitch", "density": 0.4},
    "SVC of task arithmetic": {"name": "svc"},
    "SVC of task arithmetic, α = 1": {"name": "svc", "alpha": 1.0},
    "SVC of TIES": {"name": "svc", "method": "ties"},
    "SVC of TSV": {"name": "svc", "method": "tsv"},
    "OPCM": {"name": "opcm"},
    "DOP": {"name": "dop"},
    "DOP, fixed weight, the minimum": {"name": "dop", "balance": "fixed"},
    "DARE-TIES, p = 0.5": {"name": "dare_ties", "drop": 0.5},
    "DARE-TIES, p = 0.5, trimmed to 20 %": {"name": "dare_ties", "drop": 0.5, "density": 0.2},
    "DOGE": {"name": "doge"},
    "DOGE, a correction for each": {"name": "doge", "correction": "own"},
    f"Concrete, {STEPS} steps": {"name": "concrete", "steps": STEPS},
    f"Concrete, {STEPS} steps, inner level by expert": {
        "name": "concrete",
        "steps": STEPS,
        "inner": "task",
    },
    f"Concrete, {STEPS} steps, inner level by tensor": {
        "name": "concrete",
        "steps": STEPS,
        "inner": "tensor",
    },
}


def measured(zoo: Zoo, given: Options) -> dict[str, Any]:
    """Test scores at the default coefficient and at the best of the line, and the seconds."""
    from mergesearch.merging.operators import get_operator

    operator = get_operator(str(given["name"]))
    options = dict(given)
    if "order" in operator.hyperparameters:
        options["order"] = list(zoo.experts)
    if operator.needs:
        make = CALIBRATIONS[zoo.name]
        options["calibration"] = make(zoo.folder, RUNS / f"{zoo.name}-items")
    full = operator.complete({name: one for name, one in options.items() if name != "name"})
    count = len(zoo.experts)
    default = operator.default(count, full)
    directions = operator.directions(count, full)
    began = time.process_time()
    line = {str(times): [times * default] * directions for times in LINE}
    searched = scores(zoo, zoo.paths, line, "search", options)
    best = max(LINE, key=lambda times: mean(searched[str(times)]))
    rows = {"default": line["1.0"], "best": line[str(best)]}
    tested = scores(zoo, zoo.paths, rows, "test", options)
    return {
        "coefficient": default,
        "best": best * default,
        "test": tested,
        "seconds": time.process_time() - began,
    }


def table(zoo: Zoo, found: Mapping[str, Mapping[str, Any]], alone: Mapping[str, Any]) -> str:
    """A row for each operator: the mean and the tasks at its default, and the line's best."""
    heads = ["merge", "coefficient", "mean", *zoo.experts, "best coefficient of the line", "mean"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, values in alone.items():
        tasks = " | ".join(f"{100 * values[task]:.1f}" for task in zoo.experts)
        lines.append(f"| {name} | | {mean(values):.1f} | {tasks} | | |")
    for label, one in found.items():
        values = one["test"]["default"]
        tasks = " | ".join(f"{100 * values[task]:.1f}" for task in zoo.experts)
        best = f"{one['best']:.3g} | {mean(one['test']['best']):.1f}"
        lines.append(
            f"| {label} | {one['coefficient']:.3g} | {mean(values):.1f} | {tasks} | {best} |"
        )
    return "\n".join(lines)


def at_home(zoo: Zoo) -> dict[str, Any]:
    """Test scores of the base, and of every expert on its own task."""
    rows = {"base": [0.0] * len(zoo.experts), **one_hot(zoo)}
    values = scores(zoo, zoo.paths, rows)
    home = {task: values[task][task] for task in zoo.experts}
    return {"base": values["base"], "each expert at home": home}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the tables."""
    from experiments.zoo.building import silence_transformers

    parser = argparse.ArgumentParser(description="Operators beside their siblings.")
    parser.add_argument("--zoos", nargs="*", choices=list(CALIBRATIONS), default=list(CALIBRATIONS))
    options = parser.parse_args(arguments)
    silence_transformers()
    RUNS.mkdir(parents=True, exist_ok=True)
    parts = []
    for name in options.zoos:
        zoo = SCORED[name]
        alone = kept(RUNS / f"{name}-alone.json", partial(at_home, zoo))
        found = {}
        for label, given in ROWS.items():
            path = RUNS / f"{name}-{folder_name(label)}.json"
            found[label] = kept(path, partial(measured, zoo, given))
            print(name, label, f"{mean(found[label]['test']['default']):.1f}", flush=True)
        parts += [f"**The {name} zoo**", table(zoo, found, alone)]
    write_between(README, START, STOP, "\n\n".join(parts))


if __name__ == "__main__":
    main()
