"""From tensor names to groups that share coefficients.

:func:`group_tensors` collects the tensors of a layout at one of the granularities; where a tensor
is in its model comes from :mod:`mergesearch.merging.tensors.roles`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mergesearch.merging import InputError, Layout, TensorSpec
from mergesearch.merging.tensors.roles import (
    NO_ROLE,
    ModelPart,
    Module,
    TensorRole,
    block_axes,
    depth_in,
    roles_of,
)

#: How finely coefficients vary, from coarse to fine.
Granularity = Literal["global", "task", "module", "block", "block_module", "tensor"]

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


@dataclass(frozen=True)
class Group:
    """Tensors that share coefficients.

    Attributes:
        name: Label in tables, for example ``block 3/attention``.
        tensors: Names of the tensors, in the order of the layout.
        ranges: Flat ``(start, stop)`` ranges in increasing order; padding belongs to the tensor
            before it.
        parameters: Number of parameters, padding excluded.
        depth: 0 for the first block of its tower, 1 for the last, None outside the blocks.
        module: The module, where all its tensors are of one, else None.
        role: Role of its first tensor; none for groups that a study names.
    """

    name: str
    tensors: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    parameters: int
    depth: float | None
    module: Module | None
    role: TensorRole = NO_ROLE


def group_tensors(
    layout: Layout, granularity: Granularity, exclude: Collection[str] = ()
) -> tuple[Group, ...]:
    """Groups that cover every tensor of ``layout`` but the excluded ones, each exactly once.

    ``global`` and ``task`` make one group (and differ in whether experts share its coefficient);
    ``module`` one per module; ``block`` one per block, and ``block_module`` one per block and part,
    beside ``embedding``, ``final``, ``head`` and ``other`` for what lies outside the blocks;
    ``tensor`` one per tensor. Where a model has several towers, labels start with the tower.

    Args:
        layout: The tensors.
        granularity: One of :data:`GRANULARITIES`.
        exclude: Names of tensors to leave out.

    Raises:
        InputError: If no numbered block is recognised at a granularity that needs blocks, or
            nothing is left.
    """
    specs = [spec for spec in layout.tensors if spec.name not in exclude]
    if not specs:
        raise InputError(
            "space.exclude: expected at least one tensor to stay, received patterns that match all"
        )
    roles = roles_of(layout.names)
    axes = block_axes(roles[spec.name] for spec in specs)
    if granularity in ("block", "block_module") and not axes:
        raise InputError(
            f"space.granularity: {granularity!r} needs numbered blocks, received {len(specs)} "
            f"tensors without any, such as {specs[0].name!r}; use 'task', 'module' or 'tensor'"
        )
    buckets: dict[str, list[TensorSpec]] = {}
    for spec in sorted(specs, key=lambda spec: _order(roles[spec.name], granularity)):
        label = _label(spec.name, roles[spec.name], granularity, several_towers=len(axes) > 1)
        buckets.setdefault(label, []).append(spec)
    ends = _ends(layout)
    return tuple(
        _group(name, members, granularity, roles, axes, ends) for name, members in buckets.items()
    )


def group_of(layout: Layout, name: str, tensors: Collection[str]) -> Group:
    """The group of these tensors, under a name that says nothing of their role or depth."""
    return _plain_group(name, [layout.by_name[tensor] for tensor in tensors], _ends(layout))


def _ends(layout: Layout) -> dict[str, int]:
    """Name of a tensor -> where the next one begins."""
    return dict(zip(layout.names, [*layout.segment_starts(), layout.size][1:], strict=True))


def _plain_group(name: str, members: Collection[TensorSpec], ends: Mapping[str, int]) -> Group:
    members = sorted(members, key=lambda spec: spec.start)
    return Group(
        name=name,
        tensors=tuple(spec.name for spec in members),
        ranges=_join((spec.start, ends[spec.name]) for spec in members),
        parameters=sum(spec.size for spec in members),
        depth=None,
        module=None,
    )


_PARTS: tuple[ModelPart, ...] = (
    *("embedding", "projector", "attention", "mlp", "convolution", "state_space", "other"),
    *("final", "head"),
)
_MODULES: tuple[Module, ...] = get_args(Module)


def _order(role: TensorRole, granularity: Granularity) -> tuple[str, int, int, int]:
    """Sort key: per tower embedding, blocks, final norm, head; modules in their fixed order."""
    if granularity in ("global", "task", "tensor"):
        return ("", 0, 0, 0)
    if granularity == "module":
        return (role.tower, 0, 0, _MODULES.index(role.module))
    if role.block is None:
        return (role.tower, _PARTS.index(role.part), -1, 0)
    part = _PARTS.index(role.part) if granularity == "block_module" else 0
    return (role.tower, _PARTS.index("attention"), role.block, part)


def _label(name: str, role: TensorRole, granularity: Granularity, *, several_towers: bool) -> str:
    tower = f"{role.tower}/" if several_towers and role.tower else ""
    if granularity == "tensor":
        return name
    if granularity in ("global", "task"):
        return "all"
    if granularity == "module":
        return tower + role.module
    if role.block is None:
        return tower + role.part
    return f"{tower}block {role.block_name}" + (
        f"/{role.part}" if granularity == "block_module" else ""
    )


def _group(
    name: str,
    members: list[TensorSpec],
    granularity: Granularity,
    roles: Mapping[str, TensorRole],
    axes: Mapping[str, tuple[int, ...]],
    ends: Mapping[str, int],
) -> Group:
    group = _plain_group(name, members, ends)
    role = roles[group.tensors[0]]
    modules = {roles[tensor].module for tensor in group.tensors}
    blockwise = granularity in ("block", "block_module", "tensor")
    return replace(
        group,
        depth=depth_in(role, axes) if blockwise else None,
        module=modules.pop() if len(modules) == 1 else None,
        role=role,
    )


def _join(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges in increasing order with touching neighbours joined and empty ones dropped."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)


def groups_by_name(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Name of a group -> its tensors, of blocks, their modules, and modules of the whole model.

    Of two groups of one name the one beside the blocks is meant: ``embedding`` is what lies before
    them.
    """
    named: dict[str, tuple[str, ...]] = {}
    granularities: tuple[Granularity, ...] = ("module", "block_module", "block")
    for granularity in granularities:
        named |= _named(layout, granularity)
    return named


def groupings_by_name(layout: Layout) -> list[dict[str, tuple[str, ...]]]:
    """Ways to divide all tensors into groups that :func:`groups_by_name` knows, coarse ones first.

    They are those of modules, blocks, and modules of blocks, as far as a model has them.
    """
    known = groups_by_name(layout)
    granularities: tuple[Granularity, ...] = ("module", "block", "block_module")
    ways = [_named(layout, granularity) for granularity in granularities]
    return [way for way in ways if way and all(known[name] == way[name] for name in way)]


def _named(layout: Layout, granularity: Granularity) -> dict[str, tuple[str, ...]]:
    """Name of a group -> its tensors; none where the model has no numbered blocks."""
    try:
        groups = group_tensors(layout, granularity)
    except InputError:
        return {}
    return {group.name: group.tensors for group in groups}
