"""Experiments 3 and 4: every strategy on the digits zoo, several seeds each.

``python -m experiments.e0003_0004_strategies single|tasks|blocks``

Each case is a real study, run as a user would run it, on one thread; two at a time. Finished
studies are kept in ``runs/strategies`` and not run again, and the table goes into the experiment's
README, between its two marks.

``single``  one objective, mean accuracy over the four domains (``0003-one-objective``)
``tasks``   four objectives, one coefficient for each expert (``0004-several-objectives``)
``blocks``  two objectives, a coefficient for each block and expert (``0004-several-objectives``)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments.running import ROOT, interval, run_in_pairs, write_between

ZOO = ROOT / "zoo" / "digits"
RUNS = ROOT / "runs" / "strategies"
DATA = ZOO / "data-small"
DOMAINS = ("upright", "rotated", "mirrored", "inverted")
START = "<!-- table NAME: written by the command above -->"
STOP = "<!-- end of table NAME -->"
#: Scans behind the search items, each once in every domain: half of the zoo's, which halves the
#: time of a trial.
SCANS = 200


@dataclass(frozen=True)
class Method:
    """A row of a table: its label, and what its study has beside the common sections."""

    label: str
    sections: Mapping[str, Any] = field(default_factory=dict)


def _named(name: str, **options: Any) -> Method:
    inner = next((str(value) for value in options.values() if isinstance(value, str)), "")
    return Method(f"{name} ({inner})" if inner else name, {"strategy": {"name": name, **options}})


ADAPTERS = {name: f"{ZOO}/base+{ZOO}/adapters/{name}" for name in DOMAINS}

MEDSAMIX = Method("medsamix", {"strategy": "medsamix", "operator": "stack", "space": {}})

SINGLE = (
    _named("cma_es"),
    _named("quadratic"),
    _named("portfolio"),
    Method("m2n2", {"strategy": "m2n2", "space": {}}),
    MEDSAMIX,
    Method(
        "evo_merging (adapters)",
        {"strategy": "evo_merging", "operator": "lora_sparse", "experts": ADAPTERS, "space": {}},
    ),
    _named("nevergrad", optimizer="TBPSA"),
    _named("nevergrad", optimizer="DE"),
    _named("nevergrad", optimizer="OnePlusOne"),
    _named("optuna", sampler="tpe"),
    _named("optuna", sampler="cma_es"),
    Method("lorahub (4 coefficients)", {"strategy": "lorahub", "space": {}}),
    Method("pcb_es (4 coefficients)", {"strategy": "pcb_es", "operator": "pcb", "space": {}}),
    _named("pso"),
    _named("model_swarms"),
    _named("evogm"),
    _named("sobol"),
)
SEVERAL = ("map", "nested_map", "nsga2", "nsga3", "sms_emoa", "cma_parego", "portfolio", "sobol")
TASKS = (*map(_named, SEVERAL), _named("bayesian_map"), _named("optuna", sampler="nsga2"), MEDSAMIX)
BLOCKS = (*map(_named, SEVERAL), _named("optuna", sampler="nsga2"))


def _by_domain(names: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "metric": "accuracy", "domains": list(domains)}
        for name, domains in names.items()
    ]


@dataclass(frozen=True)
class Setting:
    """One table.

    Attributes:
        methods: Its rows.
        readme: Where it stands.
        trials: Budget of every study.
        space: The space that all but strategies with a space of their own search.
        objectives: Of the classification evaluator.
    """

    methods: Sequence[Method]
    readme: str
    trials: int
    space: Mapping[str, Any]
    objectives: Sequence[Mapping[str, Any]]


SETTINGS = {
    "single": Setting(
        SINGLE,
        "0003-one-objective",
        500,
        {"granularity": "block", "bounds": [0.0, 1.0]},
        [{"name": "accuracy"}],
    ),
    "tasks": Setting(
        TASKS,
        "0004-several-objectives",
        400,
        {"granularity": "task", "bounds": [0.0, 1.0]},
        _by_domain({name: [name] for name in DOMAINS}),
    ),
    "blocks": Setting(
        BLOCKS,
        "0004-several-objectives",
        400,
        {"granularity": "block", "bounds": [0.0, 1.0]},
        _by_domain({"keep upright": ["upright"], "gain the others": DOMAINS[1:]}),
    ),
}


@dataclass(frozen=True)
class Case:
    """One study: a method in a setting, with a seed."""

    setting: str
    method: int
    seed: int
    trials: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        label = SETTINGS[self.setting].methods[self.method].label
        return "-".join(
            [
                self.setting,
                *label.replace("(", "").replace(")", "").split(),
                str(self.seed),
                str(self.trials),
            ]
        )

    def study(self) -> dict[str, Any]:
        """The study file."""
        setting = SETTINGS[self.setting]
        evaluator = {"kind": "classification", "data": str(DATA), "domain": "domain", "id": "id"}
        return {
            "name": self.name,
            "seed": self.seed,
            "base": str(ZOO / "base"),
            "experts": {name: str(ZOO / name) for name in DOMAINS},
            "space": dict(setting.space),
            "evaluators": [evaluator | {"objectives": list(setting.objectives)}],
            "budget": {"trials": self.trials},
            **setting.methods[self.method].sections,
        }


def run_case(case: Case) -> dict[str, Any]:
    """Run a study, or read it if it is finished; its figures."""
    path = RUNS / f"{case.name}.json"
    if path.is_file():
        finished: dict[str, Any] = json.loads(path.read_text())
        return finished
    import torch

    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.spec.study_file import resolve, validate

    torch.set_num_threads(1)
    run = run_study(resolve(validate(case.study(), case.name), ROOT), RUNS / case.name)
    figures = _one(run) if len(run.plan.objectives) == 1 else _front(run)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _one(run: Any) -> dict[str, Any]:
    """Test scores of the winner and of the anchors, and the best score on search items."""
    (name,) = (objective.name for objective in run.plan.objectives)
    verdict = run.verdict
    records = run.log.records
    test = {number: score.values[name] for number, score in verdict.scores["test"].items()}
    searched = [
        record.values[name]
        for record in records
        if record.kind != "anchor" and record.state == "complete"
    ]
    return {
        "dim": len(run.plan.space.names),
        "winner": test[verdict.winner],
        "anchors": {
            record.name: test[record.number]
            for record in records
            if record.number in test and record.name
        },
        "search": max(searched),
        "whole": len(searched),
    }


def _front(run: Any) -> dict[str, Any]:
    """Hypervolume of the front and of the anchors, on search items and again on test items."""
    from mergesearch.search.front import to_losses
    from mergesearch.search.runs.wiring import worker_spec
    from mergesearch.search.study.problem import study_normaliser
    from mergesearch.search.study.selection import front_numbers
    from mergesearch.search.workers.messages import Task
    from mergesearch.search.workers.worker import Worker

    objectives = run.plan.objectives
    records = run.log.records
    scale = study_normaliser(run.plan, records)
    worker = Worker(worker_spec(run.plan, run.folder))

    def volumes(merges: Sequence[Any]) -> list[float]:
        again = [worker.run(Task("", record.recipe, "test")).measurement for record in merges]
        values = [[record.values for record in merges], [m.values for m in again if m is not None]]
        return [
            scale.hypervolume([to_losses(v, objectives) for v in rows]) if rows else 0.0
            for rows in values
        ]

    numbers = {*front_numbers(records, objectives)}
    members = [record for record in records if record.number in numbers]
    anchors = [
        record for record in records if record.kind == "anchor" and record.state == "complete"
    ]
    (search, test) = volumes(members)
    (search_anchors, test_anchors) = volumes(anchors)
    return {
        "dim": len(run.plan.space.names),
        "members": len(members),
        "search": search,
        "test": test,
        "anchors": {"search": search_anchors, "test": test_anchors},
    }


def table(setting: str, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The rows, best first on test items."""
    return _single_table(results) if setting == "single" else _front_table(results)


