"""Coefficients by role and depth: what a merge says of tensors in models of any depth.

A profile has a curve over depth for every role that its merge has coefficients for. Coefficients
are divided by the operator's default, so that other numbers of experts are comparable, and averaged
over directions, because an expert of one study stands for none of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, Layout
from mergesearch.merging.tensors.roles import ModelPart, Module
from mergesearch.spaces.groups import Group, group_tensors
from mergesearch.spaces.parts.partition import Partition

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Role:
    """What a tensor is and where it acts, apart from its depth.

    Attributes:
        tower: Tower of the model, empty where names tell none.
        module: What it is.
        part: Where it acts.
        numbered: Whether it is in a numbered block.
    """

    tower: str
    module: Module
    part: ModelPart
    numbered: bool

    @property
    def told(self) -> bool:
        """Whether the name tells anything: a module or the number of a block."""
        return self.numbered or self.module != "other"


@dataclass(frozen=True)
class RoleCurve:
    """Ratio to the default coefficient over the depth of one role.

    Attributes:
        depths: Rising, ``(depths,)``; 0 alone for a role outside the blocks.
        ratios: The ratio at each of them ``(depths,)``.
    """

    depths: _Array
    ratios: _Array

    def at(self, depth: float) -> float:
        """The ratio at a depth: interpolated between neighbours, constant beyond the ends."""
        return float(np.interp(depth, self.depths, self.ratios))


@dataclass(frozen=True)
class RoleProfile:
    """A curve for each role of a merge."""

    curves: dict[Role, RoleCurve]

    def at(self, role: Role, depth: float) -> float | None:
        """The ratio of a role at a depth, or None where the merge says nothing of it.

        A role that is in other towers only takes the mean over these.
        """
        if role in self.curves:
            return self.curves[role].at(depth)
        alike = [
            curve.at(depth)
            for other, curve in self.curves.items()
            if (other.module, other.part, other.numbered) == (role.module, role.part, role.numbered)
        ]
        return float(np.mean(alike)) if alike else None


def role_of(group: Group) -> Role:
    """The role of a group of one tensor."""
    found = group.role
    return Role(found.tower, found.module, found.part, found.block is not None)


def profile_of(layout: Layout, field: Field, default: float, tensors: Iterable[str]) -> RoleProfile:
    """The profile of a merge.

    Args:
        layout: The flat index.
        field: The merge's coefficients.
        default: The coefficient that ratios refer to, not 0.
        tensors: Names of the tensors whose coefficients were searched; others say nothing.
    """
    searched = set(tensors)
    groups = [group for group in _single_tensors(layout) if group.name in searched]
    means = Partition(layout, tuple(groups)).means(field).mean(axis=0) / default
    found: dict[Role, dict[float, list[tuple[float, int]]]] = {}
    for group, ratio in zip(groups, means.tolist(), strict=True):
        at_depths = found.setdefault(role_of(group), {})
        at_depths.setdefault(group.depth or 0.0, []).append((ratio, group.parameters))
    return RoleProfile({role: _curve(at_depths) for role, at_depths in found.items()})


def field_by_profiles(
    layout: Layout, directions: int, default: float, profiles: Sequence[RoleProfile]
) -> tuple[Field, int]:
    """The coefficients that profiles suggest, the same for all directions.

    Args:
        layout: The flat index.
        directions: Number of directions K.
        default: The coefficient that ratios are multiplied by; tensors of which no profile says
            anything take it.
        profiles: Each counts alike.

    Returns:
        The coefficients, and the number of tensors that some profile says something of.
    """
    groups = _single_tensors(layout)
    partition = Partition(layout, groups)
    known = [_mean_ratio(group, profiles) for group in groups]
    ratios = np.array([*(1.0 if ratio is None else ratio for ratio in known), 1.0])
    values = np.tile(default * ratios[partition.owners], (directions, 1))
    return Field(partition.boundaries, values), sum(ratio is not None for ratio in known)


def _mean_ratio(group: Group, profiles: Sequence[RoleProfile]) -> float | None:
    """Mean over the profiles that know the role of a tensor; None where none does."""
    role = role_of(group)
    ratios = [profile.at(role, group.depth or 0.0) for profile in profiles]
    known = [ratio for ratio in ratios if ratio is not None]
    return float(np.mean(known)) if known and role.told else None


def _single_tensors(layout: Layout) -> tuple[Group, ...]:
    """Every tensor that holds parameters as a group of its own."""
    return tuple(group for group in group_tensors(layout, "tensor") if group.parameters)


def _curve(at_depths: dict[float, list[tuple[float, int]]]) -> RoleCurve:
    """Parameter-weighted mean ratio at each depth."""
    depths = sorted(at_depths)
    ratios = []
    for depth in depths:
        values, weights = zip(*at_depths[depth], strict=True)
        ratios.append(np.average(values, weights=weights))
    return RoleCurve(np.array(depths), np.array(ratios))
