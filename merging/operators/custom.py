"""Operators that are not the product's own: those of plug-ins, and classes of users' programs.

Either is an :class:`mergesearch.merging.operators.base.Operator`, or a class with a method
``prepare`` and, where they differ from the defaults, attributes of the names that an operator has::

    class Halves:
        \"\"\"Half of every task vector.\"\"\"

        default = 1.0          # the coefficient where a search begins
        bounds = (0.0, 2.0)    # of a searched coefficient

        def prepare(self, base, experts, *, share: float = 0.5) -> Basis:
            def rows(name):
                return [share * (e.read(name) - base.read(name)).float() for e in experts]

            return Basis("delta", len(experts), rows)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.tensors.source import Options


def as_operator(name: str, value: Any, origin: str, label: str) -> Operator:
    """Make an operator of what a plug-in or a program gives.

    Args:
        name: What to call it.
        value: An :class:`Operator`, or a class with ``prepare``.
        origin: What tells versions of it apart.
        label: Names it in messages.

    Raises:
        RecipeError: If it is neither.
    """
    if isinstance(value, Operator):
        return replace(value, name=name, revision=origin)
    if not isinstance(value, type) or not callable(getattr(value, "prepare", None)):
        raise RecipeError(
            f"{label}: expected an Operator or a class with a method prepare, received "
            f"{getattr(value, '__name__', type(value).__name__)}"
        )
    made = value()
    prepare = _checked(made.prepare, label)
    summary = (inspect.getdoc(value) or f"{value.__name__}, without a docstring").splitlines()[0]
    return Operator(
        name=name,
        prepare=prepare,
        summary=summary[:1].lower() + summary[1:].rstrip("."),
        paper=getattr(made, "paper", origin),
        family=getattr(made, "family", "linear"),
        scope=getattr(made, "scope", "S"),
        identities=frozenset(getattr(made, "identities", ())),
        default=_of_experts(getattr(made, "default", 1.0)),
        bounds=_of_experts(getattr(made, "bounds", (0.0, 1.0))),
        directions=_of_experts(getattr(made, "directions", lambda experts, _options: experts)),
        needs=frozenset(getattr(made, "needs", ())),
        experts=getattr(made, "experts", (1, None)),
        refuse=getattr(made, "refuse", None),
        # Nothing is known of it, so names count.
        by_name=True,
        revision=origin,
    )


def _checked(prepare: Callable[..., Basis], label: str) -> Callable[..., Basis]:
    """Refuse a ``prepare`` that cannot be called with a base and experts."""
    parameters = inspect.signature(prepare).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) != 2 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise RecipeError(
            f"{label}: expected prepare(base, experts, *, options...), received "
            f"prepare{inspect.signature(prepare)}"
        )
    return prepare


def _of_experts(value: Any) -> Callable[[int, Options], Any]:
    """A function of the number of experts and the options; any other value is always the same."""
    if callable(value):
        function: Callable[[int, Options], Any] = value
        return function
    return lambda _experts, _options: value
