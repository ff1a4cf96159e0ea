"""Pools of LoRA adapters: how much of each is kept, and how far it is added.

The space of Chen 2025, "Black-box model merging for language-model-as-a-service with massive model
repositories" (Evo-Merging), over the operator ``lora_sparse``. A point holds the share of each
adapter's A that is kept, alpha in [0, 1], and then its signed scale, beta in [−1.5, 1.5]. The
operator prunes at most 95 %, so an alpha below 0.05 counts as 0.05; a scale of 0 leaves an adapter
out.

Unlike in other spaces, the recipes of two points differ in hyperparameters, not in coefficients
alone: there is no one basis that all trials share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, InputError, Layout, Recipe
from mergesearch.spaces.base import (
    SUMMARY_SIZE,
    Point,
    Row,
    Space,
    cannot_hold,
    check_field,
    check_point,
    fits,
    named_values,
)
from mergesearch.spaces.parts.partition import weighted_mean
from mergesearch.spaces.request import SpaceRequest

#: The largest share of a matrix that ``lora_sparse`` prunes.
MOST_PRUNED = 0.95


@dataclass(frozen=True, eq=False)
class AdapterSpace:
    """The shares of N adapters that are kept, then their N scales.

    Attributes:
        template: The merge whose coefficients and sparsity are replaced; its operator is
            ``lora_sparse``.
        layout: Where the tensors lie.
        lower, upper, start: float64 ``(2 N,)``.
    """

    template: Recipe
    layout: Layout
    lower: Point
    upper: Point
    start: Point

    @property
    def adapters(self) -> int:
        """Number of adapters N."""
        return len(self.template.experts)

    @property
    def title(self) -> str:
        """What the space is, in a few words."""
        return f"keep and scale of {self.adapters} adapters"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """``rotated/keep``, ..., then ``rotated/scale``, ..."""
        return tuple(
            f"{expert.name}/{label}"
            for label in ("keep", "scale")
            for expert in self.template.experts
        )

    def field(self, point: Point) -> Field:
        """One segment with the scales as coefficients; NaN and infinity pass through."""
        return Field.constant(
            self.layout.size, check_point(point, 2 * self.adapters)[self.adapters :]
        )

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``: sparsity 1 − alpha, and the scales as coefficients."""
        keep = check_point(point, 2 * self.adapters)[: self.adapters]
        sparsity = np.clip(1.0 - keep, 0.0, MOST_PRUNED).tolist()
        options = self.template.options | {"sparsity": sparsity}
        return replace(
            self.template, hyperparameters=tuple(sorted(options.items())), field=self.field(point)
        )

    def encode(self, field: Field) -> Point | None:
        """The point with the template's sparsity and the coefficients of ``field``.

        It may lie outside the bounds; None if the coefficients are not constant.
        """
        compact = field.compact()
        if not fits(field, self.adapters, self.layout.size) or compact.segments != 1:
            return None
        return np.concatenate([_kept_shares(self.template), compact.values[:, 0]])

    def refine(self, point: Point, finer: Space) -> Point:
        """The same point, in a space of the same adapters.

        Raises:
            RecipeError: If ``finer`` is anything else.
        """
        if not isinstance(finer, AdapterSpace) or finer.names != self.names:
            raise cannot_hold(finer, f"a point of a {self.title} space")
        return check_point(point, 2 * self.adapters).copy()

    def summary(self, point: Point) -> dict[str, float]:
        """The coordinates if there are at most 16, else mean coordinates and the first scales."""
        point = check_point(point, 2 * self.adapters)
        if point.size <= SUMMARY_SIZE:
            return named_values(self.names, point)
        keep = point[: self.adapters]
        scales = point[self.adapters :]
        means = {"keep": keep.mean(), "scale": scales.mean(), "|scale|": np.abs(scales).mean()}
        named = zip(
            self.names[self.adapters :], scales[: SUMMARY_SIZE - len(means)].tolist(), strict=False
        )
        return {name: float(mean) for name, mean in means.items()} | dict(named)

    def summary_of(self, field: Field) -> dict[str, float]:
        """The same numbers for a field: the template's sparsity, and mean coefficients.

        Raises:
            RecipeError: If ``field`` has another size or number of directions.
        """
        check_field(field, self.adapters, self.layout.size)
        width = np.diff(field.boundaries).astype(np.float64)
        scales = [weighted_mean(row, width) for row in field.values]
        return self.summary(np.append(_kept_shares(self.template), scales))

    def table(self) -> tuple[Row, ...]:
        """One row: both numbers of an adapter hold for all tensors."""
        return (Row("all", self.layout.names, self.layout.parameters, 2 * self.adapters),)


def adapter_space(template: Recipe, layout: Layout) -> AdapterSpace:
    """The space over the adapters of ``template``; its start keeps all of each, and averages them.

    Raises:
        InputError: If the operator is not ``lora_sparse``.
    """
    from mergesearch.merging.operators import get_operator

    if template.operator != "lora_sparse":
        raise InputError(
            f"operator: the space of adapters expects 'lora_sparse', received {template.operator!r}"
        )
    adapters = len(template.experts)
    operator = get_operator("lora_sparse")
    low, high = operator.bounds(adapters, {})
    return AdapterSpace(
        template,
        layout,
        lower=np.repeat([0.0, low], adapters),
        upper=np.repeat([1.0, high], adapters),
        start=np.repeat([1.0, operator.default(adapters, {})], adapters),
    )


def build_adapter_space(request: SpaceRequest) -> AdapterSpace:
    """The space over the adapters of the study.

    Raises:
        InputError: If the operator is not ``lora_sparse``.
    """
    return adapter_space(request.template, request.model_layout)


def _kept_shares(template: Recipe) -> npt.NDArray[np.float64]:
    """The share of each adapter that the template keeps ``(adapters,)``."""
    from mergesearch.merging.operators import get_operator
    from mergesearch.merging.operators.parts.election import one_minus

    adapters = len(template.experts)
    sparsity = get_operator("lora_sparse").complete(template.options)["sparsity"]
    shares = sparsity if isinstance(sparsity, list) else [sparsity] * adapters
    return np.array([one_minus(share) for share in shares])
