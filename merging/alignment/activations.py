"""What is compared by activations: units that answer alike on the same items are the same unit.

Activations are read where an operation contracts over units or normalises them: before products
of matrices, convolutions and layer norms. Each unit's activations are standardised, so that the
inner product of two is their correlation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mergesearch.merging.alignment.groups import Groups, Leaf, Leaves
from mergesearch.merging.alignment.matching import Term
from mergesearch.merging.alignment.subject import Subject
from mergesearch.merging.alignment.tracing import Place

#: Activations of a unit that are compared at one place, at most.
SAMPLES = 4096


def activation_terms(subject: Subject, expert: Any) -> list[Term]:
    """Terms of all places where activations of moved units are read.

    Args:
        subject: With the base and items.
        expert: Any source of the expert's weights.
    """
    groups = subject.groups
    places = {place: axes for place, axes in groups.reads.items() if front_of(axes, groups)}
    batches = subject.batches(expert.name)
    ours = collected(subject, subject.base, places, batches)
    theirs = collected(subject, expert, places, batches)
    return [
        Term(partial(_pair, ours[place], theirs[place]), (front_of(axes, groups), ()))
        for place, axes in places.items()
    ]


def front_of(axes: Leaves, groups: Groups) -> tuple[Leaf, ...]:
    """The leaves of an activation whose units may be reordered."""
    return tuple(
        leaf
        for axis in axes
        for leaf in axis
        if leaf.group is not None and groups.reorders(leaf.group)
    )


def units_first(tensor: torch.Tensor, axes: Leaves, groups: Groups) -> torch.Tensor:
    """An activation as ``(units, samples)``."""
    flat = [leaf for axis in axes for leaf in axis]
    split = tensor.reshape([leaf.size for leaf in flat] or [1])
    front = [at for at, leaf in enumerate(flat) if leaf in front_of(axes, groups)]
    units = 1
    for at in front:
        units *= flat[at].size
    return split.movedim(front, [*range(len(front))]).reshape(units, -1)


def collected(
    subject: Subject, source: Any, places: Mapping[Place, Leaves], batches: Sequence[Any]
) -> dict[Place, torch.Tensor]:
    """Standardised activations of a source at all places, ``(units, samples)``."""
    parts: dict[Place, list[torch.Tensor]] = {place: [] for place in places}
    limit = max(1, SAMPLES // max(len(batches), 1))
    for taken in subject.features(source, [*places], batches):
        for place, tensor in taken.items():
            units = units_first(tensor, at_batch(places[place], tensor), subject.groups)
            parts[place].append(thinned(units, limit))
    return {place: standardised(torch.cat(found, 1)) for place, found in parts.items()}


def at_batch(axes: Leaves, tensor: torch.Tensor) -> Leaves:
    """The leaves of an activation of another number of items or tokens.

    Only sizes of fixed leaves may differ; a dimension of several of them is given as one.
    """
    return tuple(_resized(axis, size) for axis, size in zip(axes, tensor.shape, strict=True))


def _resized(axis: tuple[Leaf, ...], size: int) -> tuple[Leaf, ...]:
    known = 1
    fixed = [leaf for leaf in axis if leaf.group is None]
    for leaf in axis:
        known *= leaf.size if leaf.group is not None else 1
    if not fixed:
        return axis
    first = next(at for at, leaf in enumerate(axis) if leaf.group is None)
    moving = [leaf for leaf in axis if leaf.group is not None]
    rest = axis[first:]
    # Fixed leaves that stand together are one; where they do not, sizes must be as traced.
    together = all(leaf.group is None for leaf in rest[: len(fixed)])
    if not together:
        return axis
    merged = Leaf(size // known, None)
    return (*moving[:first], merged, *moving[first:])


def thinned(units: torch.Tensor, limit: int) -> torch.Tensor:
    """At most ``limit`` samples, evenly spaced."""
    count = units.shape[1]
    if count <= limit:
        return units.clone()
    return units[:, torch.linspace(0, count - 1, limit).long()]


def standardised(units: torch.Tensor) -> torch.Tensor:
    """Units of mean 0 and length 1, ``(units, samples)``; constant ones are zero."""
    centred = units.double() - units.double().mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-12 * max(units.shape[1], 1), centred / length, 0.0)


def _pair(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ours, theirs
