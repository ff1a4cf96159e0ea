"""Priors from other runs: where a study begins whose experts and depth no earlier run had.

Of each finished run the coefficients of its best merge are summarised by role and depth
(:mod:`mergesearch.search.runs.start.role_profile`); the study begins at their mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergesearch.merging import InputError, MergesearchError, Recipe
from mergesearch.merging.operators import get_operator
from mergesearch.search.plan.plan import Plan
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.runs.opened import Run
from mergesearch.search.runs.start.role_profile import (
    RoleProfile,
    field_by_profiles,
    profile_of,
)
from mergesearch.search.strategies.base import Point
from mergesearch.spaces.coefficient_space import CoefficientSpace


def prior_point(plan: Plan, runs: Sequence[Run]) -> Point:
    """The point of this study's space that other runs suggest, moved into the box.

    Raises:
        InputError: If a run is unfinished or of an operator of another meaning, a space has no
            coefficients by tensor, or no role of this study is in the runs.
    """
    space = _coefficients(plan, "this study")
    default = _default(plan.template, "this study")
    profiles = [_profile(plan, run) for run in runs]
    field, known = field_by_profiles(space.layout, space.directions, default, profiles)
    if not known:
        raise InputError(
            "start.priors: expected runs on tensors of the roles that this study has, found none "
            "of its roles in them; leave start out, or choose other runs"
        )
    return np.clip(space.project(field), space.lower, space.upper)


def _profile(plan: Plan, run: Run) -> RoleProfile:
    """Ratios of a run's best merge by role and depth."""
    where = str(run.folder.path)
    space = _coefficients(run.plan, where)
    _check_meaning(plan.template, run.plan.template, where)
    default = _default(run.plan.template, where)
    held = set(space.held)
    tensors = [
        name
        for index, group in enumerate(space.groups)
        if index not in held
        for name in group.tensors
    ]
    return profile_of(space.layout, _best(run).recipe.field, default, tensors)


def _best(run: Run) -> TrialRecord:
    """The winner; where base, an expert or another operator won, the strategy's recommendation.

    Those say nothing of how to weigh task vectors of other experts.

    Raises:
        InputError: If the run is unfinished, or there is no such recommendation.
    """
    try:
        winner = run.trial(None)
    except MergesearchError as error:
        raise InputError(f"start.priors: {error}") from None
    own = winner.recipe.basis_key == run.plan.template.basis_key
    single = winner.name == "base" or winner.name.startswith("expert ")
    if own and not single:
        return winner
    for record in reversed(run.log.records):
        if record.kind == "recommended" and record.state == "complete":
            return record
    raise InputError(
        f"start.priors: {run.folder.path}: expected a winner or a recommendation of its operator, "
        f"received the anchor {winner.name!r} and no recommendation; leave the run out"
    )


def _coefficients(plan: Plan, where: str) -> CoefficientSpace:
    """The space of a study, which must have coefficients that belong to tensors.

    Raises:
        InputError: If it is another kind of space.
    """
    if not isinstance(plan.space, CoefficientSpace):
        raise InputError(
            f"start.priors: {where}: expected a space of coefficients over tensors, whose names "
            f"tell role and depth, received a {plan.space.title} space; leave start out, or choose "
            "other runs"
        )
    return plan.space


def _default(template: Recipe, where: str) -> float:
    """The operator's default coefficient, which ratios refer to.

    Raises:
        InputError: If it is 0.
    """
    operator = get_operator(template.operator)
    default = operator.default(len(template.experts), template.options)
    if default == 0:
        raise InputError(
            f"start.priors: {where}: expected an operator whose default coefficient is not 0, "
            f"received {operator.name}; leave start out, or choose other runs"
        )
    return default


def _check_meaning(ours: Recipe, theirs: Recipe, where: str) -> None:
    """Refuse an operator whose coefficients mean something else.

    Raises:
        InputError: If the family, the linearity, or what a direction stands for differ.
    """
    if _meaning(ours) != _meaning(theirs):
        raise InputError(
            f"start.priors: {where}: expected a run whose operator has coefficients of the same "
            f"meaning as {ours.operator} ({', '.join(_meaning(ours))}), received {theirs.operator} "
            f"({', '.join(_meaning(theirs))}); leave the run out"
        )


def _meaning(recipe: Recipe) -> tuple[str, str, str]:
    """Family of an operator, how its merges depend on coefficients, and what these belong to."""
    operator = get_operator(recipe.operator)
    return (
        operator.family,
        "linear in them" if "linearity" in operator.identities else "not linear in them",
        "one an expert" if recipe.field.directions == len(recipe.experts) else "fused experts",
    )
