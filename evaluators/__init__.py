"""How good a merged model is: evaluators and the data that they exchange with the search."""

from __future__ import annotations

from evaluators.base import SPLITS, Candidate, Evaluator, Measurement, Objective, Split

__all__ = ["SPLITS", "Candidate", "Evaluator", "Measurement", "Objective", "Split"]
