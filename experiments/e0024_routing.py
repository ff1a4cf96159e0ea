"""Experiment 24: merges for each input, on a language model and on image-text models.

``python -m experiments.e0024_routing [--zoos skills clip]``

T3 and Twin-Merging with their published settings, variants of them, task arithmetic, and an oracle
router, which knows the task of every item. Nothing is searched but one coefficient of task
arithmetic. Figures are of the first test items of a balanced order, for T3 of half as many. Those
that are finished are kept in ``runs/routing``; the tables go into the README of
``experiments/0024-routing``, between its marks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.running import ROOT, folder_name, kept, write_between
from experiments.zoo.clip import section
from experiments.zoo.clip_data import CLASSES
from experiments.zoo.skills_data import SKILLS

if TYPE_CHECKING:
    from mergesearch.merging.recipe import Recipe

RUNS = ROOT / "runs" / "routing"
README = ROOT / "experiments" / "0024-routing" / "README.md"
START = "<!-- tables: written by the command above -->"
STOP = "<!-- end of tables -->"
#: Coefficients of task arithmetic that are tried on search items.
LINE = (0.12, 0.21, 0.3, 0.42, 0.6)
#: Weights of the expert that are the same for all items, beside T3.
STATIC = (0.0, 0.5, 1.0)
#: Label -> parameters of T3 beside those that it starts with.
T3_ROWS: Mapping[str, Mapping[str, Any]] = {
    "T3 as published": {},
    "T3, centred, γ 20: the expert where they differ": {"centred": True, "gamma": 20.0},
    "T3, centred, γ 20: the base where they differ": {
        "centred": True,
        "gamma": 20.0,
        "lambda_min": 1.0,
        "lambda_max": 0.0,
    },
}
#: Label -> parameters of Twin-Merging beside those that it starts with.
TWIN_ROWS: Mapping[str, Mapping[str, Any]] = {
    "Twin-Merging": {},
    "Twin-Merging, temperature 0.05": {"temperature": 0.05},
    "Twin-Merging, once for a batch": {"per": "batch"},
    "Twin-Merging, rank 1": {"rank": 1.0},
}
#: Label -> rank of the vectors of which an oracle chooses one.
ORACLES = {"oracle router": 0.1, "oracle router, rank 1": 1.0}

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """A zoo, and how its items are scored.

    Attributes:
        name: Of its folder.
        title: Of its table.
        tasks: Their names, which are those of the experts.
        items: Test items that are used.
        evaluator: Section of the study file for a method, without objectives.
        objective: Of every task, beside its domain.
        percent: Whether scores are shares, of which more is better.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    items: int
    evaluator: Callable[[str], dict[str, Any]]
    objective: Mapping[str, Any]
    percent: bool = True

    @property
    def folder(self) -> Path:
        """Where its models are."""
        return ROOT / "zoo" / self.name


def _written(method: str) -> dict[str, Any]:
    files = {task: str(ROOT / "zoo" / "skills" / "data" / task) for task in SKILLS}
    return {
        "kind": "generation",
        "data": {"file": files},
        "target": "target",
        "id": "id",
        "max_new_tokens": 16,
        "batch_size": 64,
        "routing": {"method": method},
    }


def _scored(method: str) -> dict[str, Any]:
    files = {task: tokenized(task) for task in SKILLS}
    return {
        "kind": "language_model",
        "data": {"file": files},
        "labels": "labels",
        "id": "id",
        "batch_size": 64,
        "routing": {"method": method},
    }


def _prompted(method: str) -> dict[str, Any]:
    return section(ROOT / "zoo" / "clip") | {"kind": method, "input": "image"}


CASES = (
    Case(
        "skills",
        "The skills zoo, exact match of what is written, %",
        tuple(SKILLS),
        500,
        _written,
        {},
    ),
    Case(
        "skills",
        "The skills zoo, nats per token of the right answer (less is better)",
        tuple(SKILLS),
        500,
        _scored,
        {},
        percent=False,
    ),
    Case(
        "clip",
        "The clip zoo, accuracy by class prompts, %",
        tuple(CLASSES),
        800,
        _prompted,
        {"metric": "accuracy"},
    ),
)


