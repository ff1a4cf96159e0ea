"""Chooses the operators that a study with ``operator: auto`` goes on from, by their anchors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergesearch.merging import StudyFailedError
from mergesearch.search.front import to_losses
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.survey import Choice, shared_coefficient
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.study.problem import penalised_losses, study_normaliser
from mergesearch.search.study.reporting import first_failure


def choose_operators(plan: Plan, records: Sequence[TrialRecord]) -> Choice:
    """The best operators of a study, each with its best coefficient; a function of the record.

    Merges are ranked by the weighted sum of their normalised losses on search items; of equal ones
    the first measured comes first.

    Raises:
        StudyFailedError: If no operator could be measured.
    """
    survey = plan.survey
    assert survey is not None
    names = {survey.single(name).basis_key: name for name in (*survey.measured, *survey.free)}
    best: dict[str, tuple[float, float]] = {}
    normaliser = study_normaliser(plan, records)
    for record in records:
        coefficient = shared_coefficient(record.recipe)
        name = names.get(record.recipe.basis_key)
        if record.kind != "anchor" or record.state != "complete" or not coefficient or name is None:
            continue
        losses = to_losses(record.values, plan.objectives)
        losses = penalised_losses(losses, record.violations, normaliser)
        score = float(normaliser.scalarise(np.array([losses]), plan.weights)[0])
        if name not in best or score < best[name][0]:
            best[name] = score, coefficient
    if not best:
        raise StudyFailedError(
            f"operator auto: no operator could be measured; the first failure: "
            f"{first_failure(records)}"
        )
    chosen = sorted(best, key=lambda name: best[name][0])[: survey.keep]
    return Choice(tuple(chosen), tuple(best[name][1] for name in chosen))
