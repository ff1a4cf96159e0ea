"""Whether base and experts of a recipe have one text tower, so that every merge has it too."""

from __future__ import annotations

from functools import cache

from mergesearch.merging import Recipe
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.models.prompt_heads import reads_text, same_tensors


def shares_text_tower(recipe: Recipe) -> bool:
    """Whether all that does not read images is the same in base and experts.

    The logit scale may differ: it is no part of the text features.
    """
    if not recipe.base.path or not recipe.experts:
        return False
    return _same_towers(recipe.base.path, *(expert.path for expert in recipe.experts))


@cache
def _same_towers(base: str, *experts: str) -> bool:
    own = open_checkpoint(base)
    others = [open_checkpoint(path) for path in experts]
    names = sorted(name for name in own.tensors if reads_text(name))
    there = all(name in other.tensors for other in others for name in names)
    return there and same_tensors(own, others, names)
