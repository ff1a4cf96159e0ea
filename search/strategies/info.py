"""What a user needs to know of a strategy to choose it; also of those that others give."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Strategy

_LEAST = re.compile(r"(\d+)( d\b| for every expert)?")


@dataclass(frozen=True)
class StrategyInfo:
    """A strategy by name, and what a user needs to choose it.

    Attributes:
        name: As in the study file.
        module, type_name: Where the class lives.
        summary: What it does, in one line that begins with a verb.
        source: Paper or library.
        when: Completes the sentence "Use it ...".
        objectives: ``one`` (several are combined by the study's weights), ``several`` (searches for
            a front), ``any``.
        dims: Smallest and largest sensible dimension; None: no upper end.
        budget: Sensible number of trials, in words that begin with the least, as a number or with
            ``d`` (coefficients) or ``for every expert`` behind it.
        space: What its points are: ``coefficients`` (any box), or a space of its own that the study
            then searches.
        most: Largest dimension that it accepts; None: any.
        slow: When an ask or a tell takes more than 50 ms of CPU, in words; empty: never.
        holds_blocks: Whether it holds lower blocks while it moves upper ones, so that workers keep
            hidden states unless the study says otherwise.
        preset: Keys of the study's ``space`` section that it sets unless the study does.
        given: The class itself, where a plug-in or a program gives it.
    """

    name: str
    module: str
    type_name: str
    summary: str
    source: str
    when: str
    objectives: Literal["one", "several", "any"] = "one"
    dims: tuple[int, int | None] = (1, None)
    budget: str = ""
    space: Literal["coefficients", "segments", "mixed", "product"] = "coefficients"
    most: int | None = None
    slow: str = ""
    holds_blocks: bool = False
    preset: Mapping[str, Any] = field(default_factory=dict)
    given: type[Strategy] | None = field(default=None, compare=False, repr=False)

    def least(self, dimensions: int, experts: int) -> int:
        """The least sensible number of trials; 0 where any will do."""
        found = _LEAST.match(self.budget)
        if found is None:
            return 0
        times = {" d": dimensions, " for every expert": experts}
        return int(found[1]) * times.get(found[2] or "", 1)

    def load(self) -> type[Strategy]:
        """Import the class."""
        if self.given is not None:
            return self.given
        loaded: type[Strategy] = getattr(importlib.import_module(self.module), self.type_name)
        return loaded

    def needs_with(self, options: Mapping[str, Any]) -> frozenset[str]:
        """What the evaluators must provide; a portfolio needs what its members need."""
        loaded = self.load()
        needs_of = getattr(loaded, "needs_of", None)
        needs: frozenset[str] = loaded.needs if needs_of is None else needs_of(options)
        return needs

    def options(self) -> dict[str, inspect.Parameter]:
        """Keyword-only parameters: the options of the study file."""
        parameters = inspect.signature(self.load()).parameters.values()
        return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


#: What a class of a strategy must have.
_PARTS = ("ask", "tell", "best", "needs", "recommends")


def as_strategy_info(name: str, value: Any, origin: str, label: str) -> StrategyInfo:
    """Make an entry of what a plug-in or a program gives: an entry, or the class alone.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(value, StrategyInfo):
        return replace(value, name=name)
    lacking = [part for part in _PARTS if not hasattr(value, part)]
    if not isinstance(value, type) or lacking:
        received = getattr(value, "__name__", type(value).__name__)
        without = f" without {lacking[0]}" if isinstance(value, type) else ""
        raise InputError(
            f"{label}: expected a StrategyInfo or a class with {', '.join(_PARTS)}, received "
            f"{received}{without}"
        )
    summary = (inspect.getdoc(value) or f"{value.__name__}, without a docstring").splitlines()[0]
    return StrategyInfo(
        name,
        value.__module__,
        value.__qualname__,
        summary=summary[:1].lower() + summary[1:].rstrip("."),
        source=getattr(value, "source", origin),
        when=getattr(value, "when", "as its author says"),
        objectives=getattr(value, "objectives", "any"),
        dims=getattr(value, "dims", (1, None)),
        budget=getattr(value, "budget", "any"),
        given=value,
    )
