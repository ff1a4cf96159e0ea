"""Colours, axis limits and positions of labels, for pictures and interactive figures alike.

Colours are those of Okabe and Ito 2008, "Color Universal Design", which people with any colour
vision can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Objective

Array = npt.NDArray[np.float64]

BLUE = "#0072B2"
VERMILLION = "#D55E00"
ORANGE = "#E69F00"
GREY = "#9AA0A6"
INK = "#202124"
#: Room that a line of text takes, as a share of the axes' height.
TEXT_HEIGHT = 0.045

Box = tuple[float, float, float, float]
#: Where a label may stand beside its point, best first.
SIDES = ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


def label_sides(
    points: Array, names: Sequence[str], avoid: Array, frame: Box
) -> list[tuple[int, int]]:
    """The side of each point where its label of 8-point type hides least, given those before it.

    Args:
        points: Positions to label, ``(n, 2)`` in typographic points.
        names: Labels, ``(n,)``.
        avoid: Positions that should stay visible, ``(k, 2)``.
        frame: Left, bottom, right and top of the axes.

    Returns:
        Horizontal and vertical direction per point, each -1, 0 or 1.
    """
    taken: list[Box] = []
    sides = []
    for (x, y), name in zip(points, names, strict=True):
        boxes = [_label_box(x, y, len(name), side) for side in SIDES]
        best = int(np.argmin([_crowding(box, taken, avoid, frame) for box in boxes]))
        taken.append(boxes[best])
        sides.append(SIDES[best])
    return sides


def _label_box(x: float, y: float, length: int, side: tuple[int, int]) -> Box:
    width = 4.7 * length
    height = 10.0
    left = x + side[0] * (7 + width / 2) - width / 2
    bottom = y + side[1] * (6 + height / 2) - height / 2
    return left, bottom, left + width, bottom + height


def _crowding(box: Box, taken: Sequence[Box], points: Array, frame: Box) -> float:
    """How much a label in ``box`` would hide or lose."""
    left, bottom, right, top = box
    labels = sum(left < t[2] and t[0] < right and bottom < t[3] and t[1] < top for t in taken)
    x = points[:, 0]
    y = points[:, 1]
    hidden = int(np.sum((left < x) & (x < right) & (bottom < y) & (y < top)))
    outside = left < frame[0] or bottom < frame[1] or right > frame[2] or top > frame[3]
    return 3.0 * labels + hidden + 10.0 * outside


def staircase(points: Array, first: Objective, second: Objective) -> Array:
    """Corners of the edge of what ``points`` ``(n, 2)`` dominate, in the users' directions."""
    order = np.argsort(
        points[:, 0] if first.direction == "minimize" else -points[:, 0], kind="stable"
    )
    ahead = points[order]
    # Going along the first objective from its best, the second only improves; the corner keeps its
    # old value.
    corners = np.column_stack([ahead[1:, 0], ahead[:-1, 1]])
    return np.insert(ahead, np.arange(1, len(ahead)), corners, axis=0) if len(ahead) > 1 else ahead


def colour_range(values: Array) -> tuple[float, float, str]:
    """Limits and colour map: white at 0, blue above it, red below it if any value is."""
    top = float(np.abs(values).max()) or 1.0
    return (-top, top, "RdBu") if values.min() < 0 else (0.0, top, "Blues")


def visible_range(values: npt.ArrayLike, keep: npt.ArrayLike) -> tuple[float, float]:
    """Axis limits around all of ``keep`` and all but the most extreme 4 % of ``values``."""
    values = np.asarray(values, dtype=np.float64)
    keep = np.asarray(keep, dtype=np.float64)
    bulk = np.percentile(values, [2, 98]) if values.size else np.empty(0)
    seen = np.concatenate([bulk, keep])
    low = float(seen.min())
    high = float(seen.max())
    air = 0.06 * (high - low) or 0.05 * max(abs(high), 1.0)
    return low - air, high + air


def focus_range(
    core: Sequence[float], others: Sequence[float], anchors: Sequence[float]
) -> tuple[float, float]:
    """Axis limits that show what matters large, whatever lies far from it.

    Args:
        core: Values of the front and the winner, which are always inside.
        others: Values of the search, which widen the limits by two widths of the core at most.
        anchors: Values of anchors; those farther than the width of all that are left outside.
    """
    if not core:
        return visible_range([], [*others, *anchors])
    low = min(core)
    high = max(core)
    bulk = np.percentile(others, [5, 95]) if others else np.array([low, high])
    width = high - low or float(bulk[1] - bulk[0])
    low = min(low, max(float(bulk[0]), low - 2 * width))
    high = max(high, min(float(bulk[1]), high + 2 * width))
    width = high - low or math.inf
    near = [value for value in anchors if low - width <= value <= high + width]
    return visible_range([], [low, high, *near])


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved apart by at least ``gap``, in their order, each as little as possible.

    Neighbours that touch form a block around the mean of their wishes (pool adjacent violators, as
    in isotonic regression).
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[list[float]] = []  # wished heights of each block
    for i in order:
        blocks.append([heights[i]])
        while len(blocks) > 1 and _top(blocks[-2], gap) + gap > _bottom(blocks[-1], gap):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    moved = [_bottom(block, gap) + gap * index for block in blocks for index in range(len(block))]
    result = [0.0] * len(heights)
    for i, height in zip(order, moved, strict=True):
        result[i] = height
    return result


def _bottom(block: Sequence[float], gap: float) -> float:
    return sum(block) / len(block) - gap * (len(block) - 1) / 2


def _top(block: Sequence[float], gap: float) -> float:
    return sum(block) / len(block) + gap * (len(block) - 1) / 2
