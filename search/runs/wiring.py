"""From a checked study and its folder to the trial log and the spec of its workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergesearch.merging import RunFolderError
from mergesearch.merging.tensors.accelerator import ACCELERATOR
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.storage import Storage
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.retry import RetryPolicy
from mergesearch.search.spec.code import given_objects, used_plugins
from mergesearch.search.spec.sections import StudySpec
from mergesearch.search.strategies.base import Point
from mergesearch.search.workers.messages import NODE_CACHE, WorkerSpec


def storage_location(spec: StudySpec, folder: RunFolder) -> str | Path:
    """Where the trial log is: the study's storage URL, or the journal in the run folder.

    ``${NAME}`` in the URL is filled in from the environment here, and only here, so that a password
    never reaches the run folder.
    """
    return recorded_location({"storage": spec.storage}, folder)


def recorded_location(study: Mapping[str, Any], folder: RunFolder) -> str | Path:
    """:func:`storage_location` from the study as it is recorded, unchecked."""
    storage = study.get("storage")
    return os.path.expandvars(storage) if storage else folder.journal


def open_log(
    storage: Storage,
    plan: Plan,
    *,
    create: bool = True,
    retry: RetryPolicy | None = None,
    guard: Callable[[], None] = lambda: None,
) -> TrialLog:
    """The trial log of a study; arguments as in :class:`TrialLog`."""
    return TrialLog(
        storage,
        plan.spec.name,
        plan.objectives,
        lambda point: plan.space.decode(_of_space(point, plan)),
        plan.recorded_template,
        keep_fields=plan.entry.space == "mixed",
        create=create,
        retry=retry,
        guard=guard,
    )


def _of_space(point: Point, plan: Plan) -> Point:
    """A recorded point, which must have the dimensions of the space.

    Raises:
        RunFolderError: If it has others.
    """
    if point.shape != plan.space.lower.shape:
        raise RunFolderError(
            f"record: expected points of {plan.space.lower.size} dimensions, received one of "
            f"{point.size}; is this the journal of another study?"
        )
    return point


def worker_spec(plan: Plan, folder: RunFolder) -> WorkerSpec:
    """What workers of a study are built from.

    While operators are measured, they hold the experts themselves.
    """
    section = plan.spec.workers
    return WorkerSpec(
        template=plan.recorded_template if plan.undecided else plan.template,
        evaluators=tuple(evaluator.model_dump(mode="json") for evaluator in plan.spec.evaluators),
        arenas=section.cache or str(folder.arenas if section.address is None else NODE_CACHE),
        threads=section.threads,
        device=ACCELERATOR if section.gpus_each else "cpu",
        shards=max(int(section.gpus_each), 1),
        space=None if plan.undecided else plan.differentiable_space,
        rows=plan.spec.rows,
        prepare=section.prepare,
        objects=given_objects(plan.spec),
        plugins=used_plugins(plan.spec),
        lend=plan.spec.selection.lend,
        hidden_states=plan.hidden_states,
    )
