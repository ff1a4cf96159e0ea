"""Arenas as arrays, for comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging.resident.arena import Arenas
from mergesearch.merging.resident.terms import Terms


def decoded(arenas: Arenas) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Base ``(size,)`` and rows ``(K, size)`` as a merge reads them; factors read as zeros."""
    base, rows = Terms.of(arenas).read(0, arenas.layout.size)
    return np.asarray(base), np.asarray(rows)
