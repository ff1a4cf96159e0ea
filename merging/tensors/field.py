"""Coefficients as a piecewise-constant function over the flat index.

Global, task-wise, block-wise, tensor-wise and chunk-wise coefficients, depth curves and moving
split points are all the same thing: K rows (one per direction of the basis) of values that are
constant on segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.foreign.shown import shown


@dataclass(frozen=True, eq=False)
class Field:
    """Coefficients that are constant on segments of the flat index.

    ``values[k, s]`` is the coefficient of direction k for positions
    ``boundaries[s]:boundaries[s+1]``.

    Attributes:
        boundaries: int64 ``(segments + 1,)``, strictly increasing, first 0, last the size of the
            layout.
        values: float64 ``(directions, segments)``. May hold NaN or infinity: a search that proposes
            them gets an infeasible trial, not a crash.
    """

    boundaries: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        boundaries = np.ascontiguousarray(self.boundaries, dtype=np.int64)
        values = np.ascontiguousarray(self.values, dtype=np.float64)
        if values.ndim != 2 or boundaries.shape != (values.shape[1] + 1,) or values.shape[1] == 0:
            raise RecipeError(
                "field: expected values (directions, segments) and boundaries (segments + 1,), "
                f"received {values.shape} and {boundaries.shape}"
            )
        if boundaries[0] != 0 or np.any(np.diff(boundaries) <= 0):
            raise RecipeError("field: expected boundaries that start at 0 and strictly increase")
        # One bit pattern for NaN, so that a digest survives any text format.
        values = np.where(np.isnan(values), np.nan, values)
        for array in (boundaries, values):
            array.setflags(write=False)
        object.__setattr__(self, "boundaries", boundaries)
        object.__setattr__(self, "values", values)

    @classmethod
    def constant(cls, size: int, coefficients: Sequence[float] | npt.NDArray[np.float64]) -> Field:
        """One segment over ``size`` positions with one coefficient per direction."""
        return cls(np.array([0, size]), np.asarray(coefficients, dtype=np.float64)[:, None])

    @property
    def directions(self) -> int:
        """Number of directions K."""
        return int(self.values.shape[0])

    @property
    def segments(self) -> int:
        """Number of segments S."""
        return int(self.values.shape[1])

    @property
    def size(self) -> int:
        """Length of the flat index."""
        return int(self.boundaries[-1])

    def at(self, positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Values at flat positions: ``(n,)`` -> ``(directions, n)``."""
        segment = np.searchsorted(self.boundaries, np.asarray(positions), side="right") - 1
        return self.values[:, segment]

    def restrict(self, start: int, stop: int) -> Field:
        """The part over ``start:stop``, re-based to 0."""
        first = int(np.searchsorted(self.boundaries, start, side="right")) - 1
        last = int(np.searchsorted(self.boundaries, stop, side="left"))
        inner = np.clip(self.boundaries[first : last + 1], start, stop) - start
        return Field(inner, self.values[:, first:last])

    def refine(self, boundaries: npt.ArrayLike) -> Field:
        """The same function on the union of its own and the given boundaries."""
        union = np.union1d(self.boundaries, np.asarray(boundaries, dtype=np.int64))
        if union[0] != 0 or union[-1] != self.size:
            raise RecipeError(
                f"field: expected boundaries within 0..{self.size}, received {union[[0, -1]]}"
            )
        return Field(union, self.at(union[:-1]))

    def compact(self) -> Field:
        """The same function with equal neighbouring segments joined."""
        left = self.values[:, :-1]
        right = self.values[:, 1:]
        same = np.all((left == right) | (np.isnan(left) & np.isnan(right)), axis=0)
        keep = np.concatenate(([True], ~same))
        return Field(np.append(self.boundaries[:-1][keep], self.size), self.values[:, keep])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; floats survive exactly (shortest round-trip repr)."""
        return {"boundaries": self.boundaries.tolist(), "values": self.values.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Field:
        """Inverse of :meth:`to_dict`."""
        if set(data) != {"boundaries", "values"}:
            raise RecipeError(
                "field: expected keys 'boundaries' and 'values', received "
                f"{', '.join(shown(key) for key in sorted(map(str, data))[:8]) or 'none'}"
            )
        return cls(_numbers(data, "boundaries", "i"), _numbers(data, "values", "if"))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Field)
            and np.array_equal(self.boundaries, other.boundaries)
            and np.array_equal(self.values, other.values, equal_nan=True)
        )

    def __hash__(self) -> int:
        return hash((self.boundaries.tobytes(), self.values.tobytes()))


def _numbers(data: Mapping[str, Any], key: str, kinds: str) -> npt.NDArray[Any]:
    """An array of a field as :meth:`Field.to_dict` writes it.

    Raises:
        RecipeError: If it is anything but lists of equal length, of whole numbers where ``kinds``
            is ``i``.
    """
    what = "whole numbers" if kinds == "i" else "numbers"
    try:
        array = np.asarray(data[key])
    except (TypeError, ValueError, OverflowError):  # lists of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in kinds:
        raise RecipeError(
            f"field: {key}: expected lists of {what} of 64 bits, received {shown(data[key])}"
        )
    return array
