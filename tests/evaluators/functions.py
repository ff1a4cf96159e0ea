"""Functions that tests let evaluators of kind ``python`` call."""

from __future__ import annotations

from typing import Any

import numpy as np

SIZES = {"search": 6, "validation": 5, "test": 4}


def scored(recipe: Any, split: str, factor: float = 1.0) -> list[float]:
    """Scores of all items of a split."""
    total = float(recipe.field.values.sum())
    return [factor * total * (k + 1 + SIZES[split]) for k in range(SIZES[split])]


def scored_in_parts(recipe: Any, split: str, items: Any) -> dict[str, Any]:
    """Scores of the items that are asked for."""
    CALLS.append(items)
    whole = np.array(scored(recipe, split))
    return {"score": whole if items is None else whole[items]}


def undivided(recipe: Any) -> np.ndarray:
    """Scores of 20 items, which know no split."""
    return float(recipe.field.values.sum()) * np.arange(20)


def plain(recipe: Any) -> float:
    """One number."""
    return float(recipe.field.values.sum())


def named(recipe: Any) -> dict[str, float]:
    """One number, by name."""
    return {"score": plain(recipe)}


def listed(recipe: Any) -> list[float]:
    """Scores of 20 items as a list."""
    return undivided(recipe).tolist()


def scored_by_name(recipe: Any) -> dict[str, list[float]]:
    """Scores of 20 items, by name."""
    return {"score": listed(recipe)}


def misspelt(recipe: Any) -> Flaot:  # noqa: F821
    """One number, by a type that does not exist."""
    return plain(recipe)


def odd(recipe: Any) -> Any:
    """Whatever the test wants."""
    return ANSWER[0]


#: Items that each call of ``scored_in_parts`` was asked for.
CALLS: list[Any] = []
#: What ``odd`` returns.
ANSWER: list[Any] = [None]
NUMBER = 3
