"""Known merges, measured before the search: a study never reports a winner worse than its best anchor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from merging import Field, Layout, Recipe
from merging.operators import Operator
from merging.places import classify
from spaces import Space
from spaces.groups import group_tensors

#: Rise of the LiNeS line over depth, on top of 1/K (Wang 2024, "LiNeS: Post-training Layer Scaling", sec. 4).
LINES_RISE = 0.3


@dataclass(frozen=True)
class Anchor:
    """A known merge by name."""

    name: str
    recipe: Recipe


def default_anchors(template: Recipe, layout: Layout | None, space: Space, operator: Operator) -> tuple[Anchor, ...]:
    """Base, every expert, uniform average, the operator's default, a LiNeS line, and the space's start.

    Anchors that are the same merge are listed once, under the first name. Experts alone are anchors only where the
    operator reproduces them (``expert_near_one_hot``); analytic problems have the start alone.
    """
    named: list[tuple[str, Field]] = []
    if layout is not None:
        options = template.options
        count = operator.directions(len(template.experts), options)
        default = operator.default(len(template.experts), options)
        named.append(("base", Field.constant(layout.size, np.zeros(count))))
        if count == len(template.experts) and "expert_near_one_hot" in operator.identities:
            named += [
                (f"expert {expert.name}", Field.constant(layout.size, np.eye(count)[place]))
                for place, expert in enumerate(template.experts)
            ]
        named.append(("average", Field.constant(layout.size, np.full(count, 1 / len(template.experts)))))
        named.append((f"{operator.name} {default:.3g}", Field.constant(layout.size, np.full(count, default))))
        line = lines_field(layout, count, 1 / len(template.experts), LINES_RISE)
        named += [] if line is None else [("LiNeS", line)]
    named.append(("start", space.decode(space.start).field))
    anchors: dict[str, Anchor] = {}
    for name, field in named:
        recipe = template.with_field(field)
        anchors.setdefault(recipe.digest, Anchor(name, recipe))
    return tuple(anchors.values())


def lines_field(layout: Layout, directions: int, base: float, rise: float) -> Field | None:
    """``base + rise * depth`` in every block, ``base`` elsewhere, for all directions alike (LiNeS, eq. 4).

    None for a model whose tensor names show no blocks.
    """
    values = np.full(len(layout.tensors), base)
    place = {name: index for index, name in enumerate(layout.names)}
    deep = [group for group in group_tensors(layout, "block") if group.depth] if has_blocks(layout) else []
    for group in deep:
        values[[place[name] for name in group.tensors]] = base + rise * (group.depth or 0.0)
    if not deep:
        return None
    # Tensors without elements share their start with the next one.
    starts, first = np.unique([spec.start for spec in layout.tensors if spec.size], return_index=True)
    kept = values[[index for index, spec in enumerate(layout.tensors) if spec.size]][first]
    return Field(np.append(starts, layout.size), np.tile(kept, (directions, 1))).compact()


def has_blocks(layout: Layout) -> bool:
    """Whether any tensor name shows a block number."""
    return any(classify(name).block is not None for name in layout.names)
