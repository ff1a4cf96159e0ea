"""Where the experts of a study come from, told from samples before all weights are read."""

from __future__ import annotations

from dataclasses import replace

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.family.aligned import stored_source
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
    return tuple(_lineage(family, expert) for expert in family.experts)


def _lineage(family: ModelFamily, expert: Checkpoint) -> Lineage:
    """The lineage of an expert; one that will be aligned is compared as it is stored."""
    how = family.moved.get(expert.name, "")
    if not how:
        return compare_weights(family.base, expert)
    found = compare_weights(stored_source(family.base), stored_source(expert))
    return replace(found, aligned=how, apart=())


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
