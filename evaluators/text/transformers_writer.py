"""Greedy generation by the resident model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.text.text_items import TextItems, longest
from mergesearch.evaluators.text.writer import Written, cut
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch


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

    def write(self, model: Any, items: TextItems) -> list[Written]:
        """Continue the prompt of each item.

        Raises:
            InputError: If prompts are too long for the model.
        """
        import torch

        ids, mask = self._batch(model, items)
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
                stopping_criteria=[self._stopped(ids.shape[1])] if self._until else None,
            )
        return [self._written(row, ends) for row in written[:, ids.shape[1] :].tolist()]

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
        return ids.to(device), mask.to(device)

    def _ends(self, model: Any) -> set[int]:
        """Tokens that end a sequence according to the model or the tokenizer."""
        own = model.generation_config.eos_token_id
        ends = set(own) if isinstance(own, list | tuple) else {own}
        return {int(token) for token in ends | {self._tokenizer.eos_token_id} if token is not None}

    def _stopped(self, start: int) -> Callable[..., torch.Tensor]:
        """Make a criterion that stops rows whose new tokens hold a stop string."""
        import torch

        # Every token is at least one byte; a stop string may begin within one more.
        reach = 1 + max(len(text.encode()) for text in self._until)

        def stopped(ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
            tails = self._tokenizer.batch_decode(
                ids[:, max(start, ids.shape[1] - reach) :], skip_special_tokens=True
            )
            return torch.tensor(
                [any(u in tail for u in self._until) for tail in tails], device=ids.device
            )

        return stopped

    def _written(self, row: list[int], ends: set[int]) -> Written:
        """Decode one row of new tokens."""
        stop = next((index for index, token in enumerate(row) if token in ends), len(row))
        while stop and row[stop - 1] == self._tokenizer.pad_token_id:
            stop -= 1
        text = self._tokenizer.decode(row[:stop], skip_special_tokens=True)
        return Written(cut(text, self._until), stop)
