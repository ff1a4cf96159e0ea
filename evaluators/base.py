"""The contract of every evaluator, and the data that it exchanges with the search.

An evaluator scores a *candidate* on the items of a *split*::

    evaluator = build_evaluators([{"kind": "classification", ...}], folder)
    evaluator.objectives                        # names and directions, known before any weight is read
    evaluator.open()                            # load items once per worker
    evaluator.evaluate(candidate, "search")     # -> Measurement

Values are in the user's direction (accuracy is maximised as accuracy); the search flips signs once, at its
own boundary. Items of the three splits are disjoint: the search sees ``search``, the winner is chosen on
``validation``, and reported once on ``test``.

A search may ask for a part of the items: the first so many of a fixed order that is the same in every worker and
balanced over domains, so that the items of a smaller part are among those of a larger one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from merging import Recipe

Split = Literal["search", "validation", "test"]
SPLITS: tuple[Split, ...] = ("search", "validation", "test")


@dataclass(frozen=True)
class Objective:
    """Name and direction of one thing to optimise."""

    name: str
    direction: Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Candidate:
    """What is evaluated: the recipe and, where the evaluator needs one, the merged model.

    ``model`` is the worker's resident ``torch.nn.Module`` whose parameters are views into the merged arena; it
    changes with the next trial, so an evaluator must not keep it.
    """

    recipe: Recipe
    model: Any = None


@dataclass(frozen=True)
class Measurement:
    """Result of one evaluation.

    Attributes:
        values: Objective name -> value in the user's direction.
        errors: Objective name -> standard error of the value over items, where it is known.
        items: Objective name -> score of each item ``(items,)``, in the order of the split; where only a part was
            asked for, of the items in that part.
        gradient: d objective / d point ``(dim,)``, from evaluators that provide it.
    """

    values: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    items: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    gradient: npt.NDArray[np.float64] | None = None


class Evaluator(Protocol):
    """Scores candidates. Built from the study file in the driver and again in each worker."""

    #: What is measured, in a fixed order.
    objectives: tuple[Objective, ...]
    #: Extras beyond the values: subset of {"items", "gradient"}.
    provides: frozenset[str]
    #: The ``transformers`` auto class of the model it runs, or None when it needs no model.
    model_class: str | None

    def check(self) -> None:
        """Refuse wrong input (missing data, overlapping or empty splits) before any weight is read."""

    def open(self) -> None:
        """Load the items; called once in each worker, before the first evaluation."""

    def size(self, split: Split) -> int:
        """Number of items of a split, 0 where there are none; known after :meth:`check`, before :meth:`open`."""

    def cost(self, split: Split, items: int | None = None) -> int:
        """Evaluations of items that one call of :meth:`evaluate` makes; 1 where there are no items."""

    def evaluate(self, candidate: Candidate, split: Split, items: int | None = None) -> Measurement:
        """Score ``candidate`` on the items of ``split``, or on the first ``items`` of them in the fixed order.

        Deterministic for a given recipe, split and number of items.
        """
