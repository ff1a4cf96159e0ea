"""The long reference of a problem without a known optimum, kept in ``runs/league``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.league.landscape import Array

#: Ascent: steps, their rate, and how often held-out losses are taken.
STEPS = 250
RATE = 0.02
SHOWN_EVERY = 5


def kept_reference(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A reference from its file, or made and written there."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    figures = make()
    # Two processes may make the same reference at once: each writes a file of its own first.
    own = path.with_suffix(f".{np.random.SeedSequence().entropy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    own.write_text(json.dumps(figures))
    own.replace(path)
    return figures


def long_reference(
    start: Array,
    weightings: Sequence[Array],
    slope: Callable[[Array, Array, int], Array],
    true_losses: Callable[[Array], Array],
) -> dict[str, Any]:
    """Best held-out losses along ascents on other items.

    Args:
        start: Where every ascent begins ``(dim,)``.
        weightings: Weights of the objectives ``(objectives,)`` of each ascent.
        slope: (weights, point, step) -> gradient of a smooth loss ``(dim,)``.
        true_losses: Held-out losses of a point ``(objectives,)``.

    Returns:
        ``mean``: the smallest mean loss, ``point``: where; ``each``: the smallest loss of each
        objective.
    """
    ways = [_ascend(start, partial(slope, weights)) for weights in weightings]
    points = np.concatenate(ways)
    seen = np.array([true_losses(point) for point in points])
    best = int(np.argmin(seen.mean(axis=1)))
    return {
        "mean": float(seen[best].mean()),
        "each": seen.min(axis=0).tolist(),
        "point": points[best].tolist(),
    }


def _ascend(start: Array, slope: Callable[[Array, int], Array]) -> Array:
    """Points along Adam's way from the start in the box [0, 1] ``(shown, dim)``."""
    point = start.copy()
    moments = np.zeros((2, point.size))
    shown = [point]
    for step in range(1, STEPS + 1):
        found = slope(point, step)
        moments = np.stack([0.9 * moments[0] + 0.1 * found, 0.99 * moments[1] + 0.01 * found**2])
        length = np.sqrt(moments[1] / (1.0 - 0.99**step)) + 1e-8
        point = np.clip(point - RATE * moments[0] / (1.0 - 0.9**step) / length, 0.0, 1.0)
        if step % SHOWN_EVERY == 0:
            shown.append(point)
    return np.array(shown)
