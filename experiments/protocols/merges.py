"""Merges of a protocol, planned, prepared and scored by the product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.protocols.models_file import Models
from experiments.protocols.protocol import Adaptation, Method, Protocol
from mergesearch.merging import InputError, StudyFailedError

if TYPE_CHECKING:
    from mergesearch.evaluators import Split
    from mergesearch.merging import Recipe
    from mergesearch.search.plan.plan import Plan
    from mergesearch.search.spec.sections import StudySpec

#: Gradient steps of a trial of a method that adapts.
STEPS_EACH = 50
#: Name of the model that was trained on all tasks.
MULTITASK = "multitask"


@dataclass(frozen=True)
class Scores:
    """What a merge scores: objective -> value in its own unit, and the value's standard error."""

    values: Mapping[str, float]
    errors: Mapping[str, float]


def method_study(
    models: Models, protocol: Protocol, method: Method, experts: Sequence[str]
) -> StudySpec:
    """The study of a method's merges of some experts; nothing in it is searched."""
    from mergesearch.merging.operators import get_operator

    operator = {"name": method.operator, **method.options}
    if "inputs" in get_operator(method.operator).needs and models.file.calibration is not None:
        operator["calibration"] = _of_experts(models.file.calibration, experts)
    chosen = protocol.exclude if models.file.exclude is None else models.file.exclude
    space = {"granularity": "task", **({"exclude": [chosen]} if chosen else {})}
    return _resolved(models, experts, operator=operator, space=space)


def reference_study(models: Models) -> StudySpec:
    """The study of base and experts, and of the model of all tasks where there is one."""
    file = models.file
    more = {} if file.multitask is None else {MULTITASK: file.multitask}
    return _resolved(models, tuple(file.experts), more=more, space={"granularity": "task"})


def adapting_study(models: Models, method: Method, experts: Sequence[str]) -> StudySpec:
    """The study of a method that follows a loss of unlabelled items."""
    adaptation = method.adaptation
    section = models.file.adaptation
    assert adaptation is not None
    assert section is not None
    strategy = {
        "name": adaptation.strategy,
        "steps": min(STEPS_EACH, steps_of(models, adaptation)),
        "restarts_in_parallel": 1,
        **adaptation.options,
    }
    return _resolved(
        models,
        experts,
        evaluators=section.evaluators,
        operator={"name": method.operator, **method.options},
        space={"granularity": adaptation.granularity},
        strategy=strategy,
        budget={"trials": -(-steps_of(models, adaptation) // STEPS_EACH) + 1},
        selection={"leaders": 1},
    )


def steps_of(models: Models, adaptation: Adaptation) -> int:
    """Gradient steps of a method, by the file or as published."""
    section = models.file.adaptation
    own = None if section is None else section.steps
    return adaptation.steps if own is None else own


def _of_experts(calibration: Mapping[str, Any], experts: Sequence[str]) -> dict[str, Any]:
    """Calibration items of the merged experts alone."""
    data = calibration.get("data")
    if not isinstance(data, dict):
        return dict(calibration)
    return {**calibration, "data": {name: data[name] for name in experts if name in data}}


def _resolved(
    models: Models,
    experts: Sequence[str],
    more: Mapping[str, str] | None = None,
    **sections: Any,
) -> StudySpec:
    from mergesearch.search.plan.loading import checked_study
    from mergesearch.search.spec.study_file import resolve

    file = models.file
    study = {
        "name": file.name,
        "base": file.base,
        "experts": {**{name: file.experts[name] for name in experts}, **(more or {})},
        "evaluators": file.evaluators,
        "anchors": "none",
        "budget": {"trials": 1000},  # none is run
        **file.study,
        **sections,
    }
    return resolve(checked_study(study, file.name), models.folder)


class Scorer:
    """The merged model of one study, in this process; a context that frees its files.

    Args:
        plan: The study.
        folder: Where prepared weights lie while it lives.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        from tempfile import TemporaryDirectory

        from mergesearch.search.record.run_folder import RunFolder
        from mergesearch.search.runs.wiring import worker_spec
        from mergesearch.search.workers.worker import Worker

        folder.mkdir(parents=True, exist_ok=True)
        self._plan = plan
        self._arenas = TemporaryDirectory(dir=folder, prefix=".arenas-")
        spec = worker_spec(plan, RunFolder(folder / "none"))
        self._worker = Worker(replace(spec, arenas=self._arenas.name))

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        del self._worker
        self._arenas.cleanup()

    @property
    def directions(self) -> int:
        """Coefficients of a merge."""
        return int(self._plan.space.lower.size)

    def at(self, coefficients: Sequence[float], split: Split) -> Scores:
        """Scores of the merge with these coefficients, one for each direction."""
        return self.of(self._plan.space.decode(np.asarray(coefficients, dtype=float)), split)

    def of(self, recipe: Recipe, split: Split) -> Scores:
        """Scores of a merge.

        Raises:
            StudyFailedError: If it has none.
        """
        from mergesearch.search.workers.messages import Task

        own = self._plan.template.with_field(recipe.field)
        outcome = self._worker.run(Task("", own, split))
        if outcome.measurement is None:
            assert outcome.failure is not None
            raise StudyFailedError(outcome.failure.message)
        found = outcome.measurement
        return Scores(dict(found.values), dict(found.errors))


def check_objectives(models: Models, plan: Plan) -> None:
    """Refuse names of objectives that the evaluators do not have, and losses among the tasks.

    Raises:
        InputError: In one line.
    """
    from mergesearch.merging.errors import did_you_mean

    known = {objective.name: objective.direction for objective in plan.objectives}
    for key, names in models.named.items():
        for name in names:
            if name not in known:
                raise InputError(
                    f"{key}: expected objectives of the evaluators, received {name!r}; "
                    f"{did_you_mean(name, known)}"
                )
            minimised = known[name] == "minimize"
            if (
                key.startswith(("tasks", "held_out"))
                and minimised
                and name not in models.file.rates
            ):
                raise InputError(
                    f"{key}: expected scores of which more is better, received {name!r}, which is "
                    "minimised; list it in rates if it is a share between 0 and 1"
                )
            if key == "rates" and not minimised:
                raise InputError(
                    f"rates: expected objectives that are minimised, received {name!r}"
                )
