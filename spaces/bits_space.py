"""Bits of each layer under a budget, beside the coefficients of a merge or without them.

Layers that matter more get more bits (Dumitru 2024, "Layer-Wise Quantization: A Pragmatic and
Effective Method for Quantizing LLMs Beyond Integer Bit-Levels"). A coordinate of a layer says how
many bits it should have more than the others; what it gets follows from the budget
(:func:`mergesearch.spaces.parts.bit_allocation.allocate_bits`), so every point keeps it. The two
measures of that paper, or numbers that a study gives, are where the search begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mergesearch.merging import Field, InputError, Recipe
from mergesearch.merging.models.layer_bits import WIDTHS, BitLayer, bit_layers, check_hqq
from mergesearch.spaces.base import SUMMARY_SIZE, Point, Row, Space, cannot_hold, check_point
from mergesearch.spaces.chunk_space import build_chunk_space
from mergesearch.spaces.group_space import build_curve_space, build_group_space
from mergesearch.spaces.parts.bit_allocation import Whole, allocate_bits, ranked_scores
from mergesearch.spaces.request import SpaceRequest
from mergesearch.spaces.section import BitsSpec


@dataclass(frozen=True, eq=False)
class BitsSpace:
    """Coordinates of another space, and one for the bits of each layer.

    Attributes:
        inner: The space of the coefficients.
        layers: What is rounded, layer by layer.
        choices: Bits to choose from, in increasing order.
        mean: Most bits of an element in the mean.
        prior: Scores of the layers where the search begins, in bits ``(layers,)``.
        only: Whether bits alone are searched; the coefficients stay at the start of ``inner``.
    """

    inner: Space
    layers: tuple[BitLayer, ...]
    choices: tuple[int, ...]
    mean: float
    prior: Point
    only: bool = False

    @property
    def title(self) -> str:
        """What the space is, in a few words."""
        bits = f"bits of {len(self.layers)} layers, {self.mean:g} in the mean"
        return bits if self.only else f"{self.inner.title} and {bits}"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the coordinates; those of bits are such as ``bits/block 3``."""
        own = tuple(f"bits/{layer.name}" for layer in self.layers)
        return own if self.only else (*self.inner.names, *own)

    @property
    def lower(self) -> Point:
        """Lower bounds."""
        return self._joined(self.inner.lower, np.full(len(self.layers), -self._reach))

    @property
    def upper(self) -> Point:
        """Upper bounds."""
        return self._joined(self.inner.upper, np.full(len(self.layers), self._reach))

    @property
    def start(self) -> Point:
        """The start of the coefficients, with the bits that the prior alone gives."""
        return self._joined(self.inner.start, np.zeros(len(self.layers)))

    @cached_property
    def template(self) -> Recipe:
        """The start as a recipe, whose field and bits the points replace."""
        return self.decode(self.start)

    def bits(self, point: Point) -> Whole:
        """Bits of each layer at ``point``: ``(layers,)``."""
        scores = self.prior + check_point(point, len(self.names))[-len(self.layers) :]
        sizes = [layer.size for layer in self.layers]
        return allocate_bits(scores, sizes, self.choices, self.mean)

    def field(self, point: Point) -> Field:
        """The coefficients at ``point``."""
        return self.inner.field(self._inner_point(point))

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``, rounded."""
        pairs = zip(self.layers, self.bits(point).tolist(), strict=True)
        widths = [(name, width) for layer, width in pairs for name in layer.tensors]
        return replace(self.inner.decode(self._inner_point(point)), bits=tuple(sorted(widths)))

    def encode(self, field: Field) -> Point | None:
        """The point with these coefficients and the bits of the start; None if there is none."""
        if self.only:
            return self.start if self.field(self.start) == field else None
        point = self.inner.encode(field)
        return None if point is None else self._joined(point, np.zeros(len(self.layers)))

    def refine(self, point: Point, finer: Space) -> Point:
        """The point of ``finer`` with the same coefficients and bits.

        Raises:
            RecipeError: If ``finer`` rounds other layers, or from another start.
        """
        same = isinstance(finer, BitsSpace) and (
            (finer.layers, finer.choices, finer.mean, finer.only)
            == (self.layers, self.choices, self.mean, self.only)
            and np.array_equal(finer.prior, self.prior)
        )
        if not same or not isinstance(finer, BitsSpace):
            raise cannot_hold(finer, f"a point of a {self.title} space")
        own = check_point(point, len(self.names))[-len(self.layers) :]
        if self.only:
            return own.copy()
        return finer._joined(self.inner.refine(self._inner_point(point), finer.inner), own)

    def summary(self, point: Point) -> dict[str, float]:
        """Bits in the mean of the layers, those of the first of them, and the coefficients."""
        inner = {} if self.only else self.inner.summary(self._inner_point(point))
        return self._summary(self.bits(point), inner)

    def summary_of(self, field: Field) -> dict[str, float]:
        """The same for any field, with the bits of the start."""
        inner = {} if self.only else self.inner.summary_of(field)
        return self._summary(self.bits(self.start), inner)

    def table(self) -> tuple[Row, ...]:
        """The rows of the coefficients, and one for the bits of each layer."""
        rows = self.inner.table()
        if self.only:
            rows = tuple(replace(row, coefficients=0) for row in rows)
        return (*rows, *(Row(f"bits/{each.name}", (), 0, 1) for each in self.layers))

    @property
    def _reach(self) -> float:
        """How far a layer can be moved: from the fewest bits to the most and back."""
        return float(self.choices[-1] - self.choices[0])

    def _joined(self, inner: Point, own: Point) -> Point:
        return own if self.only else np.concatenate([inner, own])

    def _inner_point(self, point: Point) -> Point:
        array = check_point(point, len(self.names))
        return self.inner.start if self.only else array[: -len(self.layers)]

    def _summary(self, bits: Whole, inner: dict[str, float]) -> dict[str, float]:
        numbers = {"bits in the mean": float(bits.mean())}
        numbers |= dict([*inner.items()][: SUMMARY_SIZE // 2])
        named = zip(self.layers, bits.tolist(), strict=True)
        numbers |= {f"bits/{layer.name}": float(width) for layer, width in named}
        return dict([*numbers.items()][:SUMMARY_SIZE])


def build_bits_space(request: SpaceRequest) -> BitsSpace:
    """The space that the section describes, with bits beside its coefficients.

    Raises:
        InputError: If a value is not allowed, hqq is missing, or the model has no blocks.
    """
    section = request.section
    bits = section.bits
    assert bits is not None
    choices = _choices(bits)
    check_hqq()
    layers = bit_layers(request.model_layout)
    return BitsSpace(
        _inner_space(request),
        layers,
        choices,
        bits.mean,
        _prior(request, bits, layers, choices),
        bits.only,
    )


def _inner_space(request: SpaceRequest) -> Space:
    if request.section.granularity == "chunk":
        return build_chunk_space(request)
    if request.section.depth is not None:
        return build_curve_space(request)
    return build_group_space(request)


def _choices(bits: BitsSpec) -> tuple[int, ...]:
    """The bits to choose from, in increasing order.

    Raises:
        InputError: If they are fewer than two, or the budget lies outside them.
    """
    choices = tuple(sorted({*bits.choices}))
    odd = [width for width in choices if width not in WIDTHS]
    if odd or len(choices) < 2 or len(choices) != len(bits.choices):
        raise InputError(
            f"space.bits.choices: expected two or more different ones of {list(WIDTHS)}, received "
            f"{bits.choices}"
        )
    if not choices[0] <= bits.mean <= choices[-1]:
        raise InputError(
            f"space.bits.mean: expected a number from {choices[0]} to {choices[-1]}, the least and "
            f"the greatest of the choices, received {bits.mean:g}"
        )
    return choices


def _prior(
    request: SpaceRequest, bits: BitsSpec, layers: Sequence[BitLayer], choices: tuple[int, ...]
) -> Point:
    """Where the search begins.

    Raises:
        InputError: If there are not as many numbers as layers, or no items to measure with.
    """
    if bits.prior == "lim" and bits.calibration is None:
        raise InputError(
            "space.bits.calibration: required key is missing: prior lim runs the experts on items; "
            "set it, or choose zd"
        )
    if bits.prior != "lim" and bits.calibration is not None:
        raise InputError("space.bits.calibration: only allowed with prior lim; leave it out")
    if bits.prior is None:
        return np.zeros(len(layers))
    if isinstance(bits.prior, str):
        assert request.importance is not None
        return ranked_scores(request.importance(bits), choices)
    if len(bits.prior) != len(layers):
        raise InputError(
            f"space.bits.prior: expected lim, zd or a list of {len(layers)} numbers, one for each "
            f"layer, received a list of {len(bits.prior)}"
        )
    return ranked_scores(np.array(bits.prior, np.float64), choices)
