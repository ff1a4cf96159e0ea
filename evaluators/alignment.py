"""How far a model's answers are from those of the expert of each domain, on items without labels.

Zhang 2025, "Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided
Layer Chunking" (arXiv 2509.25712): T² times the cross-entropy between the expert's and the model's
answers at temperature T, plus a weight times the mean over chosen layers of the mean squared
difference of hidden states. Values here are the divergence KL(expert || model) in the place of the
cross-entropy: they differ by the expert's entropy, which no coefficient moves, so the gradients are
the same, and 0 means that nothing is left to align.

Experts run once on the items of their domains, one after the other; what they said is kept, they
are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mergesearch.evaluators.base import ItemSubset, Split
from mergesearch.evaluators.by_item import ByItem, wide
from mergesearch.evaluators.model_items import (
    ModelItems,
    item_means,
    padded,
    read_items,
    run_model,
    token_mask,
)
from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.opening import open_checkpoint

if TYPE_CHECKING:
    import torch


class Alignment(ByItem):
    """Scores any model that gives logits.

    Args:
        model_class: The ``transformers`` auto class of the model and the experts.
        teachers: Domain -> path of its expert; experts of other domains may be among them.
        temperature: T.
        hidden_weight: Weight of the difference of hidden states.
        layers: Places among the model's hidden states, of which 0 is the embeddings; none: answers
            only.
        **by_item: As for :class:`ByItem`.
    """

    smooth: ClassVar[frozenset[str]] = frozenset({"alignment"})

    def __init__(
        self,
        model_class: str,
        teachers: Mapping[str, str],
        temperature: float = 1.0,
        hidden_weight: float = 1.0,
        layers: Sequence[int] = (),
        **by_item: Any,
    ) -> None:
        super().__init__(**by_item)
        self.model_class = model_class
        self._teachers = dict(teachers)
        self._temperature = temperature
        if self._columns["domain"] is None and len(teachers) == 1:
            self._teachers = {"": next(iter(teachers.values()))}
        self._hidden_weight = hidden_weight
        self._layers = tuple(layers)
        self._taught: dict[Split, ModelItems] = {}
        self._device: Any = None

    def check(self) -> None:
        """As for all, and refuse domains without an expert.

        Raises:
            InputError: In one line.
        """

        super().check()
        if self._columns["domain"] is None and len(self._teachers) > 1:
            raise InputError(
                f"{self._where}.domain: required key is missing: {len(self._teachers)} experts "
                "need a column that says "
                "whose an item is; or name one of them in teachers"
            )
        lacking = sorted((self._domains or {""}) - set(self._teachers))
        if lacking:
            raise InputError(
                f"{self._where}.teachers: expected an expert for every domain, received none "
                f"for {lacking[0]!r}; "
                f"experts: {sorted(self._teachers)}"
            )
        for domain in sorted(self._domains):
            open_checkpoint(self._teachers[domain], f"{self._where}.teachers.{domain}")

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        return read_items(columns, self._where)

    def _items_of(self, split: Split) -> ModelItems:
        """The items with what the experts said of them, asked when a split is first used."""
        if split not in self._taught:
            self._taught[split] = self._teach(self._items[split])
        return self._taught[split]

    def _teach(self, items: ModelItems) -> ModelItems:
        """Run every domain's expert on its items."""
        import torch

        from mergesearch.merging.models.loading import load_model

        said: dict[str, list[Any]] = {name: [None] * len(items.domains) for name in self._said}
        for domain in np.unique(items.domains).tolist():
            places = np.flatnonzero(items.domains == domain)
            assert self.model_class is not None
            teacher = load_model(self._teachers[domain], self.model_class)
            if self._device is not None:
                teacher = teacher.to(self._device)
            with torch.inference_mode():
                for start in range(0, len(places), self._batch_size):
                    part = places[start : start + self._batch_size]
                    self._note(teacher, items.rows(part), part, said)
        stacked = {name: _stacked(rows) for name, rows in said.items()}
        return replace(items, extra=stacked)

    @property
    def _said(self) -> list[str]:
        return ["logits", *(f"layer {layer}" for layer in self._layers)]

    def _note(
        self, teacher: Any, items: ModelItems, places: Any, said: dict[str, list[Any]]
    ) -> None:
        found, batch = self._run(teacher, items)
        for name, values in zip(self._said, found, strict=True):
            lengths = (
                token_mask(batch, values[..., 0]).sum(dim=1).long().tolist()
                if values.ndim == 3
                else None
            )
            for row, place in enumerate(places.tolist()):
                one = (
                    values[row]
                    if lengths is None
                    else _unpadded(values[row], batch, row, lengths[row])
                )
                said[name][place] = one.clone()

    def _run(
        self, model: Any, items: ModelItems
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Logits, then the hidden states of the chosen layers; and what the model was given."""
        output, batch = run_model(
            model, items, **({"output_hidden_states": True} if self._layers else {})
        )
        hidden = output.hidden_states if self._layers else ()
        for layer in self._layers:
            if not -len(hidden) <= layer < len(hidden):
                raise InputError(
                    f"{self._where}.layers: expected places among {len(hidden)} hidden states, "
                    f"got {layer}"
                )
        return [wide(output.logits), *(wide(hidden[layer]) for layer in self._layers)], batch

    def evaluate(self, candidate: Any, split: Split, items: ItemSubset = None) -> Any:
        """As for all; the experts run where the model does."""
        self._device = next(candidate.model.parameters()).device
        return super().evaluate(candidate, split, items)

    def backward(self, candidate: Any, batch: Any, weights: Mapping[str, float]) -> Any:
        """As for all; the experts run where the model does."""
        self._device = next(candidate.model.parameters()).device
        return super().backward(candidate, batch, weights)

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        (answers, *states), batch = self._run(model, items)
        taught = [
            _like(items.extra[name], found)
            for name, found in zip(self._said, [answers, *states], strict=True)
        ]
        log_p = (answers / self._temperature).log_softmax(dim=-1)
        log_q = (taught[0] / self._temperature).log_softmax(dim=-1)
        divergence = self._temperature**2 * (log_q.exp() * (log_q - log_p)).sum(dim=-1)
        score = item_means(divergence, batch)
        for state, told in zip(states, taught[1:], strict=True):
            away = ((state - told) ** 2).mean(dim=-1)
            # Patches and other places that no mask speaks of all count.
            means = (
                item_means(away, batch)
                if away.ndim == 1 or _masked(away, batch)
                else away.flatten(1).mean(dim=1)
            )
            score = score + self._hidden_weight / len(states) * means
        return {"alignment": score}


def _masked(values: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> bool:
    mask = batch.get("attention_mask")
    return values.ndim == 2 and mask is not None and mask.shape == values.shape


def _unpadded(
    values: torch.Tensor, batch: Mapping[str, torch.Tensor], row: int, length: int
) -> torch.Tensor:
    """The tokens ``(tokens, ...)`` of one item that count, or all where the mask speaks of other
    places.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.shape[1] != values.shape[0]:
        return values
    return values[:length] if bool(mask[row, :length].all()) else values


def _stacked(rows: list[Any]) -> Any:
    import torch

    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows


def _like(values: torch.Tensor | list[torch.Tensor], found: torch.Tensor) -> torch.Tensor:
    """What an expert said, padded as the batch is."""
    import torch

    told = padded(values).to(found.device, found.dtype)
    if told.ndim == 3 and told.shape[1] < found.shape[1]:
        told = torch.nn.functional.pad(told, (0, 0, 0, found.shape[1] - told.shape[1]))
    return told[:, : found.shape[1]] if told.ndim == 3 else told
