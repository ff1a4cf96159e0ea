"""The coefficients of the leading trial as a table of experts and blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, InputError, Layout
from mergesearch.search.report.data import ReportData

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


def heat_map(data: ReportData) -> HeatMap | None:
    """Mean coefficient of the leading trial by expert and block; None without coefficients.

    Means are weighted by parameters. Blocks are the groups of granularity ``block``, so embedding,
    head and final norm have columns of their own; they are modules for a model without numbered
    blocks. Without a layout the columns are the segments of the field.
    """
    if data.leading is None or data.leading.recipe.routing:
        return None
    field_ = data.leading.recipe.field
    experts = data.experts or tuple(source.name for source in data.leading.recipe.experts)
    rows = (
        experts
        if len(experts) == field_.directions
        else tuple(f"direction {k}" for k in range(field_.directions))
    )
    if data.layout is None:
        columns = tuple(f"segment {s}" for s in range(field_.segments))
        return HeatMap(data.leading.number, rows, columns, np.array(field_.values))
    columns, values = block_means(field_, data.layout)
    return HeatMap(data.leading.number, rows, columns, values)


def block_means(field_: Field, layout: Layout) -> tuple[tuple[str, ...], Array]:
    """Names of the blocks, and the mean coefficients of each, ``(directions, blocks)``."""
    from mergesearch.spaces.groups import group_tensors

    try:
        groups = group_tensors(layout, "block")
    except InputError:  # no numbered blocks in this model
        groups = group_tensors(layout, "module")
    owner = {name: index for index, group in enumerate(groups) for name in group.tensors}
    specs = [spec for spec in layout.tensors if spec.name in owner]
    starts = np.array([spec.start for spec in specs], dtype=np.int64)
    stops = np.array([spec.stop for spec in specs], dtype=np.int64)
    fine = field_.refine(np.concatenate([starts, stops]))
    # Padding between tensors belongs to none: it must not pull on a mean.
    tensor = np.searchsorted(starts, fine.boundaries[:-1], side="right") - 1
    inside = (tensor >= 0) & (fine.boundaries[:-1] < stops[tensor])
    block = np.array([owner[spec.name] for spec in specs])[tensor[inside]]
    lengths = np.diff(fine.boundaries)[inside].astype(np.float64)
    sums = [
        np.bincount(block, weights=row[inside] * lengths, minlength=len(groups))
        for row in fine.values
    ]
    totals = np.bincount(block, weights=lengths, minlength=len(groups))
    return tuple(group.name for group in groups), np.stack(sums) / totals
