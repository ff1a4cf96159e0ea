"""Objectives that a Python function measures, called in the worker's own process.

The function is ``evaluate(model) -> float | dict``, where the dictionary has a number for every
objective, or the score of each item. It may have more parameters, which are given by name:

* ``split``: ``search``, ``validation`` or ``test``. Without it, scores of items are divided into
  these three, always alike; a number alone is the same for all of them.
* ``items``: indices of the items to score ``(n,)``, where the study says how many each split has;
  trials that stop early then cost less.
* those that the study lists under ``inputs``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import (
    SPLITS,
    Candidate,
    ItemSubset,
    Measurement,
    Objective,
    Split,
)
from mergesearch.evaluators.data.item_files import SHARES
from mergesearch.evaluators.evaluator_base import EvaluatorBase
from mergesearch.evaluators.items import chosen_indices
from mergesearch.evaluators.objectives import (
    Metric,
    check_names,
    constraints_of,
    extra_scores,
    needed_references,
    tolerances_of,
)
from mergesearch.evaluators.program_answer import with_bounds
from mergesearch.evaluators.python_answer import Scores, declared_answer, read_scores
from mergesearch.evaluators.score_memory import scores_at
from mergesearch.merging import InputError, MergesearchError
from mergesearch.merging.extensions.references import (
    check_sources,
    find_function,
    is_reference,
    known,
)

#: Parameters that the evaluator itself fills in.
OWN = ("split", "items")


class PythonFunction(EvaluatorBase):
    """Calls a function with every merged model.

    Args:
        function: ``module:name`` or ``file.py:name``.
        objectives: What it measures.
        inputs: Further arguments, by name.
        bounds: Limits of scores, which the function returns beside the objectives.
        sizes: Items of each split; None where that is not known.
        divide: Shares of search, validation and test items, where the function takes no split.
        source: Name -> digest of the code that the study began with.
        model_class: ``transformers`` auto class, or ``module:name`` of a function that builds the
            model; None hands over the recipe alone.
        where: Key of the study file, for messages.

    Raises:
        InputError: If two objectives have one name.
    """

    deterministic = False
    _subject = "a function"

    def __init__(
        self,
        function: str,
        objectives: Sequence[Objective],
        *,
        inputs: Mapping[str, Any] | None = None,
        bounds: Sequence[Metric] = (),
        sizes: Mapping[Split, int] | None = None,
        divide: tuple[float, float, float] = SHARES,
        source: Mapping[str, str] | None = None,
        model_class: str | None,
        where: str,
    ) -> None:
        names = check_names(objectives, where)
        self.objectives = tuple(objectives)
        self.model_class = model_class
        self.provides = frozenset({"items"} if sizes else ())
        self.additive = names if sizes else ()
        self.constraints = constraints_of(bounds)
        self._tolerances = tolerances_of(bounds)
        self._bounds = tuple(bounds)
        self._own = names
        self._names = (*names, *extra_scores(names, bounds))
        self._function = function
        self._inputs = dict(inputs or {})
        self._sizes = dict(sizes or {})
        self._divide = divide
        self._source = dict(source or {})
        self._where = where
        self._who = f"{where}.function: {function}"
        self._call: Callable[..., Any] | None = None
        self._parameters: frozenset[str] = frozenset()

    def check(self) -> None:
        """Refuse a function that cannot be called as the study says.

        One that is not loaded is let pass, so that a record can be read without it.

        Raises:
            InputError: In one line.
        """
        function = known(self._function)
        if function is not None:
            self._taken(find_function(self._function, f"{self._where}.function"))

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Say that a number alone is not confirmed on items of its own.

        Nothing is said of a function whose annotation promises scores of items, which are divided.
        """
        function = known(self._function)
        if function is None or "split" in self._taken(function):
            return []
        answer = declared_answer(function)
        if answer == "items":
            return []
        shares = ", ".join(f"{share:g}" for share in self._divide)
        doubt = f"unless it returns a score for each item (divided {shares}), "
        text = (
            f"{self._who} takes no split: {'' if answer == 'number' else doubt}its number stands "
            "for search, validation and test items alike; add a parameter split, or return a "
            "score for each item, to hold items out"
        )
        return [text]

    def open(self) -> None:
        """Import the function, once in each process.

        Raises:
            InputError: If there is none, or its code is another than the study began with.
        """
        self._call = find_function(self._function, f"{self._where}.function")
        self._parameters = self._taken(self._call)
        if self.model_class is not None and is_reference(self.model_class):
            find_function(self.model_class, f"{self._where}.model_class")
        check_sources(self._source, self._where)

    def references(self) -> frozenset[str]:
        """Models whose scores are limits."""
        return needed_references(self._bounds, {""}, {})

    def size(self, split: Split) -> int:
        """Number of items as the study states it."""
        return self._sizes.get(split, 0)

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Call the function, for new items only where it takes them.

        Raises:
            MergesearchError: If it returns something else than was asked for; one line.
            NonFiniteError: If a value is not finite.
        """
        measured = self._measured(candidate, split, items)
        return with_bounds(measured, self._own, self._bounds, candidate.references)

    def _measured(self, candidate: Candidate, split: Split, items: ItemSubset) -> Measurement:
        """All scores of the function, those of bounds among them."""
        key = (id(self), split)
        if self._sizes and "items" in self._parameters:
            indices = _chosen(self._sizes[split], items)
            found = scores_at(
                candidate.scored,
                key,
                indices,
                lambda fresh: self._itemised(candidate, split, fresh),
            )
            return Scores({}, found).measurement(indices)
        if key not in candidate.scored:
            candidate.scored[key] = self._whole(candidate, split)
        scores: Scores = candidate.scored[key]
        if items is None or not scores.items:
            return scores.measurement()
        indices = _chosen(len(next(iter(scores.items.values()))), items)
        return scores.at(indices).measurement(indices)

    def _whole(self, candidate: Candidate, split: Split) -> Scores:
        """The scores of all items of a split."""
        scores = self._asked(candidate, {"split": split, "items": None})
        if self._sizes:
            self._check_count(scores, self._sizes[split], self._own)
        if "split" in self._parameters or not scores.items:
            return scores
        count = len(next(iter(scores.items.values())))
        parts = divided(count, self._divide)
        if not all(part.size for part in parts.values()):
            raise MergesearchError(
                f"{self._who}: expected enough items for three splits, received {count}"
            )
        return scores.at(parts[split])

    def _itemised(
        self, candidate: Candidate, split: Split, indices: npt.NDArray[np.intp]
    ) -> Mapping[str, npt.NDArray[np.float64]]:
        scores = self._asked(candidate, {"split": split, "items": indices})
        self._check_count(scores, indices.size, self._names)
        return scores.items

    def _asked(self, candidate: Candidate, own: Mapping[str, Any]) -> Scores:
        """Call the function once, without recording a graph."""
        assert self._call is not None
        arguments = {name: own[name] for name in OWN if name in self._parameters}
        if candidate.model is None:
            return read_scores(
                self._call(candidate.recipe, **arguments, **self._inputs), self._names, self._who
            )
        import torch

        with torch.no_grad():
            answer = self._call(candidate.model.eval(), **arguments, **self._inputs)
        return read_scores(answer, self._names, self._who)

    def _check_count(self, scores: Scores, count: int, names: Sequence[str]) -> None:
        for name in names:
            received = scores.items[name].size if name in scores.items else "one number"
            if received != count:
                raise MergesearchError(
                    f"{self._who}: expected scores of {count} items for {name!r}, as sizes says, "
                    f"received {received}"
                )

    def _taken(self, function: Callable[..., Any]) -> frozenset[str]:
        """Which of the parameters ``split`` and ``items`` the function has.

        Raises:
            InputError: If it cannot be called with a model and the inputs.
        """
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # built-in functions may have none
            return frozenset()
        named = {
            p.name for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, _PLAIN)
        }
        taken = frozenset(name for name in OWN if name in named and name not in self._inputs)
        try:
            signature.bind(None, **dict.fromkeys(taken), **self._inputs)
        except TypeError as error:
            raise InputError(
                f"{self._who}: expected a function of a model, of any of {', '.join(OWN)}, and of "
                f"the inputs {sorted(self._inputs)}, received {signature}: {error}"
            ) from None
        if self._sizes and "split" not in taken:
            raise InputError(
                f"{self._where}.sizes: expected a function that takes split beside it, received "
                f"{signature}; add the parameter, or leave sizes out"
            )
        return taken


_PLAIN = inspect.Parameter.POSITIONAL_OR_KEYWORD


def divided(count: int, shares: Sequence[float]) -> dict[Split, npt.NDArray[np.intp]]:
    """Split -> indices of its items ``(n,)`` among ``count``, drawn once and for all, rising."""
    order = np.random.default_rng(0).permutation(count)
    ends = np.rint(np.cumsum(shares) / sum(shares) * count).astype(int)
    parts = np.split(order, ends[:-1])
    return {split: np.sort(part) for split, part in zip(SPLITS, parts, strict=True)}


def _chosen(count: int, items: ItemSubset) -> npt.NDArray[np.intp]:
    """Indices of the items that are asked for, in a fixed order of all."""
    return chosen_indices(np.full(count, ""), items)
