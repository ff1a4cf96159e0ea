"""The evaluator ``smallness``, which runs no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from mergesearch.evaluators import Candidate, Measurement, Objective
from mergesearch.evaluators.evaluator_base import EvaluatorBase


class Smallness(EvaluatorBase):
    """Measures how far coefficients are from a number."""

    constraints: tuple[str, ...] = ()
    additive: tuple[str, ...] = ()

    def __init__(self, wanted: float) -> None:
        self.objectives = (Objective("smallness", "minimize"),)
        self._wanted = wanted

    def evaluate(self, candidate: Candidate, split: str, items: Any = None) -> Measurement:
        """Measure the coefficients; there are no items."""
        away = candidate.recipe.field.values - self._wanted
        return Measurement({"smallness": float((away**2).mean())})


class SmallnessSpec(BaseModel):
    """How far coefficients are from a number."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    #: A section for the contract tests.
    example: ClassVar[dict[str, Any]] = {"kind": "smallness", "wanted": 0.2}

    kind: Literal["smallness"]
    wanted: float = Field(default=0.0, description="The number.")

    def build(self, folder: Path, where: str) -> Smallness:
        """Build the evaluator."""
        return Smallness(self.wanted)
