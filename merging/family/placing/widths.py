"""A recipe whose experts are aligned by ``pleas``, at other widths than it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.family.placing.coordinates import widenings
from mergesearch.merging.policies import TensorPolicies, parse_policies
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.memo import Memo

if TYPE_CHECKING:
    from mergesearch.merging.alignment.pleas import Widened
    from mergesearch.merging.alignment.spec import AlignSpec


@dataclass(frozen=True, eq=False)
class ChosenWidths:
    """Recipes like one, with other shares of units kept apart.

    The model is loaded once, to find which units go together.

    Attributes:
        template: The recipe; all its experts are aligned by ``pleas``, and no other policy changes
            shapes.
        layout: Of the template.
        memo: Where found groups are kept, if anywhere.
    """

    template: Recipe
    layout: Layout
    memo: Memo | None = None

    @cached_property
    def _policies(self) -> TensorPolicies:
        return parse_policies(self.template.special)

    @cached_property
    def _spec(self) -> AlignSpec:
        return next(iter(self._policies.align.values()))

    @cached_property
    def _widened(self) -> Widened:
        """With all units kept apart, which tells every tensor that may get wider."""
        sources = (self.template.base, *self.template.experts)
        base, *experts = (open_checkpoint(each.path, each.name, self.memo) for each in sources)
        return widenings(base, experts, self._spec)

    @cached_property
    def units(self) -> dict[str, int]:
        """Name of a width -> number of units that it speaks of, over all layers."""
        return {width.name: sum(width.sizes.values()) for width in self._widened.widths}

    @cached_property
    def fractions(self) -> dict[str, float]:
        """Name of a width -> share of its units that the template keeps apart."""
        from mergesearch.merging.alignment.widths import chosen_fractions

        return chosen_fractions(self._widened.widths, self._spec.fraction)

    def at(self, fractions: Mapping[str, float]) -> tuple[Recipe, Layout]:
        """The recipe, with coefficients 0, and its layout, where these shares are kept apart."""
        if fractions == self.fractions:
            return self.template, self.layout
        values = {*fractions.values()}
        chosen = values.pop() if len(values) == 1 else {k: v for k, v in fractions.items() if v}
        spec = self._spec.model_copy(update={"fraction": chosen})
        align = dict.fromkeys(self._policies.align, spec)
        layout = self._layout(spec)
        special = self._policies.model_copy(update={"align": align}).choices
        size = Field.constant(layout.size, [0.0] * self.template.field.directions)
        recipe = replace(self.template, special=special, layout=layout.digest, field=size)
        return recipe, layout

    def _layout(self, spec: AlignSpec) -> Layout:
        shapes = self._with(spec).shapes
        base = self._widened.alignments[0].subject.base
        stored = {name: base.shape(name) for name in self._all.shapes}
        return Layout.build(
            {
                tensor.name: (
                    shapes.get(tensor.name, stored.get(tensor.name, tensor.shape)),
                    tensor.dtype,
                )
                for tensor in self.layout.tensors
            }
        )

    @cached_property
    def _all(self) -> Widened:
        return self._with(self._spec.model_copy(update={"fraction": 1.0}))

    def _with(self, spec: AlignSpec) -> Widened:
        from mergesearch.merging.alignment.pleas import Widened

        return Widened(tuple(replace(each, spec=spec) for each in self._widened.alignments))
