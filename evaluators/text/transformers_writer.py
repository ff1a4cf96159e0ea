"""Greedy generation by the resident model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.text.stop_strings import (
    Criterion,
    device_criterion,
    holds_stop,
    host_criterion,
    stopped_length,
)
from mergesearch.evaluators.text.text_items import TextItems, longest
from mergesearch.evaluators.text.writer import Written, cut
from mergesearch.evaluators.transfer import to_device
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Decoded(Written):
    """A text, and whether a stop string ended it."""

    stopped: bool


class TransformersWriter:
    """Continues prompts with the resident model.

    Args:
        tokenizer: Tokenizer of the prompts.
        max_new_tokens: New tokens at most.
        until: Strings that end a text.
        where: Key of the study file, for messages.
    """

    def __init__(
        self, tokenizer: Any, max_new_tokens: int, until: Sequence[str], where: str
    ) -> None:
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._until = until
        self._where = where

    def write(self, model: Any, items: TextItems) -> Sequence[Written]:
        """Continue the prompt of each item.

        Raises:
            InputError: If prompts are too long for the model.
        """
        ids, mask = self._batch(model, items)
        ends = self._ends(model)
        start = ids.shape[1]
        if not self._until:
            return self._decoded(self._continued(model, ids, mask, None), ends)
        quick = device_criterion(self._tokenizer, self._until, start)
        if quick is not None:
            texts = self._decoded(self._continued(model, ids, mask, quick), ends)
            if not any(
                stopped and not text.stopped
                for text, stopped in zip(texts, quick.stopped(), strict=True)
            ):
                return texts
        slow = host_criterion(self._tokenizer, self._until, start)
        return self._decoded(self._continued(model, ids, mask, slow), ends)

    def _continued(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, criterion: Criterion | None
    ) -> list[list[int]]:
        """New tokens of each row, fetched from the device at once."""
        import torch

        ends = self._ends(model)
        pad = self._tokenizer.pad_token_id
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                num_beams=1,
                # Checkpoints bring settings of sampling, of which generate would warn.
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad if pad is not None else min(ends, default=0),
                stopping_criteria=None if criterion is None else [criterion],
            )
        rows: list[list[int]] = written[:, ids.shape[1] :].tolist()
        return rows

    def _batch(self, model: Any, items: TextItems) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask ``(items, tokens)``, padded on the left."""
        import torch

        width = max(len(row) for row in items.tokens)
        room = longest(model)
        if room is not None and width + self._max_new_tokens > room:
            index = max(range(len(items.tokens)), key=lambda n: len(items.tokens[n]))
            raise InputError(
                f"{self._where}.max_new_tokens: expected prompts and predictions of at most {room} "
                f"tokens, received a prompt of {width} (item {items.ids[index]!r}) and "
                f"{self._max_new_tokens} more; shorten one"
            )
        ids = torch.full((len(items.tokens), width), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(items.tokens):
            ids[index, width - len(row) :] = row
            mask[index, width - len(row) :] = 1
        device = next(model.parameters()).device
        return to_device(ids, device), to_device(mask, device)

    def _ends(self, model: Any) -> set[int]:
        """Tokens that end a sequence according to the model or the tokenizer."""
        own = model.generation_config.eos_token_id
        ends = set(own) if isinstance(own, list | tuple) else {own}
        return {int(token) for token in ends | {self._tokenizer.eos_token_id} if token is not None}

    def _decoded(self, rows: list[list[int]], ends: set[int]) -> list[_Decoded]:
        """Decode the new tokens of a batch."""
        kept = [row[: self._length(row, ends)] for row in rows]
        texts = self._tokenizer.batch_decode(kept, skip_special_tokens=True)
        return [self._cut(row, text) for row, text in zip(kept, texts, strict=True)]

    def _cut(self, row: list[int], text: str) -> _Decoded:
        """A text up to its first stop string, and the tokens that were needed to write that."""
        stopped = holds_stop(text, self._until)
        count = stopped_length(self._tokenizer, row, self._until) if stopped else len(row)
        return _Decoded(cut(text, self._until), self._length(row[:count], set()), stopped)

    def _length(self, row: list[int], ends: set[int]) -> int:
        """Number of tokens before the one that ends a sequence, and before padding."""
        stop = next((index for index, token in enumerate(row) if token in ends), len(row))
        while stop and row[stop - 1] == self._tokenizer.pad_token_id:
            stop -= 1
        return stop
