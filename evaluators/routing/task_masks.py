"""Task masks (MergeVLA): one sum of changes under the mask of each task, measured by a function.

The function gets a model that takes the tasks of its items, or infers them::

    def success(model, split):
        tasks = model.tasks_of(pixel_values=first)              # once for each episode
        model(pixel_values=later, tasks=tasks).logits

Merges that are the same for all tasks, such as anchors, come in the same form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mergesearch.evaluators.base import Candidate, ItemSubset, Measurement, Split
from mergesearch.evaluators.python import PythonFunction
from mergesearch.evaluators.routing.routed import (
    LINEAR,
    PLAIN_POLICIES,
    Parameter,
    head_around,
    tensors_at,
)
from mergesearch.merging import Field, InputError, Recipe
from mergesearch.merging.extensions.references import find_function

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.routing.masked import Held, MaskedMerge
    from mergesearch.merging.routing.task_routers import LearnedRouter

#: The head of the base, which is no task.
BASE = "base"
#: The policy under which experts keep their heads.
OWN = ("heads", "own")


class TaskMasks(PythonFunction):
    """Calls a function with merges under the masks of their tasks.

    Args:
        function: As for :class:`PythonFunction`.
        objectives: What it measures.
        groups: Group -> patterns of tensor names; each has a scale and a threshold of its own.
        threshold: Start of all thresholds, and that of tensors in no group.
        router: What infers tasks: ``head`` compares features with the heads' matrices, ``learned``
            learns from first observations; ``none`` infers none.
        directions: Singular vectors of each head that ``head`` compares features with.
        observations: Function of ``learned``: expert -> first observations of its task, by argument
            of the model.
        training: Width, steps and seed of ``learned``.
        **options: As for :class:`PythonFunction`.
    """

    def __init__(
        self,
        function: str,
        objectives: Sequence[Any],
        *,
        groups: Mapping[str, Sequence[str]],
        threshold: float,
        router: Literal["head", "learned", "none"],
        directions: int,
        observations: str | None,
        training: Mapping[str, int],
        **options: Any,
    ) -> None:
        super().__init__(function, objectives, **options)
        self._training = dict(training) if router == "learned" else {}
        self.parameters = tuple(
            parameter
            for group in groups
            for parameter in (
                Parameter(f"scale.{group}", 0.0, 2.0, 1.0),
                Parameter(f"threshold.{group}", 0.0, 2.0, threshold),
            )
        )
        self.fixed: Mapping[str, Any] = {
            "method": "task_masks",
            "per": "item",
            "router": router,
            **({"directions": directions} if router == "head" else {}),
            "threshold": threshold,
            **{f"router_{key}": value for key, value in self._training.items()},
            **{f"group.{group}": " ".join(patterns) for group, patterns in groups.items()},
        }

        self._observations = observations
        self._learned: LearnedRouter | None = None

    def open(self) -> None:
        """Import the functions, once in each process.

        Raises:
            InputError: If there is none, or its code is another than the study began with.
        """
        super().open()
        if self._observations is not None:
            find_function(self._observations, f"{self._where}.observations")

    def check_recipe(self, template: Recipe) -> None:
        """Refuse operators and policies under which experts cannot be reproduced.

        Raises:
            InputError: In one line.
        """
        if template.operator not in LINEAR:
            raise InputError(
                f"operator.name: expected one of {', '.join(LINEAR)} for task_masks, which sums "
                f"the experts' changes itself, received {template.operator!r}"
            )
        given = [one for one in template.special if one[0] != "heads"]
        odd = next((one for one in given if one not in PLAIN_POLICIES), None)
        if odd is not None:
            raise InputError(
                f"special.{odd[0]}: expected no policy but heads, and batch_norm base or merge, "
                f"for task_masks, received {odd[1]!r}; leave it out"
            )
        if self.fixed["router"] == "head" and OWN not in template.special:
            raise InputError(
                f"{self._where}.router: expected none where experts share their heads, received "
                "head; keep each expert's with special: {heads: own}, or set router: none"
            )

    def use_heads(self, names: Sequence[str]) -> Mapping[str, str]:
        """Choose the heads of all experts: each task is answered by its own.

        Raises:
            InputError: If the study names one head for all tasks.
        """
        if self.head is not None:
            raise InputError(
                f"{self._where}.head: expected none for task_masks, which answers each task by the "
                f"head of its expert, received {self.head!r}; leave it out"
            )
        assert self.model_class is not None
        return dict.fromkeys((name for name in names if name != BASE), self.model_class)

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Measure the merge of a recipe with routing, a loaded bundle, or a checkpoint."""
        if not hasattr(candidate.model, "tasks_of"):
            candidate = replace(candidate, model=self.routed(candidate))
        return super().evaluate(candidate, split, items)

    def routed(self, candidate: Candidate) -> MaskedMerge:
        """The merge of a candidate; one without routing is the same for all tasks.

        It takes the resident model over until the next merge.
        """
        from mergesearch.merging.routing.masked import MaskedMerge
        from mergesearch.merging.routing.task_routers import untrained_router

        head = head_around(candidate, "task_masks")
        tasks = [expert.name for expert in candidate.recipe.experts]
        base: dict[str, torch.Tensor] = {}
        held: Held = {}
        if candidate.recipe.routing:
            base, held = self._held(candidate)
        model = candidate.model if candidate.merged is None else candidate.merged.model
        merge = MaskedMerge(model, base, held, tasks, head=head)
        merge.router = self._learnt(merge) or untrained_router(merge, self.fixed)
        return merge

    def _learnt(self, merge: MaskedMerge) -> LearnedRouter | None:
        """The router that learns, once for all merges under masks: its features are the base's."""
        if self._observations is None:
            return None
        if not merge.held:
            return self._trained(merge, self._observations)
        self._learned = self._learned or self._trained(merge, self._observations)
        return self._learned

    def _trained(self, merge: MaskedMerge, observations: str) -> LearnedRouter:
        """A router that has learned from the observations of a function.

        Raises:
            InputError: If there are none of a task.
        """
        from mergesearch.merging.routing.task_routers import trained_router

        where = f"{self._where}.observations"
        call = find_function(observations, where)
        observed = {task: call(task) for task in merge.tasks}
        odd = next((task for task, own in observed.items() if not own), None)
        if odd is not None:
            raise InputError(
                f"{where}: expected arguments of the model with first observations of {odd!r}, "
                f"received {observed[odd]!r}"
            )
        return trained_router(merge, observed, **self._training)

    def _held(self, candidate: Candidate) -> tuple[dict[str, torch.Tensor], Held]:
        """The base, and the sum of changes with its masks, by the candidate's parameters."""
        from mergesearch.merging.routing.masked import by_tensor, held_sum

        size = candidate.recipe.field.size
        eye = np.eye(len(candidate.recipe.experts))
        base, *experts = (
            {name: tensor.cpu() for name, tensor in tensors_at(candidate, field).items()}
            for field in (Field.constant(size, row) for row in [0 * eye[0], *eye])
        )
        routing = dict(candidate.recipe.routing)
        scale = by_tensor([*base], routing, "scale", 1.0)
        threshold = by_tensor([*base], routing, "threshold", routing["threshold"])
        return base, held_sum(base, experts, scale, threshold)
