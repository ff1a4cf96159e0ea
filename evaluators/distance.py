"""Distance of a merge from the base: ‖merged − base‖₂ / ‖base‖₂ over all merged tensors.

It needs no items. Beside an objective of quality it shows what each step away from the base brings;
as a bound it keeps merges near the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.base import Candidate, ItemSubset, Measurement, Objective, Split
from mergesearch.evaluators.evaluator_base import EvaluatorBase
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint

if TYPE_CHECKING:
    import torch


class Distance(EvaluatorBase):
    """Measures the merge itself, not what it answers.

    Args:
        name: Name of the objective.
        model_class: ``transformers`` auto class of the model.
        where: Key of the study file, for messages.
    """

    constraints: tuple[str, ...] = ()
    additive: tuple[str, ...] = ()
    deterministic = True
    measures_weights = True
    _subject = "a distance"

    def __init__(self, name: str, model_class: str, where: str) -> None:
        self.objectives = (Objective(name, "minimize"),)
        self.model_class = model_class
        self._where = where
        # A model, what its tensors follow from, and stored name -> view of its parameters.
        self._views: tuple[Any, Any, Mapping[str, Any]] | None = None

    def lend(self, share: float) -> None:
        """Lend nothing: there are no items."""

    def use_heads(self, names: Sequence[str]) -> Mapping[str, str]:
        """Any head, as it does not count: the first where the study names none."""
        self.head = self.head or next(iter(names), None)
        return super().use_heads(names)

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Measure the distance, which is the same on every split.

        The base's weights are read from its checkpoint.
        """
        moved = 0.0
        size = 0.0
        for merged, base in self._pairs(candidate):
            wide = base.double()
            moved += float(((merged.double() - wide) ** 2).sum())
            size += float((wide**2).sum())
        return Measurement({self.objectives[0].name: math.sqrt(moved / size)})

    def _pairs(self, candidate: Candidate) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the merged and the base tensor of every shared name, sorted by name."""
        recipe = candidate.recipe
        base = open_checkpoint(recipe.base.path, "base")
        state = candidate.model.state_dict()
        kept = self._views
        source = (recipe.base, recipe.experts, recipe.special, bool(candidate.heads), self.one_head)
        if kept is None or kept[0] is not candidate.model or kept[1] != source:
            kept = self._views = candidate.model, source, self._shared(candidate, base)
        for name, view in kept[2].items():
            yield view.of(state[view.parameter]).cpu(), base.read(name)

    def _shared(self, candidate: Candidate, base: Checkpoint) -> dict[str, Any]:
        """Stored name -> view of the model's parameters, for every shared name, sorted."""
        from mergesearch.merging.family.family import open_family
        from mergesearch.merging.models.parameter_views import name_in_class, parameter_views

        views = parameter_views(candidate.model)
        heads = open_family(candidate.recipe).heads if candidate.heads else None
        own = {} if heads is None else heads.head(str(self.one_head)).renamed
        names = sorted(base.merged if heads is None else {*base.merged} - heads.names)
        stored = {
            name: name_in_class(candidate.model, views, own.get(name, name)) for name in names
        }
        return {name: views[other] for name, other in stored.items() if other in views}
