"""Arithmetic on ranges of the flat index: where fields differ, and which tensors a range meets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mergesearch.merging.kernels.spans import Ranges, Stretch, limits_of
from mergesearch.merging.tensors.field import Field

_S = TypeVar("_S", bound=Stretch)


def differing(before: Field, after: Field) -> Ranges:
    """Positions at which two fields over the same positions differ in the bits of a coefficient."""
    edges = after.boundaries
    old = before.values
    new = after.values
    if before.boundaries is not edges and not np.array_equal(before.boundaries, edges):
        edges = np.union1d(before.boundaries, edges)
        old = before.at(edges[:-1])
        new = after.at(edges[:-1])
    differs = np.zeros(len(edges) + 1, np.bool_)  # with what lies before and behind
    np.any(old.view(np.int64) != new.view(np.int64), axis=0, out=differs[1:-1])
    return edges[np.flatnonzero(differs[1:] != differs[:-1])].reshape(-1, 2)


def joined(ranges: npt.NDArray[np.int64]) -> Ranges:
    """Ranges in any order that may overlap, as ranges that are apart."""
    if not len(ranges):
        return np.empty((0, 2), np.int64)
    ordered = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ordered[:, 1])
    opens = np.append(True, ordered[1:, 0] > reach[:-1])
    closes = np.append(opens[1:], True)
    return np.column_stack((ordered[opens, 0], reach[closes]))


def touched(stretches: Sequence[_S], ranges: Ranges | None) -> Sequence[_S]:
    """The stretches that hold a position of some range; all of them for None."""
    if ranges is None:
        return stretches
    return [stretches[n] for n in np.flatnonzero(meeting(limits_of(stretches), ranges)).tolist()]


def meeting(limits: Ranges, ranges: Ranges) -> npt.NDArray[np.bool_]:
    """Whether each stretch, of such limits, holds a position of some range."""
    following = np.searchsorted(ranges[:, 1], limits[:, 0], side="right")
    starts = np.append(ranges[:, 0], np.iinfo(np.int64).max)
    met: npt.NDArray[np.bool_] = starts[following] < limits[:, 1]
    return met


def covered(ranges: Ranges) -> int:
    """Number of positions in ranges."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())
