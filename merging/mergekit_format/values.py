"""Parameters of a mergekit configuration at every tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mergesearch.merging.mergekit_format.places import all_settings
from mergesearch.merging.mergekit_format.reading import MergekitFile
from mergesearch.merging.mergekit_format.settings import Place, value_at
from mergesearch.merging.operators.parts.magnitudes import count_kept

Floats = npt.NDArray[np.float64]


class Values:
    """What a configuration says about every tensor and model; collects what cannot be said."""

    def __init__(
        self,
        file: MergekitFile,
        places: Sequence[Place],
        experts: Sequence[str],
        problems: list[str],
    ) -> None:
        self.file = file
        self.experts = experts
        self.problems = problems
        self._places = places

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return len(self._places)

    def at(self, name: str, default: float | None = None, model: str | None = None) -> Floats:
        """A parameter at every tensor ``(tensors,)``, NaN where it has neither value nor default.

        Args:
            name: The parameter.
            default: Its value where nothing is said.
            model: The model that it belongs to; None for parameters that all share.
        """
        found = [self._value(name, place, model) for place in self._places]
        missing = math.nan if default is None else default
        return np.array([missing if value is None else value for value in found])

    def weights(self, models: Sequence[str]) -> Floats:
        """The weight of every model ``(tensors, models)``, 0 in slices that lack the model."""
        columns = []
        for model in models:
            present = np.array([self._has(place, model) for place in self._places])
            column = np.where(present, self.at("weight", None, model), 0.0)
            if np.isnan(column).any():
                self.problems.append(
                    f"weight: expected one for {model} at every tensor, received none for some"
                )
            columns.append(np.nan_to_num(column))
        return np.stack(columns, axis=1)

    def constant(self, name: str, default: float) -> float:
        """A parameter that all models share and that must be the same at every tensor."""
        found = self.at(name, default)
        if len(set(found.tolist())) > 1:
            self.problems.append(
                f"parameters.{name}: expected one value for all tensors, received {_span(found)}; "
                "a recipe has one"
            )
        return float(found[0])

    def common(self, name: str, default: float) -> float:
        """A parameter of every expert that must be the same for all of them, at every tensor."""
        found = np.stack([self.at(name, default, expert) for expert in self.experts])
        values, counts = np.unique(found, return_counts=True)
        value = float(values[counts.argmax()])
        if len(values) == 1:
            return value
        same = self._one_density(found, values.tolist()) if name == "density" else None
        if same is None:
            self.problems.append(
                f"parameters.{name}: expected one value for all models and tensors, received "
                f"{_span(found)}; a recipe has one"
            )
        return value if same is None else same

    def everywhere(self, model: str) -> bool:
        """Whether a model is in every slice."""
        return all(self._has(place, model) for place in self._places)

    def _one_density(self, found: Floats, values: Sequence[float]) -> float | None:
        """The one density that keeps as many elements of every tensor here, or None."""
        nowhere = Place("")
        settings = [setting for key, setting in all_settings(self.file) if key == "density"]
        unfiltered = [value_at(setting, nowhere) for setting in settings]
        for density in (*unfiltered, *values):
            if density is not None and self._same_counts(found, density):
                return float(density)
        return None

    def _same_counts(self, found: Floats, density: float) -> bool:
        """Whether densities keep as many elements of every tensor as one density does here."""
        return all(
            int(each * place.size) == count_kept(density, place.size)
            for row in found
            for each, place in zip(row.tolist(), self._places, strict=True)
            if each < 1
        )

    def _has(self, place: Place, model: str) -> bool:
        inputs = self.file.slices[place.slice].inputs
        return model == self.file.base or any(each.model == model for each in inputs)

    def _value(self, name: str, place: Place, model: str | None) -> float | None:
        """The first of source, slice and file that says something about a tensor."""
        one = self.file.slices[place.slice]
        scopes: list[Mapping[str, object]] = [
            each.parameters for each in one.inputs if each.model == model
        ]
        for scope in (*scopes, one.parameters, self.file.parameters):
            value = value_at(scope[name], place) if name in scope else None
            if value is not None:
                return value
        return None


def _span(values: Floats) -> str:
    return f"{values.min():g} to {values.max():g}"
