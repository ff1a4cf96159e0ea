"""Experiment 19, second part: experts of each block under a budget, and their weights, searched.

``python -m experiments.e0019_allocation``

Each row is a study of one checkpoint (``space.mixture``) on the zoos of
:mod:`experiments.e0019_moe`, whose figures of the same budgets stand beside it. Finished figures
are kept in ``runs/moe`` and ``runs/moe_upcycled``; the tables go into
``experiments/0019-moe/README.md``, between marks of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.e0019_moe import (
    CASES,
    COUNTS,
    README,
    ZOOS,
    Case,
    cells,
    figures_of,
    head,
    measured,
    runs_of,
    tables_of_zoos,
)
from experiments.running import ROOT, folder_name, kept, write_between
from experiments.zoo.skills_data import SPLITS

if TYPE_CHECKING:
    from mergesearch.search.record.trial_record import TrialRecord
    from mergesearch.search.runs.opened import Run

START = "<!-- tables of searches: written by e0019_allocation -->"
STOP = "<!-- end of tables of searches -->"


@dataclass(frozen=True)
class Search:
    """A study: an operator and its hyperparameters, keys of ``space.mixture``, trials.

    Attributes:
        title: What is searched.
        trials: Of the budget.
        operator: On mixtures.
        options: Hyperparameters beside the calibration.
        mixture: Keys of the space beside the mean.
        means: Budgets that it is tried at.
        zoos: Where it is tried.
    """

    title: str
    trials: int
    operator: str = "mc_smoe"
    options: Mapping[str, Any] = field(default_factory=dict)
    mixture: Mapping[str, Any] = field(default_factory=dict)
    means: tuple[int, ...] = COUNTS
    zoos: tuple[str, ...] = tuple(ZOOS)


SEARCHES = (
    Search("mc_smoe, experts of each block searched", 30),
    Search(
        "mc_smoe, router all, experts of each block searched",
        30,
        options={"router": "all"},
        means=(4, 2),
    ),
    Search("reroute_experts, experts of each block searched", 30, "reroute_experts", means=(4, 2)),
    Search(
        "mc_smoe, experts of each block and weights searched",
        100,
        mixture={"weights": True},
        means=(4,),
        zoos=("moe",),
    ),
)
#: Cases of the first part that a search is compared with, by title.
COMPARED = (
    "pruned: the most used stay",
    "mc_smoe",
    "mc_smoe, blocks by usage",
    "mc_smoe, router all (the paper's form)",
)


def study_of(zoo: Path, search: Search, mean: int) -> dict[str, Any]:
    """The study file of a search."""
    tasks = {"task": "skills", "splits": {split: split for split in SPLITS}}
    calibration = {
        "data": str(zoo / "data" / "calibration"),
        "model_class": "AutoModelForCausalLM",
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask"},
        "samples": 360,
    }
    return {
        "name": folder_name(f"{search.title}-{mean}"),
        "seed": 0,
        "base": str(zoo / "base"),
        "operator": {"name": search.operator, "calibration": calibration, **search.options},
        "space": {"mixture": {"mean": float(mean), **search.mixture}},
        "strategy": "cma_es",
        "evaluators": [
            {"kind": "lm_eval", "include_path": str(zoo / "tasks"), "tasks": [tasks]},
        ],
        "budget": {"trials": search.trials},
    }


def searched(zoo: Path, search: Search, mean: int) -> dict[str, Any]:
    """Run a study, and measure its best merge on test questions."""
    from mergesearch.merging.checkpoints.opening import open_checkpoint
    from mergesearch.merging.mixture.writing import bytes_of
    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.runs.exporting import export_trial
    from mergesearch.search.spec.study_file import resolve, validate

    study = study_of(zoo, search, mean)
    run = run_study(resolve(validate(study, study["name"]), ROOT), runs_of(zoo) / study["name"])
    best = best_merge(run)
    with TemporaryDirectory() as scratch:
        exported = export_trial(run, best, Path(scratch) / "model", overwrite=False, rescored=True)
        figures = measured(zoo, Path(scratch) / "model")
        stored = bytes_of(open_checkpoint(str(Path(scratch) / "model")).tensors)
    counts = dict(best.recipe.mixture)["experts"]
    uniform = run.log.records[0]
    return {
        **figures,
        "bytes": stored,
        "counts": counts,
        "trial": best.number,
        "identical": exported.result["identical"],
        "search": best.values["acc"],
        "uniform_search": uniform.values["acc"],
    }


def best_merge(run: Run) -> TrialRecord:
    """The trial that is best on validation questions; the pruned model is not asked."""
    assert run.verdict is not None
    scores = run.verdict.scores["validation"]
    merges = [
        record
        for record in run.log.records
        if record.number in scores and dict(record.recipe.mixture)["operator"] != "prune_experts"
    ]
    return max(merges, key=lambda record: scores[record.number].values["acc"])


def tables(zoo: Path) -> str:
    """Each search between the rows of the first part at its budget."""
    lines = []
    cases = {case.title: case for case in CASES}
    for mean in COUNTS:
        lines += head(f"{mean} of 8 experts in the mean")
        lines += [_compared(zoo, cases[title], mean) for title in COMPARED]
        lines += [
            _searched(zoo, search, mean)
            for search in SEARCHES
            if mean in search.means and zoo.name in search.zoos
        ]
        lines.append("")
    return "\n".join(lines[:-1])


def _compared(zoo: Path, case: Case, mean: int) -> str:
    figures = figures_of(zoo, case, mean)
    return f"| {case.title} ({_listed(figures['counts'])}) | {cells(figures)} |"


def _searched(zoo: Path, search: Search, mean: int) -> str:
    name = folder_name(f"{search.title}-{mean}")
    figures = kept(runs_of(zoo) / f"{name}.json", partial(searched, zoo, search, mean))
    accuracy = np.mean([*figures["accuracy"].values()])
    print(zoo.name, mean, search.title, figures["counts"], f"{accuracy:.3f}", flush=True)
    title = f"**{search.title}, {search.trials} trials** ({_listed(figures['counts'])})"
    return f"| {title} | {cells(figures)} |"


def _listed(counts: list[int]) -> str:
    """Numbers of experts, block by block."""
    return ", ".join(map(str, counts))


def main() -> None:
    """Run what is missing, and write the tables."""
    argparse.ArgumentParser(description="Search experts of each block.").parse_args()
    write_between(README, START, STOP, tables_of_zoos(tables))


if __name__ == "__main__":
    main()
