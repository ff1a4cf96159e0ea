"""Trials, scores and the verdict as the trial log holds them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Split
from mergesearch.merging import Recipe
from mergesearch.search.fidelity.rules import Estimates
from mergesearch.search.workers.gradient_steps import GradientResult
from mergesearch.search.workers.messages import Failure, Outcome

#: Point -> recipe.
Decode: TypeAlias = Callable[[npt.NDArray[np.float64]], Recipe]

#: anchor: a known merge, measured before the search; search: asked by the strategy;
#: recommended: the strategy's own recommendation (``Strategy.best``), measured at the end;
#: taken: measured by another run, whose scores the study takes over.
Kind = Literal["anchor", "search", "recommended", "taken"]
#: partial: evaluated on some of the items, for the strategy alone; never compared with complete
#: trials.
TrialState = Literal["running", "complete", "partial", "failed"]


#: What trials have that have nothing: one for all, as each of its own would take 64 bytes.
NOTHING: dict[Any, Any] = {}


def _nothing() -> dict[Any, Any]:
    return NOTHING


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class TrialSummary:
    """What is known of a trial without the weights that its recipe merges.

    Attributes:
        number: Position in the log, from 0.
        kind: Who proposed it.
        name: Anchor's name (``base``, ``expert rotated``, ``average``, ...), else empty.
        state: ``running`` until a result is recorded.
        item_count: Number of items that it is to be evaluated on, the first ones; None means all.
        values: Objective name -> value in the user's direction, empty unless complete or partial.
        errors: Objective name -> standard error over items.
        seconds: Where the time went: ``merge``, ``evaluate``, ``overhead``.
        failure: Why it failed, for failed trials.
        worker: Host and process that ran it.
        finished: When the result was recorded, seconds since 1970; 0 while running.
        cpu_share: CPU time of its worker over wall time; None where it was not measured.
        stopped: Number of items after which a rule ended its evaluation; None where none did.
        estimates: Objective name -> what it would have scored on all items, estimated, for stopped
            trials.
        estimate_errors: Objective name -> standard error of the estimate, as an estimate of the
            value on all conceivable items, where it is known.
        violations: Bound -> how far it is missed, 0 or less where it is kept.
        batch_size: Items of a forward pass, where its worker had to make them fewer than the study
            says because memory ran out; else None.
        retry_of: Number of the failed trial that this one is another attempt at; else None.
        same_as: Number of the earlier trial of the same merge whose measurement it is given; None
            where it is measured.
    """

    number: int
    kind: Kind
    name: str
    state: TrialState
    item_count: int | None = None
    values: Mapping[str, float] = field(default_factory=_nothing)
    errors: Mapping[str, float] = field(default_factory=_nothing)
    seconds: Mapping[str, float] = field(default_factory=_nothing)
    failure: Failure | None = None
    worker: str = ""
    finished: float = 0.0
    cpu_share: float | None = None
    stopped: int | None = None
    estimates: Mapping[str, float] = field(default_factory=_nothing)
    estimate_errors: Mapping[str, float] = field(default_factory=_nothing)
    violations: Mapping[str, float] = field(default_factory=_nothing)
    batch_size: int | None = None
    retry_of: int | None = None
    same_as: int | None = None

    @property
    def evaluated(self) -> int | None:
        """Number of items that it was evaluated on, the first ones; None means all."""
        return self.item_count if self.stopped is None else self.stopped

    @property
    def charged(self) -> bool:
        """Whether it costs the budget a trial: no other attempt, and no trial of another run."""
        return self.retry_of is None and self.kind != "taken"

    @property
    def feasible(self) -> bool:
        """Whether it keeps all bounds."""
        return all(missed <= 0 for missed in self.violations.values())


T = TypeVar("T")
#: A trial, with what is known of its recipe or without.
Summary = TypeVar("Summary", bound=TrialSummary)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class TrialRecord(TrialSummary):
    """One trial as recorded.

    Attributes:
        suggestion: The strategy's id of a search trial, else None.
        point: Position in the space, float64 ``(dim,)``; None for an anchor that the space does not
            hold.
        merge: The merge itself, or what makes it of the point: thousands of finished trials would
            each hold coefficients that their points stand for.
        tells_at_ask: How many results the strategy had been told when this trial was asked.
        tell_index: Position of a finished search trial in the order of tells, from 0, else None.
        gradient_items: Items that its gradient steps read, beside those it is evaluated on.
        items: Objective name -> per-item scores ``(items,)``, where the evaluator gives them.
        gradient_result: The result of its gradient steps, if there were any and they ended well.
        rungs: Items -> objective name -> value, at every stage of an early stop rule.
        lost: Whether what was asked is lost; ``mergesearch repair`` keeps the trial's number, and
            the recipe is the study's own.
        told_at: Place in the order of tells that a lost result had; it is measured again for it.
    """

    suggestion: int | None
    point: npt.NDArray[np.float64] | None
    merge: Recipe | Decode
    tells_at_ask: int
    tell_index: int | None
    gradient_items: int = 0
    items: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=_nothing)
    gradient_result: GradientResult | None = None
    rungs: Mapping[int, Mapping[str, float]] = field(default_factory=_nothing)
    lost: bool = False
    told_at: int | None = None

    @property
    def recipe(self) -> Recipe:
        """The merge; it may be made anew each time."""
        if isinstance(self.merge, Recipe):
            return self.merge
        assert self.point is not None
        return self.merge(self.point)


def standing_failures(records: Sequence[Summary]) -> list[Summary]:
    """Failed trials that no later trial is another attempt at, by number.

    One that was lost with the record of another run's or of an anchor is none: nothing tells it.
    """
    tried_again = {record.retry_of for record in records}
    return [
        record
        for record in records
        if record.state == "failed" and record.number not in tried_again and record.kind != "taken"
    ]


def finished_record(
    record: TrialRecord,
    outcome: Outcome,
    tell_index: int | None,
    finished: float,
    estimates: Estimates,
    decode: Decode | None = None,
) -> TrialRecord:
    """A running trial with its result.

    Args:
        record: The trial as it was asked.
        outcome: Its result.
        tell_index: Its position in the order of tells; None where no strategy learns from it.
        finished: When the result was recorded, seconds since 1970.
        estimates: What a stopped trial would have scored on all items.
        decode: What makes its merge from now on; None keeps the merge as it is.
    """
    measurement = outcome.measurement
    whole = record.item_count is None and outcome.stopped is None
    return replace(
        record,
        tell_index=tell_index,
        state="failed" if measurement is None else "complete" if whole else "partial",
        values=_kept(measurement.values) if measurement else NOTHING,
        errors=_kept(measurement.errors) if measurement else NOTHING,
        items=_kept(measurement.items) if measurement else NOTHING,
        seconds=_kept(outcome.seconds),
        failure=outcome.failure,
        worker=sys.intern(outcome.worker),
        finished=finished,
        gradient_result=outcome.gradient_result,
        stopped=outcome.stopped,
        cpu_share=outcome.cpu_share,
        estimates=_kept(estimates.values),
        estimate_errors=_kept(estimates.errors),
        rungs=dict(outcome.rungs) or NOTHING,
        violations=_kept(measurement.violations) if measurement else NOTHING,
        batch_size=outcome.batch_size,
        merge=record.merge if decode is None else decode,
    )


def _kept(numbers: Mapping[str, T]) -> Mapping[str, T]:
    """Named things of one of many trials, whose names are the same ones."""
    return {sys.intern(name): value for name, value in numbers.items()} or NOTHING


@dataclass(frozen=True)
class Score:
    """Values, standard errors, per-item scores and missed bounds of one trial on one split.

    ``weights`` are those of the items ``(items,)``, where a value is the sum of weighted items;
    ``resampled`` are other values on resamples of the items that all trials share ``(resamples,)``.
    """

    values: Mapping[str, float]
    errors: Mapping[str, float]
    items: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict, compare=False)
    violations: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict, compare=False)
    resampled: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict, compare=False)

    @property
    def feasible(self) -> bool:
        """Whether it keeps all bounds."""
        return not self.missed

    @property
    def missed(self) -> tuple[str, ...]:
        """Names of the bounds that it misses."""
        return tuple(name for name, missed in self.violations.items() if not missed <= 0)


@dataclass(frozen=True)
class Verdict:
    """The final choice of a study.

    Leaders are re-evaluated on validation items, and the winner is reported once on test items.

    Attributes:
        winner: Number of the winning trial.
        front: Numbers of the trials on the front (several objectives), by their search values.
        leaders: Numbers of the trials that were re-evaluated.
        scores: Split -> trial number -> score. ``validation`` holds the leaders and the anchors,
            ``test`` the winner and the anchors.
        front_estimated: Numbers of the trials on the front by their estimated values; empty where
            there were no estimates.
    """

    winner: int
    front: tuple[int, ...]
    leaders: tuple[int, ...]
    scores: Mapping[Split, Mapping[int, Score]]
    front_estimated: tuple[int, ...] = ()
