"""Distance of a model's answers from those of each domain's expert, on items without labels.

Zhang 2025, "Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided
Layer Chunking" (arXiv 2509.25712): T² times the cross-entropy between the expert's and the model's
answers at temperature T, plus a weight times the mean over chosen layers of the mean squared
difference of hidden states. Values here are the divergence KL(expert || model) instead of the
cross-entropy: the two differ by the expert's entropy, which no coefficient moves, so the gradients
are the same, and 0 means that nothing is left to align.

Experts run once on the items of their domains, one after the other; their answers are kept, the
experts are not.
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
        layers: Indices of the hidden states to compare, of which 0 is the embeddings; without any,
            answers alone are compared.
        **by_item: Arguments of :class:`ByItem`.
    """

    deterministic = True
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
        """Check as every evaluator of items, and refuse domains without an expert.

        Raises:
            InputError: In one line.
        """
        super().check()
        if self._columns["domain"] is None and len(self._teachers) > 1:
            raise InputError(
                f"{self._where}.domain: required key is missing: {len(self._teachers)} experts "
                "need a column that says whose an item is; or name one of them in teachers"
            )
        lacking = sorted((self._domains or {""}) - set(self._teachers))
        if lacking:
            raise InputError(
                f"{self._where}.teachers: expected an expert for every domain, received none "
                f"for {lacking[0]!r}; experts: {sorted(self._teachers)}"
            )
        for domain in sorted(self._domains):
            open_checkpoint(self._teachers[domain], f"{self._where}.teachers.{domain}")

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        return read_items(columns, self._where)

    def _items_of(self, split: Split) -> ModelItems:
        """The items with the experts' answers, which are computed when a split is first used."""
        if split not in self._taught:
            self._taught[split] = self._teach(self._items[split])
        return self._taught[split]

    def _teach(self, items: ModelItems) -> ModelItems:
        """Run every domain's expert on its items, and add its answers to them."""
        import torch

        from mergesearch.merging.models.loading import load_model

        answers: dict[str, list[Any]] = {
            name: [None] * len(items.domains) for name in self._outputs
        }
        for domain in np.unique(items.domains).tolist():
            indices = np.flatnonzero(items.domains == domain)
            assert self.model_class is not None
            teacher = load_model(self._teachers[domain], self.model_class)
            if self._device is not None:
                teacher = teacher.to(self._device)
            with torch.inference_mode():
                for start in range(0, len(indices), self._batch_size):
                    part = indices[start : start + self._batch_size]
                    self._record(teacher, items.rows(part), part, answers)
        stacked = {name: _stacked(rows) for name, rows in answers.items()}
        return replace(items, extra=stacked)

    @property
    def _outputs(self) -> list[str]:
        """Names of the outputs that are compared."""
        return ["logits", *(f"layer {layer}" for layer in self._layers)]

    def _record(
        self, teacher: Any, items: ModelItems, indices: Any, answers: dict[str, list[Any]]
    ) -> None:
        """Put an expert's outputs for a batch into ``answers``, at the indices of its items."""
        outputs, batch = self._run(teacher, items)
        for name, values in zip(self._outputs, outputs, strict=True):
            lengths = (
                token_mask(batch, values[..., 0]).sum(dim=1).long().tolist()
                if values.ndim == 3
                else None
            )
            for row, index in enumerate(indices.tolist()):
                one = (
                    values[row]
                    if lengths is None
                    else _unpadded(values[row], batch, row, lengths[row])
                )
                answers[name][index] = one.clone()

    def _run(
        self, model: Any, items: ModelItems
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Run a model on a batch.

        Returns:
            Logits and the hidden states of the chosen layers, and the arguments of the model.
        """
        output, batch = run_model(
            model, items, **({"output_hidden_states": True} if self._layers else {})
        )
        hidden = output.hidden_states if self._layers else ()
        for layer in self._layers:
            if not -len(hidden) <= layer < len(hidden):
                raise InputError(
                    f"{self._where}.layers: expected indices among {len(hidden)} hidden states, "
                    f"received {layer}"
                )
        return [wide(output.logits), *(wide(hidden[layer]) for layer in self._layers)], batch

    def evaluate(self, candidate: Any, split: Split, items: ItemSubset = None) -> Any:
        """Measure as every evaluator of items; the experts run on the model's device."""
        self._device = next(candidate.model.parameters()).device
        return super().evaluate(candidate, split, items)

    def backward(self, candidate: Any, batch: Any, weights: Mapping[str, float]) -> Any:
        """Run backwards as every evaluator of items; the experts run on the model's device."""
        self._device = next(candidate.model.parameters()).device
        return super().backward(candidate, batch, weights)

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        (answers, *states), batch = self._run(model, items)
        taught = [
            _like(items.extra[name], output)
            for name, output in zip(self._outputs, [answers, *states], strict=True)
        ]
        log_p = (answers / self._temperature).log_softmax(dim=-1)
        log_q = (taught[0] / self._temperature).log_softmax(dim=-1)
        divergence = self._temperature**2 * (log_q.exp() * (log_q - log_p)).sum(dim=-1)
        score = item_means(divergence, batch)
        for state, expected in zip(states, taught[1:], strict=True):
            gaps = ((state - expected) ** 2).mean(dim=-1)
            # Patches and other positions that the mask does not cover all count.
            means = (
                item_means(gaps, batch)
                if gaps.ndim == 1 or _masked(gaps, batch)
                else gaps.flatten(1).mean(dim=1)
            )
            score = score + self._hidden_weight / len(states) * means
        return {"alignment": score}


def _masked(values: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> bool:
    """Whether the batch's mask covers values ``(items, tokens)``."""
    mask = batch.get("attention_mask")
    return values.ndim == 2 and mask is not None and mask.shape == values.shape


def _unpadded(
    values: torch.Tensor, batch: Mapping[str, torch.Tensor], row: int, length: int
) -> torch.Tensor:
    """The tokens ``(tokens, ...)`` of one item that count, or all where no mask covers them."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape[1] != values.shape[0]:
        return values
    return values[:length] if bool(mask[row, :length].all()) else values


def _stacked(rows: list[Any]) -> Any:
    """One tensor of rows of one shape, else the rows."""
    import torch

    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows


def _like(values: torch.Tensor | list[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """An expert's answers, padded as the model's output is, and of its device and dtype."""
    import torch

    taught = padded(values).to(output.device, output.dtype)
    if taught.ndim == 3 and taught.shape[1] < output.shape[1]:
        taught = torch.nn.functional.pad(taught, (0, 0, 0, output.shape[1] - taught.shape[1]))
    return taught[:, : output.shape[1]] if taught.ndim == 3 else taught
