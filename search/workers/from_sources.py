"""A merge whose rows were not prepared, written into a resident model from its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergesearch.merging import Recipe

if TYPE_CHECKING:
    from mergesearch.merging.resident.merged_model import MergedModel


def write_from_sources(merged: MergedModel, recipe: Recipe, arenas: str) -> None:
    """Merge a recipe from its checkpoints, tensor by tensor, into a model.

    Args:
        merged: The resident model, of the recipe's shapes.
        recipe: What to merge.
        arenas: Folder of arenas; what recipes of one family share is remembered beside them.
    """
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.in_memory import merge_stream
    from mergesearch.merging.tensors.memo import Memo

    family = open_family(recipe, Memo(Path(arenas) / "shared"))
    base = family.base
    experts = family.experts
    layout = family.layout
    tensors = merge_stream(
        base, experts, recipe.operator, recipe.options, recipe.field, layout, family.special
    )
    merged.write_tensors(tensors, recipe.bits)
