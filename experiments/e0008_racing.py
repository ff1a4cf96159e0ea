"""Experiment 8: what rules that stop trials save on the skills zoo, and what they cost.

``python -m experiments.e0008_racing [--seeds 5] [--rules full race]``

Every row is a real study by CMA-ES on 1,500 search questions (five tasks of lm_eval), with the same
seeds and anchors; only its rule differs. Rows have the same number of trials, except those with "as
many items", which stop when they have evaluated as many items as a full search, and so make more
trials. Evaluations of items in the search are counted, without the anchors, which all rows measure
in full; compared is the test accuracy of the winner. Finished studies are kept in ``runs/racing``
and not run again; the table goes into ``experiments/0008-racing/README.md``, between its two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.e0006_skills import ZOO, skills_study
from experiments.running import ROOT, folder_name, kept, mean_and_half, run_in_pairs, write_between

RUNS = ROOT / "runs" / "racing"
README = ROOT / "experiments" / "0008-racing" / "README.md"
START = "<!-- table: written by the command above -->"
STOP = "<!-- end of table -->"
TRIALS = 150
#: Search questions, all of which a trial is evaluated on that no rule stops.
QUESTIONS = 1500
#: Ends the label of a row that may evaluate as many items as a full search.
AS_MANY = ", as many items"

#: Label -> the study's fidelity.
RULES: Mapping[str, dict[str, Any]] = {
    "full": {"rule": "full"},
    "race": {"rule": "race"},
    "race, confidence 2": {"rule": "race", "confidence": 2.0},
    "halving": {"rule": "halving"},
    "hyperband": {"rule": "hyperband"},
    "subset of 150": {"rule": "subset", "min_items": 150},
    "subset of 150, gmp-IRT": {"rule": "subset", "min_items": 150, "estimate": "gmp_irt"},
    "subset of 150 anchors": {
        "rule": "subset",
        "min_items": 150,
        "order": "representative",
        "estimate": "representative",
    },
    f"race{AS_MANY}": {"rule": "race"},
    f"race, confidence 2{AS_MANY}": {"rule": "race", "confidence": 2.0},
}


@dataclass(frozen=True)
class Case:
    """A rule with a seed."""

    rule: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return folder_name(f"{self.rule}-{self.seed}")


def run_case(case: Case) -> dict[str, Any]:
    """Run a study, or read it if it is finished; its figures."""
    return kept(RUNS / f"{case.name}.json", lambda: _run(case))


def _run(case: Case) -> dict[str, Any]:
    import torch

    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.spec.study_file import resolve, validate

    torch.set_num_threads(1)
    study = skills_study(case.name, seed=case.seed, trials=TRIALS) | {"fidelity": RULES[case.rule]}
    if case.rule.endswith(AS_MANY):
        study["budget"] = {"evaluations": TRIALS * QUESTIONS}
    run = run_study(resolve(validate(study, case.name), ROOT), RUNS / case.name)
    verdict = run.verdict
    size = run.plan.evaluator.size("search")
    assert verdict is not None
    searched = [record for record in run.log.records if record.kind != "anchor"]
    tests = verdict.scores["test"]
    anchors = [
        tests[record.number].values["acc"] for record in run.log.records if record.kind == "anchor"
    ]
    return {
        "trials": len(searched),
        "share": sum(record.evaluated or size for record in searched) / (size * len(searched)),
        "complete": sum(record.state == "complete" for record in searched) / len(searched),
        "test": tests[verdict.winner].values["acc"],
        "anchor": max(anchors),
        "optimism": run.log.records[verdict.winner].values["acc"]
        - tests[verdict.winner].values["acc"],
    }


def table(results: Mapping[Case, Mapping[str, Any]]) -> str:
    """Share of evaluations, test accuracy, and its difference to full evaluation by seed."""
    lines = [
        (
            "| rule | seeds | trials | evaluations of items, % of full | trials in full, % | "
            "test accuracy of the winner, % | less that of full |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    full = {case.seed: figures["test"] for case, figures in results.items() if case.rule == "full"}
    whole = max(
        (figures["trials"] for case, figures in results.items() if case.rule == "full"),
        default=TRIALS,
    )
    for rule in RULES:
        rows = {case.seed: figures for case, figures in results.items() if case.rule == rule}
        if not rows:
            continue
        trials = np.mean([figures["trials"] for figures in rows.values()])
        share = mean_and_half(
            [100 * figures["share"] * figures["trials"] / whole for figures in rows.values()]
        )
        complete = mean_and_half([100 * figures["complete"] for figures in rows.values()])
        test = mean_and_half([100 * figures["test"] for figures in rows.values()])
        gap = mean_and_half(
            [100 * (figures["test"] - full[seed]) for seed, figures in rows.items() if seed in full]
        )
        lines.append(
            f"| {rule} | {len(rows)} | {trials:.0f} | {share} | {complete} | {test} | "
            f"{'' if rule == 'full' else gap} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and write the table."""
    from experiments.zoo.skills import build_skills

    parser = argparse.ArgumentParser(
        description="Compare rules that stop trials on the skills zoo."
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="seeds of every row (default: %(default)s)"
    )
    parser.add_argument(
        "--rules", nargs="*", choices=list(RULES), default=list(RULES), help="rows to run"
    )
    options = parser.parse_args()
    build_skills(ZOO)
    RUNS.mkdir(parents=True, exist_ok=True)
    cases = [Case(rule, seed) for seed in range(options.seeds) for rule in options.rules]
    text = table(run_in_pairs(cases, run_case))
    write_between(README, START, STOP, text)
    print(text)


if __name__ == "__main__":
    main()
