"""Experiment 5: merges with and without gradients on the digits zoo, equal wall time each.

``python -m experiments.e0005_gradients``

Every searched row is a real study on one thread, run for the same seconds, two studies at a time;
the figure is the test accuracy (mean of the four domains) of what the strategy recommends when its
time is over. No label decides anything in the rows without labels. Finished studies are kept in
``runs/gradients`` and not run again; the table goes into ``experiments/0005-gradients/README.md``,
between its two marks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments.e0003_0004_strategies import DOMAINS, ZOO
from experiments.running import ROOT, folder_name, interval, run_in_pairs, write_between

RUNS = ROOT / "runs" / "gradients"
README = ROOT / "experiments" / "0005-gradients" / "README.md"
DATA = ZOO / "data"
START = "<!-- table: written by the command above -->"
STOP = "<!-- end of table -->"
#: Items of every expert's domain that Fisher merging and RegMean++ look at.
SAMPLES = 128

LABELLED = {"kind": "classification", "data": str(DATA), "domain": "domain", "id": "id"}
ITEMS = {"data": str(DATA), "domain": "domain", "id": "id"}
ACCURACY = [LABELLED | {"objectives": [{"metric": "accuracy"}]}]
CROSS_ENTROPY = [LABELLED | {"objectives": [{"metric": "cross_entropy"}]}]
BOTH = [LABELLED | {"objectives": [{"metric": "accuracy"}, {"metric": "cross_entropy"}]}]


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        label: Its name in the table.
        looks: What it reads beside weights: ``nothing``, ``items``, ``test items`` (without
            labels), ``labels``.
        sections: Of its study; for a merge without search, its operator alone.
        seeded: Whether seeds change anything.
    """

    label: str
    looks: str
    sections: Mapping[str, Any] = field(default_factory=dict)
    seeded: bool = True

    @property
    def searched(self) -> bool:
        """Whether there is a search."""
        return "strategy" in self.sections


def _label_free(looks: str) -> Iterator[Method]:
    """The methods that read no labels, on search items or on the test items themselves."""
    option = {"transductive": looks == "test items"}
    entropy, alignment = ([{"kind": kind} | ITEMS | option] for kind in ("entropy", "alignment"))
    for granularity in ("task", "block", "tensor"):
        space = {"granularity": granularity}
        sections = {"strategy": "adamerging", "space": space, "evaluators": entropy}
        yield Method(f"AdaMerging, {granularity}-wise", looks, sections)
    plus = {"strategy": "adamerging", "space": {"granularity": "tensor"}, "evaluators": entropy}
    yield Method(
        "AdaMerging++, tensor-wise", looks, plus | {"operator": {"name": "ties", "merge": "sum"}}
    )
    paper = {"samples": 5, "batch_size": 2, "gamma": 5.0}
    for name, label in (
        ("expert_merging", "Expert Merging"),
        ("expert_merging_pp", "Expert Merging++"),
    ):
        for suffix, options in (("", {}), (", 5 items, gamma 5", paper)):
            strategy = {"name": name, **options}
            yield Method(
                label + suffix, looks, {"strategy": strategy, "space": {}, "evaluators": alignment}
            )
    follow = {"strategy": "adamerging", "space": {"granularity": "tensor"}, "evaluators": alignment}
    yield Method("Adam on alignment, tensor-wise", looks, follow)
    blocks = {"strategy": "cma_es", "space": {"granularity": "block", "bounds": [0.0, 1.0]}}
    yield Method("CMA-ES on entropy, block-wise", looks, blocks | {"evaluators": entropy})
    yield Method("CMA-ES on alignment, block-wise", looks, blocks | {"evaluators": alignment})


