"""The space around the best of several operators: its coefficients, and weights of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mergesearch.merging import InputError
from mergesearch.spaces.base import Space
from mergesearch.spaces.coefficient_space import CoefficientSpace

#: Bounds of the weight of another operator's merge: 0 is the leader's merge, 1 is the other's.
WEIGHTS = (-0.5, 1.0)

#: The leader's coefficients lie within this share of the one with which it was best.
SPREAD = 0.5


#: Bounds and start of every coefficient -> a space.
Builder = Callable[[tuple[float, float], float], Space]


def blend_space(
    build_leader: Builder, build_others: Builder, leader_rows: int, coefficient: float
) -> CoefficientSpace:
    """The space of a blend that begins at its leader's merge.

    Args:
        build_leader: The space that the study describes, of which the leader's rows are taken.
        build_others: The same without the study's bounds, which are about the leader.
        leader_rows: How many directions of the blend are the leader's.
        coefficient: The leader's, with which it was best.

    Raises:
        InputError: If the study describes a space that is not of coefficients for each direction.
    """
    leader = build_leader((coefficient * (1 - SPREAD), coefficient * (1 + SPREAD)), coefficient)
    others = build_others(WEIGHTS, 0.0)
    if not (isinstance(leader, CoefficientSpace) and isinstance(others, CoefficientSpace)):
        raise InputError("space: expected groups or curves with operator auto, received another")
    if leader.shared:
        raise InputError(
            "space.granularity: expected task or finer with operator auto, received global"
        )
    cut = leader_rows * (leader.lower.size // leader.directions)
    return replace(
        leader,
        lower=np.concatenate([leader.lower[:cut], others.lower[cut:]]),
        upper=np.concatenate([leader.upper[:cut], others.upper[cut:]]),
        start=np.concatenate([leader.start[:cut], others.start[cut:]]),
        values=leader.values[:leader_rows] + others.values[leader_rows:],
    )
