"""The base of evaluators of input-dependent merges: parameters to search, and scoring.

The result is not a checkpoint: it is merged for every batch or item, from parts that it carries
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
from mergesearch.evaluators.images.classification import Classification
from mergesearch.evaluators.items import balanced_order
from mergesearch.merging import InputError, Recipe

if TYPE_CHECKING:
    from mergesearch.merging import Field
    from mergesearch.merging.routing.routed import Routed, Tensors

#: Operators whose coefficients reproduce base, experts, and weighted sums of task vectors.
LINEAR = ("average", "task_arithmetic")
#: Policies for special tensors under which experts can be reproduced.
PLAIN_POLICIES = (("batch_norm", "base"), ("batch_norm", "merge"))


@dataclass(frozen=True)
class Parameter:
    """A number that a search may set, with its bounds and its start."""

    name: str
    lower: float
    upper: float
    start: float


@runtime_checkable
class RoutedEvaluator(Evaluator, Protocol):
    """An evaluator that merges for its inputs; a study searches its parameters."""

    parameters: tuple[Parameter, ...]
    #: The rest of a recipe's routing: the method's name, and options that are not searched.
    fixed: Mapping[str, Any]

    def check_recipe(self, template: Recipe) -> None:
        """Refuse base and experts that the method cannot use, before any weight is read."""

    def routed(self, candidate: Candidate) -> Any:
        """The input-dependent merge of a candidate."""


class RoutedClassification(Classification, ABC):
    """Scores an input-dependent merge as an image classifier.

    Checkpoints beside it are scored as they are.
    """

    #: A rule or a router gives no gradient that a strategy could follow.
    smooth: ClassVar[frozenset[str]] = frozenset()
    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, Any]

    @abstractmethod
    def routed(self, candidate: Candidate) -> Routed:
        """The input-dependent merge of a candidate.

        It takes the resident model over until the next merge.
        """

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Score the merge of a recipe with routing, a loaded bundle, or a checkpoint."""
        if candidate.merged is None or not candidate.recipe.routing:
            return super().evaluate(candidate, split, items)
        return super().evaluate(replace(candidate, model=self.routed(candidate)), split, items)

    def _item_scores(self, model: Any, items: Any) -> dict[str, Array]:
        """Metric -> score of each item ``(items,)``, computed in an order that mixes domains.

        Batches of sorted data would hold one domain each, and a merge for a batch would profit.
        """
        order = balanced_order(items.domains)
        back = np.argsort(order)
        return {
            metric: scores[back]
            for metric, scores in super()._item_scores(model, items.rows(order)).items()
        }

    def check_recipe(self, template: Recipe) -> None:
        """Refuse operators and policies under which experts cannot be reproduced.

        Raises:
            InputError: In one line.
        """
        method = self.fixed["method"]
        if template.operator not in LINEAR:
            raise InputError(
                f"operator.name: expected one of {', '.join(LINEAR)} for {method}, which merges "
                f"whole models, received {template.operator!r}"
            )
        odd = [name for name, value in template.special if (name, value) not in PLAIN_POLICIES]
        if odd:
            raise InputError(
                f"special.{odd[0]}: expected no policy but batch_norm base or merge for {method}, "
                "which is merged for each input; leave it out"
            )


def tensors_at(candidate: Candidate, field: Field) -> Tensors:
    """Merge with the coefficients of ``field``, and copy the resident model's tensors."""
    from mergesearch.merging.routing.routed import copied_tensors

    candidate.merged.write(field)
    return copied_tensors(candidate.merged.model)
