"""The base of evaluators of input-dependent merges: parameters to search, and scoring.

The result is not a checkpoint: it is merged for every batch or item, from parts that it carries
along. It answers as an image classifier, by class prompts, or as a language model
(:mod:`mergesearch.evaluators.routing.texts`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from mergesearch.evaluators.base import Candidate, Evaluator, ItemSubset, Measurement, Split
from mergesearch.evaluators.by_item import Array, ByItem, wide
from mergesearch.evaluators.images.classification import Classification
from mergesearch.evaluators.images.zero_shot import ZeroShot
from mergesearch.evaluators.items import balanced_order
from mergesearch.merging import InputError, Recipe
from mergesearch.merging.models.task_heads import OwnHead, TaskHead

if TYPE_CHECKING:
    import torch

    from mergesearch.merging import Field
    from mergesearch.merging.routing.routed import Routed
    from mergesearch.merging.routing.vectors import Tensors

#: Operators whose coefficients reproduce base, experts, and weighted sums of task vectors.
LINEAR = ("average", "task_arithmetic")
#: Policies for special tensors under which experts can be reproduced.
PLAIN_POLICIES = (("batch_norm", "base"), ("batch_norm", "merge"))
#: What keeps the logits of classes that a task lacks out of every sum, and finite.
LACKING = -1e30


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


class ForInputs(ABC):
    """What evaluators of input-dependent merges have in common, whatever scores them.

    Args:
        **options: Of what scores them, which comes after it among the bases.
    """

    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, Any]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    @abstractmethod
    def routed(self, candidate: Candidate) -> Routed:
        """The input-dependent merge of a candidate.

        It takes the resident model over until the next merge.
        """

    @abstractmethod
    def head_for(self, candidate: Candidate) -> TaskHead:
        """What answers by the models that a candidate is merged into."""

    @abstractmethod
    def search_domains(self) -> Collection[str]:
        """Domains of the search items, known before any weight is read."""

    @abstractmethod
    def seen_by_router(
        self, model: Any, batch_size: int
    ) -> tuple[list[str], Iterator[Mapping[str, torch.Tensor]]]:
        """Domain of each search item, and all of them, in batches, as arguments of the model."""

    def in_place(self, candidate: Candidate) -> Candidate:
        """A candidate whose model is the merge of its recipe, if that has a routing.

        Loaded bundles and checkpoints stay as they are.
        """
        if candidate.merged is None or not candidate.recipe.routing:
            return candidate
        return replace(candidate, model=self.routed(candidate))

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


class RoutedItems(ForInputs, ByItem, ABC):
    """Scores an input-dependent merge item by item.

    Checkpoints beside it are scored as they are.
    """

    #: A rule or a router gives no gradient that a strategy could follow.
    smooth: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def arguments(self, model: Any, items: Any) -> Mapping[str, torch.Tensor]:
        """Keyword arguments of the model for some items."""

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Score the merge of a recipe with routing, a loaded bundle, or a checkpoint."""
        return super().evaluate(self.in_place(candidate), split, items)

    def search_domains(self) -> Collection[str]:
        """Those of the data."""
        domains: Collection[str] = self._tables.check(self._splits)["search"]
        return domains

    def seen_by_router(
        self, model: Any, batch_size: int
    ) -> tuple[list[str], Iterator[Mapping[str, torch.Tensor]]]:
        """Domain of each search item, and all of them, in batches, as arguments of the model."""
        items = self._items["search"]
        starts = range(0, len(items.domains), batch_size)
        parts = (items.rows(slice(start, start + batch_size)) for start in starts)
        return [*map(str, items.domains)], (self.arguments(model, part) for part in parts)

    def _scores_of(self, candidate: Candidate, items: Any) -> Mapping[str, Array]:
        """A routed merge brings the heads of all domains, whose items run together."""
        if hasattr(candidate.model, "item_weights"):
            return self._item_scores(candidate.model, items)
        return super()._scores_of(candidate, items)

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


class OfClassifiers(RoutedItems, Classification):
    """The items of an image classifier, each by the head of its expert where these have some."""

    def check_recipe(self, template: Recipe) -> None:
        """As of all routed merges, but for heads of the experts' own, which answer here.

        Raises:
            InputError: In one line.
        """
        shared = tuple(one for one in template.special if one != ("heads", "own"))
        super().check_recipe(replace(template, special=shared))

    def head_for(self, candidate: Candidate) -> TaskHead:
        """The model's own head, or those of experts around it.

        Raises:
            InputError: If weights have to be copied for each head.
        """
        return head_around(candidate, self.fixed["method"])

    def _logits(self, model: Any, items: Any) -> torch.Tensor:
        head = self.one_head
        if not hasattr(model, "item_weights") or (head is None and not self._head_of):
            return super()._logits(model, items)
        domains = items.domains.tolist()
        tasks = [head or self._head_of[domain] for domain in domains]
        answer = model(tasks=tasks, **self.arguments(model, items))
        return wide(answer.logits).clamp_min(LACKING)

    def arguments(self, model: Any, items: Any) -> Mapping[str, torch.Tensor]:
        """The images."""
        like = next(model.parameters())
        return {"pixel_values": items.images.to(like.device, like.dtype)}


class OfPrompts(RoutedItems, ZeroShot):
    """The items of a model that answers by class prompts, each among the classes of its domain."""

    def head_for(self, candidate: Candidate) -> TaskHead:
        """The heads of class prompts: fixed ones where all models have one text tower."""
        return self._head_of_recipe(candidate)

    def arguments(self, model: Any, items: Any) -> Mapping[str, torch.Tensor]:
        """The images."""
        given: Mapping[str, torch.Tensor] = items.arguments(model)
        return given

    def _head_to_score(self, candidate: Candidate) -> TaskHead | None:
        """None for a routed merge, which brings its own."""
        routed = hasattr(candidate.model, "item_weights")
        return None if routed else super()._head_to_score(candidate)

    def _logits(self, model: Any, items: Any) -> torch.Tensor:
        if self._head is not None:
            return super()._logits(model, items)
        answer = model(tasks=items.domains.tolist(), **items.arguments(model.model))
        logits: torch.Tensor = answer.logits
        return logits


def head_around(candidate: Candidate, method: str) -> TaskHead:
    """The model's own head, or those of experts around it.

    Raises:
        InputError: If weights have to be copied for each head.
    """
    from mergesearch.merging.models.own_heads import OwnHeads

    if not candidate.heads:
        return OwnHead()
    if candidate.merged is not None and candidate.merged.has_copies:
        raise InputError(
            f"special.heads: expected a model that keeps every tensor as a parameter for "
            f"{method}, received {type(candidate.model).__name__}, which fuses some; set heads: "
            "base or average"
        )
    return OwnHeads(candidate.heads)


def tensors_at(candidate: Candidate, field: Field) -> Tensors:
    """Merge with the coefficients of ``field``, and copy the resident model's tensors."""
    from mergesearch.merging.routing.vectors import copied_tensors

    candidate.merged.write(field)
    return copied_tensors(candidate.merged.model)