def tokenized(task: str) -> str:
    """Prompts and right answers of a skill as token ids, of which the answers' count."""
    import datasets
    from transformers import AutoTokenizer

    folder = RUNS / "tokens" / task
    if folder.exists():
        return str(folder)
    datasets.disable_progress_bars()
    zoo = ROOT / "zoo" / "skills"
    tokenizer = AutoTokenizer.from_pretrained(str(zoo / "base"), local_files_only=True)

    def row(one: Mapping[str, Any]) -> dict[str, Any]:
        prompt = tokenizer(one["prompt"])["input_ids"]
        whole = [*tokenizer(f"{one['prompt']} {one['target']}")["input_ids"], 2]
        return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}

    asked = datasets.load_from_disk(str(zoo / "data" / task))
    keep = {"id"}
    rows = asked.map(row, remove_columns=sorted({*asked["test"].column_names} - keep))
    rows.save_to_disk(str(folder))
    return str(folder)


class Measuring:
    """A study's plan, worker and evaluator, by which single merges are scored.

    Args:
        case: The zoo.
        experts: Those of its experts that are merged.
        method: ``t3`` or ``twin_merging``.
        arenas: Folder for prepared weights.

    Attributes:
        items: Test items that are used.
    """

    def __init__(self, case: Case, experts: Sequence[str], method: str, arenas: str) -> None:
        from mergesearch.evaluators.spec.evaluators import build_evaluator
        from mergesearch.search.plan.planning import plan_study
        from mergesearch.search.spec.study_file import resolve, validate
        from mergesearch.search.workers.messages import WorkerSpec
        from mergesearch.search.workers.worker import Worker

        self.case = case
        self.items = case.items
        objectives = [{**case.objective, "name": task, "domains": [task]} for task in case.tasks]
        study = {
            "name": case.name,
            "base": str(case.folder / "base"),
            "experts": {task: str(case.folder / task) for task in experts},
            "evaluators": [case.evaluator(method) | {"objectives": objectives}],
            "budget": {"trials": 1000},  # none is run
        }
        spec = resolve(validate(study, case.name), ROOT)
        self.plan = plan_study(spec)
        evaluators = tuple(evaluator.model_dump() for evaluator in spec.evaluators)
        self.worker = Worker(WorkerSpec(self.plan.template, evaluators, arenas))
        self.evaluator: Any = build_evaluator(spec.evaluators, Path())
        self.evaluator.open()

    def recipe(self, parameters: Mapping[str, Any]) -> Recipe:
        """The method's start, with some parameters changed."""
        start = self.plan.space.decode(self.plan.space.start)
        changed = {**dict(start.routing), **parameters}
        return replace(start, routing=tuple(sorted(changed.items())))

    def scores(self, recipe: Recipe, model: Any, split: Any = "test") -> dict[str, float]:
        """Scores by task of a model, or of a merge for each input."""
        from mergesearch.evaluators import Candidate

        measured = self.evaluator.evaluate(Candidate(recipe, model), split, self.items)
        return {task: float(measured.values[task]) for task in self.case.tasks}

    def static(self, row: Sequence[float], split: Any = "test") -> dict[str, float]:
        """Scores by task of a weighted sum of the experts' task vectors."""
        from mergesearch.merging import Field
        from mergesearch.search.workers.messages import Task

        assert self.plan.layout is not None
        field = Field.constant(self.plan.layout.size, list(row))
        recipe = self.plan.template.with_field(field)
        outcome = self.worker.run(Task("", recipe, split, items=self.items))
        assert outcome.measurement is not None, outcome.failure
        return {task: float(outcome.measurement.values[task]) for task in self.case.tasks}

    def weights(self, routed: Any) -> tuple[Any, Any]:
        """How the test items are merged ``(items, weights)``, and their tasks ``(items,)``."""
        from mergesearch.evaluators.items import balanced_order

        items = self.evaluator._items_of("test")
        chosen = items.rows(np.sort(balanced_order(items.domains)[: self.items]))
        parts = []
        for start in range(0, len(chosen.domains), 64):
            part = chosen.rows(slice(start, start + 64))
            named = None if self.case.name == "skills" else part.domains.tolist()
            arguments = self.evaluator.arguments(routed.model, part)
            parts.append(routed.weights_for(arguments, named).numpy())
        return np.concatenate(parts), chosen.domains


