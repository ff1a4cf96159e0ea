"""The box of a merge of experts x blocks, with the names that a study gives its coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from experiments.league.landscape import Array
from mergesearch.merging import Field, Recipe, Source
from mergesearch.spaces.box_space import BoxSpace


@dataclass(frozen=True, eq=False)
class MergeBox(BoxSpace):
    """A box whose coordinates are coefficients: those of all experts in a block, then the next.

    Attributes:
        experts: Their number.
    """

    experts: int = 1

    @cached_property
    def names(self) -> tuple[str, ...]:
        """``expert 0/block 0``, ``expert 1/block 0``, ..."""
        return tuple(
            f"expert {index % self.experts}/block {index // self.experts}"
            for index in range(self.dim)
        )


def merge_box(lower: Array, upper: Array, start: Array, experts: int) -> MergeBox:
    """The box of a league problem, whose points have no weights behind them."""
    template = Recipe(Source("", ""), (), "task_arithmetic", Field.constant(1, [0.0]), ())
    return MergeBox(lower.size, lower, upper, start, template, experts)
