"""Experiment 7: one SAM for four modalities, or one for each, by MedSAMix and others.

``python -m experiments.e0007_medsamix [--quick]``

After Yang 2025, "MedSAMix: a training-free model merging approach for medical image segmentation"
(arXiv 2508.11032), on the segments zoo: a search for every domain (their single-task regime), a
search on the mean Dice of all, and one with an objective for each (their multi-task regime). Each
case is a real study, run as a user would run it, on one thread; two at a time. Figures are Dice on
test items, which no choice has seen. Finished studies are kept in ``runs/medsamix`` and not run
again; the tables go into ``experiments/0007-medsamix/README.md``, between its two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.running import ROOT, interval, kept, run_in_pairs, write_between
from experiments.zoo.segments import EXPERTS
from experiments.zoo.segments_data import DOMAINS

ZOO = ROOT / "zoo" / "segments"
RUNS = ROOT / "runs" / "medsamix"
README = ROOT / "experiments" / "0007-medsamix" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"

ITEMS = {"kind": "segmentation", "data": str(ZOO / "data"), "domain": "domain", "id": "id"}
BY_DOMAIN = [{"name": name, "domains": [name]} for name in DOMAINS]
BLOCKS = {"granularity": "block", "bounds": [0.0, 1.0]}

#: Goal of a search -> its objectives: each domain by itself, their mean, or all of them at once.
GOALS: dict[str, list[dict[str, Any]]] = {
    **{name: [row] for name, row in zip(DOMAINS, BY_DOMAIN, strict=True)},
    "mean": [{"name": "mean"}],
    "several": BY_DOMAIN,
}
#: Label -> sections of a study with one objective, and with several.
METHODS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "medsamix": ({"strategy": "medsamix", "operator": "stack", "space": {}},) * 2,
    "cma_es": (
        {"strategy": "cma_es", "space": BLOCKS},
        {"strategy": "cma_parego", "space": BLOCKS},
    ),
    "sobol": ({"strategy": "sobol", "space": BLOCKS},) * 2,
}
#: Trials of the paper: 120 for a task by itself, 200 for several.
TRIALS = 120
SEVERAL_TRIALS = 200

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """A method and what it searches for, with a seed."""

    goal: str
    method: str
    seed: int
    trials: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.goal}-{self.method}-{self.seed}-{self.trials}"

    def study(self) -> dict[str, Any]:
        """The study file."""
        return {
            "name": self.name,
            "seed": self.seed,
            "base": str(ZOO / "base"),
            "experts": {name: str(ZOO / name) for name in EXPERTS},
            "evaluators": [ITEMS | {"objectives": list(GOALS[self.goal])}],
            "budget": {"trials": self.trials},
            **METHODS[self.method][self.goal == "several"],
        }


def run_case(case: Case) -> dict[str, Any]:
    """Run a study, or read it if it is finished; its figures."""
    return kept(RUNS / f"{case.name}.json", lambda: _run(case))


def _run(case: Case) -> dict[str, Any]:
    import torch

    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.spec.study_file import resolve, validate

    torch.set_num_threads(1)
    run = run_study(resolve(validate(case.study(), case.name), ROOT), RUNS / case.name)
    return _figures(run)


def _figures(run: Any) -> dict[str, Any]:
    """Test Dice by domain of the winner, the anchors, and the front's best for each objective."""
    from mergesearch.search.front import to_losses

    records = run.log.records
    objectives = run.plan.objectives
    score = _scorer(run.plan.template)
    complete = [record for record in records if record.state == "complete" and record.feasible]
    members: dict[str, float] = {}
    for column, objective in enumerate(objectives):
        if complete and objective.name in DOMAINS:
            losses = [to_losses(record.values, objectives)[column] for record in complete]
            best = complete[losses.index(min(losses))]
            members[objective.name] = score(best.recipe)[objective.name]
    return {
        "dim": len(run.plan.space.names),
        "winner": score(records[run.verdict.winner].recipe),
        "anchors": {
            r.name: score(r.recipe) for r in records if r.kind == "anchor" and r.state == "complete"
        },
        "members": members,
    }


def _scorer(template: Any) -> Callable[[Any], dict[str, float]]:
    """Recipe -> test Dice by domain, by a worker that has seen nothing of the study."""
    from mergesearch.search.workers.messages import Task, WorkerSpec
    from mergesearch.search.workers.worker import Worker

    worker = Worker(
        WorkerSpec(template, (ITEMS | {"objectives": BY_DOMAIN},), str(RUNS / ".arenas"))
    )

    def score(recipe: Any) -> dict[str, float]:
        outcome = worker.run(Task("", recipe, "test"))
        assert outcome.measurement is not None, outcome.failure
        return dict(outcome.measurement.values)

    return score


