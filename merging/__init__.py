"""How weights combine: checkpoints, arenas, operators, recipes, kernels, export.

The bottom of the house: imports nothing from ``spaces``, ``evaluators`` or ``search``. Importing
this package loads neither torch nor numba; the functions that need them import them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergesearch.merging.errors import (
    CheckpointError,
    InputError,
    MergesearchError,
    NonFiniteError,
    RecipeError,
    ReplayError,
    RunFolderError,
    StudyFailedError,
)
from mergesearch.merging.recipe import Recipe, Source
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout, TensorSpec

if TYPE_CHECKING:
    from mergesearch.merging.in_memory import merge

__all__ = [
    "CheckpointError",
    "Field",
    "InputError",
    "Layout",
    "MergesearchError",
    "NonFiniteError",
    "Recipe",
    "RecipeError",
    "ReplayError",
    "RunFolderError",
    "Source",
    "StudyFailedError",
    "TensorSpec",
    "merge",
]


def __getattr__(name: str) -> Any:
    # `merge` imports torch; everything else here must stay light for the command line.
    if name == "merge":
        from mergesearch.merging.in_memory import merge

        return merge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
