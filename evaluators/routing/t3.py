"""T3 (Imam 2025): base and one expert interpolated for each item or batch by their disagreement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mergesearch.evaluators.base import Candidate
from mergesearch.evaluators.routing.routed import (
    ForInputs,
    OfClassifiers,
    OfPrompts,
    Parameter,
    tensors_at,
)
from mergesearch.merging import InputError, Recipe

if TYPE_CHECKING:
    from mergesearch.merging.routing.routed import Routed


class T3Rule(ForInputs):
    """T3 for what an evaluator scores.

    Args:
        per: Merge for every ``item``, or for a ``batch`` by its mean divergence.
        centred: ``2 · sigmoid - 1`` instead of the published sigmoid
            (:class:`mergesearch.merging.routing.t3.T3`).
        **items: Arguments of the evaluator that scores checkpoints.
    """

    parameters = (
        Parameter("lambda_min", 0.0, 1.0, 0.0),
        Parameter("lambda_max", 0.0, 1.0, 1.0),
        Parameter("gamma", 0.0, 20.0, 0.5),
    )

    def __init__(self, *, per: Literal["item", "batch"], centred: bool, **items: Any) -> None:
        super().__init__(**items)
        self.fixed = {"method": "t3", "per": per, "centred": centred}

    def check_recipe(self, template: Recipe) -> None:
        """Refuse anything but one expert.

        Raises:
            InputError: In one line.
        """
        super().check_recipe(template)
        if len(template.experts) != 1:
            raise InputError(
                "experts: expected exactly one for t3, which interpolates between it and the "
                f"base, received {len(template.experts)}; name one, or choose twin_merging"
            )

    def routed(self, candidate: Candidate) -> Routed:
        """Interpolate the two models by the rule of the candidate's recipe."""
        from mergesearch.merging.routing.bundle import folders
        from mergesearch.merging.routing.methods import t3_of

        base, expert = (
            tensors_at(candidate, field) for field in folders(candidate.recipe).values()
        )
        head = self.head_for(candidate)
        return t3_of(candidate.merged.model, base, expert, dict(candidate.recipe.routing), head)


class T3(T3Rule, OfClassifiers):
    """Scores T3 as an image classifier."""


class PromptedT3(T3Rule, OfPrompts):
    """Scores T3 by class prompts, as its paper does."""