def t3_rows(case: Case, expert: str) -> dict[str, Any]:
    """T3 of the base and one expert: scores and weights by task, and CPU seconds an item."""
    rows: dict[str, Any] = {}
    with TemporaryDirectory() as arenas:
        one = Measuring(case, [expert], "t3", arenas)
        one.items = case.items // 2
        for share in STATIC:
            rows[f"the same λ for all: {share:g}"] = {"scores": one.static([share])}
        for label, given in T3_ROWS.items():
            recipe = one.recipe(given)
            routed = one.worker.routed(recipe)
            began = time.process_time()
            scores = one.scores(recipe, routed)
            seconds = (time.process_time() - began) / one.items
            weights, tasks = one.weights(routed)
            shares = {task: float(weights[tasks == task].mean()) for task in case.tasks}
            rows[label] = {"scores": scores, "shares": shares, "seconds": seconds}
    return rows


def twin_rows(case: Case) -> dict[str, Any]:
    """Task arithmetic, Twin-Merging and its oracle: scores by task, and what else was measured."""
    count = len(case.tasks)
    rows: dict[str, Any] = {}
    with TemporaryDirectory() as arenas:
        one = Measuring(case, case.tasks, "twin_merging", arenas)
        rows["base"] = {"scores": one.static([0.0] * count)}
        eye = np.eye(count)
        home = {t: one.static(row)[t] for t, row in zip(case.tasks, eye.tolist(), strict=True)}
        rows["each expert at home"] = {"scores": home}
        rows["task arithmetic 0.3"] = {"scores": one.static([0.3] * count)}
        sign = 1 if case.percent else -1
        searched = {c: sign * mean(one.static([c] * count, "search")) for c in LINE}
        best = max(searched, key=lambda c: searched[c])
        label = f"task arithmetic, best of the line: {best:g}"
        rows[label] = {"scores": one.static([best] * count)}
        for label, given in TWIN_ROWS.items():
            rows[label] = _twin(one, given)
        for label, rank in ORACLES.items():
            recipe = one.recipe({"rank": rank})
            routed = one.worker.routed(recipe)
            plain = replace(recipe, routing=())
            scores = {}
            for task, row in zip(case.tasks, eye.tolist(), strict=True):
                routed.write(row)
                scores[task] = one.scores(plain, routed.model)[task]
            rows[label] = {"scores": scores}
    return rows


def _twin(one: Measuring, given: Mapping[str, Any]) -> dict[str, Any]:
    """A merge for each input, its bundle scored again, and how often the router is right."""
    from mergesearch.merging.routing.bundle import load, write_bundle

    recipe = one.recipe(given)
    routed = one.worker.routed(recipe)
    began = time.process_time()
    scores = one.scores(recipe, routed)
    seconds = (time.process_time() - began) / one.items
    weights, tasks = one.weights(routed)
    found: dict[str, Any] = {"scores": scores, "seconds": seconds}
    if dict(recipe.routing)["per"] == "item":
        wanted = np.array([one.case.tasks.index(task) for task in tasks.tolist()])
        found["right"] = float((weights.argmax(axis=1) == wanted).mean())
        found["weight of the right one"] = float(weights[np.arange(len(wanted)), wanted].mean())
    if not given:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "bundle"
            model_class = one.evaluator.model_class
            write_bundle(recipe, routed, out, model_class=model_class)
            found["bundle agrees"] = one.scores(recipe, load(out)) == scores
    return found


