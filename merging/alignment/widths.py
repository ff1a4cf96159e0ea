"""Widths that the configuration of a model can say, and the groups of units that each speaks of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch.merging.alignment.groups import Groups
from mergesearch.merging.errors import RecipeError, did_you_mean

#: Type of a model -> end of a tensor's name -> the entry that gives the number of its outputs. A
#: ``#`` stands for the number of a stage, which is the place in a list of the configuration.
WHOLE: Mapping[str, Mapping[str, str]] = {
    "resnet": {"embedder.": "embedding_size", "encoder.stages.#.": "hidden_sizes.#"},
}
#: Keys that give the number of hidden units of feed-forward layers.
HIDDEN = ("intermediate_size", "ffn_dim", "d_ff")
#: Tensors of a feed-forward layer at most: two matrices and a gate, and biases of two.
MOST_MEMBERS = 5


@dataclass(frozen=True)
class Width:
    """One width that may be chosen by itself.

    Attributes:
        name: What recipes and studies call it: an entry of the configuration.
        entries: All entries that go with it: ``key``, or ``key.place`` within a list.
        sizes: Group of units -> number of its units.
    """

    name: str
    entries: tuple[str, ...]
    sizes: Mapping[int, int]

    def apart(self, fraction: float) -> dict[int, int]:
        """Group -> number of its units that are kept apart.

        Groups that are a part of the width (the narrow layers of a bottleneck) keep their share.
        """
        least = min(self.sizes.values())
        count = round(fraction * least)
        return {index: count * size // least for index, size in self.sizes.items()}


def widths_of(groups: Groups, config: Mapping[str, Any]) -> tuple[Width, ...]:
    """The widths of a model that can be chosen, in the order of their names.

    Raises:
        RecipeError: If no configuration could say a new width.
    """
    found: list[tuple[set[str], set[int]]] = []
    for index in groups.order:
        entries = _entries(groups, index, config)
        if not entries:
            continue
        joined = (entries, {index})
        for other in [each for each in found if each[0] & joined[0]]:
            found.remove(other)
            joined = (joined[0] | other[0], joined[1] | other[1])
        found.append(joined)
    if not found:
        raise RecipeError(
            "align: pleas: expected a model whose configuration gives the number of hidden "
            f"units ({', '.join(HIDDEN)}) or a ResNet, received {config.get('model_type')}; "
            "use weight_matching"
        )
    widths = [_width(groups, *each) for each in found]
    return tuple(sorted(widths, key=lambda width: width.name))


def chosen_fractions(
    widths: Sequence[Width], fraction: float | Mapping[str, float]
) -> dict[str, float]:
    """Name of a width -> the share of its units that are kept apart.

    Raises:
        RecipeError: If a width is named that the model does not have; those that are not named
            stay as they are.
    """
    names = [width.name for width in widths]
    if not isinstance(fraction, Mapping):
        return dict.fromkeys(names, fraction)
    odd = next((name for name in fraction if name not in names), None)
    if odd is not None:
        raise RecipeError(
            f"align: fraction: expected names of widths, received {odd!r}; "
            f"{did_you_mean(odd, names)}"
        )
    return {name: fraction.get(name, 0.0) for name in names}


def widened_config(config: Mapping[str, Any], added: Mapping[str, int]) -> dict[str, Any]:
    """A configuration with wider layers.

    Args:
        config: Of the model.
        added: Entry -> how much wider.
    """
    new = dict(config)
    for entry, more in added.items():
        key, _, place = entry.partition(".")
        if place:
            new[key] = [*new[key]]
            new[key][int(place)] += more
        else:
            new[key] += more
    return new


def _width(groups: Groups, entries: Iterable[str], indices: Iterable[int]) -> Width:
    ordered = tuple(sorted(entries))
    sizes = {index: groups.groups[index].size for index in sorted(indices)}
    return Width(ordered[-1], ordered, sizes)


def _entries(groups: Groups, index: int, config: Mapping[str, Any]) -> set[str]:
    """Entries of the configuration that give the size of a group; none where nothing says it."""
    group = groups.groups[index]
    if group.outer or any(index in other.outer for other in groups.groups):
        return set()
    members = groups.members(index)
    parts = WHOLE.get(str(config.get("model_type")))
    if parts is not None:
        outputs = [name for name, place in members if place == 0]
        return {entry for name in outputs for entry in _named(name, parts)}
    if len(members) > MOST_MEMBERS:
        return set()
    return {key for key in HIDDEN if config.get(key) == group.size}


def _named(name: str, parts: Mapping[str, str]) -> list[str]:
    """Entries that a tensor's name points to."""
    found = []
    for part, entry in parts.items():
        before, stage, _ = part.partition("#")
        at = name.find(before)
        if at < 0:
            continue
        number = name[at + len(before) :].split(".")[0]
        found.append(entry.replace("#", number) if stage else entry)
    return found
