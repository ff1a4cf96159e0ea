"""Experiment 8, second part: rules at equal evaluations of items, where the truth is known.

``python -m experiments.e0008_made_items [--seeds 10]``

Every row is a number of real studies by CMA-ES on merges whose true scores are known
(:mod:`experiments.item_problem`): 30 coefficients, 1,500 search items, seven anchors. A search may
evaluate as many items as 60 trials in full have, so that a rule which saves three quarters of them
pays for four times the trials. Compared is the true gap of the winner: 0 at the optimum, 1 at the
start. Finished studies are kept in ``runs/racing-made``; the table goes into
``experiments/0008-racing/README.md``, between its two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.e0008_racing import Case
from experiments.item_problem import ItemProblem, Local, with_items
from experiments.running import ROOT, kept, mean_and_half, run_in_pairs, write_between
from mergesearch.evaluators import Split
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.runs.wiring import open_log
from mergesearch.search.spec.study_file import resolve, validate
from mergesearch.search.study.study import Study

Array = npt.NDArray[np.float64]

RUNS = ROOT / "runs" / "racing-made"
README = ROOT / "experiments" / "0008-racing" / "README.md"
START = "<!-- made items: written by the command above -->"
STOP = "<!-- end of made items -->"

DIM = 30
ITEMS: dict[Split, int] = {"search": 1500, "validation": 1000, "test": 100}
#: Trials whose evaluations on all items are the budget, anchors included.
WHOLE_TRIALS = 60

#: Label -> the study's fidelity.
RULES: Mapping[str, dict[str, Any]] = {
    "full": {"rule": "full"},
    "race": {"rule": "race"},
    "race, confidence 2": {"rule": "race", "confidence": 2.0},
    "race, confidence 3": {"rule": "race", "confidence": 3.0},
    "halving": {"rule": "halving"},
    "hyperband": {"rule": "hyperband"},
    "subset of 150": {"rule": "subset", "min_items": 150},
}


def run_case(case: Case) -> dict[str, Any]:
    """Run a study, or read it if it is finished; its figures."""
    return kept(RUNS / f"{case.name}.json", lambda: _run(case))


def _run(case: Case) -> dict[str, Any]:
    from optuna.storages import InMemoryStorage

    problem = ItemProblem(DIM, case.seed, dict(ITEMS))
    plan = _plan(problem, RULES[case.rule])
    log = open_log(InMemoryStorage(), plan)
    verdict = Study(plan, log, Local(plan.evaluator)).run()  # type: ignore[arg-type]
    searched = [record for record in log.records if record.kind != "anchor"]
    return {
        "gap": _gap(problem, log.records[verdict.winner]),
        "trials": len(searched),
        "complete": sum(record.state == "complete" for record in searched) / len(searched),
    }


def _plan(problem: ItemProblem, fidelity: Mapping[str, Any]) -> Plan:
    """The plan of an analytic study, with this evaluator and several anchors in its place."""
    items = problem.items["search"]
    study = {
        "name": "made-items",
        "seed": problem.seed,
        "space": {"dim": problem.dim, "bounds": [0.0, 1.0], "start": 0.3},
        "strategy": "cma_es",
        "evaluators": [{"kind": "synthetic", "problem": "sphere", "items": items}],
        "budget": {"evaluations": WHOLE_TRIALS * items},
        "selection": {"repeats": 0},
        "fidelity": dict(fidelity),
    }
    return with_items(plan_study(resolve(validate(study, "study.yaml"), Path())), problem)


def _gap(problem: ItemProblem, record: TrialRecord) -> float:
    """True accuracy of a trial, as a share of what lies between optimum and start."""
    points = (problem.optima[0], record.recipe.field.values.ravel(), problem.start)
    best, ours, start = (problem.truth(point)[0] for point in points)
    return float((best - ours) / (best - start))


def table(results: Mapping[Case, Mapping[str, Any]]) -> str:
    """Trials, share of whole ones, and true gaps of the winners."""
    lines = [
        "| rule | trials | trials in full, % | true gap of the winner | less that of race |",
        "|---|---|---|---|---|",
    ]
    race = {case.seed: figures["gap"] for case, figures in results.items() if case.rule == "race"}
    for rule in RULES:
        rows = {case.seed: figures for case, figures in results.items() if case.rule == rule}
        if not rows:
            continue
        gaps = mean_and_half([figures["gap"] for figures in rows.values()], 3)
        paired = [figures["gap"] - race[seed] for seed, figures in rows.items() if seed in race]
        trials, complete = (
            float(np.mean([figures[key] for figures in rows.values()]))
            for key in ("trials", "complete")
        )
        less = "" if rule == "race" or not paired else mean_and_half(paired, 3)
        lines.append(f"| {rule} | {trials:.0f} | {100 * complete:.0f} | {gaps} | {less} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description="Compare rules that stop trials at equal evaluations of items."
    )
    parser.add_argument(
        "--seeds", type=int, default=10, help="seeds of every row (default: %(default)s)"
    )
    options = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    cases = [Case(rule, seed) for seed in range(options.seeds) for rule in RULES]
    text = table(run_in_pairs(cases, run_case))
    write_between(README, START, STOP, text)
    print(text)


if __name__ == "__main__":
    main()
