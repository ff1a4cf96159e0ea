"""What a report shows of the points and recipes of trials, without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A trial's coefficients.

    Attributes:
        trial: Its number.
        rows: Names of the directions, ``(directions,)``.
        columns: Names of the blocks, ``(blocks,)``.
        values: Mean coefficients, ``(directions, blocks)``.
    """

    trial: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Array


@dataclass(frozen=True)
class Expected:
    """A merge that was not measured, as a surrogate expects it.

    Attributes:
        weights: How important the objectives are for which it is expected to be the best, summing
            to 1 ``(objectives,)``.
        values: Expected scores on search items, in the user's directions ``(objectives,)``.
        errors: How far a measurement may lie from these, one standard deviation ``(objectives,)``.
        means: Mean coefficient of each direction.
    """

    weights: tuple[float, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...]
    means: tuple[float, ...]


@dataclass(frozen=True)
class Between:
    """What is expected between measured trials.

    Attributes:
        expected: For evenly spaced weights of the objectives.
        why: Why nothing is expected, where that is so.
    """

    expected: tuple[Expected, ...] = ()
    why: str = ""


@dataclass(frozen=True, eq=False)
class Kept:
    """What was made of the points and recipes of a run's trials, so that a report needs neither.

    A report that is read back has this and no weights beside it.

    Attributes:
        estimates: Trial -> estimated losses ``(objectives,)``.
        members: Trials of the front by the estimates, where no verdict names them.
        coefficients: Coefficients of the leading trial by block; None without any.
        routing: How the leading trial routes its input; empty where it is one checkpoint.
        mixture: What the leading trial does inside one mixture; empty for any other merge.
        means: Trial -> mean coefficient of each direction.
        directions: Names of the directions.
        between: What is expected between measured trials; None in older runs, and while it was not
            worked out.
    """

    estimates: Mapping[int, Array] = field(default_factory=dict)
    members: tuple[int, ...] = ()
    coefficients: HeatMap | None = None
    routing: Mapping[str, Any] = field(default_factory=dict)
    mixture: Mapping[str, Any] = field(default_factory=dict)
    means: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    directions: tuple[str, ...] = ()
    between: Between | None = None
