"""The stored model, head included, that an expert's shared part is taken from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class WholeModel:
    """The stored model that a source is the shared part of.

    Attributes:
        path: Of its checkpoint.
        names: Tensors that it has for itself: its head.
        renamed: Name of a shared tensor -> what the stored model calls it, where that is another.
    """

    path: str
    names: frozenset[str]
    renamed: Mapping[str, str] = field(default_factory=dict)

    def stored_name(self, name: str) -> str:
        """What the stored model calls a tensor."""
        return self.renamed.get(name, name)


def whole_models(sources: Iterable[object]) -> dict[str, WholeModel]:
    """Name of a source -> the model that it is a part of; none where all have one head."""
    found = {}
    for source in sources:
        whole = below(source, "whole")
        if isinstance(whole, WholeModel):
            found[str(getattr(source, "name", ""))] = whole
    return found


def below(source: object, attribute: str) -> Any:
    """An attribute of a source, or of what it passes on."""
    while source is not None:
        value = getattr(source, attribute, None)
        if value is not None:
            return value
        source = getattr(source, "origin", None)
    return None
