"""What an export records of the weights that it wrote, beside the recipe, and reads again.

The key ``exported`` of ``recipe.yaml`` and ``recipe.json`` holds it, so that the recipe alone says
which weights it gives and which scores they had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import RecipeError
from mergesearch.merging.export.about import About
from mergesearch.merging.recipe_file import exported_of


@dataclass(frozen=True)
class Content:
    """The weights of an export.

    Attributes:
        weights: Their fingerprint, as of any checkpoint: SHA-256 over names, dtypes, shapes and
            bytes of all tensors, however they are sharded.
        dtype: Of all merged tensors; None for the base's own.
        head: Expert whose head they have, where experts keep their own; else None.
        scores: Split -> objective -> value, as recorded for the merge.
        settings: Digest of all that these scores depend on beside the merge.
    """

    weights: str
    dtype: str | None = None
    head: str | None = None
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    settings: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without what is not known."""
        return {key: value for key, value in vars(self).items() if value}


def content_of(folder: Path, dtype: str | None, head: str | None, about: About) -> Content:
    """What there is to record of an exported folder; every weight is read once.

    Args:
        folder: The model as it was written.
        dtype: Of all merged tensors, where it is not the base's own.
        head: Expert whose head it has.
        about: What its card says.
    """
    scores: dict[str, dict[str, float]] = {}
    for result in about.results:
        scores.setdefault(result.split, {})[result.metric] = result.value
    fingerprint = open_checkpoint(str(folder)).fingerprint()
    return Content(fingerprint, dtype, head, scores, about.settings if scores else "")


def recorded_content(recipe: Path) -> Content | None:
    """What an export recorded in its recipe; None where the recipe is of no export.

    Raises:
        RecipeError: If the file cannot be read, or holds something else under the key.
    """
    data = exported_of(recipe)
    if data is None:
        return None
    try:
        return Content(**data)
    except TypeError:
        raise RecipeError(
            f"{recipe}: exported: expected weights, dtype, head, scores, settings, as `mergesearch "
            f"export` writes them, received {data!r}; remove the key to go without"
        ) from None
