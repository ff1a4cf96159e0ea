"""Experiment 14: three text classifiers of a published encoder, each with a head of its own.

``python -m experiments.e0014_minilm [--rows auto]``

Every row is a real study of one objective, the mean accuracy over the tasks, with a coefficient for
each expert and layer; every merge is scored with the head of each task's expert.
Figures are of test items, on which nothing was chosen. Finished studies are kept in ``runs/minilm``
and not run again; the tables go into ``experiments/0014-minilm/README.md``, between its marks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.running import ROOT, kept, write_between
from experiments.zoo.minilm import build_minilm, section
from experiments.zoo.minilm_data import CLASSES

RUNS = ROOT / "runs" / "minilm"
ZOO = ROOT / "zoo" / "minilm"
README = ROOT / "experiments" / "0014-minilm" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
#: Search items of a trial: half of what there is, as a text takes five milliseconds on one core.
ITEMS = 450

#: Operator of a study -> its trials.
ROWS: Mapping[str, int] = {"auto": 150, "task_arithmetic": 80}

Figures = Mapping[str, Any]


def study_of(row: str, seed: int = 0) -> dict[str, Any]:
    """The study file of a row."""
    return {
        "name": f"{row}-{seed}",
        "seed": seed,
        "base": str(ZOO / "base"),
        "experts": {task: str(ZOO / task) for task in CLASSES},
        "operator": {"name": row},
        "special": {"heads": "own"},
        "evaluators": [
            section(ZOO, {"name": "score", "metric": "accuracy"}) | {"max_items": ITEMS}
        ],
        "budget": {"trials": ROWS[row]},
        "fidelity": {"rule": "race"},
        "selection": {"leaders": 4},
    }


def run_row(row: str) -> dict[str, Any]:
    """Run a study, or read it if it is finished; its figures."""
    return kept(RUNS / f"{row}.json", lambda: _run(row))


def _run(row: str) -> dict[str, Any]:
    import torch

    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.spec.study_file import resolve, validate

    torch.set_num_threads(1)
    folder = RUNS / row
    run = run_study(resolve(validate(study_of(row), row), ROOT), folder)
    verdict = run.verdict
    assert verdict is not None
    survey = run.plan.survey
    report = json.loads((folder / "report.json").read_text())
    tests = verdict.scores["test"]
    return {
        "strategy": run.plan.strategy.name,
        "dimensions": len(run.plan.space.names),
        "chosen": None if survey is None else survey.choice.to_dict(),
        "stopped": sum(record.state == "partial" for record in run.log.records),
        **{key: report[key] for key in ("gains", "against_anchors")},
        "winner": verdict.winner,
        "merges": [
            {
                "number": record.number,
                "name": record.name,
                "kind": record.kind,
                "search": record.values["score"],
                "validation": verdict.scores["validation"][record.number].values["score"],
                "test": tests[record.number].values["score"],
                "tasks": _by_task(tests[record.number].items["score"]),
            }
            for record in run.log.records
            if record.number in tests
        ],
    }


def _by_task(scores: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    """Accuracy of each task from scores of test items ``(items,)``, which lie task by task."""
    counts = [
        len((ZOO / "data" / task / "test.jsonl").read_text().splitlines()) for task in CLASSES
    ]
    parts = np.split(scores, np.cumsum(counts)[:-1])
    return {task: float(part.mean()) for task, part in zip(CLASSES, parts, strict=True)}


def tables(results: Mapping[str, Figures], manifest: Mapping[str, Any]) -> str:
    """The studies, and every merge that was scored on test items."""
    return "\n\n".join([_studies(results), _merges(results, manifest), *_chosen(results)])


def _studies(results: Mapping[str, Figures]) -> str:
    """Winners by row, and each less the anchor that is best on test items."""
    titles = ["operator", "strategy, coordinates", "winner", "search", "validation", "test"]
    titles.append("less the best anchor, 95 % interval")
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row, figures in results.items():
        (winner,) = (one for one in figures["merges"] if one["number"] == figures["winner"])
        shown = " | ".join(f"{100 * winner[key]:.1f}" for key in ("search", "validation", "test"))
        gain = figures["gains"][0]
        against = f"{gain['anchor']}: {_difference(gain)}"
        what = winner["name"] if winner["kind"] == "anchor" else f"a {winner['kind']} trial"
        lines.append(
            f"| {row} | {figures['strategy']}, {figures['dimensions']} | {what} | {shown} | "
            f"{against} |"
        )
    return "\n".join(lines)


def _merges(results: Mapping[str, Figures], manifest: Mapping[str, Any]) -> str:
    """Test accuracy by task: bounds, winners, anchors, and the first winner less each of these."""
    first = next(iter(results))
    less = f"winner of {first} less it"
    columns = ["model", "search items", *CLASSES, "mean of test items", less]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for title, key in (("base, linear heads", "probe"), ("each expert at home", "expert")):
        lines.append(_row(title, None, manifest["accuracy"][key]))
    for row, figures in results.items():
        for one in figures["merges"]:
            if one["number"] == figures["winner"] and one["kind"] != "anchor":
                lines.append(_row(f"winner of {row}", one["search"], one["tasks"]))
    against = {one["anchor"]: one for one in results[first]["against_anchors"]}
    for one in results[first]["merges"]:
        if one["kind"] == "anchor":
            lines.append(_row(one["name"], one["search"], one["tasks"], against.get(one["name"])))
    return "\n".join(lines)


def _row(
    name: str,
    search: float | None,
    tasks: Mapping[str, float],
    against: Mapping[str, Any] | None = None,
) -> str:
    """A line of the second table."""
    values = [tasks[task] for task in CLASSES]
    columns = ["" if search is None else f"{100 * search:.1f}"]
    columns += [f"{100 * value:.1f}" for value in (*values, float(np.mean(values)))]
    columns.append("" if against is None else _difference(against))
    return f"| {name} | {' | '.join(columns)} |"


def _difference(against: Mapping[str, Any]) -> str:
    """An improvement and its simultaneous interval, in points."""
    bounds = f"{100 * against['low']:+.1f} to {100 * against['high']:+.1f}"
    return f"{100 * against['improvement']:+.1f}, {bounds}"


def _chosen(results: Mapping[str, Figures]) -> list[str]:
    """What `operator: auto` went on from, as a sentence."""
    lines = []
    for figures in results.values():
        if figures["chosen"] is not None:
            members = zip(
                figures["chosen"]["members"], figures["chosen"]["coefficients"], strict=True
            )
            listed = ", ".join(f"{name} {value:.3g}" for name, value in members)
            lines.append(f"With `operator: auto`, the search went on from {listed}.")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args(arguments)
    from experiments.zoo.building import silence_transformers

    silence_transformers()
    RUNS.mkdir(parents=True, exist_ok=True)
    build_minilm(ZOO)
    for row in options.rows:
        print(row, run_row(row)["gains"], flush=True)
    results = {row: run_row(row) for row in ROWS if (RUNS / f"{row}.json").is_file()}
    manifest = json.loads(Path(ZOO / "manifest.json").read_text())
    text = tables(results, manifest)
    print(text)
    write_between(README, START, STOP, text)


if __name__ == "__main__":
    main()
