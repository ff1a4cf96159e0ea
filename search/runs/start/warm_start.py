"""Warm start: a study begins at a trial of another run, or at what several runs suggest.

The space of a study that begins at a trial may be finer (one coefficient per expert, then per
block, then per tensor): refining copies the coefficients exactly where the new space holds them.
Operators may differ, since a good field for one is often a good start for another; experts may not.
Priors (:mod:`mergesearch.search.runs.start.priors`) are for other experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mergesearch.merging import InputError, MergesearchError, Recipe
from mergesearch.search.plan.anchors import Anchor
from mergesearch.search.plan.plan import Plan
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.runs.start.leakage import leakage_notes
from mergesearch.search.runs.start.priors import prior_point
from mergesearch.search.runs.start.scores import find_scores
from mergesearch.search.spec.sections import StartSection
from mergesearch.search.strategies.base import Point


@dataclass(frozen=True, eq=False)
class WarmStart:
    """Where a study begins, or that other runs do not say it.

    Attributes:
        point: Position in the study's space, float64 ``(dim,)``, or None.
        notes: What the study shares with the runs that it comes from, one line each.
    """

    point: Point | None
    notes: tuple[str, ...] = ()


def with_warm_start(plan: Plan, start: WarmStart) -> Plan:
    """The plan that begins at ``start``, which becomes an anchor unless one is the same merge."""
    assert plan.spec.start is not None
    if start.point is None:
        return plan
    recipe = plan.space.decode(start.point)
    known = {anchor.recipe.digest for anchor in plan.anchors}
    added = () if recipe.digest in known else (Anchor(_name(plan.spec.start), recipe),)
    return replace(plan, begin=start.point, anchors=(*plan.anchors, *added), notes=start.notes)


def started(plan: Plan) -> Plan:
    """The plan with what it takes from other runs, as a study that begins now would take it.

    Raises:
        InputError: If a run is missing, or does not fit this study.
    """
    section = plan.spec.start
    if section is None:
        return plan
    begun = with_warm_start(plan, find_warm_start(plan, section))
    notes = () if section.scores is None else find_scores(begun, section.scores).notes
    return replace(begun, notes=(*begun.notes, *notes))


def find_warm_start(plan: Plan, section: StartSection) -> WarmStart:
    """The point of this study's space that other runs give, moved into the box.

    Raises:
        InputError: If a run or trial is missing or unfinished, or does not fit this study.
    """
    if section.priors is None:
        run = section.run
        return WarmStart(None if run is None else _trial_point(plan, run, section.trial))
    runs = [_opened(folder) for folder in section.priors]
    return WarmStart(prior_point(plan, runs), leakage_notes(plan, runs))


def _name(section: StartSection) -> str:
    """Name of the anchor that a start becomes."""
    names = ", ".join(Path(folder).name for folder in section.folders)
    if section.priors is not None:
        return f"priors from {names}"
    return f"winner of {names}" if section.trial is None else f"trial {section.trial} of {names}"


def _opened(folder: str) -> Run:
    try:
        return open_run(Path(folder))
    except MergesearchError as error:
        raise InputError(f"start.priors: {error}") from None


def _trial_point(plan: Plan, run: str, trial: int | None) -> Point:
    """The point of this study's space that stands for a trial of another run.

    Raises:
        InputError: If there is no such run or trial, it has other experts, or the space cannot hold
            its merge.
    """
    try:
        other = open_run(Path(run))
        record = other.trial(trial)
    except MergesearchError as error:
        raise InputError(f"start.run: {error}") from None
    _check_experts(plan, record.recipe, run)
    try:
        if record.point is not None:
            point = other.plan.space.refine(record.point, plan.space)
        else:
            encoded = plan.space.encode(record.recipe.field)
            if encoded is None:
                raise InputError(
                    f"a {plan.space.title} space cannot hold its anchor {record.name!r}"
                )
            point = encoded
    except MergesearchError as error:
        raise InputError(f"start.run: {run}: {error}") from None
    return np.clip(point, plan.space.lower, plan.space.upper)


def _check_experts(plan: Plan, recipe: Recipe, run: str) -> None:
    ours = [(expert.name, expert.path) for expert in plan.template.experts]
    theirs = [(expert.name, expert.path) for expert in recipe.experts]
    if ours != theirs or (plan.template.layout or recipe.layout) != (
        recipe.layout or plan.template.layout
    ):
        our_names = [name for name, _ in ours]
        their_names = [name for name, _ in theirs]
        raise InputError(
            f"start.run: {run}: expected a run on the experts {our_names}, in this order and from "
            f"the same places, received one on {their_names}; leave start out, or choose another "
            "run"
        )
