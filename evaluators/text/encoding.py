"""Token ids of texts and pairs of texts, as encoders and classifiers read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.model_items import ModelItems

if TYPE_CHECKING:
    import torch

#: What the names of the second texts' inputs begin with.
SECOND = "second "
#: Lengths that stand for "no limit" in the settings of tokenizers.
UNLIMITED = 1_000_000


def encoded(
    tokenizer: Any,
    texts: Sequence[Any],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int | None = None,
    words: bool = False,
) -> tuple[dict[str, list[torch.Tensor]], Any]:
    """Inputs of a model, and the tokenizer's own result.

    Args:
        tokenizer: Of ``transformers``.
        texts: Texts, or lists of words.
        pairs: Second text of each item, or None.
        max_length: Tokens of an item at most; by default as many as the tokenizer says.
        words: Whether texts are lists of words.

    Returns:
        Argument of the model -> tensor ``(tokens,)`` of each item; masks are added in batches.
    """
    import torch

    limit = max_length or min(tokenizer.model_max_length, UNLIMITED)
    found = tokenizer(
        list(texts),
        None if pairs is None else list(pairs),
        truncation=limit < UNLIMITED,
        max_length=limit if limit < UNLIMITED else None,
        is_split_into_words=words,
        verbose=False,
    )
    inputs: Mapping[str, Any] = {
        name: [torch.tensor(row, dtype=torch.int64) for row in rows]
        for name, rows in found.items()
        if name != "attention_mask"
    }
    return dict(inputs), found


def paired(
    first: Mapping[str, list[torch.Tensor]],
    second: Mapping[str, list[torch.Tensor]],
    domains: npt.NDArray[np.str_],
) -> ModelItems:
    """Items of two texts, of which the model reads the first; see :func:`second_texts`.

    Args:
        first, second: Argument of the model -> tensor ``(tokens,)`` of each text.
        domains: Domain of each item ``(items,)``.
    """
    return ModelItems(first, domains, {f"{SECOND}{name}": rows for name, rows in second.items()})


def second_texts(items: ModelItems) -> ModelItems:
    """The second texts of such items, for the model to read."""
    inputs = {
        name.removeprefix(SECOND): rows
        for name, rows in items.extra.items()
        if name.startswith(SECOND)
    }
    return ModelItems(inputs, items.domains, {})
