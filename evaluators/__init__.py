"""Evaluators of merged models, and the data that they exchange with the search."""

from __future__ import annotations

from mergesearch.evaluators.base import (
    SPLITS,
    Batch,
    Candidate,
    Evaluator,
    LossAndGradient,
    Measurement,
    Objective,
    Split,
)

__all__ = [
    "SPLITS",
    "Batch",
    "Candidate",
    "Evaluator",
    "LossAndGradient",
    "Measurement",
    "Objective",
    "Split",
]
