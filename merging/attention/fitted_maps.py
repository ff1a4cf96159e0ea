"""Maps of heads by least squares: those under which an expert's heads come nearest to the base's.

The map ``M`` of a group acts on its first side ``F`` (queries or values, one column for each input)
and cancels in the second ``S`` (keys or outputs). Wanted is the smallest

``|M F − F₀|² / |F₀|² + |M⁻ᵀ S − S₀|² / |S₀|²`` (eq. 1).

It starts at the least-squares fit of the first side alone. Each step then replaces ``M⁻ᵀ S − S₀``
by ``S − Mᵀ S₀``, which is the same near the identity; the normal equations of that are the
Sylvester equation ``(S₀S₀ᵀ/s) M + M (FFᵀ/f) = F₀Fᵀ/f + S₀Sᵀ/s`` (eq. 2). For couples of features
that rotary positions turn, M is one complex number and eq. 2 a division. The expert's function
does not change whatever M is: only how near it lies to the base.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.merging.attention.head_maps import Freedom, Matrix, block_map

#: Steps of eq. 2 after the first fit.
STEPS = 3


@dataclass(frozen=True)
class Sides:
    """Both sides of a group of heads in the base and in an expert.

    Attributes:
        first: Queries or values of the base ``(width, columns)``.
        second: Keys or outputs of the base ``(width, columns)``.
        own_first: Of the expert.
        own_second: Of the expert.
    """

    first: Matrix
    second: Matrix
    own_first: Matrix
    own_second: Matrix

    def mapped(self, act: Matrix) -> Sides:
        """The same with the expert's sides mapped."""
        inverse = np.linalg.inv(act).T
        return Sides(self.first, self.second, act @ self.own_first, inverse @ self.own_second)

    @property
    def distance(self) -> float:
        """The sum of eq. 1 for M = 1; what is zero in the base counts as it is."""
        return sum(
            float(np.sum((own - base) ** 2)) / (_square(base) or 1.0)
            for base, own in ((self.first, self.own_first), (self.second, self.own_second))
        )


def fitted_map(sides: Sides, freedom: Freedom) -> Matrix:
    """The map of a group, ``(width, width)``; the identity where none comes nearer."""
    width = len(sides.first)
    try:
        result = _step(sides, freedom, width, first_only=True)
        for _ in range(STEPS):
            result = _step(sides.mapped(result), freedom, width) @ result
        # Rounded, so that the last bits of a solver do not reach the weights.
        result = result.astype(np.float32).astype(np.float64)
        nearer = sides.mapped(result).distance < sides.distance
    except np.linalg.LinAlgError:
        return np.eye(width)
    return result if nearer and bool(np.isfinite(result).all()) else np.eye(width)


def _step(sides: Sides, freedom: Freedom, width: int, *, first_only: bool = False) -> Matrix:
    f = _square(sides.first) or 1.0
    s = _square(sides.second) or 1.0
    turned = _turned(sides, freedom, f, s, first_only)
    mixed = _mixed(sides, freedom, f, s, first_only)
    return block_map(freedom, width, turned, mixed)


def _mixed(sides: Sides, freedom: Freedom, f: float, s: float, first_only: bool) -> Matrix:
    """Eq. 2 over the features that any matrix may mix."""
    rest = freedom.rest
    if not len(rest):
        return np.zeros((0, 0))
    own = sides.own_first[rest]
    left = sides.first[rest] @ own.T / f
    if first_only:
        return np.asarray(left @ np.linalg.pinv(own @ own.T / f, hermitian=True))
    from scipy.linalg import solve_sylvester

    second = sides.second[rest]
    wanted = left + second @ sides.own_second[rest].T / s
    return np.asarray(solve_sylvester(second @ second.T / s, own @ own.T / f, wanted))


def _turned(sides: Sides, freedom: Freedom, f: float, s: float, first_only: bool) -> Matrix:
    """Real and imaginary part of the factor of each couple ``(2, couples)``."""
    own = _complex(sides.own_first, freedom)
    base = _complex(sides.first, freedom)
    above = (base * own.conj()).sum(axis=1) / f
    below = (np.abs(own) ** 2).sum(axis=1) / f
    if not first_only:
        # Keys are divided by the conjugate of the factor: k ≈ conj(m) k₀.
        keys = _complex(sides.second, freedom)
        above = above + (_complex(sides.own_second, freedom).conj() * keys).sum(axis=1) / s
        below = below + (np.abs(keys) ** 2).sum(axis=1) / s
    factor = np.where(below > 0, above / np.where(below > 0, below, 1.0), 1.0)
    return np.stack((factor.real, factor.imag))


def _complex(matrix: Matrix, freedom: Freedom) -> npt.NDArray[np.complex128]:
    return np.asarray(matrix[freedom.one] + 1j * matrix[freedom.other])


def _square(matrix: Matrix) -> float:
    return float(np.sum(matrix**2))
