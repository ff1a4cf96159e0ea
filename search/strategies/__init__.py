"""The table of search strategies: one algorithm, one file.

A strategy is a class ``Strategy(problem, seed, *, options...)``; its keyword-only arguments, with their
annotations and defaults, are its options in the study file. There is no second table of option names.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merging import InputError
from search.strategy import Problem, Strategy


@dataclass(frozen=True)
class Entry:
    """A strategy by name: where it lives, in one line what it does, and the paper or library."""

    name: str
    module: str
    type_name: str
    summary: str
    source: str

    def load(self) -> type[Strategy]:
        """Import the class."""
        loaded: type[Strategy] = getattr(importlib.import_module(self.module), self.type_name)
        return loaded

    def options(self) -> dict[str, inspect.Parameter]:
        """Keyword-only parameters: the options of the study file."""
        parameters = inspect.signature(self.load()).parameters.values()
        return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


STRATEGIES = {
    entry.name: entry
    for entry in (
        Entry(
            "cma_es",
            "search.strategies.cma_es",
            "CmaEs",
            "adapts a Gaussian to where good merges lie; the default",
            "Hansen 2016, The CMA Evolution Strategy: A Tutorial (pycma)",
        ),
        Entry(
            "random",
            "search.strategies.random",
            "Random",
            "scrambled Sobol points, denser near the start; the baseline to beat",
            "Owen 1998, Scrambling Sobol' and Niederreiter-Xing points (scipy)",
        ),
    )
}


def get_entry(name: str) -> Entry:
    """The strategy called ``name``.

    Raises:
        InputError: If there is none; names the closest and lists the known ones.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    close = difflib.get_close_matches(name, STRATEGIES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"strategy.name: expected one of {sorted(STRATEGIES)}, received {name!r}{hint}")


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with their values converted to the annotated types; defaults filled in.

    Raises:
        InputError: If an option is unknown or has the wrong type.
    """
    from pydantic import ConfigDict, ValidationError, create_model

    entry = get_entry(name)
    known = entry.options()
    hints = typing.get_type_hints(entry.load().__init__, include_extras=True)
    fields: dict[str, Any] = {key: (hints[key], parameter.default) for key, parameter in known.items()}
    model = create_model(f"{name} options", __config__=ConfigDict(extra="forbid", strict=False), **fields)
    try:
        validated: dict[str, Any] = model.model_validate(dict(options)).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InputError(f"strategy.{key}: unknown option of {name}; known: {sorted(known)}") from None
        raise InputError(f"strategy.{key}: {first['msg']}, received {first['input']!r}") from None
    return validated


def build_strategy(name: str, options: Mapping[str, Any], problem: Problem, seed: int) -> Strategy:
    """A fresh strategy; its only randomness comes from ``seed``."""
    factory: Any = get_entry(name).load()
    strategy: Strategy = factory(problem, seed, **options)
    return strategy