def _with_labels() -> Iterator[Method]:
    tensors = {"granularity": "tensor"}
    blocks = {"granularity": "block", "bounds": [0.0, 1.0]}
    for label, options in (
        ("Frank-Wolfe, exact oracle", {}),
        ("Frank-Wolfe, cosine rule", {"oracle": "cosine"}),
        ("Frank-Wolfe, soft", {"variant": "soft"}),
    ):
        strategy = {"name": "frank_wolfe", **options}
        yield Method(
            label, "labels", {"strategy": strategy, "space": tensors, "evaluators": CROSS_ENTROPY}
        )
    follow = {"strategy": "adamerging", "space": tensors, "evaluators": CROSS_ENTROPY}
    yield Method("Adam on cross-entropy, tensor-wise", "labels", follow)
    warm = {"strategy": "gradient_warm_cma", "space": blocks, "evaluators": BOTH}
    yield Method("gradient_warm_cma on both, block-wise", "labels", warm)
    for name, evaluators in (("accuracy", ACCURACY), ("cross-entropy", CROSS_ENTROPY)):
        sections = {"strategy": "cma_es", "space": blocks, "evaluators": evaluators}
        yield Method(f"CMA-ES on {name}, block-wise", "labels", sections)
    for name, space in (("block", blocks), ("tensor", {"granularity": "tensor"})):
        box = {"space": {**space, "bounds": [0.0, 1.0]}, "evaluators": ACCURACY}
        yield Method(f"hybrid on accuracy, {name}-wise", "labels", box | {"strategy": "hybrid"})
    quadratic = {"strategy": "quadratic", "space": blocks, "evaluators": ACCURACY}
    yield Method("quadratic on accuracy, block-wise", "labels", quadratic)


METHODS = (
    Method("average", "nothing", {"operator": "average"}, seeded=False),
    Method("task arithmetic 0.3", "nothing", {"operator": "task_arithmetic"}, seeded=False),
    Method("TIES", "nothing", {"operator": "ties"}, seeded=False),
    Method("Fisher", "items", {"operator": "fisher"}),
    Method("RegMean++", "items", {"operator": "regmean_pp"}),
    *_label_free("items"),
    *_label_free("test items"),
    *_with_labels(),
)


@dataclass(frozen=True)
class Case:
    """A method with a seed, and a time or a number of item evaluations."""

    method: int
    seed: int
    seconds: float
    evaluations: int | None = None

    @property
    def name(self) -> str:
        """Name of its run folder."""
        method = METHODS[self.method]
        words = folder_name(f"{method.label} {method.looks}")
        spent = f"{self.seconds:g}" if self.evaluations is None else f"{self.evaluations}e"
        return f"{words}-{self.seed}-{spent}"

    def study(self) -> dict[str, Any]:
        """The study file."""
        sections = dict(METHODS[self.method].sections)
        operator = sections.get("operator")
        if operator in ("fisher", "regmean_pp"):
            data = {name: str(RUNS / "items" / name) for name in DOMAINS}
            inputs = {
                "model_class": "AutoModelForImageClassification",
                "inputs": {"pixel_values": "pixels"},
            }
            calibration = inputs | {
                "data": data,
                "split": "search",
                "samples": SAMPLES,
                "seed": self.seed,
            }
            sections["operator"] = {"name": operator, "calibration": calibration}
        return {
            "name": self.name,
            "seed": self.seed,
            "base": str(ZOO / "base"),
            "experts": {name: str(ZOO / name) for name in DOMAINS},
            "evaluators": ACCURACY,
            "budget": {"seconds": self.seconds}
            if self.evaluations is None
            else {"evaluations": self.evaluations},
            "selection": {"leaders": 1},
            **sections,
        }


def run_case(case: Case) -> dict[str, Any]:
    """Run a study, or read it if it is finished; its figures."""
    path = RUNS / f"{case.name}.json"
    if path.is_file():
        finished: dict[str, Any] = json.loads(path.read_text())
        return finished
    import torch

    torch.set_num_threads(1)
    figures = _searched(case) if METHODS[case.method].searched else _merged(case)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _spec(case: Case) -> Any:
    from mergesearch.search.spec.study_file import resolve, validate

    return resolve(validate(case.study(), case.name), ROOT)


def _merged(case: Case) -> dict[str, Any]:
    """A merge at its operator's default."""
    from mergesearch.merging import Field
    from mergesearch.merging.operators import get_operator
    from mergesearch.search.plan.planning import plan_study

    plan = plan_study(_spec(case))
    operator = get_operator(plan.template.operator)
    experts = len(plan.template.experts)
    default = operator.default(experts, plan.template.options)
    assert plan.layout is not None
    field = Field.constant(plan.layout.size, np.full(plan.template.field.directions, default))
    return {"accuracy": _accuracy(plan.template.with_field(field)), "trials": 0, "steps": 0}


