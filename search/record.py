"""What the trial log holds of each trial, and of the final choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from evaluators import Split
from merging import Recipe
from search.descent import Descended
from search.worker import Failure

#: anchor: a known merge, measured before the search; search: asked by the strategy;
#: recommended: the strategy's own recommendation (``Strategy.best``), measured at the end.
Kind = Literal["anchor", "search", "recommended"]
#: partial: evaluated on a part of the items, for the strategy's eyes; never compared with complete trials.
State = Literal["running", "complete", "partial", "failed"]


@dataclass(frozen=True, eq=False)
class TrialRecord:
    """One trial as recorded.

    Attributes:
        number: Place in the log, from 0.
        kind: Who proposed it.
        name: Anchor's name (``base``, ``expert rotated``, ``average``, ...), else empty.
        suggestion: The strategy's id of a search trial, else None.
        point: Position in the space, float64 ``(dim,)``; None for an anchor that the space does not hold.
        recipe: The merge itself.
        tells_before: How many search trials had been told when this one was asked.
        told: Place of a finished search trial in the order of tells, else None.
        state: ``running`` until a result is recorded.
        part: Asked to be evaluated on the first so many items only; None means all of them.
        looked: Items that its descent looks at, beside those it is evaluated on.
        values: Objective name -> value in the user's direction, empty unless complete or partial.
        errors: Objective name -> standard error over items.
        items: Objective name -> per-item scores ``(items,)``, where the evaluator gives them.
        seconds: Where the time went: ``merge``, ``evaluate``, ``overhead``.
        failure: Why it failed, for failed trials.
        worker: Host and process that ran it.
        finished: When the result was recorded, seconds since 1970; 0 while running.
        descended: What came of its descent, if it has one and that ended well.
        cpu_share: CPU time of its worker over wall time; None where it was not measured.
        stopped: A rule ended its evaluation after the first so many items; None where none did.
        estimates: Objective name -> what it would have scored on all items, estimated, for stopped trials.
        rungs: Items -> objective name -> value, at every stage that a rule looked at.
        violations: Bound -> how far it is missed, 0 or less where it is kept.
    """

    number: int
    kind: Kind
    name: str
    suggestion: int | None
    point: npt.NDArray[np.float64] | None
    recipe: Recipe
    tells_before: int
    told: int | None
    state: State
    part: int | None = None
    looked: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    items: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    worker: str = ""
    finished: float = 0.0
    descended: Descended | None = None
    stopped: int | None = None
    cpu_share: float | None = None
    estimates: Mapping[str, float] = field(default_factory=dict)
    rungs: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    violations: Mapping[str, float] = field(default_factory=dict)

    @property
    def evaluated(self) -> int | None:
        """Items that it was evaluated on, the first so many; None means all."""
        return self.part if self.stopped is None else self.stopped

    @property
    def feasible(self) -> bool:
        """Whether it keeps all bounds."""
        return all(missed <= 0 for missed in self.violations.values())


@dataclass(frozen=True)
class Score:
    """Values, standard errors, per-item scores and missed bounds of one trial on one split."""

    values: Mapping[str, float]
    errors: Mapping[str, float]
    items: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict, compare=False)
    violations: Mapping[str, float] = field(default_factory=dict)

    @property
    def feasible(self) -> bool:
        """Whether it keeps all bounds."""
        return all(missed <= 0 for missed in self.violations.values())


@dataclass(frozen=True)
class Verdict:
    """The honest choice: leaders re-evaluated on validation items, the winner reported once on test items.

    Attributes:
        winner: Number of the winning trial.
        front: Numbers of the trials on the front (several objectives), by their search values.
        leaders: Numbers of the trials that were re-evaluated.
        scores: Split -> trial number -> score. ``validation`` holds the leaders and the anchors, ``test`` the winner
            and the anchors.
    """

    winner: int
    front: tuple[int, ...]
    leaders: tuple[int, ...]
    scores: Mapping[Split, Mapping[int, Score]]
