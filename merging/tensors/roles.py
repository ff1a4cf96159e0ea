"""From tensor names to their roles in a model: tower, block, module.

:func:`roles_of` reads the names of a whole model: towers and blocks are found from how names are
nested (:mod:`mergesearch.merging.tensors.block_lists`), modules from patterns of known families
(:mod:`mergesearch.merging.tensors.role_patterns`), else from words
(:mod:`mergesearch.merging.tensors.role_words`). :func:`classify` reads one name by itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from mergesearch.merging.tensors.block_lists import BlockPlace, block_places
from mergesearch.merging.tensors.role_patterns import (
    PREFIX,
    CompiledPattern,
    ModelPart,
    Module,
    block_patterns,
    outside_patterns,
)
from mergesearch.merging.tensors.role_words import role_in_block, role_outside, words_of
from mergesearch.merging.tensors.towers import tower_labels, tower_of_prefix, word_of_tower

__all__ = [
    "ModelPart",
    "Module",
    "TensorRole",
    "block_axes",
    "block_names",
    "classify",
    "depth_in",
    "roles_of",
]


@dataclass(frozen=True)
class TensorRole:
    """Where a tensor sits in its model.

    Attributes:
        block: Number of the residual block, or None outside the blocks: as written in the name, or
            counted along the axis where blocks are in stages.
        module: What it is.
        tower: Label of the tower, empty for the main one. Each has its own depth axis.
        part: Where it acts.
        written: How the name counts the block where that is not ``block``: ``0.1`` for the second
            block of the first stage.
    """

    block: int | None
    module: Module
    tower: str
    part: ModelPart
    written: str = ""

    @property
    def block_name(self) -> str:
        """The block as tables show it, empty outside the blocks."""
        return self.written or ("" if self.block is None else str(self.block))


NO_ROLE = TensorRole(None, "other", "", "other")

#: Any other numbered block.
GENERAL_BLOCK = r"(?:layers|blocks|h|layer|block|resblocks)\.(?P<block>\d+)\."


@cache
def _general_block() -> re.Pattern[str]:
    return re.compile(PREFIX + GENERAL_BLOCK)


@lru_cache(maxsize=65536)
def classify(name: str) -> TensorRole:
    """Read the role of a tensor from its name alone.

    Its block is the first ``layers.N.`` (or ``blocks``, ``h``, ``layer``, ``block``,
    ``resblocks``) after a prefix of words. :func:`roles_of` knows more: stages, other lists of
    blocks, and towers that share their words.
    """
    found = _matched(name, block_patterns()) or _matched(name, outside_patterns())
    if found is not None:
        match, module, part = found
        number = match.groupdict().get("block")
        tower = word_of_tower(match["prefix"].split("."))
        return TensorRole(None if number is None else int(number), module, tower, part)
    inside = _general_block().match(name)
    if inside is None:
        module, part = role_outside(words_of(name))
        return TensorRole(None, module, word_of_tower(name.split(".")), part)
    module, part = role_in_block(words_of(name[inside.end() :]))
    tower = word_of_tower(inside["prefix"].split("."))
    return TensorRole(int(inside["block"]), module, tower, part)


def roles_of(names: Iterable[str]) -> Mapping[str, TensorRole]:
    """Name -> role, for the tensors of a model.

    Args:
        names: All tensors of the model. With fewer of them, towers and stages may not show.
    """
    return _roles_of(tuple(names))


@lru_cache(maxsize=16)
def _roles_of(names: tuple[str, ...]) -> Mapping[str, TensorRole]:
    places = block_places(names)
    axes = {place.axis: None for place in places.values()}
    labels = tower_labels(list(axes))
    roles: dict[str, TensorRole] = {}
    unsure: list[str] = []
    for name in names:
        place = places.get(name)
        if place is None:
            module, part = _outside(name)
            roles[name] = TensorRole(None, module, tower_of_prefix(name, labels), part)
            continue
        module, part, sure = _inside(place)
        roles[name] = TensorRole(place.number, module, labels[place.axis], part, place.written)
        if not sure:
            unsure.append(name)
    return roles | _settled(roles, unsure)


def _matched(
    name: str, patterns: Sequence[CompiledPattern]
) -> tuple[re.Match[str], Module, ModelPart] | None:
    for pattern, module, part in patterns:
        match = pattern.match(name)
        if match:
            return match, module, part
    return None


def _outside(name: str) -> tuple[Module, ModelPart]:
    found = _matched(name, outside_patterns())
    return role_outside(words_of(name)) if found is None else found[1:]


def _inside(place: BlockPlace) -> tuple[Module, ModelPart, bool]:
    """What a tensor of a block is, where it acts, and whether its name alone says so."""
    found = _matched(place.canonical, block_patterns())
    if found is not None:
        return (*found[1:], True)
    rest = place.canonical.split(".", 2)[2]
    module, part = role_in_block(words_of(rest), [word.lower() for word in place.words])
    return module, part, module not in ("norm", "modulation")


def _settled(roles: Mapping[str, TensorRole], unsure: Sequence[str]) -> dict[str, TensorRole]:
    """Parts of norms and the like, corrected by what stands beside them.

    A norm of a part that its block does not have, or of none that its name tells, belongs to the
    commonest part of the nearest module that holds both.
    """
    if not unsure:
        return {}
    near: dict[str, Counter[ModelPart]] = {}
    doubtful = set(unsure)
    for name, role in roles.items():
        if role.block is not None and name not in doubtful and role.part != "other":
            for prefix in _prefixes(name):
                near.setdefault(prefix, Counter())[role.part] += 1
    settled: dict[str, TensorRole] = {}
    for name in unsure:
        role = roles[name]
        around = next((near[prefix] for prefix in _prefixes(name) if prefix in near), None)
        if around and (role.part == "other" or role.part not in around):
            part = max(around, key=lambda one: (around[one], one))
            settled[name] = replace(role, part=part)
    return settled


def _prefixes(name: str) -> Iterator[str]:
    """The modules that hold a tensor, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def block_axes(roles: Iterable[TensorRole]) -> dict[str, tuple[int, ...]]:
    """Tower -> its block numbers in increasing order.

    Numbers may have gaps: depth counts the blocks that are present.
    """
    axes: dict[str, set[int]] = {}
    for role in roles:
        if role.block is not None:
            axes.setdefault(role.tower, set()).add(role.block)
    return {tower: tuple(sorted(blocks)) for tower, blocks in sorted(axes.items())}


def block_names(roles: Iterable[TensorRole]) -> dict[tuple[str, int], str]:
    """Tower and block number -> the block as tables show it."""
    return {(r.tower, r.block): r.block_name for r in roles if r.block is not None}


def depth_in(role: TensorRole, axes: Mapping[str, tuple[int, ...]]) -> float | None:
    """Depth of a tensor: 0 in the first block of its tower, 1 in the last, None outside.

    ``axes`` are those of :func:`block_axes`.
    """
    if role.block is None:
        return None
    axis = axes[role.tower]
    return axis.index(role.block) / max(len(axis) - 1, 1)
