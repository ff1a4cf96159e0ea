"""Experiment 11: does a search on top of the best operator beat the best single method?

``python -m experiments.e0011_operator_auto [--zoos digits] [--seeds 5]``

Every row is a real study of one objective, the mean score, with 300 trials (120 on the segments
zoo). The items of the operators that run the experts are the search items of each expert's domain,
without labels. Figures are of test items, on which nothing was chosen. Finished studies are kept in
``runs/operator_auto`` and not run again; the tables go into
``experiments/0011-operator-auto/README.md``, between its marks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.running import ROOT, folder_name, kept, mean_and_half, write_between
from experiments.zoo.calibration import (
    digits_calibration,
    segments_calibration,
    skills_calibration,
)
from experiments.zoo.digits_data import DOMAINS
from experiments.zoo.segments import EXPERTS
from experiments.zoo.skills_data import SKILLS
from experiments.zoo.skills_data import SPLITS as SKILL_SPLITS

RUNS = ROOT / "runs" / "operator_auto"
ZOOS = ROOT / "zoo"
README = ROOT / "experiments" / "0011-operator-auto" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"

#: Trials of the search on test items.
ORACLE_TRIALS = 300

#: Label -> sections of the study.
ROWS: Mapping[str, dict[str, Any]] = {
    "operator auto, strategy auto": {"operator": {"name": "auto"}},
    "operator auto, 0.8 of the validation items lent": {
        "operator": {"name": "auto"},
        "selection": {"lend": 0.8},
    },
    "auto among RegMean++, Iso-CTS, TSV": {
        "operator": {"name": "auto", "among": ["regmean_pp", "iso_cts", "tsv"]}
    },
    "operator auto, cma_es": {"operator": {"name": "auto"}, "strategy": "cma_es"},
    "task_arithmetic, cma_es": {"strategy": "cma_es"},
}


@dataclass(frozen=True)
class Zoo:
    """A zoo and what its studies ask.

    Attributes:
        experts: Their names.
        calibration: (zoo, folder for items) -> the option of operators that run the experts.
        evaluator: Its section in the study file.
        trials: Of a study.
        fidelity: How many of the search items a trial is evaluated on.
    """

    experts: Sequence[str]
    calibration: Callable[[Path, Path], dict[str, Any]]
    evaluator: Mapping[str, Any]
    trials: int = 300
    fidelity: str = "full"


ZOO_STUDIES: Mapping[str, Zoo] = {
    "digits": Zoo(
        tuple(DOMAINS),
        digits_calibration,
        {
            "kind": "classification",
            "data": str(ZOOS / "digits" / "data"),
            "domain": "domain",
            "id": "id",
            "objectives": [{"name": "score", "metric": "accuracy"}],
        },
    ),
    "skills": Zoo(
        tuple(SKILLS),
        skills_calibration,
        {
            "kind": "lm_eval",
            "include_path": str(ZOOS / "skills" / "tasks"),
            "tasks": [{"task": "skills", "splits": {split: split for split in SKILL_SPLITS}}],
            "objectives": [{"name": "score"}],
        },
        fidelity="race",  # a trial in full takes two seconds
    ),
    "segments": Zoo(
        tuple(EXPERTS),
        segments_calibration,
        {
            "kind": "segmentation",
            "data": str(ZOOS / "segments" / "data"),
            "domain": "domain",
            "id": "id",
            "objectives": [{"name": "score"}],
        },
        trials=120,
    ),
}


@dataclass(frozen=True)
class Case:
    """A row on a zoo with a seed."""

    zoo: str
    row: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return folder_name(f"{self.zoo}-{self.row}-{self.seed}")


def study_of(case: Case) -> dict[str, Any]:
    """The study file of a case."""
    zoo = ZOO_STUDIES[case.zoo]
    folder = ZOOS / case.zoo
    data = {
        "name": case.name,
        "seed": case.seed,
        "base": str(folder / "base"),
        "experts": {name: str(folder / name) for name in zoo.experts},
        "evaluators": [zoo.evaluator],
        "budget": {"trials": zoo.trials},
        "fidelity": {"rule": zoo.fidelity},
        **ROWS[case.row],
    }
    if "operator" in data:
        items = zoo.calibration(folder, RUNS / "calibration" / case.zoo)
        data["operator"] = {**data["operator"], "calibration": items}
    return data


def run_case(case: Case) -> dict[str, Any]:
    """Run a study, or read it if it is finished; its figures."""
    return kept(RUNS / f"{case.name}.json", lambda: _run(case))


def _run(case: Case) -> dict[str, Any]:
    import torch

    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.spec.study_file import resolve, validate

    torch.set_num_threads(1)
    began = time.process_time()
    run = run_study(resolve(validate(study_of(case), case.name), ROOT), RUNS / case.name)
    verdict = run.verdict
    assert verdict is not None
    tests = verdict.scores["test"]
    winner = run.log.records[verdict.winner]
    survey = run.plan.survey
    return {
        "test": tests[verdict.winner].values["score"],
        "validation": verdict.scores["validation"][verdict.winner].values["score"],
        "search": winner.values["score"],
        "kind": winner.kind,
        "strategy": run.plan.strategy.name,
        "dimensions": len(run.plan.space.names),
        "chosen": None if survey is None else survey.choice.to_dict(),
        "seconds": time.process_time() - began,
        "anchors": {
            record.name: {
                "search": record.values["score"],
                "test": tests[record.number].values["score"],
            }
            for record in run.log.records
            if record.kind == "anchor" and record.state == "complete"
        },
    }


def oracle(zoo: str) -> dict[str, Any]:
    """What a search over task vectors finds that sees the test items; kept as studies are.

    No merge of these coefficients that a search can find is much better on test items.
    """
    return kept(RUNS / f"{zoo}-oracle.json", lambda: _oracle(zoo))


def _oracle(zoo: str) -> dict[str, Any]:
    import datasets
    import torch

    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.spec.study_file import resolve, validate

    torch.set_num_threads(1)
    items = RUNS / f"{zoo}-oracle-items"
    if not items.exists():
        splits = datasets.load_from_disk(str(ZOOS / zoo / "data"))
        swapped = {"search": splits["test"], "test": splits["search"]}
        datasets.DatasetDict({**splits, **swapped}).save_to_disk(str(items))
    study = study_of(Case(zoo, "task_arithmetic, cma_es", 0)) | {
        "name": f"{zoo}-oracle",
        "strategy": "hybrid",
        "evaluators": [{**ZOO_STUDIES[zoo].evaluator, "data": str(items)}],
        "budget": {"trials": ORACLE_TRIALS},
    }
    run = run_study(resolve(validate(study, study["name"]), ROOT), RUNS / f"{zoo}-oracle")
    complete = [record for record in run.log.records if record.state == "complete"]
    return {
        "best": max(record.values["score"] for record in complete),
        "anchors": {r.name: r.values["score"] for r in complete if r.kind == "anchor"},
    }


def tables(results: Mapping[Case, Mapping[str, Any]]) -> str:
    """For every zoo the winners by row, and the operators by themselves."""
    parts = []
    for zoo in ZOO_STUDIES:
        own = {case: figures for case, figures in results.items() if case.zoo == zoo}
        if own:
            parts += [f"**The {zoo} zoo**", _studies(own), _merges(own)]
        if (RUNS / f"{zoo}-oracle.json").is_file():
            found = oracle(zoo)
            parts.append(
                f"A search by `hybrid` over task vectors that sees the test items finds "
                f"{100 * found['best']:.1f} on them, the best anchor "
                f"{100 * max(found['anchors'].values()):.1f}."
            )
    return "\n\n".join(parts)


def _studies(results: Mapping[Case, Mapping[str, Any]]) -> str:
    """Search, validation and test scores of the winners, and the CPU seconds of a study."""
    lines = [
        "| study | strategy, coordinates | search | validation | test items | seeds | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        figures = [one for case, one in results.items() if case.row == row]
        if figures:
            shown = [mean_and_half([100 * one[key] for one in figures]) for key in SPLITS]
            first = figures[0]
            what = f"{first['strategy']}, {first['dimensions']}"
            each = ", ".join(f"{100 * one['test']:.1f}" for one in figures)
            seconds = f"{sum(one['seconds'] for one in figures) / len(figures):.0f}"
            lines.append(f"| {row} | {what} | {' | '.join(shown)} | {each} | {seconds} |")
    return "\n".join(lines)


def _merges(results: Mapping[Case, Mapping[str, Any]]) -> str:
    """Search and test scores of every anchor of the first study that measured operators."""
    automatic = [one for one in results.values() if one["chosen"] is not None]
    lines = ["| merge | search items | test items |", "|---|---|---|"]
    for name, values in automatic[0]["anchors"].items() if automatic else ():
        lines.append(f"| {name} | {100 * values['search']:.1f} | {100 * values['test']:.1f} |")
    for one in automatic[:1]:
        chosen = ", ".join(
            f"{name} {value:.3g}"
            for name, value in zip(
                one["chosen"]["members"], one["chosen"]["coefficients"], strict=True
            )
        )
        lines += ["", f"The search went on from {chosen}."]
    return "\n".join(lines)


#: Splits of the first table.
SPLITS = ("search", "validation", "test")


def _build(zoo: str) -> None:
    """Make a zoo where it is missing."""
    from experiments.zoo.digits import build_digits
    from experiments.zoo.segments import build_segments
    from experiments.zoo.skills import build_skills

    if zoo == "digits":
        build_digits(ZOOS / zoo)
    elif zoo == "skills":
        build_skills(ZOOS / zoo)
    else:
        build_segments(ZOOS / zoo)


def main() -> None:
    """Run what is missing, one study after the other, and write the tables of all finished ones."""
    from experiments.zoo.building import silence_transformers

    parser = argparse.ArgumentParser(description="Search on top of the best operator.")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of every row")
    parser.add_argument("--zoos", nargs="*", choices=list(ZOO_STUDIES), default=list(ZOO_STUDIES))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args()
    silence_transformers()
    RUNS.mkdir(parents=True, exist_ok=True)
    for zoo in options.zoos:
        _build(zoo)
    for seed in range(options.seeds):
        for case in (Case(zoo, row, seed) for zoo in options.zoos for row in options.rows):
            print(case.name, f"{100 * run_case(case)['test']:.1f}", flush=True)
    if "segments" in options.zoos:
        oracle("segments")
    every = [Case(zoo, row, seed) for zoo in ZOO_STUDIES for row in ROWS for seed in range(10)]
    results = {case: run_case(case) for case in every if (RUNS / f"{case.name}.json").is_file()}
    write_between(README, START, STOP, tables(results))


if __name__ == "__main__":
    main()
