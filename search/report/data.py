"""What a report is made of: the records of a study, its verdict, and the scores that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Objective, Split
from mergesearch.merging import InputError, Layout
from mergesearch.search.front import Front, Normaliser, signs, to_losses
from mergesearch.search.record.trial_record import Score, TrialRecord, TrialSummary, Verdict
from mergesearch.search.report.kept import Kept
from mergesearch.search.study.estimated_front import estimated_front, estimated_trials

Array = npt.NDArray[np.float64]

#: What a study that searches on the test items is called, wherever it is described.
TRANSDUCTIVE = "transductive: the search looks at the test items themselves, without their labels"


@dataclass(frozen=True, eq=False)
class CompleteTrials:
    """The complete trials of a study and their losses, each in units of the anchors' range.

    Attributes:
        records: Complete trials, by number.
        objectives: In the study's order.
        weights: Importance of each objective, summing to 1, ``(objectives,)``.
        scale: The study's normaliser; made from the anchors when it is None.
    """

    records: tuple[TrialSummary, ...]
    objectives: tuple[Objective, ...]
    weights: Sequence[float]
    scale: Normaliser | None = None

    @cached_property
    def losses(self) -> Array:
        """Losses, ``(complete, objectives)``."""
        rows = [to_losses(record.values, self.objectives) for record in self.records]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.objectives))

    @cached_property
    def normaliser(self) -> Normaliser | None:
        """The study's normaliser, or one made from the anchors; None without a complete trial.

        Without a complete anchor it is made from all complete trials.
        """
        if self.scale is not None or not self.records:
            return self.scale
        anchors = np.array([record.kind == "anchor" for record in self.records])
        return Normaliser.from_anchors(self.losses[anchors] if anchors.any() else self.losses)

    @cached_property
    def scalars(self) -> Array:
        """Scalarised losses, ``(complete,)``: 0 equals the best anchors, 1 the worst."""
        if self.normaliser is None:
            return np.empty(0)
        return self.normaliser.scalarise(self.losses, self.weights)

    @cached_property
    def front(self) -> Front:
        """The front that the trials form, and its hypervolume after each of them."""
        assert self.normaliser is not None
        front = Front(self.normaliser)
        for record, row in zip(self.records, self.losses, strict=True):
            front.add(record.number, row)
        return front

    @property
    def hypervolumes(self) -> Array:
        """Hypervolume after each trial, ``(complete,)``."""
        return np.array(self.front.history if self.records else [])

    def scalarise(self, score: Score) -> float:
        """Scalarised loss of a score on any split."""
        assert self.normaliser is not None
        losses = to_losses(score.values, self.objectives)
        return float(self.normaliser.scalarise(losses, self.weights))


@dataclass(frozen=True)
class FrontEstimate:
    """A front by the scores that it was chosen for, and as estimated from all trials.

    Attributes:
        observed: Hypervolume of the members that have a point, in normalised losses.
        estimated: The same by the estimates.
        values: Trial -> objective -> estimated value, in the user's direction.
        recommended: The same of the members by the estimates, best scalarised first; empty in runs
            whose front was not chosen so.
    """

    observed: float
    estimated: float
    values: Mapping[int, Mapping[str, float]]
    recommended: Mapping[int, Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything that a report is made of.

    Attributes:
        study: Name of the study.
        run: Run folder as the user would type it, for the commands shown.
        objectives: In the study's order.
        weights: Importance of each objective, summing to 1, ``(objectives,)``.
        records: Every trial of the log.
        verdict: The final choice, or None while the study is unfinished.
        layout: Flat index of the base, or None for a problem without weights.
        experts: Names of the experts, in order.
        names: Names of the space's dimensions.
        lower, upper: Bounds of the space, ``(dim,)``.
        resolved: The study as resolved, JSON-able.
        fingerprint: Versions and machine, JSON-able.
        wall_seconds: Time in which trials ran, over all sessions.
        trials_per_worker: Finished trials by worker name.
        scale: The study's normaliser; made from the anchors when it is None.
        items: Trial -> objective -> per-item scores on the test items ``(items,)``, for a paired
            interval.
        transductive: Whether the search looked at the test items, without their labels.
        repeats: Values of the winner, evaluated on the search items again; None where that failed.
        search_items: Number of search items.
        warnings: What was said before the study began.
        set_aside: Cards that were set aside after device errors, each with its last one.
        untouched: What the operator leaves in the base or merges in a plain way; empty for nothing.
        lineages: ``expert``, ``kind``, ``cosine``, ``distance`` and ``finding`` of every expert.
        predicted_seconds: Phase -> seconds that the plan expected it to take.
        tolerances: Bound -> its tolerance with the unit, for those that have one.
        means_at: Point -> mean coefficient of each direction; None where nothing decodes points.
        kept: What was made of points and recipes, in a report that is read back; None makes it from
            the records.
    """

    study: str
    run: str
    objectives: tuple[Objective, ...]
    weights: Sequence[float]
    records: Sequence[TrialSummary]
    verdict: Verdict | None = None
    layout: Layout | None = None
    experts: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    lower: Sequence[float] | Array = ()
    upper: Sequence[float] | Array = ()
    resolved: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    wall_seconds: float = 0.0
    trials_per_worker: Mapping[str, int] = field(default_factory=dict)
    scale: Normaliser | None = None
    items: Mapping[int, Mapping[str, Array]] = field(default_factory=dict)
    transductive: bool = False
    repeats: Sequence[Mapping[str, float] | None] = ()
    search_items: int = 0
    warnings: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()
    untouched: str = ""
    lineages: tuple[Mapping[str, Any], ...] = ()
    predicted_seconds: Mapping[str, float] = field(default_factory=dict)
    tolerances: Mapping[str, str] = field(default_factory=dict)
    means_at: Callable[[Array], Sequence[float]] | None = None
    kept: Kept | None = None

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.objectives) or not self.objectives:
            raise InputError(
                f"report: expected one weight for each of {[o.name for o in self.objectives]}, "
                f"received {list(self.weights)}"
            )

    @cached_property
    def complete(self) -> CompleteTrials:
        """The complete trials, by number, with their losses."""
        records = [record for record in self.records if record.state == "complete"]
        records.sort(key=lambda record: record.number)
        return CompleteTrials(tuple(records), self.objectives, self.weights, self.scale)

    @cached_property
    def complete_records(self) -> list[TrialRecord]:
        """The complete trials whose points and recipes are at hand, by number."""
        return [record for record in self.complete.records if isinstance(record, TrialRecord)]

    @cached_property
    def by_number(self) -> dict[int, TrialSummary]:
        """Trials by number."""
        return {record.number: record for record in self.records}

    @cached_property
    def front(self) -> list[TrialSummary]:
        """Front members, best scalarised first; with one objective the best ten trials."""
        complete = self.complete
        order = [complete.records[row] for row in np.argsort(complete.scalars, kind="stable")]
        if len(self.objectives) == 1 or not order:
            return order[:10]
        recorded = () if self.verdict is None else self.verdict.front
        members = frozenset(recorded or complete.front.numbers)
        return [record for record in order if record.number in members]

    @cached_property
    def estimates(self) -> dict[int, Array]:
        """Trial -> estimated losses ``(objectives,)``; none with one objective, without errors."""
        if self.kept is not None:
            return dict(self.kept.estimates)
        return estimated_trials(self.complete_records, self.objectives)

    @cached_property
    def expected(self) -> dict[int, Array]:
        """Member of the recommended front -> the losses ``(objectives,)`` that are expected of it.

        Estimates choose the members and are their losses, best scalarised first; both are as
        observed where there are none, and in runs that recorded none.
        """
        complete = self.complete
        estimates = self.estimates if self.by_estimates else {}
        members = self.estimated_members or [record.number for record in self.front]
        observed = {r.number: row for r, row in zip(complete.records, complete.losses, strict=True)}
        losses = {number: estimates.get(number, observed[number]) for number in members}
        if complete.normaliser is None or not losses:
            return losses
        scalars = complete.normaliser.scalarise([*losses.values()], self.weights)
        order = np.argsort(scalars, kind="stable")
        numbers = [*losses]
        return {numbers[row]: losses[numbers[row]] for row in order}

    @cached_property
    def estimated_members(self) -> tuple[int, ...]:
        """Members of the front by the estimates; none without estimates."""
        if self.verdict is not None:
            return self.verdict.front_estimated
        if self.kept is not None:
            return self.kept.members
        return estimated_front(
            self.complete_records, self.objectives, self.estimates if self.by_estimates else {}
        )

    @property
    def by_estimates(self) -> bool:
        """Whether estimates chose the members of the recommended front."""
        recorded = self.verdict is None or bool(self.verdict.front_estimated)
        return recorded and bool(self.estimates)

    @cached_property
    def recommended(self) -> list[TrialSummary]:
        """Members of the front by estimated losses; those of the observed one without estimates."""
        return [self.by_number[number] for number in self.expected]

    @cached_property
    def front_estimate(self) -> FrontEstimate | None:
        """What the front would score on other items; None for one objective, or without errors."""
        complete = self.complete
        members = [record.number for record in self.front if record.number in self.estimates]
        if complete.normaliser is None or not members:
            return None
        estimated = np.array([self.estimates[number] for number in members])
        observed = np.array([to_losses(self.by_number[n].values, self.objectives) for n in members])
        return FrontEstimate(
            complete.normaliser.hypervolume(observed),
            complete.normaliser.hypervolume(estimated),
            _values({number: self.estimates[number] for number in members}, self.objectives),
            _values(self.expected if self.by_estimates else {}, self.objectives),
        )

    @cached_property
    def winner(self) -> TrialSummary | None:
        """The winning trial, or None while there is no verdict."""
        return None if self.verdict is None else self.by_number[self.verdict.winner]

    @cached_property
    def leading(self) -> TrialSummary | None:
        """The winner, or until there is one the best trial by its search values.

        It keeps all bounds if any trial does.
        """
        if self.winner is not None or not self.complete.records:
            return self.winner
        return self._best({each.number: self._searched(each) for each in self.complete.records})

    @cached_property
    def anchors(self) -> list[TrialSummary]:
        """All anchors, failed ones included, by number; of several attempts at one the last."""
        tried_again = {record.retry_of for record in self.records}
        anchors = [r for r in self.records if r.kind == "anchor" and r.number not in tried_again]
        return sorted(anchors, key=lambda record: record.number)

    @cached_property
    def best_anchor(self) -> TrialSummary | None:
        """The best complete anchor on the items that decide; None where none is complete.

        It keeps all bounds there; only where no anchor does, it is the one that misses least.
        """
        return self._best(self.anchor_scores) if self.anchor_scores else None

    @cached_property
    def anchor_scores(self) -> dict[int, Score]:
        """Complete anchor -> its score on the items that decide.

        These are the validation items, or the search items while no anchor is scored on others.
        """
        return self._anchor_scores("validation") or self._anchor_scores("search")

    def _best(self, scores: Mapping[int, Score]) -> TrialSummary:
        """The best trial that keeps all bounds; where none does, the one that misses least."""
        kept = {number: score for number, score in scores.items() if score.feasible}
        if kept:
            return self.by_number[min(kept, key=lambda n: self.complete.scalarise(kept[n]))]
        worst = {number: max(score.violations.values()) for number, score in scores.items()}
        return self.by_number[min(worst, key=lambda number: worst[number])]

    def score(self, record: TrialSummary, split: Split) -> Score | None:
        """Values and standard errors of a trial on a split, or None where it was not measured."""
        if split == "search":
            return self._searched(record) if record.state == "complete" else None
        if self.verdict is None:
            return None
        return self.verdict.scores.get(split, {}).get(record.number)

    def _searched(self, record: TrialSummary) -> Score:
        return Score(record.values, record.errors, violations=record.violations)

    def _anchor_scores(self, split: Split) -> dict[int, Score]:
        """Complete anchor -> its score, for those that were measured on the split."""
        scores = {
            anchor.number: self.score(anchor, split)
            for anchor in self.anchors
            if anchor.state == "complete"
        }
        return {number: score for number, score in scores.items() if score is not None}


def _values(
    losses: Mapping[int, Array], objectives: Sequence[Objective]
) -> dict[int, dict[str, float]]:
    """Trial -> losses ``(objectives,)`` as values by objective, in the user's direction."""
    names = [objective.name for objective in objectives]
    factors = signs(objectives)
    return {
        number: dict(zip(names, (factors * row).tolist(), strict=True))
        for number, row in losses.items()
    }


def label(record: TrialSummary) -> str:
    """What to call a trial: the anchor's name, else ``trial 37``."""
    return record.name or f"trial {record.number}"
