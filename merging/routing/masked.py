"""One sum of task vectors under the mask of the task at hand, as MergeVLA has it.

Fu 2025, "MergeVLA: Cross-Skill Model Merging Toward a Generalist Vision-Language-Action Agent": the
sum of the experts' changes is kept once, with one bit for each weight and task that says where it
counts for that task (TALL masks, Wang 2024). Heads, which have no common start, stay those of the
experts. The task of an episode is inferred once, from its first observation::

    tasks = merge.tasks_of(pixel_values=first)
    merge(pixel_values=later, tasks=tasks).logits

Routers are in :mod:`mergesearch.merging.routing.task_routers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import nn

from mergesearch.merging.checkpoints.packed import restored
from mergesearch.merging.errors import InputError
from mergesearch.merging.export.pack_forms import held_numbers
from mergesearch.merging.models.task_heads import TaskHead, Tasks, wide
from mergesearch.merging.routing.prompts import IDS, MASK, PROMPT, prompts_alone
from mergesearch.merging.routing.routed import Answer, Routed
from mergesearch.merging.routing.vectors import Tensors

#: Name -> the sum of changes (``sum``, in the tensor's shape) and packed masks (``mask``, ``(K,
#: bytes)``).
Held = Mapping[str, Mapping[str, torch.Tensor]]

#: What keys of a routing begin with that say what is in a group.
GROUP = "group."


class TaskRouter(Protocol):
    """Says how well an input fits each task."""

    def scores(self, merge: MaskedMerge, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``(items, tasks)``, the largest for the task that fits best."""


