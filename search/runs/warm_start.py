"""Warm start: a study begins at a trial of another run, read in this study's space.

The other space may be coarser (one coefficient per expert, then per block, then per tensor):
refining copies the coefficients exactly where the new space holds them. Operators may differ, since
a good field for one is often a good start for another; experts may not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mergesearch.merging import InputError, MergesearchError, Recipe
from mergesearch.search.plan.anchors import Anchor
from mergesearch.search.plan.plan import Plan
from mergesearch.search.spec.sections import StartSection
from mergesearch.search.strategies.base import Point


def with_warm_start(plan: Plan, point: Point) -> Plan:
    """The plan that begins at ``point``, which becomes an anchor unless one is the same merge."""
    assert plan.spec.start is not None
    recipe = plan.space.decode(point)
    known = {anchor.recipe.digest for anchor in plan.anchors}
    name = f"winner of {Path(plan.spec.start.run).name}"
    if plan.spec.start.trial is not None:
        name = f"trial {plan.spec.start.trial} of {Path(plan.spec.start.run).name}"
    added = () if recipe.digest in known else (Anchor(name, recipe),)
    return replace(plan, begin=point, anchors=(*plan.anchors, *added))


def warm_start_point(plan: Plan, section: StartSection) -> Point:
    """The point of this study's space that stands for a trial of another run, moved into the box.

    Raises:
        InputError: If there is no such run or trial, it has other experts, or the space cannot hold
            its merge.
    """
    from mergesearch.search.runs.opened import open_run

    try:
        other = open_run(Path(section.run))
        record = other.trial(section.trial)
    except MergesearchError as error:
        raise InputError(f"start.run: {error}") from None
    _check_experts(plan, record.recipe, section.run)
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
        raise InputError(f"start.run: {section.run}: {error}") from None
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
