"""Models of studies of one mixture: a trial's recipe as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mergesearch.merging.errors import InputError
from mergesearch.merging.mixture.in_recipe import mixture_of
from mergesearch.merging.mixture.writing import Shrunken, shrink_mixture
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.tensors.memo import Memo


def export_mixture(
    recipe: Recipe,
    out: Path,
    *,
    facts: Mapping[str, str] = MappingProxyType({}),
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    dtype: str | None = None,
    head: str | None = None,
    memo: Memo | None = None,
) -> Shrunken:
    """Write what a trial was evaluated as.

    Args:
        recipe: Of a study, with a merge inside its mixture.
        out: Folder to create; may exist if it is empty.
        facts: Lines for the model card, for example scores.
        shard_bytes: Size above which the weights are split over several files.
        overwrite: Replace a folder that is not empty.
        dtype: None: such models are stored as their base is.
        head: None: such models have the base's head.
        memo: Where the study keeps what it counted; without it the model runs again.

    Raises:
        InputError: If a dtype or a head is given, or ``out`` cannot be written.
    """
    for name, value in (("dtype", dtype), ("head", head)):
        if value is not None:
            raise InputError(
                f"{name}: expected the base's own for the experts of one mixture, received "
                f"{value!r}; leave it out"
            )
    return shrink_mixture(
        mixture_of(recipe),
        out,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        memo=memo,
        facts=facts,
    )
