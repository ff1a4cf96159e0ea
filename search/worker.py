"""One trial: combine, evaluate, measure. Also the messages between driver and workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from evaluators import Measurement, Split
from merging import Recipe

#: Why a trial has no values: weights or scores not finite; an exception; the worker died (twice).
FailureKind = Literal["infeasible", "error", "lost"]


@dataclass(frozen=True)
class Task:
    """A unit of work for a backend; ``id`` is chosen by the driver."""

    id: str
    recipe: Recipe
    split: Split


@dataclass(frozen=True)
class Failure:
    """Why there is no measurement; ``detail`` is the traceback for errors."""

    kind: FailureKind
    message: str
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came back for a task: a measurement or a failure, and where the seconds went."""

    task: str
    measurement: Measurement | None
    failure: Failure | None
    seconds: Mapping[str, float] = field(default_factory=dict)  # "merge", "evaluate", "overhead"
