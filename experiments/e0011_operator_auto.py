"""Experiment 11: does a search on top of the best operator beat the best single method?

``python -m experiments.e0011_operator_auto [--seeds 3]``

Every row is a real study on the digits zoo with 300 trials of one objective, the mean accuracy. The
items of the operators that run the experts are the search items of each expert's domain, without
labels. Figures are of test items, on which nothing was chosen. Finished studies are kept in
``runs/operator_auto`` and not run again; the tables go into
``experiments/0011-operator-auto/README.md``, between its marks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.running import ROOT, folder_name, interval, kept, write_between

RUNS = ROOT / "runs" / "operator_auto"
ZOO = ROOT / "zoo" / "digits"
README = ROOT / "experiments" / "0011-operator-auto" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
TRIALS = 300

#: Label -> sections of the study.
ROWS: Mapping[str, dict[str, Any]] = {
    "operator auto, strategy auto": {"operator": {"name": "auto"}},
    "auto among RegMean++, Iso-CTS, TSV": {
        "operator": {"name": "auto", "among": ["regmean_pp", "iso_cts", "tsv"]}
    },
    "operator auto, cma_es": {"operator": {"name": "auto"}, "strategy": "cma_es"},
    "task_arithmetic, cma_es": {"strategy": "cma_es"},
}


@dataclass(frozen=True)
class Case:
    """A row with a seed."""

    row: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return folder_name(f"{self.row}-{self.seed}")


def calibration(folder: Path) -> dict[str, Any]:
    """The search items of every expert's domain, written to ``folder`` if they are not there."""
    import datasets

    from experiments.zoo.digits_data import DOMAINS

    for domain in DOMAINS:
        if (folder / domain).exists():
            continue
        items = datasets.load_from_disk(str(ZOO / "data"))["search"]
        number = items.features["domain"].str2int(domain)
        chosen = items.select([i for i, own in enumerate(items["domain"]) if own == number])
        datasets.DatasetDict({"search": chosen}).save_to_disk(str(folder / domain))
    return {
        "data": {domain: str(folder / domain) for domain in DOMAINS},
        "model_class": "AutoModelForImageClassification",
        "inputs": {"pixel_values": "pixels"},
        "split": "search",
    }


def study_of(case: Case) -> dict[str, Any]:
    """The study file of a case."""
    from experiments.zoo.digits_data import DOMAINS

    data = {
        "name": case.name,
        "seed": case.seed,
        "base": str(ZOO / "base"),
        "experts": {domain: str(ZOO / domain) for domain in DOMAINS},
        "evaluators": [
            {
                "kind": "classification",
                "data": str(ZOO / "data"),
                "domain": "domain",
                "id": "id",
                "objectives": [{"name": "accuracy", "metric": "accuracy"}],
            }
        ],
        "budget": {"trials": TRIALS},
        **ROWS[case.row],
    }
    if "operator" in data:
        data["operator"] = {**data["operator"], "calibration": calibration(RUNS / "calibration")}
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
        "test": tests[verdict.winner].values["accuracy"],
        "validation": verdict.scores["validation"][verdict.winner].values["accuracy"],
        "search": winner.values["accuracy"],
        "kind": winner.kind,
        "strategy": run.plan.strategy.name,
        "dimensions": len(run.plan.space.names),
        "chosen": None if survey is None else survey.choice.to_dict(),
        "seconds": time.process_time() - began,
        "anchors": {
            record.name: {
                "search": record.values["accuracy"],
                "test": tests[record.number].values["accuracy"],
            }
            for record in run.log.records
            if record.kind == "anchor"
        },
    }


def tables(results: Mapping[Case, Mapping[str, Any]]) -> str:
    """The winners by row, and the operators by themselves."""
    lines = [
        "| study | strategy, coordinates | search items | validation items | test items | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        figures = [one for case, one in results.items() if case.row == row]
        if figures:
            shown = [_mean([100 * one[key] for one in figures]) for key in SPLITS]
            first = figures[0]
            what = f"{first['strategy']}, {first['dimensions']}"
            each = ", ".join(f"{100 * one['test']:.1f}" for one in figures)
            lines.append(f"| {row} | {what} | {' | '.join(shown)} | {each} |")
    automatic = [one for one in results.values() if one["chosen"] is not None]
    lines += ["", "| merge | search items | test items |", "|---|---|---|"]
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


def _mean(values: list[float]) -> str:
    """Mean and half width of its 95 % interval over seeds."""
    mean, half = interval(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {half:.1f}"


def main() -> None:
    """Run what is missing, one study after the other, and write the tables of all finished ones."""
    from experiments.zoo.digits import build_digits, silence_transformers

    parser = argparse.ArgumentParser(description="Search on top of the best operator.")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every row")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args()
    silence_transformers()
    build_digits(ZOO)
    RUNS.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for row in options.rows:
            case = Case(row, seed)
            print(case.name, f"{100 * run_case(case)['test']:.1f}", flush=True)
    every = [Case(row, seed) for row in ROWS for seed in range(10)]
    results = {case: run_case(case) for case in every if (RUNS / f"{case.name}.json").is_file()}
    write_between(README, START, STOP, tables(results))


if __name__ == "__main__":
    main()
