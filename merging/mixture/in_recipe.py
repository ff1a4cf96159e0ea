"""Merges inside one mixture as recipes of a study, which travel to workers as any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergesearch.merging.checkpoints.locations import short_name
from mergesearch.merging.mixture.recipe import MixtureRecipe, get_mixture_operator, parse_options
from mergesearch.merging.recipe import Recipe

#: Key of the operator's name among its hyperparameters.
OPERATOR = "operator"


def mixture_of(recipe: Recipe) -> MixtureRecipe:
    """The recipe of one mixture that a recipe of a study holds.

    Raises:
        RecipeError: If operator or hyperparameters are none on mixtures.
    """
    given = dict(recipe.mixture)
    operator = get_mixture_operator(str(given.pop(OPERATOR, "")))
    base = recipe.base
    options = parse_options(operator, given)
    return MixtureRecipe(short_name(base.path), base.path, operator, options, base.fingerprint)


def as_it_is(template: Recipe) -> Recipe:
    """The base of a study with all its experts, as a merge inside its mixture.

    Args:
        template: Of the study, which keeps all experts.
    """
    own = dict(template.mixture)
    kept = {name: own[name] for name in ("calibration", "experts")}
    return with_mixture(template, "average_experts", kept)


def with_mixture(recipe: Recipe, operator: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe with another merge inside its mixture.

    Args:
        recipe: Of a study.
        operator: On mixtures.
        options: Its hyperparameters; those that are None are left out.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return replace(recipe, mixture=tuple(sorted({**given, OPERATOR: operator}.items())))
