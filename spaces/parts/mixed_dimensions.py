"""The coordinates of the mixed space: which tensors share parameters, and what each method takes.

See :mod:`mergesearch.spaces.mixed_space`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from mergesearch.merging import InputError, Layout, Recipe
from mergesearch.merging.tensors.roles import TensorRole, block_axes, block_names, roles_of
from mergesearch.spaces.base import Point
from mergesearch.spaces.parts.conditional_box import ConditionalBox, Dimension

Method = Literal["linear", "task_arithmetic", "ties", "slerp"]

METHODS: tuple[Method, ...] = get_args(Method)

#: The tensors of a group that share parameters: its attention, its MLPs, or all others.
CellPart = Literal["attention", "mlp", "other"]

_CELL_PARTS: tuple[CellPart, ...] = get_args(CellPart)


@dataclass(frozen=True)
class Cell:
    """Tensors of a group that share the parameters of its method.

    Attributes:
        group: Number of the group.
        name: Label, such as ``blocks 0-1/attention``.
        tensors: Names of the tensors, in the order of the layout.
        parameters: Number of parameters.
        slices: Method -> positions of its parameters among the coordinates.
    """

    group: int
    name: str
    tensors: tuple[str, ...]
    parameters: int
    slices: Mapping[Method, slice]


class MixedDimensions:
    """Collects groups with their cells and dimensions.

    Args:
        template: The merge; its operator is ``stack``.
        methods: The methods to choose from.
    """

    def __init__(self, template: Recipe, methods: tuple[Method, ...]) -> None:
        self._methods = methods
        self._parameters = _parameters(template)
        self.groups: list[str] = []
        self.cells: list[Cell] = []
        self.dimensions: list[Dimension] = []
        self.choices: list[int | None] = []

    def add(self, name: str, members: Mapping[CellPart, Sequence[str]], layout: Layout) -> None:
        """Add a group with a cell for each part of it."""
        choice = None
        if len(self._methods) > 1:
            choice = len(self.dimensions)
            high = float(len(self._methods))
            self.dimensions.append(
                Dimension(f"{name}/method", "categorical", 0.0, high, self._methods)
            )
        for part in (part for part in _CELL_PARTS if part in members):
            label = f"{name}/{part}"
            tensors = tuple(members[part])
            slices = {method: self._append(label, method, choice) for method in self._methods}
            parameters = sum(layout.by_name[tensor].size for tensor in tensors)
            self.cells.append(Cell(len(self.groups), label, tensors, parameters, slices))
        self.groups.append(name)
        self.choices.append(choice)

    def point(self, method: Method, parameters: float | npt.NDArray[np.float64] | None) -> Point:
        """The canonical point with one method in all groups.

        Args:
            method: The method.
            parameters: Its parameters in every cell; None leaves them in the middle.
        """
        box = ConditionalBox(tuple(self.dimensions))
        point = box.middle.copy()
        for choice in self.choices:
            if choice is not None:
                point[choice] = self._methods.index(method) + 0.5
        if parameters is not None:
            for cell in self.cells:
                point[cell.slices[method]] = parameters
        return box.canonical(point)

    def _append(self, label: str, method: Method, choice: int | None) -> slice:
        """Append the parameters of a method, and give their positions."""
        start = len(self.dimensions)
        condition = None if choice is None else (choice, self._methods.index(method))
        for plain in self._parameters[method]:
            self.dimensions.append(
                replace(plain, name=f"{label}/{method} {plain.name}", condition=condition)
            )
        return slice(start, len(self.dimensions))


def _parameters(template: Recipe) -> dict[Method, list[Dimension]]:
    """The parameters of each method for one cell."""
    from mergesearch.merging.operators import get_operator

    experts = len(template.experts)
    densities = tuple(densities_of(template))
    ties = get_operator("ties")
    per_expert = [Dimension(expert.name, "real", 0.0, 1.0) for expert in template.experts]
    return {
        "linear": per_expert,
        "task_arithmetic": [Dimension("scale", "real", 0.0, 1.0)],
        "ties": [
            Dimension("density", "integer", 0.0, float(len(densities)), densities),
            Dimension("scale", "real", *ties.bounds(experts, ties.complete({}))),
        ],
        "slerp": per_expert,
    }


def tensors_by_group(layout: Layout, layers: int) -> dict[str, dict[CellPart, list[str]]]:
    """Group -> part -> tensors.

    Blocks come in their order, ``layers`` of them in a group; what lies outside them comes last.

    Raises:
        InputError: If no block is recognised.
    """
    roles = roles_of(layout.names)
    axes = block_axes(roles.values())
    names = block_names(roles.values())
    if not axes:
        raise InputError(
            f"space.layers: expected numbered blocks, received {len(roles)} tensors without any, "
            f"such as {next(iter(roles))!r}; search another space"
        )
    groups: dict[str, dict[CellPart, list[str]]] = {}
    for name, role in sorted(roles.items(), key=lambda item: _depth(item[1])):
        group = groups.setdefault(_label(role, axes, names, layers), {})
        part: CellPart = role.module if role.module in ("attention", "mlp") else "other"
        group.setdefault(part, []).append(name)
    return groups


def _depth(role: TensorRole) -> tuple[bool, str, int]:
    """Sort key: blocks of each tower in their order, then what lies outside the blocks."""
    if role.block is None:
        return (True, "", -1)
    return (False, role.tower, role.block)


def _label(
    role: TensorRole,
    axes: Mapping[str, tuple[int, ...]],
    names: Mapping[tuple[str, int], str],
    layers: int,
) -> str:
    if role.block is None:
        return "outside"
    axis = axes[role.tower]
    first = axis.index(role.block) // layers * layers
    blocks = [names[role.tower, block] for block in axis[first : first + layers]]
    tower = f"{role.tower}/" if len(axes) > 1 and role.tower else ""
    if len(blocks) == 1:
        return f"{tower}block {blocks[0]}"
    return f"{tower}blocks {blocks[0]}-{blocks[-1]}"


def densities_of(template: Recipe) -> list[float]:
    """The densities of a stack."""
    from mergesearch.merging.operators import get_operator

    densities: list[float] = get_operator("stack").complete(template.options)["densities"]
    return densities
