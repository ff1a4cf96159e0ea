"""Finds good coefficients for merging fine-tuned models, by search rather than by hand.

The public face of the package. In a notebook or a script::

    import mergesearch

    recipe = mergesearch.Recipe.task_arithmetic("base", ["french", "code"], coefficient=0.4)
    mergesearch.merge(base_model, {"french": french_model, "code": code_model})

    study = mergesearch.Study("study.yaml").run()

The command line is ``mergesearch``, or ``python -m mergesearch``. Importing this package loads
nothing: what a name needs is imported when the name is first used.
"""

import itertools
import sys

# `python -m mergesearch` puts the current folder first on the import path, and runs are looked at
# where others have put files: nothing but this package may come from there. The words of the
# command line say who asked; a program that imports this package keeps its path.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    _words = sys.orig_argv
    if "-mmergesearch" in _words or ("-m", "mergesearch") in itertools.pairwise(_words):
        del sys.path[0]

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from mergesearch.merging.in_memory import merge
    from mergesearch.merging.recipe import Recipe, Source
    from mergesearch.search.api.study import Study

__version__ = "0.2.0.dev0"

__all__ = [
    "CheckpointError",
    "InputError",
    "MergesearchError",
    "NonFiniteError",
    "Recipe",
    "RecipeError",
    "ReplayError",
    "RunFolderError",
    "Source",
    "Study",
    "StudyFailedError",
    "__version__",
    "merge",
]

#: Where the names that are not errors live.
_HOMES = {
    "Recipe": "mergesearch.merging.recipe",
    "Source": "mergesearch.merging.recipe",
    "Study": "mergesearch.search.api.study",
    "merge": "mergesearch.merging.in_memory",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "mergesearch.merging.errors")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
