"""What the last write left in a resident model, and what the next one has to merge of it.

A merged weight follows from its coefficients alone. Where these have the bits that they had at the
last write, the weight is still there, unless something else was written over it. torch counts the
writes into a parameter by its own operations, and a count that moved makes the next write merge
everything. It does not count what is written past it (``parameter.data``, numpy, fused optimizers,
running statistics of normalisation in training): statistics are therefore always merged, and who
hands a model to code that may do so calls :meth:`LastWrite.forget`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import nn

from mergesearch.merging.kernels.spans import Ranges, limits_of
from mergesearch.merging.models.layer_bits import Bits
from mergesearch.merging.resident.binding import Binding
from mergesearch.merging.resident.ranges import covered, differing, joined, meeting
from mergesearch.merging.resident.shard import Shard
from mergesearch.merging.tensors.field import Field

#: Share of the positions from which on everything is merged: fewer, larger pieces cost less.
WHOLE_FROM = 0.9

#: How often torch has written to a tensor; the number never falls.
_VERSION = attrgetter("_version")


@dataclass(frozen=True, eq=False)
class Changes:
    """What a write merges of one shard.

    Attributes:
        names: Tensors whose weights may become others.
        ranges: Positions whose weights may; None for all.
    """

    names: frozenset[str]
    ranges: Ranges | None = None


@dataclass(frozen=True, eq=False)
class _Tensors:
    """Tensors of a shard that are not empty.

    Attributes:
        names: In the order of the flat index.
        numbers: Name -> place in that order.
        limits: First positions, and those after the last ``(tensors, 2)``.
        everything: A change of all of them.
    """

    names: tuple[str, ...]
    numbers: dict[str, int]
    limits: Ranges
    everything: Changes

    @classmethod
    def of(cls, shard: Shard) -> _Tensors:
        specs = [spec for spec in shard.layout.tensors if spec.size]
        names = tuple(spec.name for spec in specs)
        numbers = {name: n for n, name in enumerate(names)}
        return cls(names, numbers, limits_of(specs), Changes(frozenset(names)))

    def met_by(self, ranges: Ranges) -> frozenset[str]:
        """Names of those that have positions in ranges."""
        found = np.flatnonzero(meeting(self.limits, ranges)).tolist()
        return frozenset(self.names[n] for n in found)


@dataclass(frozen=True, eq=False)
class _Written:
    """Fields of all shards, bits of tensors, and how often torch had written to the tensors."""

    fields: tuple[Field, ...]
    bits: dict[str, int]
    count: int


class LastWrite:
    """The merge that lies in a model, if it is known.

    Args:
        shards: Where the weights lie.
        bindings: The models around them; more may be added later.
    """

    def __init__(self, shards: Sequence[Shard], bindings: Sequence[Binding]) -> None:
        self._shards = shards
        self._bindings = bindings
        self._tensors = {shard: _Tensors.of(shard) for shard in shards}
        self._written: _Written | None = None
        #: Tensors whose writes torch counts; None where it does not count those of all.
        self._watched: tuple[torch.Tensor, ...] | None
        #: Stored names of what is no parameter.
        self._statistics: set[str]
        self._look_around()

    @property
    def everything(self) -> list[Changes]:
        """All that the shards have."""
        return [self._tensors[shard].everything for shard in self._shards]

    def forget(self) -> None:
        """Let the next write merge everything."""
        self._written = None

    def extend(self) -> None:
        """Take in a model that was added: its copies are not written yet."""
        self._written = None
        self._look_around()

    def keep(self, fields: Sequence[Field], bits: Bits) -> None:
        """Remember a write that succeeded.

        Args:
            fields: Of every shard.
            bits: Of tensors that were rounded.
        """
        count = self._count()
        if count is not None:
            self._written = _Written(tuple(map(_own, fields)), dict(bits), count)

    def changes(self, fields: Sequence[Field], bits: Bits) -> list[Changes]:
        """What a write has to merge of every shard; what was there is forgotten until it is kept.

        Args:
            fields: Of every shard.
            bits: Of tensors that are to be rounded.
        """
        last = self._written
        self._written = None
        rounded = dict(bits)
        twice = len(rounded) != len(bits)  # the order of rounding counts
        if last is None or twice or last.count != self._count():
            return self.everything
        return [
            self._changes_of(shard, (before, after), (last.bits, rounded))
            for shard, before, after in zip(self._shards, last.fields, fields, strict=True)
        ]

    def _changes_of(
        self, shard: Shard, fields: tuple[Field, Field], bits: tuple[dict[str, int], dict[str, int]]
    ) -> Changes:
        """What is to be merged of a shard, whose fields and bits were and are to be such."""
        before, after = fields
        tensors = self._tensors[shard]
        alike = (before.size, before.directions) == (after.size, after.directions)
        if shard.merged.device.type != "cpu" or not alike:
            return tensors.everything
        ranges = differing(before, after)
        anew = _rounded_anew(*bits, tensors.met_by(ranges)) if any(bits) else ()
        whole = [tensors.numbers[n] for n in (*self._statistics, *anew) if n in tensors.numbers]
        if whole:
            ranges = joined(np.concatenate((ranges, tensors.limits[whole])))
        if covered(ranges) >= WHOLE_FROM * after.size:
            return tensors.everything
        return Changes(tensors.met_by(ranges), ranges)

    def _count(self) -> int | None:
        """How often torch has written to all tensors together; None where it does not count."""
        return None if self._watched is None else sum(map(_VERSION, self._watched))

    def _look_around(self) -> None:
        """Find what is to be watched, and what forward passes may change, in all models."""
        held = [pair for binding in self._bindings for pair in binding.bound.values()]
        held += [(one.owner, one.name) for binding in self._bindings for one in binding.copied]
        parameters = [tensor for tensor, _ in held if isinstance(tensor, nn.Parameter)]
        watched = (*parameters, *(shard.merged for shard in self._shards))
        self._watched = None if any(tensor.is_inference() for tensor in watched) else watched
        self._statistics = {n for tensor, n in held if not isinstance(tensor, nn.Parameter)}


def _own(field: Field) -> Field:
    """A field whose boundaries are no view of an array that others may write to."""
    shared = field.boundaries.base is not None
    return Field(field.boundaries.copy(), field.values) if shared else field


def _rounded_anew(
    before: dict[str, int], after: dict[str, int], changed: frozenset[str]
) -> set[str]:
    """Tensors that are rounded as a whole, now or before, and must be merged as one.

    Rounding looks at whole tensors. What was rounded to the same bits from the same weights stays.
    """
    return {
        name for name in {*before, *after} if name in changed or before.get(name) != after.get(name)
    }
