"""How much a loss varies along each coordinate, learned from the evidence of a quadratic model.

Automatic relevance determination (MacKay 1994, "Bayesian Nonlinear Modeling for the Prediction
Competition"; Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", section 5.1)
with shared parts alone: the coefficients of an expert in all blocks have one part in common, those
of all experts in a block another::

    log scale = expert's + block's,    each normal around 0 before there are results    (1)

A few results say much about a part that many coordinates share. Parts of single coordinates cost
more than they gave.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergesearch.search.strategies.parts.quadratic_model import Array

#: Prior standard deviation of a part.
SPREAD = 0.7
#: Length of a step along the gradient, in units of the prior variance, and its largest change.
STEP = 0.1
LARGEST = 0.2


class CoordinateScales:
    """Scales of the coordinates, which follow the evidence step by step.

    Args:
        names: Of the coordinates, such as ``rotated/block 3/attention``; empty: not known, and all
            scales stay 1.
        dim: Number of coordinates.
    """

    def __init__(self, names: Sequence[str], dim: int) -> None:
        self._columns = np.concatenate([np.empty((dim, 0)), *_shared_columns(names)], axis=1)
        self._parts = np.zeros(self._columns.shape[1])

    @property
    def learns(self) -> bool:
        """Whether there is a part to learn."""
        return bool(self._parts.size)

    @property
    def scale(self) -> Array:
        """Factors of the coordinates, with mean square 1 ``(dim,)``."""
        scale = np.exp(self._columns @ self._parts)
        return np.asarray(scale / np.sqrt(np.mean(scale**2)))

    def follow(self, gradient: Array) -> None:
        """Take a step towards the most probable scales.

        Args:
            gradient: Derivative of the log evidence by the logarithm of each scale ``(dim,)``.
        """
        # Scales have no unit: their common factor is that of the kernel.
        slope = SPREAD**2 * self._columns.T @ (gradient - np.mean(gradient)) - self._parts
        self._parts += np.clip(STEP * slope, -LARGEST, LARGEST)


def _shared_columns(names: Sequence[str]) -> list[Array]:
    """Members of each part that some but not all coordinates share, ``(dim, 1)`` each."""
    columns = []
    for labels in zip(*(_halves(name) for name in names), strict=True):
        for label in dict.fromkeys(labels):
            members = np.array([[float(other == label)] for other in labels])
            if 1 < members.sum() < len(names):
                columns.append(members)
    return columns


def _halves(name: str) -> tuple[str, str]:
    """Expert and group of a coordinate."""
    expert, _, group = name.partition("/")
    return expert, group
