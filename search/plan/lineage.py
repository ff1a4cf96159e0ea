"""Where the experts of a study come from, told from samples before all weights are read."""

from __future__ import annotations

from mergesearch.merging.family.family import ModelFamily, open_family
from mergesearch.merging.lineage.compare import compare_weights
from mergesearch.merging.lineage.refusal import check_lineages
from mergesearch.merging.lineage.relation import Lineage
from mergesearch.merging.recipe import Recipe
from mergesearch.search.plan.plan import Plan

#: How a study allows what is refused.
OVERRIDE = 'set allow_unrelated: "REASON" in the study'


def family_lineages(family: ModelFamily) -> tuple[Lineage, ...]:
    """Lineage of every expert of a family."""
    return tuple(compare_weights(family.base, expert) for expert in family.experts)


def study_lineages(plan: Plan) -> tuple[Lineage, ...]:
    """Lineage of every expert of a study; none for problems without weights."""
    return () if plan.family is None else family_lineages(plan.family)


def lineage_warnings(plan: Plan, lineages: tuple[Lineage, ...]) -> list[str]:
    """What a user should know of the experts' origin, one line each.

    Raises:
        CheckpointError: If an expert does not come from the base, and the study does not allow it.
    """
    return check_lineages(lineages, plan.spec.allow_unrelated, OVERRIDE)


def recipe_warnings(recipe: Recipe, allowed: str | None) -> list[str]:
    """The same for a merge without a study.

    Raises:
        CheckpointError: If an expert does not come from the base, and no reason is given.
    """
    lineages = family_lineages(open_family(recipe))
    return check_lineages(lineages, allowed, 'say why with --allow-unrelated "REASON"')
