"""The coordinates of the mixed space: which tensors share parameters, and what each method has to
be told.

See :mod:`mergesearch.spaces.mixed_space`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from mergesearch.merging import InputError, Layout, Recipe
from mergesearch.merging.tensors.roles import TensorRole, block_axes, classify

Method = Literal["linear", "task_arithmetic", "ties", "slerp"]

METHODS: tuple[Method, ...] = get_args(Method)

#: Which tensors of a group share parameters.
CellPart = Literal["attention", "mlp", "other"]

_PARTS: tuple[CellPart, ...] = get_args(CellPart)


@dataclass(frozen=True)
class Dimension:
    """One coordinate of a space with conditions.

    Attributes:
        name: Name of the coordinate.
        kind: ``real``, or one of ``choices``: in their order (``integer``) or without one
            (``categorical``).
        low, high: The box. A choice is a real number in [0, number of choices) that is rounded
            down.
        choices: What the numbers 0, 1, ... stand for, unless the dimension is real.
        condition: (index of another dimension, number of its choice) under which this one is
            active; None: always.
    """

    name: str
    kind: Literal["real", "integer", "categorical"]
    low: float
    high: float
    choices: tuple[Any, ...] = ()
    condition: tuple[int, int] | None = None

    @property
    def middle(self) -> float:
        """The value that stands for no information."""
        return (self.low + self.high) / 2 if self.kind == "real" else len(self.choices) // 2 + 0.5


@dataclass(frozen=True)
class Cell:
    """Tensors of a group that share the parameters of its method.

    Attributes:
        group: Number of the group.
        name: Label, such as ``blocks 0-1/attention``.
        tensors: Names of the tensors, in the order of the layout.
        parameters: Number of parameters.
        places: Method -> where its parameters are among the coordinates.
    """

    group: int
    name: str
    tensors: tuple[str, ...]
    parameters: int
    places: Mapping[Method, slice]


class Coordinates:
    """Collects groups with their cells and dimensions."""

    def __init__(self, template: Recipe, methods: tuple[Method, ...]) -> None:
        self._methods = methods
        self._parameters = _parameters(template)
        self.groups: list[str] = []
        self.cells: list[Cell] = []
        self.dimensions: list[Dimension] = []
        self.choices: list[int | None] = []

    def add(self, name: str, members: Mapping[CellPart, Sequence[str]], layout: Layout) -> None:
        """A group of the tensors of each part."""
        choice = None
        if len(self._methods) > 1:
            choice = len(self.dimensions)
            high = float(len(self._methods))
            self.dimensions.append(
                Dimension(f"{name}/method", "categorical", 0.0, high, self._methods)
            )
        for part in (part for part in _PARTS if part in members):
            label = f"{name}/{part}"
            tensors = tuple(members[part])
            places = {method: self._append(label, method, choice) for method in self._methods}
            parameters = sum(layout.by_name[tensor].size for tensor in tensors)
            self.cells.append(Cell(len(self.groups), label, tensors, parameters, places))
        self.groups.append(name)
        self.choices.append(choice)

    def _append(self, label: str, method: Method, choice: int | None) -> slice:
        """Append the parameters of a method; where they are."""
        start = len(self.dimensions)
        condition = None if choice is None else (choice, self._methods.index(method))
        for plain in self._parameters[method]:
            self.dimensions.append(
                replace(plain, name=f"{label}/{method} {plain.name}", condition=condition)
            )
        return slice(start, len(self.dimensions))


def _parameters(template: Recipe) -> dict[Method, list[Dimension]]:
    """What each method has to be told for a cell."""
    from mergesearch.merging.operators import get_operator

    experts = len(template.experts)
    densities = tuple(densities_of(template))
    ties = get_operator("ties")
    each = [Dimension(expert.name, "real", 0.0, 1.0) for expert in template.experts]
    return {
        "linear": each,
        "task_arithmetic": [Dimension("scale", "real", 0.0, 1.0)],
        "ties": [
            Dimension("density", "integer", 0.0, float(len(densities)), densities),
            Dimension("scale", "real", *ties.bounds(experts, ties.complete({}))),
        ],
        "slerp": each,
    }


def grouped(layout: Layout, layers: int) -> dict[str, dict[CellPart, list[str]]]:
    """Group -> part -> tensors: blocks in their order, ``layers`` at a time; what lies outside them
    comes last.
    """
    places = {spec.name: classify(spec.name) for spec in layout.tensors}
    axes = block_axes(places.values())
    if not axes:
        raise InputError(
            f"space.layers: expected numbered blocks, received {len(places)} tensors without any, "
            "such as "
            f"{next(iter(places))!r}; search another space"
        )
    groups: dict[str, dict[CellPart, list[str]]] = {}
    for name, place in sorted(places.items(), key=lambda item: _depth(item[1])):
        group = groups.setdefault(_label(place, axes, layers), {})
        part: CellPart = place.module if place.module in ("attention", "mlp") else "other"
        group.setdefault(part, []).append(name)
    return groups


def _depth(place: TensorRole) -> tuple[bool, str, int]:
    outside = place.block is None
    return (outside, "" if outside else place.tower, -1 if place.block is None else place.block)


def _label(place: TensorRole, axes: Mapping[str, tuple[int, ...]], layers: int) -> str:
    if place.block is None:
        return "outside"
    axis = axes[place.tower]
    first = axis.index(place.block) // layers * layers
    blocks = axis[first : first + layers]
    tower = f"{place.tower}/" if len(axes) > 1 and place.tower else ""
    return (
        f"{tower}block {blocks[0]}"
        if len(blocks) == 1
        else f"{tower}blocks {blocks[0]}-{blocks[-1]}"
    )


def densities_of(template: Recipe) -> list[float]:
    """The densities of a stack."""
    from mergesearch.merging.operators import get_operator

    densities: list[float] = get_operator("stack").complete(template.options)["densities"]
    return densities