def mean(values: Scores) -> float:
    """Mean over tasks."""
    return sum(values.values()) / len(values)


def shown(case: Case, value: float) -> str:
    """A score in its unit."""
    return f"{100 * value:.1f}" if case.percent else f"{value:.3f}"


def twin_table(case: Case, rows: Mapping[str, Any]) -> str:
    """A row for each merge: its tasks, their mean, the router, and the cost of an item."""
    heads = ["merge", *case.tasks, "mean", "router right", "its weight", "CPU ms an item"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for label, row in rows.items():
        scores = row["scores"]
        cells = [shown(case, scores[task]) for task in case.tasks]
        cells.append(shown(case, mean(scores)))
        cells.append(f"{100 * row['right']:.1f} %" if "right" in row else "")
        cells.append(f"{row['weight of the right one']:.2f}" if "right" in row else "")
        cells.append(f"{1000 * row['seconds']:.0f}" if "seconds" in row else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def t3_table(case: Case, rows: Mapping[str, Any]) -> str:
    """A row for each rule: scores and weights of the expert at home and elsewhere, over experts."""
    heads = ["base and one expert", "at home", "elsewhere", "mean", "λ at home", "λ elsewhere"]
    heads.append("CPU ms an item")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    count = len(case.tasks)
    for label in rows[case.tasks[0]]:
        of = {expert: rows[expert][label] for expert in case.tasks}
        home, others = _home_and_elsewhere(case, {one: row["scores"] for one, row in of.items()})
        mean_of_all = (home + (count - 1) * others) / count
        cells = [shown(case, value) for value in (home, others, mean_of_all)]
        if "shares" in of[case.tasks[0]]:
            shares = {one: row["shares"] for one, row in of.items()}
            cells += [f"{value:.2f}" for value in _home_and_elsewhere(case, shares)]
            cells.append(f"{1000 * np.mean([row['seconds'] for row in of.values()]):.0f}")
        else:
            cells += ["", "", ""]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _home_and_elsewhere(case: Case, by_expert: Mapping[str, Scores]) -> tuple[float, float]:
    """Means over experts of what stands at their own task, and at all others."""
    home = [by_expert[task][task] for task in case.tasks]
    others = [by_expert[one][two] for one in case.tasks for two in case.tasks if one != two]
    return float(np.mean(home)), float(np.mean(others))


def tables(case: Case) -> str:
    """Measure what is missing of a zoo, and its tables."""
    prefix = folder_name(case.title.split(" (")[0])
    twin = kept(RUNS / f"{prefix}-twin.json", partial(twin_rows, case))
    t3 = {}
    for expert in case.tasks:
        path = RUNS / f"{prefix}-t3-{expert}.json"
        t3[expert] = kept(path, partial(t3_rows, case, expert))
        print(case.title, expert, flush=True)
    agrees = twin["Twin-Merging"]["bundle agrees"]
    told = "gives the same figures" if agrees else "DOES NOT GIVE THE SAME FIGURES"
    parts = [f"**{case.title}**", twin_table(case, twin), t3_table(case, t3)]
    return "\n\n".join([*parts, f"The bundle of Twin-Merging, written and loaded again, {told}."])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the tables."""
    from experiments.zoo.building import silence_transformers

    names = sorted({case.name for case in CASES}, reverse=True)
    parser = argparse.ArgumentParser(description="Merges for each input.")
    parser.add_argument("--zoos", nargs="*", choices=names, default=names)
    options = parser.parse_args(arguments)
    silence_transformers()
    RUNS.mkdir(parents=True, exist_ok=True)
    parts = [tables(case) for case in CASES if case.name in options.zoos]
    write_between(README, START, STOP, "\n\n".join(parts))


if __name__ == "__main__":
    main()
