"""A box of numbers, and the merge that each point stands for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, Layout, Recipe, RecipeError
from mergesearch.merging.tensors.roles import classify
from mergesearch.spaces.depth_basis import Curve
from mergesearch.spaces.groups import Group, group_tensors
from mergesearch.spaces.partition import Partition, difference, weighted_mean

Point = npt.NDArray[np.float64]

#: Dashboards show this many numbers per trial at most.
SUMMARY_SIZE = 16

#: Two fields are the same to rounding below this difference, relative to coefficients above one.
ROUNDING = 1e-12

_Index = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Row:
    """One line of the table that describes a space: tensors that share a group or a curve, and
    their coefficients.
    """

    group: str
    tensors: tuple[str, ...]
    parameters: int
    coefficients: int


class Space(Protocol):
    """What a search needs to know of a space. All arrays are float64 ``(dim,)``."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the coordinates, such as ``rotated/block 3/attention``."""

    @property
    def title(self) -> str:
        """What the space is, in a few words."""

    @property
    def lower(self) -> Point:
        """Lower bounds."""

    @property
    def upper(self) -> Point:
        """Upper bounds."""

    @property
    def start(self) -> Point:
        """Where a search begins; inside the bounds."""

    def field(self, point: Point) -> Field:
        """The coefficients at ``point``, in or out of the bounds. NaN and infinity pass through."""

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``."""

    def encode(self, field: Field) -> Point | None:
        """The point whose field equals ``field`` exactly, or None if the space does not hold it.

        The point may lie outside the bounds: a known merge need not be one that the search may
        propose.
        """

    def refine(self, point: Point, finer: Space) -> Point:
        """The point of ``finer`` with the same coefficients (to rounding where a curve has to be
        fitted).

        It may lie outside the bounds of ``finer``.

        Raises:
            RecipeError: If ``finer`` cannot hold them.
        """

    def summary(self, point: Point) -> dict[str, float]:
        """At most 16 named numbers for dashboards, with the same names for every point."""

    def summary_of(self, field: Field) -> dict[str, float]:
        """The same numbers for a field that the space need not hold, read as well as they can
        be.
        """

    def table(self) -> tuple[Row, ...]:
        """Groups with their tensors, parameters and number of coefficients."""


@runtime_checkable
class DifferentiableSpace(Space, Protocol):
    """A space whose fields depend smoothly on the point."""

    def pull_back(self, point: Point, gradient: npt.NDArray[np.float64]) -> Point:
        """Gradient with respect to the point, from that with respect to the values of
        ``field(point)``.

        Args:
            point: ``(dim,)``.
            gradient: ``(directions, segments)``, on the segments of ``field(point)``.
        """


def check_point(point: Point, dim: int) -> Point:
    """``point`` as float64 ``(dim,)``.

    Raises:
        RecipeError: If it has another shape.
    """
    array = np.asarray(point, dtype=np.float64)
    if array.shape != (dim,):
        raise RecipeError(f"point: expected {dim} coordinates, received shape {array.shape}")
    return array


@dataclass(frozen=True, eq=False)
class CoefficientSpace:
    """Coefficients of the template's directions, constant on groups of tensors or along curves over
    depth.

    A point holds the coordinates of the first direction, then those of the second, and so on;
    within a direction first the terms of the curves, then one coefficient for each group that no
    curve covers.

    Attributes:
        template: The merge whose field is replaced; its field tells the number of directions K.
        layout: Where the tensors lie.
        title: What the space is, in a few words.
        groups: Disjoint groups of tensors; tensors in no group stay at the base, with coefficient
            0.
        lower, upper, start: float64 ``(dim,)``.
        curves: Curves over some of the groups.
        shared: One set of coordinates for all directions.
        clip: Range into which the values of curves are clipped, if any.
        held: Places among the groups of those whose coefficients no coordinate moves.
        values: Their coefficient of every direction ``(K,)``, or ``(1,)`` where all share one.
    """

    template: Recipe
    layout: Layout
    title: str
    groups: tuple[Group, ...]
    lower: Point
    upper: Point
    start: Point
    curves: tuple[Curve, ...] = ()
    shared: bool = False
    clip: tuple[float, float] | None = None
    held: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return len(self.names)

    @property
    def directions(self) -> int:
        """Number of directions K."""
        return self.template.field.directions

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the coordinates of one direction; empty where one coefficient covers
        everything.
        """
        terms = [
            f"{curve.name}/{term}".lstrip("/")
            for curve in self.curves
            for term in curve.basis.term_names
        ]
        whole = len(self.groups) == 1 and self.groups[0].name == "all"
        return (*terms, *("" if whole else self.groups[index].name for index in self._own))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the coordinates, such as ``rotated/block 3/attention``."""
        if self.shared:
            return tuple(label or "global" for label in self.labels)
        names = self._direction_names
        return tuple(
            f"{name}/{label}" if label else name for name in names for label in self.labels
        )

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``."""
        return self.template.with_field(self.field(point))

    def field(self, point: Point) -> Field:
        """The coefficients at ``point``: an exact gather for groups; NaN and infinity pass
        through.
        """
        rows = check_point(point, self.dim).reshape(-1, len(self.labels))
        table = np.zeros(
            (rows.shape[0], len(self.groups) + 1)
        )  # the last column is for what stays at the base
        for curve, place in self._slices:
            values = curve.basis.evaluate(rows[:, place])[:, curve.rows]
            table[:, curve.groups] = values if self.clip is None else _clip(values, *self.clip)
        if self.held:
            table[:, self.held] = np.array(self.values)[:, None]
        if self._own.size:
            table[:, self._own] = rows[:, -self._own.size :]
        values = table[:, self._partition.owners]
        return Field(
            self._partition.boundaries,
            np.repeat(values, self.directions, axis=0) if self.shared else values,
        )

    def pull_back(self, point: Point, gradient: npt.NDArray[np.float64]) -> Point:
        """Gradient with respect to the point, from that with respect to the values of
        ``field(point)``.

        Values that are clipped pull at nothing.

        Args:
            point: ``(dim,)``.
            gradient: ``(directions, segments)``, on the segments of ``field(point)``.

        Raises:
            RecipeError: If the gradient has another shape.
        """
        rows = check_point(point, self.dim).reshape(-1, len(self.labels))
        table = self._group_gradient(gradient)
        pulled = np.zeros(rows.shape)
        for curve, place in self._slices:
            slope = table[:, curve.groups]
            if self.clip is not None:
                values = curve.basis.evaluate(rows[:, place])[:, curve.rows]
                slope = np.where((values < self.clip[0]) | (values > self.clip[1]), 0.0, slope)
            pulled[:, place] = slope @ curve.basis.matrix[curve.rows]
        if self._own.size:
            pulled[:, -self._own.size :] = table[:, self._own]
        return pulled.ravel()

    def encode(self, field: Field) -> Point | None:
        """The point whose field equals ``field`` exactly, or None; it may lie outside the bounds.

        Curves hold constants and lines between given ends exactly. Other cosines and splines are
        found again only as far as floating point allows, so a field that came from them often gives
        None.
        """
        if field.directions != self.directions or field.size != self.layout.size:
            return None
        point = self.project(field)
        return point if difference(self.field(point), field) == 0.0 else None

    def project(self, field: Field) -> Point:
        """Read ``field`` in the coordinates of this space, as well as it can be read.

        Groups read the parameter-weighted mean coefficient, curves go through those means by least
        squares (a line through its two ends). Fields that the space holds are read exactly, or to
        rounding for cosines and splines.

        Raises:
            RecipeError: If ``field`` has another size or number of directions.
        """
        self._check_field(field)
        means = self._partition.means(field)
        if self.shared:
            means = means[:1] + (means - means[:1]).mean(axis=0, keepdims=True)
        parts = [curve.basis.solve(means[:, curve.groups], curve.rows) for curve in self.curves]
        return np.concatenate([*parts, means[:, self._own]], axis=1).ravel()

    def refine(self, point: Point, finer: Space) -> Point:
        """The point of ``finer`` with the same coefficients; it may lie outside the bounds of
        ``finer``.

        Values are copied where ``finer`` has a coefficient per group, and terms are copied to a
        curve of the same basis; a curve of another basis is fitted, and must meet the values to
        rounding (1e-12).

        Raises:
            RecipeError: If ``finer`` cannot hold them.
        """
        field = self.field(point)
        exact = finer.encode(field)
        if exact is not None:
            return exact
        if not isinstance(finer, CoefficientSpace):
            raise RecipeError(
                f"refine: a {finer.title} space cannot hold a point of a {self.title} space"
            )
        scale = max(1.0, float(np.abs(field.values).max()))
        for candidate in (self._copy_terms(point, finer), finer.project(field)):
            if difference(finer.field(candidate), field) <= ROUNDING * scale:
                return candidate
        raise RecipeError(
            f"refine: a {finer.title} space cannot hold this point of a {self.title} space: "
            "coefficients differ "
            f"at {self._partition.farthest(finer.field(candidate), field)!r}; choose a granularity "
            "that splits it"
        )

    def summary(self, point: Point) -> dict[str, float]:
        """The coordinates themselves up to 16 of them, else mean coefficients; names are the same
        for every point.
        """
        if self.dim <= SUMMARY_SIZE:
            return dict(zip(self.names, check_point(point, self.dim).tolist(), strict=True))
        return self._mean_coefficients(self.field(point))

    def summary_of(self, field: Field) -> dict[str, float]:
        """The same numbers for a field that the space need not hold, by :meth:`project`."""
        if self.dim <= SUMMARY_SIZE:
            return dict(zip(self.names, self.project(field).tolist(), strict=True))
        return self._mean_coefficients(field)

    def table(self) -> tuple[Row, ...]:
        """Curves and groups with their tensors, parameters and coefficients; what stays at the base
        comes last.
        """
        copies = 1 if self.shared else self.directions
        rows = []
        for curve in self.curves:
            members = [self.groups[index] for index in curve.groups]
            label = (
                f"{curve.name or 'depth'}: {curve.basis.name} curve over {curve.basis.blocks} "
                "blocks"
            )
            tensors = tuple(name for group in members for name in group.tensors)
            parameters = sum(group.parameters for group in members)
            rows.append(Row(label, tensors, parameters, copies * curve.basis.terms))
        for index in self._own:
            group = self.groups[index]
            rows.append(Row(group.name, group.tensors, group.parameters, copies))
        held = [self.groups[index] for index in self.held]
        if held:
            names = tuple(name for group in held for name in group.tensors)
            rows.append(Row("held at the start", names, sum(group.parameters for group in held), 0))
        grouped = {name for group in self.groups for name in group.tensors}
        rest = [spec for spec in self.layout.tensors if spec.name not in grouped]
        if rest:
            rows.append(
                Row("kept at the base", tuple(s.name for s in rest), sum(s.size for s in rest), 0)
            )
        return tuple(rows)

    @cached_property
    def _direction_names(self) -> tuple[str, ...]:
        # Operators that fuse experts have directions of their own.
        if len(self.template.experts) == self.directions:
            return tuple(expert.name for expert in self.template.experts)
        return tuple(f"direction {index}" for index in range(self.directions))

    @cached_property
    def _own(self) -> _Index:
        """Groups with a coefficient of their own."""
        covered = {int(index) for curve in self.curves for index in curve.groups} | {*self.held}
        return np.array(
            [index for index in range(len(self.groups)) if index not in covered], np.intp
        )

    @cached_property
    def _slices(self) -> tuple[tuple[Curve, slice], ...]:
        """Curves with the places of their terms among the coordinates of a direction."""
        stops = np.cumsum([curve.basis.terms for curve in self.curves], dtype=int).tolist()
        return tuple(
            (c, slice(stop - c.basis.terms, stop))
            for c, stop in zip(self.curves, stops, strict=True)
        )

    @cached_property
    def _partition(self) -> Partition:
        return Partition(self.layout, self.groups)

    def _group_gradient(self, gradient: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sums over the segments of each group, and over the directions that share a coordinate."""
        expected = (self.directions, len(self._partition.owners))
        if gradient.shape != expected:
            raise RecipeError(
                f"pull back: expected a gradient of shape {expected}, received {gradient.shape}"
            )
        rows = gradient.sum(axis=0, keepdims=True) if self.shared else gradient
        table = np.zeros((len(self.groups) + 1, len(rows)))
        np.add.at(table, self._partition.owners, rows.T)
        return table.T

    def _check_field(self, field: Field) -> None:
        if field.directions != self.directions or field.size != self.layout.size:
            raise RecipeError(
                f"field: expected {self.directions} directions over {self.layout.size} positions, "
                f"received {field.directions} over {field.size}"
            )

    def _copy_terms(self, point: Point, finer: CoefficientSpace) -> Point:
        """The point of ``finer`` whose curves repeat the terms of this space's curves of the same
        basis, then zeros.
        """
        source = point.reshape(-1, len(self.labels))
        target = finer.project(self.field(point)).reshape(-1, len(finer.labels))
        for curve, place in finer._slices:
            for coarse, origin in self._slices:
                if curve.extends(coarse):
                    target[:, place] = 0.0
                    target[:, place.start : place.start + coarse.basis.terms] = source[:, origin]
        return target.ravel()

    def _mean_coefficients(self, field: Field) -> dict[str, float]:
        """Parameter-weighted mean coefficient per expert (the first eight), third of depth,
        attention, and MLP.
        """
        self._check_field(field)
        pieces = self._partition.split(field)
        mean = pieces.values.mean(axis=0)
        rows = {
            f"expert {name}": row
            for name, row in zip(self._direction_names[:8], pieces.values, strict=False)
        }
        summary = {label: weighted_mean(row, pieces.weight) for label, row in rows.items()}
        for label, members in self._portraits.items():
            share = pieces.weight * members[pieces.tensor]
            if share.any():
                summary[label] = weighted_mean(mean, share)
        return summary

    @cached_property
    def _portraits(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Which of the partition's tensors each number of the summary averages, beside those per
        expert.
        """
        depths = {group.name: group.depth for group in group_tensors(self.layout, "tensor")}
        names = self._partition.tensors
        depth = np.array(
            [np.nan if depths[name] is None else depths[name] for name in names], np.float64
        )
        module = np.array([classify(name).module for name in names])
        return {
            "depth early": depth < 1 / 3,
            "depth middle": (depth >= 1 / 3) & (depth <= 2 / 3),
            "depth late": depth > 2 / 3,
            "module attention": module == "attention",
            "module mlp": module == "mlp",
        }


def _clip(values: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.float64]:
    """Clip finite values; the others must reach the merge, which calls the trial infeasible."""
    return np.where(np.isfinite(values), np.clip(values, low, high), values)