def _single_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = [
        (interval([100 * figures["winner"] for figures in seeds]), label, seeds)
        for label, seeds in results.items()
    ]
    lines = [
        "| strategy | dimensions | test accuracy of the winner, % | best on search items, % |",
        "|---|---|---|---|",
    ]
    for (mean, half), label, seeds in sorted(rows, key=lambda row: -row[0][0]):
        best = np.mean([100 * figures["search"] for figures in seeds])
        lines.append(f"| {label} | {seeds[0]['dim']} | {mean:.1f} ± {half:.1f} | {best:.1f} |")
    anchors = next(iter(results.values()))[0]["anchors"]
    lines += ["", "| anchor | test accuracy, % |", "|---|---|"]
    return "\n".join(
        [*lines, *(f"| {name} | {100 * value:.1f} |" for name, value in anchors.items())]
    )


def _front_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = [
        (interval([figures["test"] for figures in seeds]), label, seeds)
        for label, seeds in results.items()
    ]
    lines = [
        "| strategy | hypervolume, test items | hypervolume, search items | members |",
        "|---|---|---|---|",
    ]
    for (mean, half), label, seeds in sorted(rows, key=lambda row: -row[0][0]):
        seen, spread = interval([figures["search"] for figures in seeds])
        members = np.mean([figures["members"] for figures in seeds])
        lines.append(
            f"| {label} | {mean:.3f} ± {half:.3f} | {seen:.3f} ± {spread:.3f} | {members:.0f} |"
        )
    anchors = next(iter(results.values()))[0]["anchors"]
    return "\n".join(
        [*lines, f"| the anchors alone | {anchors['test']:.3f} | {anchors['search']:.3f} | |"]
    )


