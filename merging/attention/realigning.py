"""Experts seen with their heads in the base's coordinates, tensor by tensor when asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mergesearch.merging.attention.fitted_maps import Sides, fitted_map
from mergesearch.merging.attention.head_maps import (
    SIDES,
    Freedom,
    Maps,
    Matrix,
    Pair,
    freedoms,
    mapped,
    names_of,
    side_heads,
)
from mergesearch.merging.attention.heads import Attention, HeadMatrix, Shapes, find_attentions

if TYPE_CHECKING:
    import torch

#: Name -> the stored tensor.
Read = Callable[[str], "torch.Tensor"]
#: Attentions whose maps are kept; neighbours in the order of names share them.
KEPT = 4


@dataclass(frozen=True)
class MappedHeads:
    """Attentions of a model, and the map of each of their heads.

    Attributes:
        attentions: Attentions with the pairs that are mapped.
        maps: Number of an attention -> its maps.
    """

    attentions: Sequence[tuple[Attention, tuple[Freedom, ...]]]
    maps: Callable[[int], Maps]
    _places: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for place, (attention, free) in enumerate(self.attentions):
            for name in names_of(attention, [one.pair for one in free]):
                self._places[name] = place

    @property
    def names(self) -> tuple[str, ...]:
        """Stored tensors that the maps change."""
        return tuple(self._places)

    def apply(self, name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
        """A stored tensor with the maps applied, rounded once to ``dtype``."""
        import torch

        place = self._places[name]
        attention = self.attentions[place][0]
        result = mapped(_numbers(tensor), name, attention, self.maps(place))
        return torch.from_numpy(result).to(getattr(torch, dtype))


def mappable(
    shapes: Shapes, config: Mapping[str, Any]
) -> list[tuple[Attention, tuple[Freedom, ...]]]:
    """Attentions of a model with the pairs whose features may be mapped."""
    found = [(one, freedoms(one, shapes, config)) for one in find_attentions(shapes, config)]
    return [(attention, free) for attention, free in found if free]


def realigned(
    base: Read, expert: Read, attentions: Sequence[tuple[Attention, tuple[Freedom, ...]]]
) -> MappedHeads:
    """Heads of an expert mapped to where they are nearest to the base's.

    Args:
        base: Reads the base.
        expert: Reads the expert.
        attentions: Those that both have.
    """

    @lru_cache(maxsize=KEPT)
    def maps(place: int) -> Maps:
        attention, free = attentions[place]
        return {
            one.pair: np.stack([fitted_map(sides, one) for sides in _sides(attention, one.pair)])
            for one in free
        }

    def _sides(attention: Attention, pair: Pair) -> Iterator[Sides]:
        return sides_of(base, expert, attention, pair)

    return MappedHeads(attentions, maps)


def recovered(
    base: Read, expert: Read, attentions: Sequence[tuple[Attention, tuple[Freedom, ...]]]
) -> float:
    """Share of the distance between heads of an expert and the base's that re-alignment removes.

    Distances are relative to the base's sides, as in :mod:`.fitted_maps`, eq. 1; NaN where there is
    none.
    """
    before = 0.0
    after = 0.0
    for attention, free in attentions:
        for one in free:
            for sides in sides_of(base, expert, attention, one.pair):
                before += sides.distance
                after += sides.mapped(fitted_map(sides, one)).distance
    return 1 - math.sqrt(after / before) if before > 0 else math.nan


def sides_of(base: Read, expert: Read, attention: Attention, pair: Pair) -> Iterator[Sides]:
    """Both sides of every group of heads, in base and expert."""
    first, second = (attention.matrices[side] for side in SIDES[pair])
    read = [
        _groups(source, matrix, attention)
        for source in (base, expert)
        for matrix in (first, second)
    ]
    for group in range(attention.counts.groups):
        yield Sides(*(side[group] for side in read))


def _groups(read: Read, matrix: HeadMatrix, attention: Attention) -> list[Matrix]:
    """The features of each group, those of its heads one beside the other."""
    tensor = _numbers(read(matrix.name))
    features_first = tensor.T if matrix.axis == 1 else tensor
    blocks: list[list[Matrix]] = [[] for _ in range(attention.counts.groups)]
    for group, features in side_heads(matrix, attention.counts):
        blocks[group].append(features_first[features])
    return [np.concatenate(group, axis=1) for group in blocks]


def _numbers(tensor: torch.Tensor) -> Matrix:
    return np.asarray(tensor.detach().cpu().double().numpy())
