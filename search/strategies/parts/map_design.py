"""Designs of the MAP family: how many points, and where they lie before there is a model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mergesearch.merging import InputError
from mergesearch.search.strategies.base import Point, Problem
from mergesearch.search.strategies.parts.map_ridge import Array
from mergesearch.search.strategies.parts.map_search import FrontSearch
from mergesearch.search.strategies.parts.sampling import sobol_points

#: Up to this dimension the vertices (one coordinate 1, the others 0) are part of the design.
VERTEX_LIMIT = 16


#: Results with which models begin.
LEAST_RESULTS = 3


def refuse_dimensions(name: str, problem: Problem, most: int) -> None:
    """Refuse boxes with more coordinates than a strategy can model.

    Raises:
        InputError: If there are more than ``most``.
    """
    if problem.dim > most:
        raise InputError(
            f"strategy.name: expected at most {most} coordinates for {name}, received "
            f"{problem.dim}; choose a coarser "
            "space, or nsga2 or cma_parego"
        )


def design_size(problem: Problem, multiple: float, share: float) -> int:
    """Points of a design: ``multiple`` of the unknowns of a quadratic, less the anchors.

    They take at most ``share`` of the budget.
    """
    dim = int(np.count_nonzero(problem.width))
    unknowns = (dim + 1) * (dim + 2) // 2
    wanted = int(np.ceil(multiple * unknowns)) - len(problem.anchors)
    return max(min(wanted, int(share * problem.budget)), LEAST_RESULTS)


def design_points(
    problem: Problem, search: FrontSearch, rng: np.random.Generator, sigma: float
) -> Iterator[Array]:
    """The start and the vertices, then Sobol points without end, in the unit cube."""
    yield from first_points(problem, search)
    yield from sobol_points(search.box.unit(problem.start), rng, sigma)


def first_points(problem: Problem, search: FrontSearch) -> list[Array]:
    """The start and, in few dimensions, the vertices, in the unit cube.

    Points that an anchor has measured are left out.
    """
    few = search.box.free.size <= VERTEX_LIMIT
    points: list[Array] = []
    for point in (problem.start, *(vertices(problem) if few else ())):
        unit = search.box.unit(point)
        if not any(
            np.allclose(unit, other, rtol=0, atol=1e-9) for other in (*search.points, *points)
        ):
            points.append(unit)
    return points


def vertices(problem: Problem) -> list[Point]:
    """A corner for each free coordinate: the experts of a task-wise merge."""
    return [corner(problem, [index]) for index in np.flatnonzero(problem.width)]


def corner(problem: Problem, ones: npt.ArrayLike) -> Point:
    """Some coordinates 1 and the others 0, or as near to that as the box allows."""
    low, high = (np.clip(value, problem.lower, problem.upper) for value in (0.0, 1.0))
    return np.asarray(np.where(np.isin(np.arange(problem.dim), ones), high, low))
