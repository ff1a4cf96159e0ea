"""Trials as the dashboard's API describes them, written without its slower objects.

Only plain trials are written here. What else a trial may have (files, notes, reported steps,
parameters that are no numbers) is left to the dashboard.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, TypeAlias

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from mergesearch.search.record.attributes import TRIAL_KEYS
from mergesearch.search.record.trial_text import CONSTRAINTS

#: A trial as Optuna gives it.
Trial: TypeAlias = FrozenTrial

#: What a plain trial may have among its system attributes; of these only bounds are shown.
PLAIN_KEYS = frozenset({CONSTRAINTS, *TRIAL_KEYS})


def plain_json(study_id: int, trial: Trial) -> bytes | None:
    """A trial as JSON; None where it is not plain."""
    if trial.intermediate_values or not trial.system_attrs.keys() <= PLAIN_KEYS:
        return None
    if not all(type(each) is FloatDistribution for each in trial.distributions.values()):
        return None
    if not all(isinstance(value, str | int | float) for value in trial.user_attrs.values()):
        return None
    try:
        return json.dumps(_described(study_id, trial), allow_nan=False).encode()
    except ValueError:  # infinities, for which the API has words
        return None


def kind_of(trial: Trial) -> tuple[Any, ...]:
    """What a plain trial adds to what the API says of its study, and which keys it has.

    Those are the ranges of its parameters, and which attributes are numbers.
    """
    return (
        trial.state,
        trial.values is None,
        trial.datetime_start is None,
        CONSTRAINTS in trial.system_attrs,
        tuple((name, *_range(each)) for name, each in trial.distributions.items()),
        tuple((name, type(value)) for name, value in trial.user_attrs.items()),
    )


def _described(study_id: int, trial: Trial) -> dict[str, Any]:
    described = {
        "trial_id": trial._trial_id,  # which has no public way
        "study_id": study_id,
        "number": trial.number,
        "state": trial.state.name.capitalize(),
        "params": [
            {
                "name": name,
                "param_internal_value": value,
                "param_external_value": str(value),
                "param_external_pytyp": str(type(value)),
                "distribution": _distribution(*_range(trial.distributions[name])),
            }
            for name, value in trial.params.items()
        ],
        "fixed_params": [],
        "user_attrs": [
            {"key": key, "value": str(value)} for key, value in trial.user_attrs.items()
        ],
        "note": {"version": 0, "body": ""},
        "artifacts": [],
        "constraints": trial.system_attrs.get(CONSTRAINTS, []),
        "intermediate_values": [],
    }
    if trial.values is not None:
        described["values"] = trial.values
    for key in ("datetime_start", "datetime_complete"):
        moment = getattr(trial, key)
        if moment is not None:
            described[key] = moment.isoformat()
    return described


def _range(distribution: BaseDistribution) -> tuple[float, float, float | None, bool]:
    """Lowest and highest value of a distribution of numbers, its step, and its scale."""
    assert isinstance(distribution, FloatDistribution)
    return distribution.low, distribution.high, distribution.step, distribution.log


@lru_cache(maxsize=1024)  # studies have few, and repeat them for every trial
def _distribution(low: float, high: float, step: float | None, log: bool) -> dict[str, Any]:
    return {"type": "FloatDistribution", "low": low, "high": high, "step": step, "log": log}
