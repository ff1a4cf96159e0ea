"""Twin-Merging (Lu 2024): a shared merge and low-rank vectors of experts, weighted by a router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mergesearch.evaluators.base import Candidate
from mergesearch.evaluators.routing.routed import (
    ForInputs,
    OfClassifiers,
    OfPrompts,
    Parameter,
    tensors_at,
)
from mergesearch.merging import Field, InputError, Recipe
from mergesearch.merging.models.task_heads import TaskHead

if TYPE_CHECKING:
    from torch import nn

    from mergesearch.merging.routing.routed import Routed


class TwinRule(ForInputs):
    """Twin-Merging for what an evaluator scores.

    The router learns from the search items which expert an item belongs to: the one of its domain.

    Args:
        per: Merge for every ``item``, or for a ``batch`` by the mean of its weights.
        experts: Domain -> expert; by default a domain belongs to the expert of its name.
        router_width: Hidden width of the router.
        router_steps: Steps of its training, on all search items at once.
        router_seed: Seed of its first weights.
        **items: Arguments of the evaluator that scores checkpoints.

    Raises:
        InputError: If there is no column of domains.
    """

    parameters = (
        Parameter("shared_scale", 0.0, 1.0, 0.3),
        Parameter("rank", 0.01, 1.0, 0.1),
        Parameter("temperature", 0.05, 5.0, 1.0),
    )

    def __init__(
        self,
        *,
        per: Literal["item", "batch"],
        experts: Mapping[str, str] | None = None,
        router_width: int,
        router_steps: int,
        router_seed: int,
        **items: Any,
    ) -> None:
        super().__init__(experts=experts, **items)
        self._key = items["where"]
        self._owners = experts
        self._router_batch = items["batch_size"]  # as given: the router must not depend on memory
        router = {
            "router_width": router_width,
            "router_steps": router_steps,
            "router_seed": router_seed,
        }
        self.fixed = {"method": "twin_merging", "per": per, **router}
        columns = items.get("columns")  # none where tasks are the domains
        if columns is not None and columns["domain"] is None:
            raise InputError(
                f"{self._key}.domain: required key is missing: the router of "
                "twin_merging learns which domain an item belongs to"
            )

    def check_recipe(self, template: Recipe) -> None:
        """Refuse domains without an expert and experts without a domain.

        Raises:
            InputError: In one line.
        """
        super().check_recipe(template)
        where = self._key
        names = [expert.name for expert in template.experts]
        owners = {domain: self._owner(domain) for domain in sorted(self.search_domains())}
        lost = next((domain for domain, owner in owners.items() if owner not in names), None)
        if lost is not None:
            raise InputError(
                f"{where}.experts: expected one of the experts {names} for domain {lost!r}, "
                f"received {owners[lost]!r}; write `experts: {{domain: expert}}`"
            )
        idle = sorted(set(names) - set(owners.values()))
        if idle:
            raise InputError(
                f"{where}.experts: expected a domain for every expert, received none for "
                f"{idle[0]!r}; the router could not learn when to choose it"
            )

    def routed(self, candidate: Candidate) -> Routed:
        """Merge what is shared and what is exclusive, and train a router on the search items."""
        from mergesearch.merging.routing.twin_merging import TwinMerging as Merge
        from mergesearch.merging.routing.vectors import exclusive_vector

        values = dict(candidate.recipe.routing)
        size = candidate.recipe.field.size
        eye = np.eye(len(candidate.recipe.experts))
        shared_field = Field.constant(size, np.full(len(eye), values["shared_scale"]))
        shared = tensors_at(candidate, shared_field)
        vectors = [
            exclusive_vector(
                tensors_at(candidate, Field.constant(size, row)), shared, values["rank"]
            )
            for row in eye
        ]
        candidate.merged.write(shared_field)
        model = candidate.merged.model
        head = self.head_for(candidate)
        router = self._trained(model, candidate.recipe, head)
        return Merge(
            model,
            shared,
            vectors,
            router,
            temperature=values["temperature"],
            per=values["per"],
            head=head,
        )

    def _owner(self, domain: str) -> str:
        """The expert that a domain belongs to."""
        return domain if self._owners is None else self._owners.get(domain, domain)

    def _trained(self, model: Any, recipe: Recipe, head: TaskHead) -> nn.Module:
        """Train a router to tell the expert of a search item by the model's features."""
        import torch

        from mergesearch.merging.routing.router import train_router

        values = dict(recipe.routing)
        indices = {expert.name: index for index, expert in enumerate(recipe.experts)}
        domains, batches = self.seen_by_router(model, self._router_batch)
        with torch.no_grad():
            features = torch.cat([head.features(model, batch) for batch in batches])
        return train_router(
            features,
            torch.tensor([indices[self._owner(domain)] for domain in domains]),
            len(indices),
            width=values["router_width"],
            steps=values["router_steps"],
            seed=values["router_seed"],
        )


class TwinMerging(TwinRule, OfClassifiers):
    """Scores Twin-Merging as an image classifier."""


class PromptedTwinMerging(TwinRule, OfPrompts):
    """Scores Twin-Merging by class prompts."""
