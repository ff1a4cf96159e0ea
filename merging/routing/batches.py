"""Batches of which parts are answered by different merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mergesearch.merging.models.task_heads import Tasks


def of_items(tasks: Tasks, chosen: torch.Tensor) -> Tasks:
    """The tasks of some items."""
    if tasks is None or isinstance(tasks, str):
        return tasks
    return [str(tasks[index]) for index in chosen.tolist()]


def together(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]], lacking: float = float("-inf")
) -> torch.Tensor:
    """Rows of all items, from indices and rows of parts, which may be narrower.

    Args:
        parts: Logits of items, or tokens.
        lacking: Stands where a row is narrower.
    """
    count = sum(len(chosen) for chosen, _ in parts)
    widest = max((part for _, part in parts), key=lambda part: part.shape[1])
    rows = widest.new_full((count, *widest.shape[1:]), lacking)
    for chosen, part in parts:
        rows[chosen, : part.shape[1]] = part
    return rows


def padding_token(model: Any, options: Mapping[str, Any]) -> int:
    """What fills up rows of generated tokens: the padding, else what ends a text.

    Args:
        model: A language model.
        options: Of its ``generate``, which come before its own settings.
    """
    settings: Any = getattr(model, "generation_config", None)
    for name in ("pad_token_id", "eos_token_id"):
        token = options.get(name)
        token = getattr(settings, name, None) if token is None else token
        if token is not None:
            return int(token[0] if isinstance(token, Sequence) else token)
    return 0
