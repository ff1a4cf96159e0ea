"""Experts of each block of one mixture under a budget, and weights of the experts in their groups.

How many experts a block keeps is a whole number (Li 2024, "Merge, Then Compress", lets usage decide
it). A coordinate of a block says how many experts it should have more than the others; what it gets
follows from the budget (:func:`mergesearch.spaces.parts.bit_allocation.allocate_bits`), so every
point keeps it. A coordinate of an expert is what is added to its share in its group, whichever
group that is at this number of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mergesearch.merging import Field, InputError, Recipe
from mergesearch.merging.mixture.in_recipe import with_mixture
from mergesearch.spaces.base import SUMMARY_SIZE, Point, Row, Space, cannot_hold, check_point
from mergesearch.spaces.parts.bit_allocation import Whole, allocate_bits
from mergesearch.spaces.section import MixtureSpec

#: Bounds of what is added to the share of an expert in its group.
WEIGHT_BOUNDS = (-0.5, 1.0)


@dataclass(frozen=True, eq=False)
class MixtureSpace:
    """A coordinate for the number of experts of each block, and one for the weight of each expert.

    Attributes:
        template: Recipe whose merge inside the mixture is set.
        blocks: Names of the blocks that have experts.
        experts: That each of them has.
        choices: Numbers of experts that a block may keep, in increasing order; with a single one
            there are no coordinates of numbers.
        mean: Most experts of a block in the mean.
        prior: Experts that each block should have more than the others at the start ``(blocks,)``.
        weight_bounds: Of the coordinates of weights; None where there are none.
    """

    template: Recipe
    blocks: tuple[str, ...]
    experts: int
    choices: tuple[int, ...]
    mean: float
    prior: Point
    weight_bounds: tuple[float, float] | None = None

    @property
    def title(self) -> str:
        """What the space is, in a few words."""
        kept = f"experts of {len(self.blocks)} blocks, {self.mean:g} in the mean"
        weights = f"weights of {self._weighted} experts"
        if not self._numbered:
            return f"{weights}, {self.choices[0]} kept in each block"
        return f"{kept}, and {weights}" if self._weighted else kept

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the coordinates, such as ``experts/block 3`` and ``weight/block 3/expert 0``."""
        numbers = [f"experts/{block}" for block in self.blocks] if self._numbered else []
        places = range(self.experts if self._weighted else 0)
        weights = [f"weight/{block}/expert {e}" for block in self.blocks for e in places]
        return (*numbers, *weights)

    @property
    def lower(self) -> Point:
        """Lower bounds."""
        low = 0.0 if self.weight_bounds is None else self.weight_bounds[0]
        return self._joined(np.full(self._numbered, -self._reach), np.full(self._weighted, low))

    @property
    def upper(self) -> Point:
        """Upper bounds."""
        high = 0.0 if self.weight_bounds is None else self.weight_bounds[1]
        return self._joined(np.full(self._numbered, self._reach), np.full(self._weighted, high))

    @property
    def start(self) -> Point:
        """The numbers that the prior alone gives, with weights by usage."""
        return np.zeros(self._numbered + self._weighted)

    def counts(self, point: Point) -> Whole:
        """Experts that each block keeps at ``point``: ``(blocks,)``."""
        array = check_point(point, len(self.names))
        if not self._numbered:
            return np.full(len(self.blocks), self.choices[0])
        scores = self.prior + array[: self._numbered]
        return allocate_bits(scores, [1] * len(self.blocks), self.choices, self.mean)

    def weights(self, point: Point) -> list[list[float]] | None:
        """What is added to the share of each expert of each block; None for nothing at all."""
        own = check_point(point, len(self.names))[self._numbered :]
        if not own.any():
            return None
        rows: list[list[float]] = own.reshape(len(self.blocks), self.experts).tolist()
        return rows

    def field(self, point: Point) -> Field:
        """The field of the template, whatever the point."""
        check_point(point, len(self.names))
        return self.template.field

    def decode(self, point: Point) -> Recipe:
        """The template with the numbers and weights at ``point``."""
        return self.recipe(self.counts(point).tolist(), self.weights(point))

    def recipe(self, counts: Sequence[int], weights: list[list[float]] | None = None) -> Recipe:
        """The template with given numbers of experts and weights.

        Args:
            counts: Experts of each block.
            weights: What is added to the share of each expert of each block.
        """
        options: dict[str, Any] = dict(self.template.mixture)
        operator = options.pop("operator")
        changed = {**options, "experts": [*counts], "weights": weights}
        return with_mixture(self.template, operator, changed)

    def encode(self, field: Field) -> Point | None:
        """None: coefficients alone are no point of this space."""
        return None

    def point_of(self, recipe: Recipe) -> Point | None:
        """The point of a merge inside the mixture, or None if the space does not hold it."""
        given = dict(recipe.mixture)
        counts = given.get("experts")
        weights = given.get("weights")
        if not isinstance(counts, list) or len(counts) != len(self.blocks):
            return None
        scores = np.array(counts, np.float64) - self.prior
        numbers = scores - scores.mean() if self._numbered else np.zeros(0)
        added = np.zeros(self._weighted) if weights is None else np.ravel(weights)
        if added.shape != (self._weighted,):
            return None
        point = self._joined(numbers, added)
        return point if self.decode(point).digest == recipe.digest else None

    def refine(self, point: Point, finer: Space) -> Point:
        """The same numbers and weights in another such space.

        Raises:
            RecipeError: If ``finer`` is anything else.
        """
        found = finer.point_of(self.decode(point)) if isinstance(finer, MixtureSpace) else None
        if found is None:
            raise cannot_hold(finer, f"a point of a {self.title} space")
        return found

    def summary(self, point: Point) -> dict[str, float]:
        """Experts in the mean, the most of a block, and those of the first blocks."""
        counts = self.counts(point)
        numbers = {
            "experts in the mean": float(counts.mean()),
            "most experts of a block": float(counts.max()),
        }
        pairs = zip(self.blocks, counts.tolist(), strict=True)
        numbers |= {f"experts/{block}": float(count) for block, count in pairs}
        return dict([*numbers.items()][:SUMMARY_SIZE])

    def summary_of(self, field: Field) -> dict[str, float]:
        """Nothing: coefficients say nothing of experts."""
        return {}

    def table(self) -> tuple[Row, ...]:
        """A row for each block, without tensors."""
        each = bool(self._numbered) + (self.experts if self._weighted else 0)
        return tuple(Row(f"experts/{block}", (), 0, each) for block in self.blocks)

    @property
    def _numbered(self) -> int:
        """Coordinates of numbers."""
        return len(self.blocks) if len(self.choices) > 1 else 0

    @property
    def _weighted(self) -> int:
        """Coordinates of weights."""
        return 0 if self.weight_bounds is None else len(self.blocks) * self.experts

    @property
    def _reach(self) -> float:
        """How far a block can be moved: from the fewest experts to the most and back."""
        return float(self.choices[-1] - self.choices[0])

    def _joined(self, numbers: Point, weights: Point) -> Point:
        return np.concatenate([numbers, weights])