class MaskedMerge(Routed):
    """``base + m_t ⊙ sum``, with the mask m of the task t of every item.

    Args:
        model: The model whose weights are written.
        base: Those that anything is added to, by name in the model.
        held: What is added, and where; nothing for a merge that is the same for all tasks.
        tasks: Names of the K tasks, in the order of the masks.
        router: What infers a task that is not told; None: every task must be told.
        head: What answers by the model; None: the model itself, for all tasks.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Tensors,
        held: Held,
        tasks: Sequence[str],
        *,
        router: TaskRouter | None = None,
        head: TaskHead | None = None,
    ) -> None:
        super().__init__(model, "item", head, names=[*held])
        self.base = base
        self.held = held
        self.tasks = tuple(tasks)
        self.router = router
        self._written: int | None = None

    @torch.no_grad()
    def tasks_of(
        self, pixel_values: torch.Tensor | None = None, **inputs: torch.Tensor
    ) -> list[str]:
        """The task of every item, by the router; for episodes, from their first observations.

        Args:
            pixel_values: Images, if the model reads any.
            **inputs: Other arguments of the model; of texts prompts alone are looked at
                (:func:`mergesearch.merging.routing.prompts.prompts_alone`).

        Raises:
            InputError: If there is no router, or a mask does not fit its texts.
        """
        if self.router is None:
            raise InputError(
                f"tasks: expected one of {', '.join(self.tasks)} for the items, or one for each, "
                "received none, and this merge has no router"
            )
        named = inputs if pixel_values is None else {"pixel_values": pixel_values, **inputs}
        chosen = self.router.scores(self, prompts_alone(named)).argmax(dim=1)
        return [self.tasks[index] for index in chosen.tolist()]

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        tasks: Tasks = None,
        prompt_mask: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> Answer:
        """Logits of every item, by the model and head of its task.

        Args:
            pixel_values: Images, if the model reads any.
            tasks: The task of each item, or of all; None: each is inferred from its item.
            prompt_mask: As in :meth:`Routed.forward`.
            **inputs: Other arguments of the model.
        """
        if tasks is None:
            deciding = inputs if prompt_mask is None else {**inputs, PROMPT: prompt_mask}
            tasks = self.tasks_of(pixel_values, **deciding)
        answer: Answer = super().forward(pixel_values, tasks, prompt_mask, **inputs)
        return answer

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tasks: Tasks = None,
        **options: Any,
    ) -> torch.Tensor:
        """Prompts with what the model and head of its task write after each.

        Args:
            input_ids: As in :meth:`Routed.generate`.
            attention_mask: As there.
            tasks: The task of each prompt, or of all; None: each is inferred from its prompt.
            **options: As there.
        """
        if tasks is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            tasks = self.tasks_of(**{IDS: input_ids, MASK: mask})
        return super().generate(input_ids, attention_mask, tasks, **options)

    def item_weights(self, inputs: Mapping[str, torch.Tensor], tasks: Tasks = None) -> torch.Tensor:
        """1 for the task of every item, else 0 ``(items, tasks)``.

        Raises:
            InputError: If a task is none of the merge's.
        """
        count = len(next(iter(inputs.values())))
        named = [tasks] * count if isinstance(tasks, str) else [*(tasks or self.tasks_of(**inputs))]
        odd = next((name for name in named if name not in self.tasks), None)
        if odd is not None:
            raise InputError(f"tasks: expected one of {', '.join(self.tasks)}, received {odd!r}")
        places = torch.tensor([self.tasks.index(name) for name in named], dtype=torch.int64)
        return nn.functional.one_hot(places, len(self.tasks)).double()

    def write(self, weights: Sequence[float]) -> None:
        """Write the weights of one task, unless they are there."""
        place = [*weights].index(1.0)
        if place != self._written:
            super().write(weights)
            self._written = place

    def merged_tensor(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """A tensor of the task whose weight is 1."""
        return wide(restored("masked", self.base[name], self.held[name], [*weights].index(1.0)))

    def write_task(self, task: str) -> None:
        """Write the weights of a task."""
        self.write([float(task == other) for other in self.tasks])

    @torch.no_grad()
    def write_base(self) -> None:
        """Write the base; a merge that is the same for all tasks stays as it is."""
        self._load(self.base)
        self._written = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._written = None
        return super()._apply(fn, recurse)


def held_sum(
    base: Mapping[str, torch.Tensor],
    experts: Sequence[Mapping[str, torch.Tensor]],
    scale: Mapping[str, float],
    threshold: Mapping[str, float],
) -> dict[str, dict[str, torch.Tensor]]:
    """The scaled sum of task vectors, and where it counts for each task.

    ``m_t = [|τ_t| > λ |Σ_k τ_k − τ_t|]`` (Wang 2024); tensors that no expert changes are left out.

    Args:
        base: Name -> tensor.
        experts: Those of K experts.
        scale: Name -> factor of the sum.
        threshold: Name -> λ.
    """
    held = {}
    for name, tensor in base.items():
        own = [expert[name] for expert in experts]
        if all(torch.equal(one, tensor) for one in own):
            continue
        given = [threshold[name]] * len(own)
        numbers = held_numbers("masked", tensor, own, rank=0, directions=0, thresholds=given)
        held[name] = {"sum": scale[name] * numbers["sum"], "mask": numbers["mask"]}
    return held


def by_tensor(
    names: Sequence[str], routing: Mapping[str, Any], parameter: str, otherwise: float
) -> dict[str, float]:
    """Tensor -> a parameter of its group: the first one with a pattern like its name.

    Args:
        names: Of tensors.
        routing: Of a recipe: ``group.NAME`` is patterns of the shell, with blanks between them, and
            ``PARAMETER.NAME`` a number.
        parameter: ``scale`` or ``threshold``.
        otherwise: Value of tensors in no group.
    """
    patterns = {
        key.removeprefix(GROUP): text.split()
        for key, text in routing.items()
        if key.startswith(GROUP)
    }
    found = {}
    for name in names:
        like = (g for g, ps in patterns.items() if any(fnmatchcase(name, p) for p in ps))
        group = next(like, None)
        found[name] = otherwise if group is None else float(routing[f"{parameter}.{group}"])
    return found
