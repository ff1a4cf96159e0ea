"""What to try next: strategies, the study loop, the trial log, backends, reports and the command line."""

from __future__ import annotations

from search.strategy import Problem, Strategy, Suggestion, Told

__all__ = ["Problem", "Strategy", "Suggestion", "Told"]
