"""Coefficient curves over depth: a few numbers per expert instead of one per block.

The coefficient of direction k in block l is ``c[k, l] = Σ_j x[k, j] φ_j(l)``. Three bases:

* ``linear``: the coefficients of the first and the last block, and a straight line between them
  (Wang 2024, LiNeS: Post-training layer scaling prevents forgetting and enhances model merging).
  Bounds on the two bound the line.
* ``dct``: cosines ``cos(π j (l + ½) / L)``, the constant first, the others times √2, so that all
  columns are orthogonal with unit root mean square. Bounds on the numbers do not bound the curve.
* ``bspline``: control points of a clamped uniform B-spline, cubic from four points on (de Boor
  1978, A Practical Guide to Splines). Weights are non-negative and sum to one, so bounds on the
  points bound the curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from mergesearch.merging import InputError

BasisName = Literal["linear", "dct", "bspline"]

BASES: tuple[BasisName, ...] = get_args(BasisName)

_Array = npt.NDArray[np.float64]
_Index = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Basis:
    """A basis sampled at the blocks: ``matrix`` is ``(blocks, terms)``."""

    name: BasisName
    matrix: _Array

    @property
    def blocks(self) -> int:
        """Number of blocks L."""
        return int(self.matrix.shape[0])

    @property
    def terms(self) -> int:
        """Number of coordinates per curve J."""
        return int(self.matrix.shape[1])

    @property
    def bounding(self) -> bool:
        """Whether bounds on the coordinates bound the curve.

        They do where the rows of the matrix are non-negative and sum to one.
        """
        return self.name != "dct"

    @property
    def term_names(self) -> tuple[str, ...]:
        """Labels of the coordinates."""
        if self.name == "linear":
            return ("first", "last")
        word = "dct" if self.name == "dct" else "spline"
        return tuple(f"{word} {j}" for j in range(self.terms))

    @cached_property
    def _leading(self) -> _Index:
        """The term from which :meth:`evaluate` starts at each block ``(blocks,)``.

        It is the heaviest one, or the constant of the cosines.
        """
        return self.matrix.argmax(axis=1) if self.bounding else np.zeros(self.blocks, np.intp)

    @cached_property
    def _others(self) -> tuple[_Index, ...]:
        """For each term, the blocks to which it adds beside the leading term."""
        leading = self._leading
        return tuple(
            np.flatnonzero((self.matrix[:, j] != 0) & (leading != j)) for j in range(self.terms)
        )

    def evaluate(self, coordinates: _Array) -> _Array:
        """Curves at the blocks: ``(curves, terms)`` -> ``(curves, blocks)``.

        Bounding bases are summed as differences from the heaviest term: equal coordinates then give
        exactly that constant, and the ends are exactly the end coordinates. NaN reaches only the
        blocks that its term touches.
        """
        lead = coordinates[:, self._leading]
        values = lead.copy()
        with np.errstate(invalid="ignore", over="ignore"):
            for j, rows in enumerate(self._others):
                term = coordinates[:, j, None]
                step = term - lead[:, rows] if self.bounding else term
                values[:, rows] += self.matrix[rows, j] * step
        return values

    def constant(self, values: _Array) -> _Array:
        """Coordinates of constant curves: ``(curves,)`` -> ``(curves, terms)``."""
        shape = np.ones(self.terms) if self.bounding else np.eye(1, self.terms)[0]
        return np.multiply.outer(values, shape)

    def solve(self, values: _Array, rows: _Index) -> _Array:
        """Coordinates ``(curves, terms)`` of the curves through ``values`` at blocks ``rows``.

        Constants are met exactly, and so are lines whose ends are given. Other values are fitted by
        least squares, which meets them to rounding if the basis holds them.

        Args:
            values: Values of the curves ``(curves, rows)``.
            rows: Their blocks, in increasing order ``(rows,)``.
        """
        if self.name == "linear" and rows.size and rows[0] == 0 and rows[-1] == self.blocks - 1:
            return values[:, [0, -1]]
        inverse = np.linalg.pinv(self.matrix[rows])
        return self.constant(values[:, 0]) + (values - values[:, :1]) @ inverse.T

    def box(self, low: float, high: float) -> tuple[_Array, _Array]:
        """Bounds of the coordinates, each ``(terms,)``, for coefficients in ``low..high``.

        The constant of the cosines gets those bounds, cosine j plus or minus
        ``(high - low) / (1 + j)``: smooth curves are tried first, and the curve may leave
        ``low..high`` unless it is clipped.
        """
        if self.bounding:
            return np.full(self.terms, low), np.full(self.terms, high)
        reach = (high - low) / (1.0 + np.arange(self.terms, dtype=np.float64))
        lower = -reach
        upper = reach.copy()
        lower[0] = low
        upper[0] = high
        return lower, upper


def make_basis(name: BasisName, terms: int, blocks: int) -> Basis:
    """Sample a basis at ``blocks`` evenly spaced depths ``l / (L - 1)``.

    Raises:
        InputError: If there are no terms or more than blocks, or if a line has not two terms.
    """
    if name == "linear" and terms != 2:
        raise InputError(
            f"space.depth.size: expected 2 (or nothing) for a linear curve, received {terms}"
        )
    if not 1 <= terms <= blocks:
        raise InputError(
            f"space.depth.size: expected 1 to {blocks} (the number of blocks), received {terms}"
        )
    depth = np.arange(blocks) / max(blocks - 1, 1)
    if name == "linear":
        return Basis(name, np.stack([1.0 - depth, depth], axis=1))
    return Basis(name, _cosines(terms, blocks) if name == "dct" else _splines(terms, depth))


def _cosines(terms: int, blocks: int) -> _Array:
    angle = np.pi * (np.arange(blocks) + 0.5) / blocks
    matrix: _Array = math.sqrt(2.0) * np.cos(np.multiply.outer(angle, np.arange(terms)))
    matrix[:, 0] = 1.0
    return matrix


def _splines(terms: int, depth: _Array) -> _Array:
    from scipy.interpolate import BSpline

    degree = min(3, terms - 1)
    inner = np.linspace(0.0, 1.0, terms - degree + 1)
    knots = np.concatenate([np.zeros(degree), inner, np.ones(degree)])
    return np.asarray(BSpline.design_matrix(depth, knots, degree).toarray(), np.float64)
