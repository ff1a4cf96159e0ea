"""The base of evaluators of items that need a tokenizer: to read them, or to write answers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergesearch.evaluators.by_item import ByItem
from mergesearch.evaluators.text.text_items import required_tokenizer
from mergesearch.evaluators.text.tokenizers import (
    check_tokenizer,
    load_tokenizer,
    parent_warnings,
)


class Tokenized(ByItem):
    """Knows the tokenizer; subclasses load it in their check.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        **by_item: Arguments of :class:`ByItem`.
    """

    deterministic = True

    def __init__(self, tokenizer: str | None, **by_item: Any) -> None:
        super().__init__(**by_item)
        self._tokenizer = tokenizer

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Warnings about tokenizers that differ among base and experts."""
        return parent_warnings(sources, templates=False)

    def _check_tokenizer(self, *, template: bool = False) -> bool:
        """Check the tokenizer, without loading it if its files say enough.

        Args:
            template: Whether a chat template is asked about.

        Returns:
            Whether it has one.

        Raises:
            InputError: If there is no tokenizer.
        """
        return check_tokenizer(
            required_tokenizer(self._tokenizer, self._where),
            f"{self._where}.tokenizer",
            template=template,
        )

    def _loaded(self) -> Any:
        """The tokenizer."""
        return load_tokenizer(
            required_tokenizer(self._tokenizer, self._where), f"{self._where}.tokenizer"
        )
