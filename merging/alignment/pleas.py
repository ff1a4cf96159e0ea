"""PLeaS: units that agree are merged, those that agree least are kept apart in wider layers.

Nasery et al., "PLeaS: Merging Models with Permutations and Least Squares" (2024), for two models:
after matching, the share ``fraction`` of the units of a layer that agree least is kept twice, so
that the layer gets ``(1 + fraction)`` times as wide. Here base and expert are both written in these
wider coordinates, and each still computes what it did: units of the other are there, but nothing
reads them. Their average is the paper's merge before its least squares: averages between merged
units, halves from separate units to merged ones, whole weights into separate units, and nothing
between units that are separate in different models. All other coefficients are merges, too.

Only widths that a configuration can say are changed: hidden units of feed-forward layers, and all
channels of a ResNet.
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
from mergesearch.merging.errors import RecipeError

#: Type of a model -> the keys of its configuration that give the widths of all its units.
WHOLE: Mapping[str, tuple[str, ...]] = {"resnet": ("embedding_size", "hidden_sizes")}
#: Keys that give the number of hidden units of feed-forward layers.
HIDDEN = ("intermediate_size", "ffn_dim", "d_ff")
#: Tensors of a feed-forward layer at most: two matrices and a gate, and biases of two.
MOST_MEMBERS = 5

#: Group -> units of the base that are kept apart from the expert's in the same places.
Apart = Mapping[int, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Widened:
    """Base and expert in wider coordinates.

    Attributes:
        alignment: Brings the expert's units into the base's order.
    """

    alignment: ExpertAlignment

    @cached_property
    def groups(self) -> Groups:
        """Groups of the base."""
        return self.alignment.subject.groups

    @cached_property
    def sizes(self) -> Mapping[int, int]:
        """Group -> number of its units that are kept apart, for those that get wider.

        Raises:
            RecipeError: If no configuration could say the new widths.
        """
        config = self.alignment.subject.base.config
        fraction = self.alignment.spec.fraction
        found = {
            index: round(fraction * self.groups.groups[index].size)
            for index in self.groups.order
            if _may_widen(self.groups, index, config)
        }
        if not found:
            raise RecipeError(
                "align: pleas: expected a model whose configuration gives the number of hidden "
                f"units ({', '.join(HIDDEN)}) or a ResNet, received {config.get('model_type')}; "
                "use weight_matching"
            )
        return {index: count for index, count in found.items() if count}

    @property
    def config(self) -> dict[str, Any]:
        """The configuration with the new widths."""
        config = dict(self.alignment.subject.base.config)
        fraction = self.alignment.spec.fraction
        for key in WHOLE.get(str(config.get("model_type")), HIDDEN):
            if isinstance(config.get(key), list):
                config[key] = [size + round(fraction * size) for size in config[key]]
            elif isinstance(config.get(key), int):
                config[key] += round(fraction * config[key])
        return config

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that change."""
        base = self.alignment.subject.base
        return {
            name: tuple(
                size + (0 if group is None else self.sizes[group])
                for size, group in zip(base.shape(name), groups, strict=True)
            )
            for name in self.groups.tensors
            for groups in [self._wide(name)]
            if any(group is not None for group in groups)
        }

    @cached_property
    def apart(self) -> Apart:
        """Units of every wider group that agree least, in the order of the base."""
        agreements = {index: self._agreement(index) for index in self.sizes}
        return {
            index: agreements[index].argsort(stable=True)[:count].sort().values
            for index, count in self.sizes.items()
        }

    def read(self, name: str, *, expert: bool) -> torch.Tensor:
        """A tensor of base or expert in the wider coordinates."""
        ours = self.alignment.subject.base.read(name)
        theirs = self._expert(name)
        kept = (theirs if expert else ours).dtype
        ours, theirs = ours.to(kept), theirs.to(kept)
        wide = self._wide(name)
        size = len(ours) if ours.ndim else 0
        for place, group in enumerate(wide):
            if group is not None:
                ours = _base_axis(ours, place, self.sizes[group])
                theirs = _expert_axis(theirs, place, self.apart[group])
        result = (theirs if expert else ours).clone()
        if wide and wide[0] is not None:
            # Units of the other model compute what they do there, so that averages keep them.
            rows = self.apart[wide[0]] if expert else torch.arange(size, len(result))
            result[rows] = (ours if expert else theirs)[rows]
        return result

    def _expert(self, name: str) -> torch.Tensor:
        groups, moves = self.alignment.found
        return moved(self.alignment.expert.read(name), groups.tensors[name], groups, moves)

    def _wide(self, name: str) -> tuple[int | None, ...]:
        """The wider group of each dimension of a tensor."""
        return tuple(
            axis[0].group if len(axis) == 1 and axis[0].group in self.sizes else None
            for axis in self.groups.tensors[name]
        )

    def _agreement(self, index: int) -> torch.Tensor:
        """Cosine of every unit of the base with the expert's in its place, ``(units,)``."""
        size = self.groups.groups[index].size
        products = torch.zeros(3, size, dtype=torch.float64)
        for name, place in self.groups.members(index):
            ours, theirs = (
                tensor.movedim(place, 0).reshape(size, -1).double()
                for tensor in (self.alignment.subject.base.read(name), self._expert(name))
            )
            products += torch.stack([(ours * theirs).sum(1), (ours**2).sum(1), (theirs**2).sum(1)])
        return products[0] / (products[1] * products[2]).sqrt().clamp_min(1e-30)


def _may_widen(groups: Groups, index: int, config: Mapping[str, Any]) -> bool:
    group = groups.groups[index]
    if group.outer or any(index in other.outer for other in groups.groups):
        return False
    if str(config.get("model_type")) in WHOLE:
        return True
    hidden = {config.get(key) for key in HIDDEN}
    return group.size in hidden and len(groups.members(index)) <= MOST_MEMBERS


def _base_axis(tensor: torch.Tensor, place: int, more: int) -> torch.Tensor:
    """A tensor of the base with zeros where the expert's own units are."""
    shape = list(tensor.shape)
    shape[place] = more
    return torch.cat([tensor, tensor.new_zeros(shape)], place)


def _expert_axis(tensor: torch.Tensor, place: int, apart: torch.Tensor) -> torch.Tensor:
    """A tensor of the expert with its own units at the end, and zeros where the base's are."""
    own = tensor.index_select(place, apart)
    return torch.cat([tensor.index_fill(place, apart, 0), own], place)
