"""Embeddings of texts by an encoder, and the base of evaluators that compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mergesearch.evaluators.by_item import wide
from mergesearch.evaluators.model_items import ModelItems, run_model
from mergesearch.evaluators.text.encoding import encoded

if TYPE_CHECKING:
    import torch

Pooling = Literal["mean", "first", "last"]


def embeddings(model: Any, items: ModelItems, pooling: Pooling) -> torch.Tensor:
    """Embeddings of length 1 ``(items, width)``.

    Args:
        model: An encoder with ``last_hidden_state``.
        items: Token ids.
        pooling: Mean of the tokens, or the ``first`` or ``last`` of them.
    """
    import torch

    output, batch = run_model(model, items)
    states = wide(output.last_hidden_state)
    mask = batch.get("attention_mask")
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
    mask = mask.to(states.device)
    if pooling == "first":
        pooled = states[:, 0]
    elif pooling == "last":
        rows = torch.arange(len(states), device=states.device)
        pooled = states[rows, mask.sum(dim=1) - 1]
    else:
        counted = mask[..., None].to(states.dtype)
        pooled = (states * counted).sum(dim=1) / counted.sum(dim=1)
    unit: torch.Tensor = pooled / pooled.norm(dim=1, keepdim=True)
    return unit


def text_inputs(
    tokenizer: Any, texts: Sequence[str], prefix: str, max_length: int | None
) -> Mapping[str, list[torch.Tensor]]:
    """Inputs of the encoder for texts, each with the same words before it."""
    return encoded(tokenizer, [f"{prefix}{text}" for text in texts], max_length=max_length)[0]
