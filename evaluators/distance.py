"""How far a merge is from the base: ‖merged − base‖₂ / ‖base‖₂ over all merged tensors; costs no
item.

Beside an objective of quality it shows what each step away from the base buys; as a bound it keeps
merges near.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.base import (
    Batch,
    Candidate,
    ItemSubset,
    LossAndGradient,
    Measurement,
    Objective,
    Split,
)
from mergesearch.merging import MergesearchError
from mergesearch.merging.checkpoints.opening import open_checkpoint

if TYPE_CHECKING:
    import torch


class Distance:
    """Measures the merge itself.

    Args:
        name: Name of the objective.
        model_class: ``transformers`` auto class of the model.
        where: Key of the study file, for messages.
    """

    transductive = False
    selects = False
    differentiable: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    additive: tuple[str, ...] = ()
    provides: frozenset[str] = frozenset()

    def __init__(self, name: str, model_class: str, where: str) -> None:
        self.objectives = (Objective(name, "minimize"),)
        self.model_class: str | None = model_class
        self._where = where
        self._known: tuple[Any, Mapping[str, Any]] | None = (
            None  # a model, and where its stored tensors are
        )

    def check(self) -> None:
        """Nothing to refuse: there is no data."""

    def references(self) -> frozenset[str]:
        """None: the base's weights are at hand."""
        return frozenset()

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """None."""
        return []

    def open(self) -> None:
        """Nothing to load."""

    def size(self, split: Split) -> int:
        """No items."""
        return 0

    def cost(self, split: Split, items: int | None = None) -> int:
        """One evaluation."""
        return 1

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """The same on every split; reads the base's weights from its checkpoint."""
        moved = 0.0
        size = 0.0
        for merged, base in self._pairs(candidate):
            wide = base.double()
            moved += float(((merged.double() - wide) ** 2).sum())
            size += float((wide**2).sum())
        return Measurement({self.objectives[0].name: math.sqrt(moved / size)})

    def batch_cost(self, batch: Batch) -> int:
        """Nothing: there are no gradients."""
        return 0

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        """Refused: strategies follow losses on items.

        Raises:
            MergesearchError: Always.
        """
        raise MergesearchError(
            f"{self._where}: expected no gradients of a distance, received a request for some"
        )

    def _pairs(self, candidate: Candidate) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Merged and base tensor, by stored name."""
        from mergesearch.merging.models.parameter_views import parameter_views

        base = open_checkpoint(candidate.recipe.base.path, "base")
        state = candidate.model.state_dict()
        if self._known is None or self._known[0] is not candidate.model:
            self._known = candidate.model, parameter_views(candidate.model)
        places = self._known[1]
        for name in sorted(base.merged):
            if name in places:
                yield places[name].of(state[places[name].parameter]).cpu(), base.read(name)
