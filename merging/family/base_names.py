"""Experts whose tensors have the base's names behind another prefix, seen with the base's names.

A model with a head stores ``bert.encoder...`` where the model without one stores ``encoder...``; a
language model inside a vision-language model has the names of its own behind ``language_model.``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.family.aligned import renamed

#: Components of a prefix at most, as in ``model.language_model.``.
_DEEPEST = 2


def with_base_names(
    sources: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[Mapping[str, str]]]:
    """Sources with the names of the first, and for each: name -> its own name, where they differ.

    Args:
        sources: Base and experts.
    """
    base = sources[0]
    views = [base]
    maps: list[Mapping[str, str]] = [{}]
    for source in sources[1:]:
        own = own_names(base.tensors, source.tensors)
        views.append(renamed(source, own) if own else source)
        maps.append(own)
    return views, maps


def own_names(base: Collection[str], expert: Collection[str]) -> dict[str, str]:
    """Names of the base -> what an expert calls these tensors; none where names line up.

    Of all pairs of prefixes it is the one under which most names are found, if those are more than
    half of the base's.
    """
    known = {*expert}
    if 2 * len(known & {*base}) >= len(base):
        return {}
    pairs = [
        (ours, theirs) for ours in _prefixes(base, 1) for theirs in _prefixes(expert, _DEEPEST)
    ]
    found = [_matches(base, known, *pair) for pair in pairs]
    best = max(found, key=len, default={})
    return best if 2 * len(best) > len(base) else {}


def _matches(
    base: Collection[str], expert: Collection[str], ours: str, theirs: str
) -> dict[str, str]:
    pairs = {n: theirs + n.removeprefix(ours) for n in base if n.startswith(ours)}
    return {n: own for n, own in pairs.items() if own in expert and n not in expert}


def _prefixes(names: Collection[str], depth: int) -> list[str]:
    """Beginnings of names of so many components at most, the empty one among them, sorted."""
    found = {""}
    for name in names:
        parts = name.split(".")
        for count in range(1, min(depth, len(parts) - 1) + 1):
            found.add(".".join(parts[:count]) + ".")
    return sorted(found)
