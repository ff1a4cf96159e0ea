"""Items that are texts, and their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.by_item import domain_names
from mergesearch.evaluators.data.identities import text_identity
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class TextItems:
    """Prompts of a split in memory.

    Attributes:
        prompts: Text of each item, as the data has it.
        targets: Expected text of each item, or None.
        tokens: Token ids ``(tokens,)`` that the model reads of each item.
        ids: Id of each item.
        domains: Domain of each item ``(items,)``.
    """

    prompts: list[str]
    targets: list[str | None]
    tokens: list[torch.Tensor]
    ids: list[str]
    domains: npt.NDArray[np.str_]

    def rows(self, indices: npt.NDArray[np.intp] | slice) -> TextItems:
        """The items at some indices."""
        numbers = np.arange(len(self.domains))[indices].tolist()
        return TextItems(
            [self.prompts[n] for n in numbers],
            [self.targets[n] for n in numbers],
            [self.tokens[n] for n in numbers],
            [self.ids[n] for n in numbers],
            self.domains[numbers],
        )


def read_prompts(columns: Mapping[str, Any], tokens: list[torch.Tensor]) -> TextItems:
    """Make items from columns by role, and from the tokens ``(tokens,)`` of each."""
    prompts = columns["prompt"]
    ids = columns.get("id")
    return TextItems(
        prompts,
        columns.get("target") or [None] * len(prompts),
        tokens,
        [text_identity(text) for text in prompts] if ids is None else [str(one) for one in ids],
        domain_names(columns.get("domain"), len(prompts)),
    )


def first_token(tokenizer: Any, where: str) -> int:
    """The token that stands before a text: the tokenizer's bos, else its eos.

    Raises:
        InputError: If it has neither.
    """
    for number in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if number is not None:
            return int(number)
    raise InputError(
        f"{where}: expected a tokenizer with a bos or eos token, received one with neither"
    )


def longest(model: Any) -> int | None:
    """Number of positions that the model has, if its configuration states it."""
    config = (
        model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    )
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else int(positions)


def required_tokenizer(path: str | None, where: str) -> str:
    """The path of the tokenizer, which is required.

    Raises:
        InputError: If it is None.
    """
    if path is None:
        raise InputError(
            f"{where}.tokenizer: required key is missing: a study without a base has none"
        )
    return path
