"""Groups laid over the flat index: who owns each segment, and means of fields over groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, Layout
from mergesearch.spaces.groups import Group

_Array = npt.NDArray[np.float64]
_Index = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Pieces:
    """A field cut at tensors and groups, without padding and what stays at the base.

    Attributes:
        values: ``(directions, pieces)``.
        weight: Number of parameters of each piece ``(pieces,)``.
        tensor: Index into ``Partition.tensors`` of each piece ``(pieces,)``.
        group: Index into the groups of each piece ``(pieces,)``.
    """

    values: _Array
    weight: _Array
    tensor: _Index
    group: _Index


@dataclass(frozen=True, eq=False)
class Partition:
    """Disjoint groups over a layout.

    Tensors in no group count as a last group, numbered ``len(groups)``.
    """

    layout: Layout
    groups: tuple[Group, ...]

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that are not empty, in the order of the layout."""
        return tuple(spec.name for spec in self.layout.tensors if spec.size)

    @cached_property
    def boundaries(self) -> npt.NDArray[np.int64]:
        """Starts of the segments, then the size of the layout: ``(segments + 1,)``.

        A segment is the longest run of tensors of one group.
        """
        starts = [start for start, _ in self._runs]
        return np.array([*starts, self.layout.size], np.int64)

    @cached_property
    def owners(self) -> _Index:
        """Group of each segment between the boundaries ``(segments,)``."""
        return np.array([group for _, group in self._runs], np.intp)

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """Start and group of each segment."""
        rest = len(self.groups)
        position = 0
        pieces = sorted(
            (*ends, index) for index, group in enumerate(self.groups) for ends in group.ranges
        )
        runs: list[tuple[int, int]] = []
        for start, stop, index in [*pieces, (self.layout.size, self.layout.size, rest)]:
            between = [(position, rest)] if start > position else []
            for run in [*between, (start, index)] if stop > start else between:
                if not runs or runs[-1][1] != run[1]:
                    runs.append(run)
            position = stop
        return runs

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.array([self.layout.by_name[name].start for name in self.tensors], np.int64)

    @cached_property
    def _stops(self) -> npt.NDArray[np.int64]:
        return np.array([self.layout.by_name[name].stop for name in self.tensors], np.int64)

    @cached_property
    def _edges(self) -> npt.NDArray[np.int64]:
        return np.unique(np.concatenate([self.boundaries, self._starts, self._stops]))

    def split(self, field: Field) -> Pieces:
        """Cut ``field`` where tensors start and stop, beside its own boundaries."""
        fine = field.refine(self._edges)
        begin = fine.boundaries[:-1]
        tensor = np.searchsorted(self._starts, begin, side="right") - 1
        group = self.owners[np.searchsorted(self.boundaries, begin, side="right") - 1]
        used = (begin < self._stops[tensor]) & (group < len(self.groups))
        weight = np.diff(fine.boundaries).astype(np.float64)
        return Pieces(fine.values[:, used], weight[used], tensor[used], group[used])

    def means(self, field: Field) -> _Array:
        """Parameter-weighted mean coefficient of each group ``(directions, groups)``.

        It is exact where the coefficient is constant.
        """
        pieces = self.split(field)
        _, first = np.unique(pieces.group, return_index=True)
        reference = pieces.values[:, first]
        with np.errstate(invalid="ignore", over="ignore"):
            excess = (pieces.values - reference[:, pieces.group]) * pieces.weight
        sums = np.stack([np.bincount(pieces.group, weights=row) for row in excess])
        return reference + sums / np.bincount(pieces.group, weights=pieces.weight)

    def sums(self, values: _Array) -> _Array:
        """Sums over the segments of each group: ``(rows, segments)`` -> ``(rows, groups + 1)``."""
        table = np.zeros((len(self.groups) + 1, len(values)))
        np.add.at(table, self.owners, values.T)
        return table.T

    def farthest(self, one: Field, other: Field) -> str:
        """Name of the tensor in which two fields differ most."""
        segment = int(_gaps(one, other).max(axis=0).argmax())
        begin = np.union1d(one.boundaries, other.boundaries)[segment]
        return self.tensors[int(np.searchsorted(self._starts, begin, side="right")) - 1]


def weighted_mean(values: _Array, weight: _Array) -> float:
    """Mean of ``values`` ``(pieces,)``, exact where they are all equal."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(values[0] + np.sum((values - values[0]) * weight) / weight.sum())


def difference(one: Field, other: Field) -> float:
    """Largest difference between two fields of equal size and directions; NaN equals NaN only."""
    return float(_gaps(one, other).max())


def _gaps(one: Field, other: Field) -> _Array:
    """Differences between two fields on their common segments ``(directions, segments)``."""
    left = one.refine(other.boundaries).values
    right = other.refine(one.boundaries).values
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(left - right)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    return np.where(same, 0.0, np.where(np.isnan(gaps), np.inf, gaps))