def _searched(case: Case) -> dict[str, Any]:
    """What the strategy recommends when its time is over."""
    from mergesearch.search.runs.driver import run_study

    run = run_study(_spec(case), RUNS / case.name)
    (chosen,) = (record for record in run.log.records if record.kind == "recommended")
    searched = [record for record in run.log.records if record.kind == "search"]
    steps = [
        len(record.gradient_result.losses)
        for record in searched
        if record.gradient_result is not None
    ]
    spent = sum(sum(record.seconds.values()) for record in searched)
    return {
        "accuracy": _accuracy(chosen.recipe),
        "dim": len(run.plan.space.names),
        "trials": len(searched),
        "steps": sum(steps),
        "seconds": spent,
    }


def _accuracy(recipe: Any) -> float:
    """Mean test accuracy over the domains, by a worker that has seen nothing of the study."""
    from mergesearch.search.workers.messages import Task, WorkerSpec
    from mergesearch.search.workers.worker import Worker

    worker = Worker(WorkerSpec(recipe, tuple(ACCURACY), str(RUNS / ".arenas")))
    outcome = worker.run(Task("", recipe, "test"))
    assert outcome.measurement is not None, outcome.failure
    return float(outcome.measurement.values["accuracy"])


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A table for each kind of data that methods read, best first."""
    titles = {
        "nothing": "Nothing but weights",
        "items": "Items without labels, inductive (search items)",
        "test items": "Items without labels, transductive (the test items themselves)",
        "labels": "Labelled search items",
    }
    parts = []
    for looks, title in titles.items():
        rows = []
        for index, method in enumerate(METHODS):
            seeds = results.get(str(index), ())
            if method.looks == looks and seeds:
                rows.append((interval([100 * r["accuracy"] for r in seeds]), method, seeds))
        lines = [
            f"**{title}**",
            "",
            "| method | coefficients | trials | steps | test accuracy, % |",
            "|---|---|---|---|---|",
        ]
        for (mean, half), method, seeds in sorted(rows, key=lambda row: -row[0][0]):
            spread = f" ± {half:.1f}" if len(seeds) > 1 else ""
            trials, steps = (
                f"{np.mean([r[key] for r in seeds]):.0f}" for key in ("trials", "steps")
            )
            lines.append(
                f"| {method.label} | {seeds[0].get('dim', '')} | {trials} | {steps} | "
                f"{mean:.1f}{spread} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def write_table(text: str) -> None:
    """Put the tables between their marks."""
    write_between(README, START, STOP, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="seeds of every method (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="time of every search (default: %(default)s)"
    )
    parser.add_argument(
        "--evaluations",
        type=int,
        help="evaluations of items of every search, instead of a time; no table is written",
    )
    parser.add_argument(
        "--only", default="", help="run methods whose label holds this, and write no table"
    )
    options = parser.parse_args(arguments)
    chosen = [index for index, method in enumerate(METHODS) if options.only in method.label]
    cases = [
        Case(index, seed, options.seconds, options.evaluations)
        for seed in range(options.seeds)
        for index in chosen
        if METHODS[index].seeded or not seed
    ]
    results = _run_all(cases)
    by_method = {
        str(index): [results[c] for c in cases if c.method == index and c in results]
        for index in chosen
    }
    text = table(by_method)
    print(text)
    if len(results) == len(cases) and not options.only and options.evaluations is None:
        write_table(text)


def _save_by_domain() -> None:
    """Save the search items of every domain apart, for operators that run experts on their own."""
    from datasets import DatasetDict, load_from_disk

    for name in DOMAINS:
        folder = RUNS / "items" / name
        if not folder.exists():
            items = load_from_disk(str(DATA / "search"))
            rows = np.flatnonzero(
                np.array(items.features["domain"].int2str(items["domain"][:])) == name
            )
            DatasetDict({"search": items.select(rows)}).save_to_disk(str(folder))


def _run_all(cases: Sequence[Case]) -> dict[Case, dict[str, Any]]:
    """Figures of every case, two at a time; one that fails is reported and left out."""
    from experiments.zoo.building import silence_transformers
    from experiments.zoo.digits import build_digits

    silence_transformers()
    build_digits(ZOO)
    RUNS.mkdir(parents=True, exist_ok=True)
    _save_by_domain()
    return run_in_pairs(cases, run_case)


if __name__ == "__main__":
    main()
