"""PLeaS: units that agree are merged, those that agree least are kept apart in wider layers.

Nasery et al., "PLeaS: Merging Models with Permutations and Least Squares" (2024), for two models:
after matching, the share ``fraction`` of the units of a layer that agree least is kept twice, so
that the layer gets ``(1 + fraction)`` times as wide. Here base and expert are both written in these
wider coordinates, and each still computes what it did: units of the other are there, but nothing
reads them. Their average is the paper's merge before its least squares: averages between merged
units, halves from separate units to merged ones, whole weights into separate units, and nothing
between units that are separate in different models. All other coefficients are merges, too. The
second step, least squares on features, is the operator ``pleas``
(:mod:`mergesearch.merging.operators.pleas`).

The paper merges two models. More experts are matched to the base one by one; the same units are
kept apart for all of them, those that agree least in the mean, and a layer gets
``(1 + experts · fraction)`` times as wide.

Only widths that a configuration can say are changed (:mod:`mergesearch.merging.alignment.widths`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mergesearch.merging.alignment.aligning import ExpertAlignment
from mergesearch.merging.alignment.groups import Groups
from mergesearch.merging.alignment.moving import moved
from mergesearch.merging.alignment.widths import (
    Width,
    chosen_fractions,
    widened_config,
    widths_of,
)
from mergesearch.merging.tensors.owned import Owned

#: Group -> units of the base that are kept apart from the experts' in the same places.
Apart = Mapping[int, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Widened:
    """Base and experts in wider coordinates.

    Sources are counted from the base, which is 0.

    Attributes:
        alignments: Bring the units of each expert into the base's order; they have one subject
            and the same settings.
    """

    alignments: tuple[ExpertAlignment, ...]

    @property
    def groups(self) -> Groups:
        """Groups of the base."""
        return self.alignments[0].subject.groups

    @property
    def _base(self) -> Any:
        return self.alignments[0].subject.base

    @cached_property
    def widths(self) -> tuple[Width, ...]:
        """Widths that may be chosen.

        Raises:
            RecipeError: If no configuration could say new ones.
        """
        return widths_of(self.groups, self._base.config)

    @cached_property
    def _apart_by_width(self) -> list[tuple[Width, dict[int, int]]]:
        fractions = chosen_fractions(self.widths, self.alignments[0].spec.fraction)
        return [(width, width.apart(fractions[width.name])) for width in self.widths]

    @cached_property
    def sizes(self) -> Mapping[int, int]:
        """Group -> number of its units that are kept apart, for those that get wider."""
        return {
            index: count
            for _, counts in self._apart_by_width
            for index, count in counts.items()
            if count
        }

    @property
    def config(self) -> dict[str, Any]:
        """The configuration with the new widths."""
        added = {
            entry: len(self.alignments) * max(counts.values())
            for width, counts in self._apart_by_width
            for entry in width.entries
        }
        return widened_config(self._base.config, added)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that change."""
        return {
            name: tuple(
                size + (0 if group is None else self._added(group))
                for size, group in zip(self._base.shape(name), groups, strict=True)
            )
            for name in self.groups.tensors
            for groups in [self._wide(name)]
            if any(group is not None for group in groups)
        }

    @cached_property
    def apart(self) -> Apart:
        """Units of every wider group that agree least, in the order of the base."""
        agreements = {index: _agreement(self, index) for index in self.sizes}
        return {
            index: agreements[index].argsort(stable=True)[:count].sort().values
            for index, count in self.sizes.items()
        }

    def read(self, name: str, source: int) -> torch.Tensor:
        """A tensor of a source in the wider coordinates."""
        parts = [self.in_order(name, each) for each in range(len(self.alignments) + 1)]
        dtype = parts[source].dtype
        wide = self._wide(name)
        laid = [self._laid_out(part.to(dtype), each, wide) for each, part in enumerate(parts)]
        result = laid[source].clone()
        if wide and wide[0] is not None:
            # Units of the other models compute what they do there, so that averages keep them.
            for each, part in enumerate(laid):
                rows = self._own_places(wide[0], each)
                result[rows] = part[rows]
        return result

    def owned(self, name: str, source: int) -> Owned:
        """Which units of each dimension of a tensor a source has, None where it has all."""
        return tuple(
            None if group is None else self._owned_units(group, source)
            for group in (self._wide(name) if name in self.groups.tensors else ())
        )

    def _owned_units(self, group: int, source: int) -> torch.Tensor:
        size = self.groups.groups[group].size
        owned = torch.zeros(size + self._added(group), dtype=torch.bool)
        owned[:size] = True
        if source:
            owned[self.apart[group]] = False
            owned[self._own_places(group, source)] = True
        return owned

    def _own_places(self, group: int, source: int) -> torch.Tensor:
        """Where the units lie that a source keeps apart."""
        if source == 0:
            return self.apart[group]
        count = self.sizes[group]
        first = self.groups.groups[group].size + (source - 1) * count
        return torch.arange(first, first + count)

    def _added(self, group: int) -> int:
        return len(self.alignments) * self.sizes[group]

    def in_order(self, name: str, source: int) -> torch.Tensor:
        """A tensor in the base's order of units, before layers get wider."""
        if source == 0:
            tensor: torch.Tensor = self._base.read(name)
            return tensor
        alignment = self.alignments[source - 1]
        groups, moves = alignment.found
        return moved(alignment.expert.read(name), groups.tensors[name], groups, moves)

    def _laid_out(
        self, tensor: torch.Tensor, source: int, wide: tuple[int | None, ...]
    ) -> torch.Tensor:
        """A tensor with a source's own units in their places, and zeros where others' are."""
        for place, group in enumerate(wide):
            if group is None:
                continue
            own = tensor.index_select(place, self.apart[group])
            shape = list(tensor.shape)
            shape[place] += self._added(group)
            laid = tensor.new_zeros(shape)
            laid.narrow(place, 0, tensor.shape[place]).copy_(
                tensor if source == 0 else tensor.index_fill(place, self.apart[group], 0)
            )
            tensor = laid.index_copy(place, self._own_places(group, source), own)
        return tensor

    def _wide(self, name: str) -> tuple[int | None, ...]:
        """The wider group of each dimension of a tensor."""
        return tuple(
            axis[0].group if len(axis) == 1 and axis[0].group in self.sizes else None
            for axis in self.groups.tensors[name]
        )


def _agreement(widened: Widened, index: int) -> torch.Tensor:
    """Cosine of every unit of the base with the experts' in its place, summed, ``(units,)``."""
    size = widened.groups.groups[index].size
    total = torch.zeros(size, dtype=torch.float64)
    for source in range(1, len(widened.alignments) + 1):
        products = torch.zeros(3, size, dtype=torch.float64)
        for name, place in widened.groups.members(index):
            ours, theirs = (
                widened.in_order(name, each).movedim(place, 0).reshape(size, -1).double()
                for each in (0, source)
            )
            products += torch.stack([(ours * theirs).sum(1), (ours**2).sum(1), (theirs**2).sum(1)])
        total += products[0] / (products[1] * products[2]).sqrt().clamp_min(1e-30)
    return total
