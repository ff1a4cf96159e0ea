"""writer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergesearch.evaluators.text.text_items import TextItems

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Written:
    """What a model wrote after one prompt.

    Attributes:
        text: The text, up to the first stop string.
        tokens: Tokens that it took, without the one that ends a sequence.
    """

    text: str
    tokens: int


class Writer(Protocol):
    """Continues prompts."""

    def write(self, model: Any, items: TextItems) -> list[Written]:
        """What the model writes after each item's prompt."""


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of some strings."""
    places = [place for place in (text.find(one) for one in until) if place >= 0]
    return text[: min(places, default=len(text))]
