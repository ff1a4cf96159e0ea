"""Timing of small operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def seconds_of(operation: Callable[[], None], repeats: int) -> float:
    """Median wall seconds of an operation."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        operation()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of an action; what it returns is dropped."""
    wall = time.perf_counter()
    cpu = time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu
