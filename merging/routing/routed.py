"""Models whose weights depend on their input: merged anew for every batch, or every item.

Such a merge is no checkpoint. It holds the tensors that it is merged from, and answers as a model
does::

    routed(pixel_values=images).logits
    routed(pixel_values=images, tasks="cars").logits    # with a head of class prompts
    routed(**tokens).logits                             # texts, each merged for as a prompt
    routed(**tokens, prompt_mask=mask).logits           # prompts with answers after them
    routed.generate(**tokens, max_new_tokens=64)        # one decision for each prompt

T3 (Imam 2025, "T3: Test-Time Model Merging in VLMs for Zero-Shot Medical Imaging Analysis")
interpolates between two models by how much they disagree. Twin-Merging (Lu 2024, "Twin-Merging:
Dynamic Integration of Modular Expertise in Model Merging") adds low-rank vectors of the experts to
a shared merge, by the weights that a router gives them. Of a text the prompt alone decides, once,
whatever is scored or written after it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mergesearch.merging.errors import InputError, NonFiniteError
from mergesearch.merging.models.own_heads import OwnHeads
from mergesearch.merging.models.task_heads import OwnHead, TaskHead, Tasks
from mergesearch.merging.routing.batches import of_items, padding_token, together
from mergesearch.merging.routing.prompts import IDS, MASK, PROMPT, prompts_alone
from mergesearch.merging.routing.vectors import (
    Tensors,
    floating_tensors,
    without_heads,
)

#: Options of ``generate`` -> the value under which the result is one row of tokens for each prompt.
OTHER_RESULTS = {"return_dict_in_generate": False, "num_return_sequences": 1}


@dataclass(frozen=True, eq=False)
class Answer:
    """The output of a routed model.

    Attributes:
        logits: ``(items, classes)``; minus infinity for classes that an item's task lacks. Of
            texts ``(items, tokens, vocabulary)``.
        weights: How every item was merged ``(items, weights)``, float64.
    """

    logits: torch.Tensor
    weights: torch.Tensor


class Routed(nn.Module, ABC):
    """A model that is merged for its inputs.

    Args:
        model: The model whose weights are written; it belongs to this one from now on.
        per: Merge for every ``item``, or once for a ``batch``, by the mean of what its items ask
            for.
        head: What answers by the model; None: the model itself.
        names: Tensors that are merged; None: all but those of heads.
    """

    def __init__(
        self,
        model: nn.Module,
        per: str,
        head: TaskHead | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self._names = names
        self.model = model
        self.per = per
        self.head: TaskHead = head or OwnHead()
        self._targets = self._shared_tensors()

    @abstractmethod
    def item_weights(self, inputs: Mapping[str, torch.Tensor], tasks: Tasks = None) -> torch.Tensor:
        """How every item would be merged ``(items, weights)``, float64."""

    @abstractmethod
    def merged_tensor(self, name: str, weights: Sequence[float]) -> torch.Tensor:
        """A merged tensor, in float32 or wider."""

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        tasks: Tasks = None,
        prompt_mask: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> Answer:
        """Logits of every item, by the model that is merged for it.

        Items with the same weights run together.

        Args:
            pixel_values: Images, if the model reads any.
            tasks: The task of each item, or of all, where the head has several.
            prompt_mask: 1 where a token of ``input_ids`` belongs to a prompt ``(items, tokens)``;
                by default wherever ``attention_mask`` has no padding. Only these tokens decide.
            **inputs: Other arguments of the model.

        Raises:
            InputError: If a mask does not fit its texts.
        """
        named = inputs if pixel_values is None else {"pixel_values": pixel_values, **inputs}
        deciding = named if prompt_mask is None else {**named, PROMPT: prompt_mask}
        weights = self.weights_for(deciding, tasks)
        parts = []
        for chosen in self.merges(weights):
            own = of_items(tasks, chosen)
            batch = {key: value[chosen] for key, value in named.items()}
            parts.append((chosen, self.head.answer(self.model, batch, own).logits))
        return Answer(together(parts), weights)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tasks: Tasks = None,
        **options: Any,
    ) -> torch.Tensor:
        """Prompts with what is written after each, by the model that is merged for it.

        Prompts with the same weights are continued together.

        Args:
            input_ids: Prompts ``(items, tokens)``, padded on their left.
            attention_mask: 0 where they are padded.
            tasks: As in :meth:`forward`.
            **options: Of ``generate`` in ``transformers``.

        Returns:
            Tokens ``(items, tokens)``; rows that end earlier are filled up on their right.

        Raises:
            InputError: If a mask does not fit, or an option asks for another kind of result.
        """
        odd = [name for name, plain in OTHER_RESULTS.items() if options.get(name, plain) != plain]
        if odd:
            raise InputError(
                f"{odd[0]}: expected none for a merge for each input, which returns one row of "
                f"tokens for each prompt, received {options[odd[0]]!r}; leave it out"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        parts = []
        for chosen in self.merges(self.weights_for({IDS: input_ids, MASK: mask}, tasks)):
            model = self._writer(of_items(tasks, chosen))
            batch = {IDS: input_ids[chosen], MASK: mask[chosen]}
            parts.append((chosen, model.generate(**batch, **options)))
        return together(parts, padding_token(self.model, options))

    def _writer(self, tasks: Tasks) -> Any:
        """What writes after prompts of one merge: the model, with the head of their task.

        Raises:
            InputError: If experts have heads of their own, and it is not one task.
        """
        if not isinstance(self.head, OwnHeads):
            return self.model
        named = {tasks} if isinstance(tasks, str) else {*(tasks or ())}
        if len(named) != 1 or not named <= {*self.head.models}:
            raise InputError(
                f"tasks: expected one of {', '.join(self.head.models)} for prompts that are "
                f"continued together, received {', '.join(sorted(named)) or 'none'}; call it for "
                "each task"
            )
        return self.head.models[named.pop()]

    @torch.no_grad()
    def weights_for(self, inputs: Mapping[str, torch.Tensor], tasks: Tasks = None) -> torch.Tensor:
        """How every item of a batch is merged ``(items, weights)``, float64.

        Args:
            inputs: Arguments of the model; of texts, prompts alone are looked at
                (:func:`mergesearch.merging.routing.prompts.prompts_alone`).
            tasks: As in :meth:`forward`.

        Raises:
            InputError: If a mask does not fit its texts.
        """
        weights = self.item_weights(prompts_alone(inputs), tasks)
        if self.per == "batch":
            weights = weights.mean(dim=0, keepdim=True).expand_as(weights)
        return weights

    def merges(self, weights: torch.Tensor) -> Iterator[torch.Tensor]:
        """Write one merge after the other into the model, and yield the items that it is for.

        Args:
            weights: Of every item ``(items, weights)``.
        """
        rows, owner = torch.unique(weights, dim=0, return_inverse=True)
        for index, row in enumerate(rows.tolist()):
            self.write(row)
            yield torch.nonzero(owner == index).flatten()

    @torch.no_grad()
    def write(self, weights: Sequence[float]) -> None:
        """Merge with ``weights`` into the model.

        Raises:
            NonFiniteError: If a merged tensor holds NaN or infinity.
        """
        for name, target in self._targets.items():
            target.copy_(self.merged_tensor(name, weights))
            if not bool(torch.isfinite(target.sum())) and not bool(torch.isfinite(target).all()):
                raise NonFiniteError(f"tensor {name!r}")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Moving or casting gives the model other memory.
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self.head, OwnHeads):
            self.head.apply(fn)
        self._targets = self._shared_tensors()
        return moved

    def _shared_tensors(self) -> Tensors:
        """The memory of all tensors that are merged, none of which is a head's."""
        shared = without_heads(floating_tensors(self.model), self.head)
        return {n: t for n, t in shared.items() if self._names is None or n in self._names}

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, target in self._targets.items():
            target.copy_(tensors[name])
