"""Experiment 6: five skills at once on the skills zoo, against every anchor.

``python -m experiments.e0006_skills``

Studies by strategies for several objectives on five tasks of lm_eval, 300 trials each, run as a
user would run them, two at a time on one thread each. Finished studies are kept in ``runs/skills``
and not run again; the tables go into ``experiments/0006-skills/README.md``, between its two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.running import ROOT, kept, run_in_pairs, write_between
from experiments.zoo.skills_data import SKILLS, SPLITS

ZOO = ROOT / "zoo" / "skills"
RUNS = ROOT / "runs" / "skills"
README = ROOT / "experiments" / "0006-skills" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
TRIALS = 300
STRATEGIES = ("cma_parego", "nsga3")


def skills_study(name: str, *, seed: int, trials: int, objectives: Any = None) -> dict[str, Any]:
    """A study of the zoo on its five multiple-choice tasks; by default of their mean accuracy."""
    tasks = {"task": "skills", "splits": {split: split for split in SPLITS}}
    evaluator = {"kind": "lm_eval", "include_path": str(ZOO / "tasks"), "tasks": [tasks]}
    return {
        "name": name,
        "seed": seed,
        "base": str(ZOO / "base"),
        "experts": {skill: str(ZOO / skill) for skill in SKILLS},
        "space": {"granularity": "block", "bounds": [0.0, 1.0]},
        "strategy": "cma_es",
        "evaluators": [evaluator | ({} if objectives is None else {"objectives": objectives})],
        "budget": {"trials": trials},
    }


@dataclass(frozen=True)
class Case:
    """A strategy with a seed."""

    strategy: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.strategy}-{self.seed}"


def run_case(case: Case) -> dict[str, Any]:
    """Run a study, or read it if it is finished; its figures."""
    return kept(RUNS / f"{case.name}.json", lambda: _run(case))


def _run(case: Case) -> dict[str, Any]:
    import torch

    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.spec.study_file import resolve, validate
    from mergesearch.search.study.problem import study_normaliser

    torch.set_num_threads(1)
    objectives = [{"name": skill, "domains": [f"skills_{skill}"]} for skill in SKILLS]
    study = skills_study(case.name, seed=case.seed, trials=TRIALS, objectives=objectives)
    run = run_study(
        resolve(validate(study | {"strategy": case.strategy}, case.name), ROOT), RUNS / case.name
    )
    verdict = run.verdict
    records = run.log.records
    assert verdict is not None
    tests = verdict.scores["test"]
    scale = study_normaliser(run.plan, records)
    losses = [
        [-record.values[skill] for skill in SKILLS]
        for record in records
        if record.state == "complete"
    ]
    anchors = [
        record for record in records if record.kind == "anchor" and record.state == "complete"
    ]
    return {
        "anchors": {record.name: dict(tests[record.number].values) for record in anchors},
        "winner": dict(tests[verdict.winner].values),
        "errors": dict(tests[verdict.winner].errors),
        "front": len(verdict.front),
        "hypervolume": scale.hypervolume(losses),
        "anchors alone": scale.hypervolume(
            [[-r.values[skill] for skill in SKILLS] for r in anchors]
        ),
        "best of each": {
            skill: max(records[n].values[skill] for n in verdict.front) for skill in SKILLS
        },
    }


def tables(results: Mapping[Case, Mapping[str, Any]]) -> str:
    """Test accuracy of the compromises and all anchors, then what the fronts hold."""
    lines = ["| merge | " + " | ".join(SKILLS) + " | mean |", "|---" * (len(SKILLS) + 2) + "|"]
    anchors = next(iter(results.values()))["anchors"]
    rows = anchors | {
        f"**{case.strategy}, best compromise**": figures["winner"]
        for case, figures in results.items()
    }
    for name, scores in rows.items():
        cells = [f"{100 * scores[skill]:.1f}" for skill in SKILLS]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {100 * np.mean([scores[s] for s in SKILLS]):.1f} |"
        )
    fronts = [
        (
            "| strategy | trials on the front | hypervolume | of the anchors alone | best of each "
            "skill on the front |"
        ),
        "|---|---|---|---|---|",
    ]
    for case, figures in results.items():
        best = ", ".join(
            f"{skill} {100 * value:.0f}" for skill, value in figures["best of each"].items()
        )
        volumes = f"{figures['hypervolume']:.3f} | {figures['anchors alone']:.3f}"
        fronts.append(f"| {case.strategy} | {figures['front']} | {volumes} | {best} |")
    return "\n".join([*lines, "", *fronts])


def main() -> None:
    """Run what is missing, and write the tables."""
    from experiments.zoo.skills import build_skills

    argparse.ArgumentParser(
        description="Search five skills at once on the skills zoo."
    ).parse_args()
    build_skills(ZOO)
    RUNS.mkdir(parents=True, exist_ok=True)
    text = tables(run_in_pairs([Case(strategy) for strategy in STRATEGIES], run_case))
    write_between(README, START, STOP, text)
    print(text)


if __name__ == "__main__":
    main()
