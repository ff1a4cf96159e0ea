"""What to try next: strategies, the study loop, the record, backends, reports, command line."""

from __future__ import annotations

from mergesearch.search.strategies.base import Problem, Strategy, Suggestion, TrialResult

__all__ = ["Problem", "Strategy", "Suggestion", "TrialResult"]