def tables(results: Mapping[Case, Mapping[str, Any]]) -> str:
    """One merge for all domains, then one for each."""
    anchors = next(r["anchors"] for case, r in results.items() if case.method == "cma_es")
    known: dict[str, list[Scores]] = {name: [scores] for name, scores in anchors.items()}
    best: dict[str, list[Scores]] = {
        "the best anchor of each domain": [
            {d: max(scores[d] for scores in anchors.values()) for d in DOMAINS}
        ]
    }
    return "\n\n".join(
        [
            "**One merge for all domains**",
            _table(known | _shared(results)),
            "**A merge for each domain**",
            _table(best | _special(results)),
        ]
    )


def _shared(results: Mapping[Case, Mapping[str, Any]]) -> dict[str, list[Scores]]:
    """Label -> for every seed, the scores of its winner by domain."""
    rows: dict[str, list[Scores]] = {}
    for goal, words in (("mean", "mean Dice"), ("several", "four objectives")):
        for method, sections in METHODS.items():
            label = f"{sections[goal == 'several']['strategy']}, {words}"
            rows[label] = [
                figures["winner"]
                for case, figures in results.items()
                if (case.goal, case.method) == (goal, method)
            ]
    return rows


def _special(results: Mapping[Case, Mapping[str, Any]]) -> dict[str, list[Scores]]:
    """Label -> for every seed, the scores of the merge for each domain in that domain."""
    rows: dict[str, list[Scores]] = {}
    for method, (one, several) in METHODS.items():
        own = {
            (case.goal, case.seed): figures["winner"]
            for case, figures in results.items()
            if case.method == method
        }
        seeds = sorted({seed for goal, seed in own if goal in DOMAINS})
        whole = [seed for seed in seeds if all((domain, seed) in own for domain in DOMAINS)]
        rows[f"{one['strategy']}, a search for each"] = [
            {d: own[d, seed][d] for d in DOMAINS} for seed in whole
        ]
        rows[f"{several['strategy']}, one search, its front"] = [
            figures["members"]
            for case, figures in results.items()
            if (case.goal, case.method) == ("several", method)
        ]
    return rows


def _table(rows: Mapping[str, Sequence[Scores]]) -> str:
    """Test Dice in percent by domain, and the mean of all with its interval over seeds."""
    lines = ["| merge | " + " | ".join(DOMAINS) + " | mean |", "|---" * (len(DOMAINS) + 2) + "|"]
    for label, seeds in rows.items():
        if seeds:
            by_domain = [
                f"{100 * np.mean([scores[domain] for scores in seeds]):.1f}" for domain in DOMAINS
            ]
            mean, half = interval(
                [100 * float(np.mean([scores[d] for d in DOMAINS])) for scores in seeds]
            )
            spread = f" ± {half:.1f}" if len(seeds) > 1 else ""
            lines.append(f"| {label} | {' | '.join(by_domain)} | {mean:.1f}{spread} |")
    return "\n".join(lines)


def write_tables(text: str) -> None:
    """Put the tables between their marks."""
    write_between(README, START, STOP, text)


def cases(seeds: int, share: float = 1.0) -> list[Case]:
    """Every study, with a share of the trials."""
    return [
        Case(goal, method, seed, round(share * (SEVERAL_TRIALS if goal == "several" else TRIALS)))
        for seed in range(seeds)
        for goal in GOALS
        for method in METHODS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds of every study (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed, a quarter of the trials; writes no table"
    )
    options = parser.parse_args(arguments)
    chosen = cases(1, 0.25) if options.quick else cases(options.seeds)
    results = _run_all(chosen)
    text = tables(results)
    print(text)
    if len(results) == len(chosen) and not options.quick:
        write_tables(text)


def _run_all(chosen: Sequence[Case]) -> dict[Case, dict[str, Any]]:
    """Figures of every case, two at a time; one that fails is reported and left out."""
    from experiments.zoo.building import silence_transformers
    from experiments.zoo.segments import build_segments

    silence_transformers()
    build_segments(ZOO)
    RUNS.mkdir(parents=True, exist_ok=True)
    return run_in_pairs(chosen, run_case)


if __name__ == "__main__":
    main()
