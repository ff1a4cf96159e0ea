"""How far weights of an expert agree with the base's: cosine, relative distance, scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float32] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Sums of products of base and expert over compared elements.

    Attributes:
        dot: Of base and expert.
        base: Of the base with itself.
        expert: Of the expert with itself.
        change: Of their difference with itself.
        parameters: Number of parameters that the sums stand for.
    """

    dot: float = 0.0
    base: float = 0.0
    expert: float = 0.0
    change: float = 0.0
    parameters: int = 0

    @classmethod
    def of(cls, base: Numbers, expert: Numbers, parameters: int = 0) -> Agreement:
        """Agreement of two arrays, extrapolated to ``parameters`` if these are more."""
        ours = base.astype(np.float64).ravel()
        theirs = expert.astype(np.float64).ravel()
        change = theirs - ours
        count = parameters or ours.size
        factor = count / max(ours.size, 1)
        return cls(
            dot=float(ours @ theirs) * factor,
            base=float(ours @ ours) * factor,
            expert=float(theirs @ theirs) * factor,
            change=float(change @ change) * factor,
            parameters=count,
        )

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.dot + other.dot,
            self.base + other.base,
            self.expert + other.expert,
            self.change + other.change,
            self.parameters + other.parameters,
        )

    @property
    def comparable(self) -> bool:
        """Whether both sides hold anything but zeros."""
        return self.base > 0 and self.expert > 0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between base and expert; NaN where one of them is zero."""
        if not self.comparable:
            return math.nan
        return self.dot / math.sqrt(self.base) / math.sqrt(self.expert)

    @property
    def distance(self) -> float:
        """Length of the change relative to the base's; NaN where that is zero."""
        return math.sqrt(self.change / self.base) if self.base > 0 else math.nan

    @property
    def octaves(self) -> float:
        """Binary logarithm of the expert's length over the base's; NaN where one is zero."""
        return math.log2(self.expert / self.base) / 2 if self.comparable else math.nan


def row_agreement(base: Numbers, expert: Numbers) -> tuple[float, float]:
    """Median over rows of their cosine, and of the size of their scale in octaves.

    Both are NaN where no row can be compared. Factors of single rows or heads leave the first at 1
    and show in the second.
    """
    ours = np.einsum("ij,ij->i", base, base, dtype=np.float64)
    theirs = np.einsum("ij,ij->i", expert, expert, dtype=np.float64)
    filled = (ours > 0) & (theirs > 0)
    if not filled.any():
        return math.nan, math.nan
    dots = np.einsum("ij,ij->i", base, expert, dtype=np.float64)[filled]
    cosines = dots / np.sqrt(ours[filled] * theirs[filled])
    octaves = np.abs(np.log2(theirs[filled] / ours[filled])) / 2
    return float(np.median(cosines)), float(np.median(octaves))
