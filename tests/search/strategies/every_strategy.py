"""A small study for every strategy, in the kind of space that it searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergesearch.search.strategies.table import STRATEGIES
from tests.search.conftest import model_study
from tests.search.studies import analytic

#: Strategies that merge real checkpoints because their space is made of them.
OPERATORS = {"segments": "task_arithmetic", "mixed": "stack", "product": "lora_sparse"}


def label(value: object) -> str:
    """Part of a test's id."""
    return (
        value
        if isinstance(value, str)
        else "-".join(map(str, value.values()))
        if isinstance(value, dict)
        else ""
    )


def study_of(
    name: str, options: dict, models: Path, items: Path, *, trials: int = 40, seconds: float = 0.0
) -> dict[str, Any]:
    """A study of about ``trials`` trials; failures included where the evaluator can make them."""
    entry = STRATEGIES[name]
    strategy = {"name": name, **options}
    if entry.space == "coefficients":
        several = entry.objectives == "several"
        problem: dict[str, Any] = {
            "kind": "synthetic",
            "items": 40,
            "noise": 0.02,
            "seconds": seconds,
        }
        problem |= (
            {"problem": "quadratic_tasks", "objectives": 2} if several else {"problem": "ellipsoid"}
        )
        problem |= {"faults": {"nan": 0.1}}
        return analytic(name, trials=trials, dim=4, strategy=strategy, evaluators=[problem])
    experts = {expert: str(models / expert) for expert in ("left", "right")}
    if entry.space == "product":
        experts = {
            expert: f"{models / 'base'}+{models / 'adapters' / expert}" for expert in experts
        }
    return model_study(
        models,
        items,
        name=name,
        strategy=strategy,
        operator=OPERATORS[entry.space],
        experts=experts,
        space={},
        budget={"trials": min(trials, 24)},  # real merges take longer
    )
