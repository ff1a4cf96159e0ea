"""Comparison of the measured parents with the reference scores that the study declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergesearch.evaluators import Objective
from mergesearch.search.record.trial_record import TrialSummary

#: Half width of a 95 % interval in standard errors.
Z95 = 1.96


def reference_mismatches(
    records: Sequence[TrialSummary],
    objectives: Sequence[Objective],
    declared: Mapping[str, Mapping[str, float]],
) -> list[str]:
    """Messages on parents that differ from their reference scores by more than noise."""
    lines = []
    for record in records:
        known = (
            declared.get(record.name, {})
            if record.kind == "anchor" and record.state == "complete"
            else {}
        )
        for objective in objectives:
            if objective.name not in known:
                continue
            value = record.values[objective.name]
            error = record.errors.get(objective.name, 0.0)
            if abs(value - known[objective.name]) > Z95 * error + 1e-9:
                lines.append(
                    f"{record.name}: {objective.name} is {value:.4g} ± {error:.2g} on search "
                    f"items, its reference score says {known[objective.name]:.4g}; are prompt, "
                    "chat template and few-shot examples the same?"
                )
    return lines
