"""Anchors: known merges that are measured before the search and compete with its trials."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mergesearch.merging import Field, Layout, Recipe
from mergesearch.merging.mixture.in_recipe import as_it_is
from mergesearch.merging.operators import OPERATORS, Operator
from mergesearch.merging.tensors.roles import roles_of
from mergesearch.spaces import Space
from mergesearch.spaces.groups import group_tensors

#: Rise of the LiNeS line over depth, on top of 1/K (Wang 2024, "LiNeS: Post-training Layer
#: Scaling", sec. 4).
LINES_RISE = 0.3

#: Operators that reproduce experts, their average, and any weighted sum of task vectors.
LINEAR = ("average", "task_arithmetic")


@dataclass(frozen=True)
class Anchor:
    """A known merge by name."""

    name: str
    recipe: Recipe


def default_anchors(
    template: Recipe, layout: Layout | None, space: Space | None, operator: Operator
) -> tuple[Anchor, ...]:
    """Base, experts, average, task arithmetic, LiNeS, TIES, the operator's default, the start.

    All but the last two are merged by an operator that reproduces them, where the study's own does
    not. Anchors that are the same merge are listed once, under the first name; analytic problems
    have the start alone. Without a space there is no start.
    """
    named: list[tuple[str, Recipe]] = []
    if layout is not None:
        options = template.options
        experts = len(template.experts)
        count = operator.directions(experts, options)
        default = operator.default(experts, options)
        named.append(("base", template.with_field(Field.constant(layout.size, np.zeros(count)))))
        named += _known_merges(template, layout, operator)
        own = template.with_field(Field.constant(layout.size, np.full(count, default)))
        named.append((f"{operator.name} {default:.3g}", own))
    if space is not None:
        named.append(("start", space.decode(space.start)))
    anchors: dict[str, Anchor] = {}
    for name, recipe in named:
        anchors.setdefault(recipe.digest, Anchor(name, recipe))
    return tuple(anchors.values())


def reference_recipe(template: Recipe, layout: Layout, name: str) -> Recipe:
    """``base`` or ``expert NAME`` as a recipe, by an operator that reproduces them, not rounded."""
    if template.mixture:
        return as_it_is(template)
    recipe = replace(template, bits=())
    if template.operator not in LINEAR:
        recipe = replace(recipe, operator="average", hyperparameters=())
    row = [float(name == f"expert {expert.name}") for expert in template.experts]
    return recipe.with_field(Field.constant(layout.size, np.array(row)))


def _known_merges(template: Recipe, layout: Layout, operator: Operator) -> list[tuple[str, Recipe]]:
    """Experts, average, task arithmetic, the LiNeS line and default TIES."""
    experts = len(template.experts)
    soup = template
    arithmetic = template
    if operator.name not in LINEAR:
        soup = replace(template, operator="average", hyperparameters=())
        arithmetic = replace(template, operator="task_arithmetic", hyperparameters=())
    named = [
        (
            f"expert {expert.name}",
            soup.with_field(Field.constant(layout.size, np.eye(experts)[index])),
        )
        for index, expert in enumerate(template.experts)
    ]
    named.append(
        ("average", soup.with_field(Field.constant(layout.size, np.full(experts, 1 / experts))))
    )
    if operator.name not in LINEAR:
        default = OPERATORS["task_arithmetic"].default(experts, {})
        field = Field.constant(layout.size, np.full(experts, default))
        named.append((f"task_arithmetic {default:.3g}", arithmetic.with_field(field)))
    line = lines_field(layout, experts, 1 / experts, LINES_RISE)
    if line is not None:
        named.append(("LiNeS", arithmetic.with_field(line)))
    return named if experts == 1 else [*named, _default_ties(template, layout)]


def _default_ties(template: Recipe, layout: Layout) -> tuple[str, Recipe]:
    """TIES at its defaults, the merge that most people try after the average."""
    ties = OPERATORS["ties"]
    experts = len(template.experts)
    options = ties.complete({})
    coefficient = ties.default(experts, options)
    recipe = replace(template, operator="ties", hyperparameters=tuple(sorted(options.items())))
    return f"ties {coefficient:.3g}", recipe.with_field(
        Field.constant(layout.size, np.full(experts, coefficient))
    )


def lines_field(layout: Layout, directions: int, base: float, rise: float) -> Field | None:
    """``base + rise * depth`` in every block and ``base`` elsewhere (LiNeS, eq. 4).

    All directions get the same values. None for a model whose tensor names show no blocks.
    """
    values = np.full(len(layout.tensors), base)
    index_of = {name: index for index, name in enumerate(layout.names)}
    deep = (
        [group for group in group_tensors(layout, "block") if group.depth]
        if has_blocks(layout)
        else []
    )
    for group in deep:
        values[[index_of[name] for name in group.tensors]] = base + rise * (group.depth or 0.0)
    if not deep:
        return None
    # Tensors without elements share their start with the next one.
    starts, first = np.unique(
        [spec.start for spec in layout.tensors if spec.size], return_index=True
    )
    row = values[[index for index, spec in enumerate(layout.tensors) if spec.size]][first]
    return Field(np.append(starts, layout.size), np.tile(row, (directions, 1))).compact()


def has_blocks(layout: Layout) -> bool:
    """Whether any tensor name shows a block number."""
    return any(role.block is not None for role in roles_of(layout.names).values())
