"""Labels of the towers of a model: the vision encoder, the language model, a mask decoder.

A tower is an axis of numbered blocks (:mod:`mergesearch.merging.tensors.block_lists`). Its label
is a usual word where one is in its path, else the word that tells it from the other towers. The
main tower, such as the encoder of an encoder and decoder, has the empty label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mergesearch.merging.tensors.block_lists import Path

#: Words of a path that name a tower in all models. An encoder is the main tower of its model.
TOWERS: Mapping[str, str] = {
    "vision_model": "vision",
    "vision_tower": "vision",
    "visual": "vision",
    "text_model": "text",
    "language_model": "text",
    "decoder": "decoder",
}

#: Words that say nothing about which tower it is.
_GENERAL = frozenset({"", "encoder", "model", "transformer", "module", "layers", "base_model"})
_SUFFIX = re.compile(r"_(?:model|tower|backbone|encoder)$")


def word_of_tower(words: Sequence[str]) -> str:
    """The usual label for a path, empty where no word of it names a tower."""
    return next((TOWERS[word] for word in words if word in TOWERS), "")


def tower_labels(axes: Sequence[Path]) -> dict[Path, str]:
    """Axis -> label; no two are the same."""
    usual = {axis: word_of_tower(axis) for axis in axes}
    labels: dict[Path, str] = {}
    for axis in axes:
        rivals = [other for other in axes if other != axis and usual[other] == usual[axis]]
        # A main tower among others of usual names is told from these.
        others = rivals or [other for other in axes if other != axis and not usual[axis]]
        word = _own_word(axis, others)
        general = not others or word in _GENERAL
        label = usual[axis] if general else _joined(usual[axis], word)
        if label in labels.values():
            label = next(name for name in _longer(axis, label) if name not in labels.values())
        labels[axis] = label
    return labels


def tower_of_prefix(name: str, labels: Mapping[Path, str]) -> str:
    """The tower that a tensor outside the blocks belongs to.

    It is the only one under the longest prefix that it shares with any, or the one that this
    prefix names; otherwise it belongs to none, as to a main tower.
    """
    if not labels:
        return word_of_tower(name.split("."))
    words = tuple(name.split("."))[:-1]
    for length in range(len(words), 0, -1):
        under = [label for axis, label in labels.items() if axis[:length] == words[:length]]
        if under:
            named = word_of_tower(words[:length])
            return under[0] if len(under) == 1 else named if named in under else ""
    return ""


def _own_word(axis: Path, others: Sequence[Path]) -> str:
    """The first word at which an axis differs from all others, empty if there is none."""
    for index, word in enumerate(axis):
        if all(other[: index + 1] != axis[: index + 1] for other in others):
            return word
    return ""


def _joined(label: str, word: str) -> str:
    plain = _SUFFIX.sub("", word)
    return f"{label}_{plain}" if label else plain


def _longer(axis: Path, label: str) -> list[str]:
    """Labels to fall back to where a shorter one is taken."""
    words = [word for word in axis if word not in _GENERAL] or ["blocks"]
    dotted = ".".join(axis) or "blocks"
    return [words[-1], "_".join(words), dotted, *(f"{dotted} {n}" for n in range(2, 99))]
