"""Scores of single merges on the zoos, by task: what experiments without a search share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from experiments.running import ROOT
from experiments.zoo.clip import section
from experiments.zoo.clip_data import CLASSES
from experiments.zoo.digits_data import DOMAINS
from experiments.zoo.skills_data import SKILLS, SPLITS

ZOOS = ROOT / "zoo"

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Zoo:
    """A zoo and how its experts are scored.

    Attributes:
        name: Of its folder.
        experts: Their names, which are those of the tasks.
        evaluator: Section of the study file, without objectives.
        prefix: What names of domains begin with before those of tasks.
    """

    name: str
    experts: tuple[str, ...]
    evaluator: Mapping[str, Any]
    prefix: str = ""

    @property
    def folder(self) -> Path:
        """Where its models are."""
        return ZOOS / self.name

    @property
    def paths(self) -> dict[str, str]:
        """Name -> path of each expert."""
        return {name: str(self.folder / name) for name in self.experts}


_DIGITS = {
    "kind": "classification",
    "data": str(ZOOS / "digits" / "data"),
    "domain": "domain",
    "id": "id",
}
_SKILLS = {
    "kind": "lm_eval",
    "include_path": str(ZOOS / "skills" / "tasks"),
    "tasks": [{"task": "skills", "splits": {split: split for split in SPLITS}}],
}
SCORED: Mapping[str, Zoo] = {
    "digits": Zoo("digits", tuple(DOMAINS), _DIGITS),
    "skills": Zoo("skills", tuple(SKILLS), _SKILLS, "skills_"),
    "clip": Zoo("clip", tuple(CLASSES), section(ZOOS / "clip")),
}


def scores(
    zoo: Zoo,
    experts: Mapping[str, Any],
    rows: Mapping[str, Sequence[float]],
    split: Literal["search", "validation", "test"] = "test",
    operator: Mapping[str, Any] | None = None,
) -> dict[str, Scores]:
    """Score by task of some merges.

    Args:
        zoo: Whose base and test items are taken.
        experts: As in a study file: name -> path, or path with options.
        rows: Label -> coefficient of each expert.
        split: Items to score on.
        operator: Name and hyperparameters, as in a study file; None for task arithmetic.
    """
    from mergesearch.merging import Field
    from mergesearch.search.plan.planning import plan_study
    from mergesearch.search.spec.study_file import resolve, validate
    from mergesearch.search.workers.messages import Task, WorkerSpec
    from mergesearch.search.workers.worker import Worker

    objectives = [_objective(zoo, task) for task in zoo.experts]
    study = {
        "name": zoo.name,
        "base": str(zoo.folder / "base"),
        "experts": dict(experts),
        "evaluators": [{**zoo.evaluator, "objectives": objectives}],
        "budget": {"trials": 1000},  # none is run
        **({} if operator is None else {"operator": dict(operator)}),
    }
    spec = resolve(validate(study, zoo.name), ROOT)
    plan = plan_study(spec)
    assert plan.layout is not None
    evaluators = tuple(evaluator.model_dump() for evaluator in spec.evaluators)
    found: dict[str, Scores] = {}
    with TemporaryDirectory() as arenas:
        worker = Worker(WorkerSpec(plan.template, evaluators, arenas))
        for label, row in rows.items():
            recipe = plan.template.with_field(Field.constant(plan.layout.size, list(row)))
            outcome = worker.run(Task("", recipe, split))
            assert outcome.measurement is not None, outcome.failure
            values = outcome.measurement.values
            found[label] = {task: float(values[task]) for task in zoo.experts}
    return found


def _objective(zoo: Zoo, task: str) -> dict[str, Any]:
    named = {"name": task, "domains": [f"{zoo.prefix}{task}"]}
    return named if zoo.name == "skills" else {**named, "metric": "accuracy"}


def one_hot(zoo: Zoo) -> dict[str, list[float]]:
    """Coefficients under which a merge is an expert, by its name."""
    return {name: [float(name == other) for other in zoo.experts] for name in zoo.experts}


def mean(values: Scores) -> float:
    """Mean over tasks in percent."""
    return 100 * sum(values.values()) / len(values)
