"""Pools of LoRA adapters: how much of each to keep, and how far to add it.

The space of Chen 2025, "Black-box model merging for language-model-as-a-service with massive model
repositories" (Evo-Merging), over the operator ``lora_sparse``. A point holds what is kept of each
adapter's A, alpha in [0, 1], and then its signed scale, beta in [−1.5, 1.5]. The operator prunes at
most 95 %, so an alpha below 0.05 counts as 0.05; a scale of 0 leaves an adapter out.

Unlike in other spaces, the recipes of two points differ in hyperparameters, not in coefficients
alone: there is no one basis that all trials share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, InputError, Layout, Recipe, RecipeError
from mergesearch.spaces.coefficient_space import SUMMARY_SIZE, Point, Row, Space, check_point
from mergesearch.spaces.partition import weighted_mean

if TYPE_CHECKING:
    from mergesearch.merging.operators import Operator

#: What ``lora_sparse`` prunes at most.
MOST_PRUNED = 0.95


@dataclass(frozen=True, eq=False)
class AdapterSpace:
    """What to keep of N adapters, then their N scales.

    Attributes:
        template: The merge whose coefficients and sparsity are replaced; its operator is
            ``lora_sparse``.
        layout: Where the tensors lie.
    """

    template: Recipe
    layout: Layout

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
            f"{expert.name}/{what}"
            for what in ("keep", "scale")
            for expert in self.template.experts
        )

    @cached_property
    def lower(self) -> Point:
        """Lower bounds."""
        return self._both(0.0, self._bounds[0])

    @cached_property
    def upper(self) -> Point:
        """Upper bounds."""
        return self._both(1.0, self._bounds[1])

    @cached_property
    def start(self) -> Point:
        """Everything is kept, and averaged."""
        return self._both(1.0, self._operator.default(self.adapters, {}))

    def field(self, point: Point) -> Field:
        """One segment with the scales as coefficients; NaN and infinity pass through."""
        return Field.constant(
            self.layout.size, check_point(point, 2 * self.adapters)[self.adapters :]
        )

    def decode(self, point: Point) -> Recipe:
        """The merge at ``point``: sparsity 1 − alpha for each adapter, and the scales as
        coefficients.
        """
        keep = check_point(point, 2 * self.adapters)[: self.adapters]
        sparsity = np.clip(1.0 - keep, 0.0, MOST_PRUNED).tolist()
        options = self.template.options | {"sparsity": sparsity}
        return replace(
            self.template, hyperparameters=tuple(sorted(options.items())), field=self.field(point)
        )

    def encode(self, field: Field) -> Point | None:
        """The point with the template's sparsity and the coefficients of ``field``, or None if they
        are not constant.

        The point may lie outside the bounds.
        """
        compact = field.compact()
        if compact.values.shape != (self.adapters, 1) or field.size != self.layout.size:
            return None
        return np.concatenate([self._kept(), compact.values[:, 0]])

    def refine(self, point: Point, finer: Space) -> Point:
        """The same point, in a space of the same adapters.

        Raises:
            RecipeError: If ``finer`` is anything else.
        """
        if not isinstance(finer, AdapterSpace) or finer.names != self.names:
            raise RecipeError(
                f"refine: a {finer.title} space cannot hold a point of a {self.title} space"
            )
        return check_point(point, 2 * self.adapters).copy()

    def summary(self, point: Point) -> dict[str, float]:
        """The coordinates up to 16 of them, else what is kept on average, mean scales, and the
        first scales.
        """
        point = check_point(point, 2 * self.adapters)
        if point.size <= SUMMARY_SIZE:
            return dict(zip(self.names, point.tolist(), strict=True))
        keep = point[: self.adapters]
        scales = point[self.adapters :]
        means = {"keep": keep.mean(), "scale": scales.mean(), "|scale|": np.abs(scales).mean()}
        named = zip(
            self.names[self.adapters :], scales[: SUMMARY_SIZE - len(means)].tolist(), strict=False
        )
        return {name: float(mean) for name, mean in means.items()} | dict(named)

    def summary_of(self, field: Field) -> dict[str, float]:
        """The same numbers for a field, which knows nothing of sparsity: the template's, and mean
        coefficients.

        Raises:
            RecipeError: If ``field`` has another size or number of directions.
        """
        if field.directions != self.adapters or field.size != self.layout.size:
            raise RecipeError(
                f"field: expected {self.adapters} directions over {self.layout.size} positions, "
                f"received {field.directions} over {field.size}"
            )
        width = np.diff(field.boundaries).astype(np.float64)
        return self.summary(
            np.append(self._kept(), [weighted_mean(row, width) for row in field.values])
        )

    def table(self) -> tuple[Row, ...]:
        """One row: both numbers of an adapter hold for all tensors."""
        return (Row("all", self.layout.names, self.layout.parameters, 2 * self.adapters),)

    @property
    def _operator(self) -> Operator:
        from mergesearch.merging.operators import get_operator

        return get_operator("lora_sparse")

    @property
    def _bounds(self) -> tuple[float, float]:
        return self._operator.bounds(self.adapters, {})

    def _both(self, keep: float, scale: float) -> npt.NDArray[np.float64]:
        return np.repeat([keep, scale], self.adapters)

    def _kept(self) -> npt.NDArray[np.float64]:
        """What the template keeps of each adapter ``(adapters,)``."""
        from mergesearch.merging.operators.parts.election import one_minus

        sparsity = self._operator.complete(self.template.options)["sparsity"]
        shares = sparsity if isinstance(sparsity, list) else [sparsity] * self.adapters
        return np.array([one_minus(share) for share in shares])


def adapter_space(template: Recipe, layout: Layout) -> AdapterSpace:
    """The space over the adapters of ``template``.

    Raises:
        InputError: If the operator is not ``lora_sparse``.
    """
    if template.operator != "lora_sparse":
        raise InputError(
            f"operator: the space of adapters expects 'lora_sparse', received {template.operator!r}"
        )
    return AdapterSpace(template, layout)