def write_table(setting: str, text: str) -> None:
    """Put the table between its marks."""
    path = ROOT / "experiments" / SETTINGS[setting].readme / "README.md"
    start = START.replace("NAME", setting)
    stop = STOP.replace("NAME", setting)
    write_between(path, start, stop, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=sorted(SETTINGS))
    parser.add_argument(
        "--seeds", type=int, default=5, help="seeds of every strategy (default: %(default)s)"
    )
    parser.add_argument(
        "--trials", type=int, help="trials of every study (default: those of the experiment)"
    )
    parser.add_argument(
        "--only", default="", help="run strategies whose name holds this, and write no table"
    )
    options = parser.parse_args(arguments)
    setting = SETTINGS[options.setting]
    trials = options.trials or setting.trials
    chosen = [row for row, method in enumerate(setting.methods) if options.only in method.label]
    cases = [
        Case(options.setting, row, seed, trials) for seed in range(options.seeds) for row in chosen
    ]
    results = _run_all(cases)
    by_label = {
        setting.methods[row].label: [
            results[case] for case in cases if case.method == row and case in results
        ]
        for row in chosen
    }
    text = table(options.setting, {label: seeds for label, seeds in by_label.items() if seeds})
    print(text)
    if len(results) == len(cases) and len(chosen) == len(setting.methods) and not options.trials:
        write_table(options.setting, text)


def _halve_search_items() -> None:
    """Save the zoo's items with fewer search items."""
    from experiments.zoo.digits import Settings
    from experiments.zoo.digits_data import load_images, partition, save_items

    if not DATA.exists():
        settings = Settings()
        splits = partition(len(load_images()[1]), settings.images, settings.seed)
        save_items(
            DATA,
            {name: splits[name][: SCANS if name == "search" else None] for name in settings.images},
        )


def _run_all(cases: Sequence[Case]) -> dict[Case, dict[str, Any]]:
    """Figures of every case, two at a time; one that fails is reported and left out."""
    from experiments.zoo.building import silence_transformers
    from experiments.zoo.digits import build_digits
    from experiments.zoo.digits_adapters import extract_adapters

    silence_transformers()
    extract_adapters(build_digits(ZOO))
    _halve_search_items()
    RUNS.mkdir(parents=True, exist_ok=True)
    return run_in_pairs(cases, run_case)


if __name__ == "__main__":
    main()
