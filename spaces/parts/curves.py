"""Curves of a space: which groups of tensors each covers, at which depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mergesearch.merging.tensors.roles import ModelPart, TensorRole, block_axes
from mergesearch.spaces.groups import Group
from mergesearch.spaces.parts.depth_basis import Basis, BasisName, make_basis

Ends = Literal["own", "curve"]

_Index = npt.NDArray[np.intp]

_BLOCK_PARTS: tuple[ModelPart, ...] = (
    *("attention", "mlp", "convolution", "state_space", "other"),
)


@dataclass(frozen=True, eq=False)
class Curve:
    """One curve of a space.

    Attributes:
        tower: The tower that it runs over; empty where the model has only one.
        part: The part of the blocks that it covers; None for all.
        basis: Its basis, sampled at the blocks of the tower.
        groups: Indices of the groups that it covers ``(covered,)``.
        rows: Block on the tower's depth axis whose value each of them takes ``(covered,)``.
    """

    tower: str
    part: ModelPart | None
    basis: Basis
    groups: _Index
    rows: _Index

    @property
    def name(self) -> str:
        """Label such as ``vision/attention``; empty for the only curve."""
        return "/".join(word for word in (self.tower, self.part) if word)

    def extends(self, other: Curve) -> bool:
        """Whether this curve holds ``other``, restricted to its groups.

        It then has the same leading terms, and zeros after them.
        """
        same_axis = self.tower == other.tower and self.basis.blocks == other.basis.blocks
        covered = other.part in (None, self.part)
        more = self.basis.terms == other.basis.terms or (
            self.basis.name == "dct" and self.basis.terms > other.basis.terms
        )
        return same_axis and covered and self.basis.name == other.basis.name and more


def make_curves(
    groups: Sequence[Group], basis: BasisName, size: int | None, *, modules: bool, ends: Ends
) -> tuple[Curve, ...]:
    """Curves over the block groups, one per tower and, with ``modules``, per part of the blocks.

    Args:
        groups: Groups at granularity ``block``, or ``block_module`` with ``modules``.
        basis: Name of the basis.
        size: Number of terms; None for two on a line, otherwise four or as many as there are
            blocks.
        modules: Separate curves for attention and MLP.
        ends: With ``curve``, embeddings take the value at the first block, the final norm and the
            head that at the last (from the attention and the MLP curve if they are separate); with
            ``own`` no curve covers them.

    Raises:
        InputError: If ``size`` does not fit the number of blocks.
    """
    roles = [group.role for group in groups]
    axes = block_axes(roles)
    curves = []
    for tower, axis in axes.items():
        terms = size if size is not None else 2 if basis == "linear" else min(4, len(axis))
        sampled = make_basis(basis, terms, len(axis))
        parts = _parts(roles, tower) if modules else [None]
        label = tower if len(axes) > 1 else ""
        for part in parts:
            rows = _block_rows(roles, tower, axis, part)
            if ends == "curve":
                outside = _outside(roles, tower, only_tower=len(axes) == 1)
                rows |= _end_rows(outside, parts, part, len(axis) - 1)
            order = sorted(rows, key=lambda index: (rows[index], index))
            blocks = np.array([rows[index] for index in order])
            curves.append(Curve(label, part, sampled, np.array(order), blocks))
    return tuple(curves)


def _parts(roles: Sequence[TensorRole], tower: str) -> list[ModelPart | None]:
    """The parts that the blocks of a tower have, in their fixed order."""
    inside = {role.part for role in roles if role.block is not None and role.tower == tower}
    return [part for part in _BLOCK_PARTS if part in inside]


def _block_rows(
    roles: Sequence[TensorRole], tower: str, axis: tuple[int, ...], part: ModelPart | None
) -> dict[int, int]:
    """Group -> position of its block on the axis, for the groups of one part of the blocks."""
    return {
        index: axis.index(role.block)
        for index, role in enumerate(roles)
        if role.block is not None and role.tower == tower and part in (None, role.part)
    }


def _outside(roles: Sequence[TensorRole], tower: str, *, only_tower: bool) -> dict[int, ModelPart]:
    """Group -> part, for the groups outside the blocks that belong to a tower."""
    return {
        index: role.part
        for index, role in enumerate(roles)
        if role.block is None and (role.tower == tower or only_tower)
    }


def _end_rows(
    outside: Mapping[int, ModelPart],
    parts: Sequence[ModelPart | None],
    part: ModelPart | None,
    last: int,
) -> dict[int, int]:
    """Group -> block whose value it takes, for what one of the curves covers outside the blocks.

    The curve of the first part covers embeddings, that of the MLP the final norm and the head.
    """
    rows: dict[int, int] = {}
    if part == parts[0]:
        rows |= {index: 0 for index, kind in outside.items() if kind == "embedding"}
    if part == ("mlp" if "mlp" in parts else parts[-1]):
        rows |= {index: last for index, kind in outside.items() if kind in ("final", "head")}
    return rows
