"""Models of merges that have other shapes than the study's own: layers of other widths."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mergesearch.merging import Field, Recipe
from mergesearch.search.workers.loading import LoadingReporter
from mergesearch.search.workers.messages import WorkerSpec
from mergesearch.search.workers.resident_model import resident_model

if TYPE_CHECKING:
    from mergesearch.merging.resident.merged_model import MergedModel


class OtherShapes:
    """The model of the last merge of other shapes; trials of the same ones are merged into it.

    Prepared weights of all shapes stay on disk, so that those which come back are only loaded.

    Args:
        spec: Of the worker.
        model_class: Of transformers.
    """

    def __init__(self, spec: WorkerSpec, model_class: str) -> None:
        self._spec = spec
        self._model_class = model_class
        self._key = ""
        self._merged: MergedModel | None = None

    def fits_own(self, recipe: Recipe) -> bool:
        """Whether a merge has the shapes of the study's own."""
        return recipe.layout == self._spec.template.layout

    def holds(self, recipe: Recipe) -> bool:
        """Whether the model at hand has the prepared weights of a recipe."""
        return self._merged is not None and recipe.basis_key == self._key

    def merged(self, recipe: Recipe) -> MergedModel:
        """A model with the shapes of a recipe, made where the one at hand has others."""
        if self._merged is None or recipe.basis_key != self._key:
            self._merged = None  # its memory is free before the next one is made
            still = Field.constant(recipe.field.size, [0.0] * recipe.field.directions)
            spec = replace(self._spec, template=recipe.with_field(still))
            self._merged = resident_model(spec, self._model_class, LoadingReporter())
            self._key = recipe.basis_key
        return self._merged
