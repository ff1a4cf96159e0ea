"""Draws of points: Sobol sequences around a start, and reflection into a box."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import numpy as np

from mergesearch.search.strategies.base import Point
from mergesearch.search.strategies.parts.map_ridge import Array


def sobol_points(start: Array, rng: np.random.Generator, sigma: float) -> Iterator[Array]:
    """Scrambled Sobol points of the unit cube, without end.

    Every fourth is uniform, the others are normal around the start.
    """
    from scipy.special import ndtri
    from scipy.stats import qmc

    sobol = qmc.Sobol(start.size, scramble=True, rng=rng)
    for number in itertools.count():
        with warnings.catch_warnings():
            # Points come one at a time; the balance that scipy warns about holds at powers of two.
            warnings.simplefilter("ignore", UserWarning)
            uniform = np.clip(sobol.random(1)[0], 1e-12, 1.0 - 1e-12)
        if number % 4 == 1:
            yield uniform
        else:
            yield reflect(start + sigma * ndtri(uniform), np.zeros_like(start), np.ones_like(start))


def reflect(point: Point, lower: Point, upper: Point) -> Point:
    """``point`` folded into the box by reflection at its faces; all ``(dim,)``."""
    width = upper - lower
    safe = np.where(width > 0, width, 1.0)
    phase = np.mod((point - lower) / safe, 2.0)
    folded = lower + safe * np.where(phase > 1.0, 2.0 - phase, phase)
    return np.where(width > 0, np.clip(folded, lower, upper), lower)
