"""Merges that both tools make, as each of them says it, and how many times faster ours must be.

mergekit 0.1.5 calls DELLA with the election of TIES ``della``, as we do, and the sum
``della_linear``. It has no TSV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Method:
    """One merge as both tools say it.

    Attributes:
        name: For the table.
        operator: Ours, with ``options`` and one coefficient for all experts.
        method: That of mergekit, with ``parameters`` and one weight for all experts.
        target: How many times faster ours must be, inside.
        around_base: Whether the base takes part.
        experts: How many experts do; None for all.
        between: Whether mergekit takes the base for one of the models, and one weight ``t``.
    """

    name: str
    operator: str
    coefficient: float
    method: str
    weight: float
    target: float | None
    options: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    around_base: bool = True
    experts: int | None = None
    between: bool = False

    def recipe(self, folder: Path, experts: Sequence[str]) -> dict[str, Any]:
        """The merge as a recipe of ours."""
        return {
            "base": str(folder / "base"),
            "experts": {name: str(folder / name) for name in experts[: self.experts]},
            "operator": self.operator,
            "coefficients": self.coefficient,
            "hyperparameters": dict(self.options),
        }

    def config(self, folder: Path, experts: Sequence[str], dtype: str) -> dict[str, Any]:
        """The merge as mergekit says it."""
        models = [str(folder / name) for name in experts[: self.experts]]
        whole = {
            "merge_method": self.method,
            **({"base_model": str(folder / "base")} if self.around_base else {}),
            "dtype": dtype,
        }
        if self.between:
            both = [{"model": model} for model in (str(folder / "base"), *models)]
            return {**whole, "models": both, "parameters": {"t": self.weight}}
        weight = {"weight": self.weight, **self.parameters}
        return {**whole, "models": [{"model": model, "parameters": weight} for model in models]}


METHODS = (
    Method("linear", "average", 1 / 3, "linear", 1.0, 2.0, around_base=False),
    Method("task arithmetic", "task_arithmetic", 0.3, "task_arithmetic", 0.3, 2.0),
    Method(
        "TIES 0.2",
        "ties",
        1.0,
        "ties",
        1.0,
        20.0,
        {"density": 0.2, "scope": "tensor"},
        {"density": 0.2},
    ),
    Method(
        "DARE-TIES 0.2", "dare_ties", 1.0, "dare_ties", 1.0, 20.0, {"drop": 0.8}, {"density": 0.2}
    ),
    Method("SLERP", "slerp", 0.5, "slerp", 0.5, 2.0, experts=1, between=True),
    Method(
        "DELLA 0.2",
        "della",
        1.0,
        "della",
        1.0,
        2.0,
        {"density": 0.2, "epsilon": 0.1},
        {"density": 0.2, "epsilon": 0.1},
    ),
    Method(
        "DELLA-linear 0.2",
        "della_linear",
        0.3,
        "della_linear",
        0.3,
        2.0,
        {"density": 0.2, "epsilon": 0.1},
        {"density": 0.2, "epsilon": 0.1},
    ),
    Method(
        "Breadcrumbs 0.2",
        "breadcrumbs",
        0.3,
        "breadcrumbs",
        0.3,
        2.0,
        {"density": 0.2, "gamma": 0.1, "scope": "tensor"},
        {"density": 0.2, "gamma": 0.1},
    ),
)
