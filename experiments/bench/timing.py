"""Timing of small operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def seconds_of(operation: Callable[[], None], repeats: int) -> float:
    """Median wall seconds of an operation."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        operation()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
