"""What the evaluators of input-dependent merges share: parameters to search, and scoring as a
classifier.

The result is no checkpoint: it is merged for every batch or item, of parts that it has to carry
along.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from mergesearch.evaluators.base import Candidate, Evaluator, ItemSubset, Measurement, Split
from mergesearch.evaluators.by_item import Array
from mergesearch.evaluators.classification import Classification
from mergesearch.evaluators.items import balanced_order
from mergesearch.merging import InputError, Recipe

if TYPE_CHECKING:
    from mergesearch.merging import Field
    from mergesearch.merging.routing.routed import Routed, Tensors

#: Operators whose coefficients reproduce base, experts, and weighted sums of task vectors.
LINEAR = ("average", "task_arithmetic")


@dataclass(frozen=True)
class Parameter:
    """A number that a search may set: bounds, and where it starts."""

    name: str
    lower: float
    upper: float
    start: float


@runtime_checkable
class RoutedEvaluator(Evaluator, Protocol):
    """An evaluator that merges for its inputs; its parameters are what a study searches."""

    parameters: tuple[Parameter, ...]
    #: What else the routing of a recipe holds: the method's name, and what is not searched.
    fixed: Mapping[str, Any]

    def check_recipe(self, template: Recipe) -> None:
        """Refuse base and experts that the method cannot use, before any weight is read."""

    def routed(self, candidate: Candidate) -> Any:
        """The input-dependent merge of a candidate."""


class RoutedClassification(Classification, ABC):
    """Scores an input-dependent merge as an image classifier, and checkpoints beside it as they
    are.
    """

    #: What depends on its inputs through a rule or a router has no gradient that a walk could
    #: follow.
    smooth: ClassVar[frozenset[str]] = frozenset()
    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, Any]

    @abstractmethod
    def routed(self, candidate: Candidate) -> Routed:
        """The input-dependent merge of a candidate; it takes the resident model over until the next
        merge.
        """

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Score the merge of a recipe with routing, a loaded bundle, or a checkpoint."""
        if candidate.merged is None or not candidate.recipe.routing:
            return super().evaluate(candidate, split, items)
        return super().evaluate(replace(candidate, model=self.routed(candidate)), split, items)

    def _item_scores(self, model: Any, items: Any) -> dict[str, Array]:
        """In a fixed order that mixes domains: sorted data would tell a merge for a batch whose
        items it holds.
        """
        order = balanced_order(items.domains)
        places = np.argsort(order)
        return {
            metric: scores[places]
            for metric, scores in super()._item_scores(model, items.rows(order)).items()
        }

    def check_recipe(self, template: Recipe) -> None:
        """Refuse operators and policies under which experts are not what they are.

        Raises:
            InputError: In one line.
        """
        method = self.fixed["method"]
        if template.operator not in LINEAR:
            raise InputError(
                f"operator.name: expected one of {', '.join(LINEAR)} for {method}, which merges "
                "whole models, received "
                f"{template.operator!r}"
            )
        odd = [name for name, value in template.special if (name, value) not in PLAIN_POLICIES]
        if odd:
            raise InputError(
                f"special.{odd[0]}: expected no policy but batch_norm base or merge for {method}, "
                "which is merged for "
                "each input; leave it out"
            )


PLAIN_POLICIES = (("batch_norm", "base"), ("batch_norm", "merge"))


def tensors_at(candidate: Candidate, field: Field) -> Tensors:
    """The resident model's tensors with the coefficients of ``field``."""
    from mergesearch.merging.routing.routed import copied_tensors

    candidate.merged.write(field)
    return copied_tensors(candidate.merged.model)
