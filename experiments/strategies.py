"""Every strategy on the digits zoo, several seeds each:
``python -m experiments.strategies single|tasks|blocks``.

Each case is a real study, run as a user would run it, on one thread; two at a time. What is
finished is kept in ``runs/strategies`` and not run again, and the table goes into the experiment's
README, between its two marks.

``single``   one objective, mean accuracy over the four domains (``experiments/0003-one-objective``)
``tasks`` four objectives, one coefficient for each expert (``experiments/0004-several-objectives``)
``blocks`` two objectives, a coefficient for each block and expert (the same experiment)
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "zoo" / "digits"
RUNS = ROOT / "runs" / "strategies"
DATA = ZOO / "data-small"
DOMAINS = ("upright", "rotated", "mirrored", "inverted")
START = "<!-- table NAME: written by the command above -->"
STOP = "<!-- end of table NAME -->"
#: Scans behind the search items, each once in every domain: half of the zoo's, which halves the
#: time of a trial.
SCANS = 200
#: Half width of a 95 % interval of a mean in standard errors, by number of seeds (Student's t).
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Named(Protocol):
    """A case with the name of its run folder."""

    @property
    def name(self) -> str:
        """The name."""


AnyCase = TypeVar("AnyCase", bound=Named)


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
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    import torch

    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.spec.study_file import resolve, validate

    torch.set_num_threads(1)
    run = run_study(resolve(validate(case.study(), case.name), ROOT), RUNS / case.name)
    figures = _one(run) if len(run.plan.objectives) == 1 else _front(run)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _one(run: Any) -> dict[str, Any]:
    """Test score of the winner and of the anchors, the best score on search items, and how the
    seconds went.
    """
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
    """Hypervolume of the front of search and recommendation, on search items and again on test
    items.
    """
    from mergesearch.search.front import to_losses
    from mergesearch.search.runs.opened import worker_spec
    from mergesearch.search.study.problem import study_normaliser
    from mergesearch.search.study.selection import front_numbers
    from mergesearch.search.workers.messages import Task
    from mergesearch.search.workers.worker import Worker

    objectives = run.plan.objectives
    records = run.log.records
    scale = study_normaliser(run.plan, records)
    worker = Worker(worker_spec(run.plan, run.folder))

    def volumes(members: Sequence[Any]) -> list[float]:
        again = [worker.run(Task("", record.recipe, "test")).measurement for record in members]
        values = [[record.values for record in members], [m.values for m in again if m is not None]]
        return [
            scale.hypervolume([to_losses(v, objectives) for v in rows]) if rows else 0.0
            for rows in values
        ]

    found = [record for record in records if record.number in {*front_numbers(records, objectives)}]
    anchors = [
        record for record in records if record.kind == "anchor" and record.state == "complete"
    ]
    (search, test) = volumes(found)
    (search_anchors, test_anchors) = volumes(anchors)
    return {
        "dim": len(run.plan.space.names),
        "members": len(found),
        "search": search,
        "test": test,
        "anchors": {"search": search_anchors, "test": test_anchors},
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval over seeds."""
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return float(array.mean()), math.nan
    return float(array.mean()), T95.get(array.size, 1.96) * float(array.std(ddof=1)) / math.sqrt(
        array.size
    )


def table(setting: str, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The rows, best first on test items."""
    return _single_table(results) if setting == "single" else _front_table(results)


def _single_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = [
        (interval([100 * r["winner"] for r in found]), label, found)
        for label, found in results.items()
    ]
    lines = [
        "| strategy | dimensions | test accuracy of the winner, % | best on search items, % |",
        "|---|---|---|---|",
    ]
    for (mean, half), label, found in sorted(rows, key=lambda row: -row[0][0]):
        best = np.mean([100 * r["search"] for r in found])
        lines.append(f"| {label} | {found[0]['dim']} | {mean:.1f} ± {half:.1f} | {best:.1f} |")
    anchors = next(iter(results.values()))[0]["anchors"]
    lines += ["", "| anchor | test accuracy, % |", "|---|---|"]
    return "\n".join(
        [*lines, *(f"| {name} | {100 * value:.1f} |" for name, value in anchors.items())]
    )


def _front_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = [
        (interval([r["test"] for r in found]), label, found) for label, found in results.items()
    ]
    lines = [
        "| strategy | hypervolume, test items | hypervolume, search items | members |",
        "|---|---|---|---|",
    ]
    for (mean, half), label, found in sorted(rows, key=lambda row: -row[0][0]):
        seen, spread = interval([r["search"] for r in found])
        members = np.mean([r["members"] for r in found])
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
    chosen = [place for place, method in enumerate(setting.methods) if options.only in method.label]
    cases = [
        Case(options.setting, place, seed, trials)
        for seed in range(options.seeds)
        for place in chosen
    ]
    results = _run_all(cases)
    by_label = {
        setting.methods[place].label: [
            results[case] for case in cases if case.method == place and case in results
        ]
        for place in chosen
    }
    text = table(options.setting, {label: found for label, found in by_label.items() if found})
    print(text)
    if len(results) == len(cases) and len(chosen) == len(setting.methods) and not options.trials:
        write_table(options.setting, text)


def _halve_search_items() -> None:
    """The zoo's items with fewer to search on."""
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
    """Every case, two at a time; one that fails is told and left out."""
    from experiments.zoo.digits import build_digits, silence_transformers
    from experiments.zoo.digits_adapters import extract_adapters

    silence_transformers()
    extract_adapters(build_digits(ZOO))
    _halve_search_items()
    RUNS.mkdir(parents=True, exist_ok=True)
    return run_in_pairs(cases, run_case)


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures that were written to ``path`` before, or those that are made now, written there."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    figures = make()
    path.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def write_between(path: Path, start: str, stop: str, text: str) -> None:
    """Put a text between two marks of a page."""
    before, _, rest = path.read_text().partition(start)
    path.write_text(f"{before}{start}\n\n{text}\n\n{stop}{rest.partition(stop)[2]}")


def run_in_pairs(
    cases: Sequence[AnyCase], run: Callable[[AnyCase], dict[str, Any]]
) -> dict[AnyCase, dict[str, Any]]:
    """Figures of every case, two at a time on one thread each; one that fails is told and left
    out.
    """
    from experiments.zoo.digits import silence_transformers

    results = {}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    with ProcessPoolExecutor(2, get_context("spawn"), silence_transformers) as pool:
        waiting = {pool.submit(run, case): case for case in cases}
        for done in as_completed(waiting):
            case = waiting[done]
            try:
                results[case] = done.result()
                print(f"{len(results)}/{len(cases)} {case.name}", flush=True)
            except Exception as error:
                print(f"FAILED {case.name}: {type(error).__name__}: {error}", flush=True)
    return results


if __name__ == "__main__":
    main()
