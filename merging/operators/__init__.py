"""Operators by name: one file per family, one line here per member. Loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from merging.errors import RecipeError
from merging.operators.average import AVERAGE
from merging.operators.base import IDENTITIES, Basis, Factors, Operator, Options, TensorSource
from merging.operators.task_arithmetic import TASK_ARITHMETIC

__all__ = [
    "IDENTITIES",
    "OPERATORS",
    "Basis",
    "Factors",
    "Operator",
    "Options",
    "TensorSource",
    "get_operator",
]

_ALL = (
    # linear
    AVERAGE,
    TASK_ARITHMETIC,
)

OPERATORS: Mapping[str, Operator] = {operator.name: operator for operator in _ALL}


def get_operator(name: str) -> Operator:
    """The operator called ``name``.

    Raises:
        RecipeError: If there is none; the message lists the known names and the closest.
    """
    if name in OPERATORS:
        return OPERATORS[name]
    close = difflib.get_close_matches(name, OPERATORS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise RecipeError(f"operator: expected one of {sorted(OPERATORS)}, received {name!r}{hint}")
