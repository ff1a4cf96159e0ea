"""What dashboards and tables show of a space of coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, Layout
from mergesearch.merging.tensors.roles import roles_of
from mergesearch.spaces.base import Row
from mergesearch.spaces.groups import Group, group_tensors
from mergesearch.spaces.parts.coefficient_coordinates import DirectionCoordinates
from mergesearch.spaces.parts.curves import Curve
from mergesearch.spaces.parts.partition import Partition, weighted_mean

#: Directions with a mean of their own.
_SUMMARISED = 8


@dataclass(frozen=True, eq=False)
class MeanCoefficients:
    """Parameter-weighted mean coefficients of fields over a partition.

    Attributes:
        partition: The groups; tensors in none of them are left out.
        names: Names of the directions.
    """

    partition: Partition
    names: tuple[str, ...]

    def of(self, field: Field) -> dict[str, float]:
        """Means per direction (the first eight), third of depth, attention, and MLP."""
        pieces = self.partition.split(field)
        mean = pieces.values.mean(axis=0)
        summary = {
            f"expert {name}": weighted_mean(row, pieces.weight)
            for name, row in zip(self.names[:_SUMMARISED], pieces.values, strict=False)
        }
        for label, members in self._members.items():
            share = pieces.weight * members[pieces.tensor]
            if share.any():
                summary[label] = weighted_mean(mean, share)
        return summary

    @cached_property
    def _members(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Which of the partition's tensors each mean over directions covers ``(tensors,)``."""
        depths = {
            group.name: group.depth for group in group_tensors(self.partition.layout, "tensor")
        }
        names = self.partition.tensors
        depth = np.array(
            [np.nan if depths[name] is None else depths[name] for name in names], np.float64
        )
        roles = roles_of(self.partition.layout.names)
        module = np.array([roles[name].module for name in names])
        return {
            "depth early": depth < 1 / 3,
            "depth middle": (depth >= 1 / 3) & (depth <= 2 / 3),
            "depth late": depth > 2 / 3,
            "module attention": module == "attention",
            "module mlp": module == "mlp",
        }


def coefficient_table(
    coordinates: DirectionCoordinates, layout: Layout, copies: int
) -> tuple[Row, ...]:
    """Curves and groups with their tensors, parameters and number of coefficients.

    What is held and what stays at the base comes last.

    Args:
        coordinates: The coordinates of one direction.
        layout: Where the tensors lie.
        copies: How many directions have coordinates of their own.
    """
    groups = coordinates.groups
    rows = [
        _row(
            _curve_label(curve),
            [groups[index] for index in curve.groups],
            copies * curve.basis.terms,
        )
        for curve in coordinates.curves
    ]
    rows += [_row(groups[index].name, [groups[index]], copies) for index in coordinates.own]
    if coordinates.held:
        rows.append(_row("held at the start", [groups[index] for index in coordinates.held], 0))
    grouped = {name for group in groups for name in group.tensors}
    rest = [spec for spec in layout.tensors if spec.name not in grouped]
    if rest:
        names = tuple(spec.name for spec in rest)
        rows.append(Row("kept at the base", names, sum(spec.size for spec in rest), 0))
    return tuple(rows)


def _row(label: str, groups: Sequence[Group], coefficients: int) -> Row:
    tensors = tuple(name for group in groups for name in group.tensors)
    return Row(label, tensors, sum(group.parameters for group in groups), coefficients)


def _curve_label(curve: Curve) -> str:
    return f"{curve.name or 'depth'}: {curve.basis.name} curve over {curve.basis.blocks} blocks"
