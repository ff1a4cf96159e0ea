"""The interface of engines that continue prompts, and the texts that they return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mergesearch.evaluators.text.text_items import TextItems


@dataclass(frozen=True)
class Written:
    """A text that a model wrote after one prompt.

    Attributes:
        text: The text, up to the first stop string.
        tokens: Number of its tokens, without the one that ends a sequence.
    """

    text: str
    tokens: int


class Writer(Protocol):
    """Continues prompts."""

    def write(self, model: Any, items: TextItems) -> Sequence[Written]:
        """Continue the prompt of each item."""


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of some strings."""
    stops = [stop for stop in (text.find(one) for one in until) if stop >= 0]
    return text[: min(stops, default=len(text))]
