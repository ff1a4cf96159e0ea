"""The coefficients of trials: those of the leading one by expert and block, and means of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, InputError, Layout
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.kept import Between, HeatMap, Kept

Array = npt.NDArray[np.float64]


def heat_map(data: ReportData) -> HeatMap | None:
    """Mean coefficient of the leading trial by expert and block; None without coefficients.

    Means are weighted by parameters. Blocks are the groups of granularity ``block``, so embedding,
    head and final norm have columns of their own; they are modules for a model without numbered
    blocks. Without a layout the columns are the segments of the field.
    """
    if data.kept is not None:
        return data.kept.coefficients
    if not isinstance(data.leading, TrialRecord) or data.leading.recipe.routing:
        return None
    field_ = data.leading.recipe.field
    if not field_.directions:
        return None
    rows = _directions(data, data.leading)
    if data.layout is None:
        columns = tuple(f"segment {s}" for s in range(field_.segments))
        return HeatMap(data.leading.number, rows, columns, np.array(field_.values))
    columns, values = block_means(field_, data.layout)
    return HeatMap(data.leading.number, rows, columns, values)


def kept_of(data: ReportData) -> Kept:
    """What a report shows of the points and recipes of trials."""
    if data.kept is not None:
        return data.kept
    leading = data.leading if isinstance(data.leading, TrialRecord) else None
    directions = () if leading is None else _directions(data, leading)
    return Kept(
        estimates=data.estimates,
        members=() if data.verdict is not None else data.estimated_members,
        coefficients=heat_map(data),
        routing=routing(data),
        mixture=mixture(data),
        means={
            record.number: tuple(mean_coefficients(record.recipe.field).tolist())
            for record in data.complete_records
            if record.recipe.field.directions == len(directions)
        },
        directions=directions,
        between=_between(data, len(directions)),
    )


def _between(data: ReportData, directions: int) -> Between | None:
    """What is expected between trials; None where nothing decodes points."""
    if data.means_at is None:
        return None
    # A report that is read back has it, and need not wait for what fits it.
    from mergesearch.search.report.between.expected import between

    return between(data, directions)


def with_kept(data: ReportData) -> ReportData:
    """``data`` with what is made of points and recipes made once."""
    return data if data.kept is not None else replace(data, kept=kept_of(data))


def routing(data: ReportData) -> Mapping[str, Any]:
    """How the leading trial routes its input; empty where it is one checkpoint."""
    if data.kept is not None:
        return data.kept.routing
    return dict(data.leading.recipe.routing) if isinstance(data.leading, TrialRecord) else {}


def mixture(data: ReportData) -> Mapping[str, Any]:
    """What the leading trial does inside one mixture; empty for any other merge."""
    if data.kept is not None:
        return data.kept.mixture
    return dict(data.leading.recipe.mixture) if isinstance(data.leading, TrialRecord) else {}


def mean_coefficients(field_: Field) -> Array:
    """Mean coefficient of each direction over all parameters, ``(directions,)``."""
    lengths = np.diff(field_.boundaries)
    return np.asarray(field_.values @ (lengths / lengths.sum()))


def _directions(data: ReportData, record: TrialRecord) -> tuple[str, ...]:
    """Names of the directions of a trial's coefficients."""
    experts = data.experts or tuple(source.name for source in record.recipe.experts)
    count = record.recipe.field.directions
    return experts if len(experts) == count else tuple(f"direction {k}" for k in range(count))


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
