"""Experts of other widths than the base, brought to its shapes by optimal transport.

Imfeld et al., "Transformer Fusion with Optimal Transport" (ICLR 2024), heterogeneous fusion: with
``n`` units of the base and ``m`` of the expert, Sinkhorn's plan ``P (n, m)`` between their
activations has uniform marginals, so that ``n · P`` gives each unit of the base as a mean of units
of the expert, and ``m · Pᵀ`` the other way round. What a layer writes is mapped by the first, what
it reads by the second, so that sums over inputs keep their size; the authors' code uses ``n · P``
for both, which scales inputs by ``n / m``. Where ``n = m`` the two are the same.

Heads and their channels are one axis here: maps go across heads, as in the paper. Both models have
the same layers, and differ in widths alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mergesearch.merging.alignment.activations import collected, front_of
from mergesearch.merging.alignment.groups import Groups, Leaf
from mergesearch.merging.alignment.subject import Subject
from mergesearch.merging.alignment.transport import plan
from mergesearch.merging.errors import RecipeError

#: Groups of a dimension, outermost first.
Key = tuple[int, ...]


@dataclass(frozen=True)
class Plans:
    """How an expert of other widths gets the shapes of the base.

    Attributes:
        plans: Groups of a dimension -> plan ``(units of the base, units of the expert)``.
        groups: Of the base.
    """

    plans: Mapping[Key, torch.Tensor]
    groups: Groups

    def mapped(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the expert in the base's shape, in its own dtype."""
        for place, key in enumerate(map(key_of, self.groups.tensors.get(name, ()))):
            if key:
                own = self.plans[key]
                count = own.shape[1 if self.groups.inputs.get(name) == place else 0]
                wide = tensor.double().movedim(place, -1) @ (count * own).T
                tensor = wide.movedim(-1, place).to(tensor.dtype).contiguous()
        return tensor


def plans_between(subject: Subject, other: Subject, smoothing: float) -> dict[Key, torch.Tensor]:
    """Plans between the units of two models.

    Args:
        subject: The base.
        other: The expert, as the base of a subject of its own.
        smoothing: Of the plans.

    Raises:
        RecipeError: If the models differ in more than widths.
    """
    ours = subject.groups
    theirs = other.groups
    keys = {name: tuple(map(key_of, axes)) for name, axes in ours.tensors.items()}
    _check_alike(ours, theirs, keys)
    needed = {key for each in keys.values() for key in each if key}
    places = {
        place: axes
        for place, axes in ours.reads.items()
        if tuple(leaf.group for leaf in front_of(axes, ours)) in needed and place in theirs.reads
    }
    batches = subject.batches(other.base.name)
    first = collected(subject, subject.base, places, batches)
    second = collected(other, other.base, {p: theirs.reads[p] for p in places}, batches)
    costs: dict[Key, list[torch.Tensor]] = {}
    for place, axes in places.items():
        key = tuple(leaf.group for leaf in front_of(axes, ours) if leaf.group is not None)
        costs.setdefault(key, []).append(torch.cdist(first[place], second[place]) ** 2)
    lost = needed - {*costs}
    if lost:
        raise _other(f"units of {_example(keys, next(iter(lost)))} that no layer reads")
    return {key: plan(torch.stack(each).mean(0), smoothing) for key, each in costs.items()}


def to_tensors(plans: Mapping[Key, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Plans as named tensors, for a file."""
    return {",".join(map(str, key)): each for key, each in plans.items()}


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Inverse of :func:`to_tensors`."""
    return {tuple(map(int, name.split(","))): each for name, each in tensors.items()}


def key_of(axis: tuple[Leaf, ...]) -> Key:
    """The groups of a dimension; none if some of its units are fixed."""
    groups = [leaf.group for leaf in axis if leaf.group is not None]
    return tuple(groups) if len(groups) == len(axis) else ()


def _check_alike(ours: Groups, theirs: Groups, keys: Mapping[str, Sequence[Key]]) -> None:
    """Refuse models whose tensors do not go together dimension by dimension."""
    if {*ours.tensors} != {*theirs.tensors}:
        odd = sorted({*ours.tensors} ^ {*theirs.tensors})[0]
        raise _other(f"{odd} in one of them alone")
    pairs: dict[int | None, int | None] = {}
    for name, axes in ours.tensors.items():
        others = theirs.tensors[name]
        if len(axes) != len(others):
            raise _other(f"{name} of other dimensions")
        for place, (one, two) in enumerate(zip(axes, others, strict=True)):
            same = [leaf.size for leaf in one] == [leaf.size for leaf in two]
            fits = len(one) == len(two) and all(
                pairs.setdefault(a.group, b.group) == b.group for a, b in zip(one, two, strict=True)
            )
            if not fits or not (keys[name][place] or same):
                raise _other(f"{name}, dimension {place}, whose units are fixed or tied otherwise")


def _example(keys: Mapping[str, Sequence[Key]], key: Key) -> str:
    return next(name for name, each in keys.items() if key in each)


def _other(what: str) -> RecipeError:
    return RecipeError(
        "align: transport: expected an expert that differs from the base in widths alone, received "
        f"{what}; use models of one family"
    )
