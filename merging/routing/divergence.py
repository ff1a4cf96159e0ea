"""How far apart the predictions of two models are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mergesearch.merging.routing.prompts import IDS, MASK

#: Bytes of logits of prompts that are kept for a comparison at most, unless one prompt has more.
KEPT_LOGITS = 2**30
#: Numbers of logits that are compared at a time, in float64.
AT_ONCE = 2**23


def js_divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of the predictions of two logits, in nats.

    ``(items, classes)`` -> float64 ``(items,)``. Classes whose logits are minus infinity add 0.
    """
    rows = max(AT_ONCE // max(one.shape[1], 1), 1)
    pairs = zip(torch.split(one, rows), torch.split(other, rows), strict=True)
    return torch.cat([_js_divergence(*pair) for pair in pairs])


def _js_divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    log_p, log_q = (torch.log_softmax(logits.double(), dim=1) for logits in (one, other))
    log_mean = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    halves = [
        torch.where(log.isneginf(), 0.0, log.exp() * (log - log_mean)).sum(dim=1)
        for log in (log_p, log_q)
    ]
    # Rounding may leave the least bit below zero.
    return ((halves[0] + halves[1]) / 2).clamp_min(0.0)


def split_prompts(
    model: Any, inputs: Mapping[str, torch.Tensor]
) -> Iterator[Mapping[str, torch.Tensor]]:
    """Parts of a batch of texts whose logits can be kept, each as wide as its longest prompt.

    Args:
        model: A language model.
        inputs: Ids and mask of prompts, padded on their right, and what goes with them.
    """
    shape = inputs[IDS].shape
    count, tokens = shape
    rows = max(KEPT_LOGITS // max(2 * tokens * _logit_bytes(model), 1), 1)
    for start in range(0, count, rows):
        part = {name: tensor[start : start + rows] for name, tensor in inputs.items()}
        width = int(part[MASK].sum(dim=1).max())
        yield {
            name: tensor[:, :width] if inputs[name].shape == shape else tensor
            for name, tensor in part.items()
        }


def _logit_bytes(model: Any) -> int:
    """Bytes of the logits of a language model at one token; 0 where its head is not known."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return 0 if weight is None else len(weight) * weight.element_size()
