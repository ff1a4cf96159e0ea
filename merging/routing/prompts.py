"""Which tokens of texts decide how these are merged: those of their prompts, and no padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mergesearch.merging.errors import InputError

IDS = "input_ids"
#: What is no padding.
MASK = "attention_mask"
#: What belongs to a prompt; by default all that is no padding.
PROMPT = "prompt_mask"


def prompts_alone(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The part of a batch that decides how its items are merged.

    Of texts it is their prompts, padded on the right whatever the side they came padded on, so
    that what follows a prompt (an answer that is scored) cannot take part. Other inputs, such as
    the images of a prompt, decide as they are.

    Args:
        inputs: Arguments of a model; of texts :data:`IDS` ``(items, tokens)``, with or without
            :data:`MASK` and :data:`PROMPT` of the same shape, which are 1 where a token counts.
            What else has that shape goes with the tokens.

    Raises:
        InputError: If a mask has another shape, or an item has no prompt.
    """
    if IDS not in inputs:
        return inputs
    ids = inputs[IDS]
    real = torch.ones_like(ids, dtype=torch.bool)
    for name in (MASK, PROMPT):
        if name in inputs:
            real &= _checked(name, inputs[name], ids).bool()
    counts = real.sum(dim=1)
    if not bool(counts.all()):
        row = int((counts == 0).nonzero()[0])
        raise InputError(
            f"{PROMPT}: expected at least one token of a prompt for every item, received none for "
            f"item {row}; a merge for each input decides by prompts"
        )
    width = int(counts.max())
    order = real.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    mask = real.gather(1, order)
    others = {
        name: given.gather(1, order.to(given.device)) if given.shape == ids.shape else given
        for name, given in inputs.items()
        if name not in (IDS, MASK, PROMPT)
    }
    return {IDS: ids.gather(1, order).where(mask, 0), MASK: mask.to(torch.int64), **others}


def prompt_means(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each prompt ``(items,)``.

    Args:
        values: One for every token that counts ``(n,)``, item after item.
        mask: Where these are ``(items, tokens)``.
    """
    owner = mask.nonzero()[:, 0].to(values.device)
    sums = values.new_zeros(len(mask)).index_add(0, owner, values)
    return sums / mask.sum(dim=1).to(values.device)


def _checked(name: str, mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if mask.shape != ids.shape:
        raise InputError(
            f"{name}: expected the shape of {IDS}, {tuple(ids.shape)}, received {tuple(mask.shape)}"
        )
    return mask.to(ids.device)