def mixture_space(
    section: MixtureSpec,
    template: Recipe,
    blocks: Sequence[str],
    experts: int,
    *,
    usage: Sequence[int] | None = None,
    bounds: tuple[float, float] | None = None,
) -> MixtureSpace:
    """The space that a ``space.mixture`` section describes.

    Args:
        section: The section.
        template: Recipe whose merge inside the mixture is set.
        blocks: Names of the blocks that have experts.
        experts: That each of them has.
        usage: Experts that each block would keep by usage, for prior ``usage``.
        bounds: Of weights; None for the usual ones.

    Raises:
        InputError: If a value does not fit the mixture.
    """
    choices = _choices(section, experts)
    mean = _mean(section, len(blocks), choices)
    if len(choices) == 1 and not section.weights:
        raise InputError(
            f"space.mixture.choices: expected two numbers or more, or weights: true, received "
            f"{[*choices]} alone; nothing is left to search"
        )
    low, high = bounds or WEIGHT_BOUNDS
    if not low <= 0 <= high or low == high:
        raise InputError(
            f"space.bounds: expected [low, high] around 0, what is added to shares by usage at the "
            f"start, received [{low:g}, {high:g}]"
        )
    return MixtureSpace(
        template,
        tuple(blocks),
        experts,
        choices,
        mean,
        _prior(section, len(blocks), usage),
        (low, high) if section.weights else None,
    )


def _choices(section: MixtureSpec, experts: int) -> tuple[int, ...]:
    """Numbers of experts to choose from, in increasing order.

    Raises:
        InputError: If one is named twice, or is more than a block has.
    """
    given = section.choices or range(1, experts + 1)
    choices = tuple(sorted({*given}))
    if len(choices) != len(given) or choices[-1] > experts:
        raise InputError(
            f"space.mixture.choices: expected different numbers from 1 to {experts}, as many as a "
            f"block has, received {[*given]}"
        )
    return choices


def _mean(section: MixtureSpec, blocks: int, choices: Sequence[int]) -> float:
    """Experts of a block in the mean.

    Raises:
        InputError: If the budget lies outside the choices.
    """
    key = "mean" if section.total is None else "total"
    times = 1 if section.total is None else blocks
    given = section.mean if section.total is None else section.total
    assert given is not None
    if not choices[0] * times <= given <= choices[-1] * times:
        raise InputError(
            f"space.mixture.{key}: expected a number from {choices[0] * times} to "
            f"{choices[-1] * times}, the least and the most that the choices allow, received "
            f"{given:g}"
        )
    return given / times


def _prior(section: MixtureSpec, blocks: int, usage: Sequence[int] | None) -> Point:
    """Where the search begins.

    Raises:
        InputError: If there are not as many numbers as blocks.
    """
    if section.prior is None:
        return np.zeros(blocks)
    if section.prior == "usage":
        assert usage is not None
        return np.asarray(usage, np.float64)
    if len(section.prior) != blocks:
        raise InputError(
            f"space.mixture.prior: expected usage or a list of {blocks} numbers, one for each "
            f"block, received a list of {len(section.prior)}"
        )
    return np.array(section.prior, np.float64)
