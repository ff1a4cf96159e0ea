"""What a report says of a study, as plain numbers; tables, plots and pages only show it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import SPLITS, Objective, Split
from mergesearch.merging import Field, InputError, Layout
from mergesearch.search.front import Front, Normaliser, signs, to_losses
from mergesearch.search.record.trial_record import Score, TrialRecord, Verdict
from mergesearch.search.redact import redact
from mergesearch.search.study.reference_scores import Z95

Array = npt.NDArray[np.float64]

#: What a study that searches on the test items is called, wherever it is described.
TRANSDUCTIVE = "transductive: the search looks at the test items themselves, without their labels"
PHASES = ("merge", "evaluate", "descend", "overhead")


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything a report is made of.

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
    """

    study: str
    run: str
    objectives: tuple[Objective, ...]
    weights: Sequence[float]
    records: Sequence[TrialRecord]
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

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.objectives) or not self.objectives:
            raise InputError(
                f"report: expected one weight for each of {[o.name for o in self.objectives]}, "
                f"received {list(self.weights)}"
            )

    @cached_property
    def complete(self) -> list[TrialRecord]:
        """Complete trials, by number."""
        return sorted((r for r in self.records if r.state == "complete"), key=lambda r: r.number)

    @cached_property
    def by_number(self) -> dict[int, TrialRecord]:
        """Trials by number."""
        return {record.number: record for record in self.records}

    @cached_property
    def losses(self) -> Array:
        """Losses of the complete trials, ``(complete, objectives)``."""
        rows = [to_losses(record.values, self.objectives) for record in self.complete]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.objectives))

    @cached_property
    def normaliser(self) -> Normaliser | None:
        """The study's normaliser; from the anchors, or from whatever is complete, when none was
        given.
        """
        if self.scale is not None or not self.complete:
            return self.scale
        anchors = np.array([record.kind == "anchor" for record in self.complete])
        return Normaliser.from_anchors(self.losses[anchors] if anchors.any() else self.losses)

    @cached_property
    def scalars(self) -> Array:
        """Scalarised loss of the complete trials, ``(complete,)``: 0 equals the best anchors, 1 the
        worst.
        """
        if self.normaliser is None:
            return np.empty(0)
        return self.normaliser.scalarise(self.losses, self.weights)

    @cached_property
    def front(self) -> list[TrialRecord]:
        """Front members, best scalarised first; with one objective the best ten trials."""
        order = [self.complete[i] for i in np.argsort(self.scalars, kind="stable")]
        if len(self.objectives) == 1:
            return order[:10]
        return [record for record in order if record.number in self._front_numbers]

    @cached_property
    def _front_numbers(self) -> frozenset[int]:
        if self.verdict is not None and self.verdict.front:
            return frozenset(self.verdict.front)
        return frozenset(self._front_history.numbers)

    @cached_property
    def _front_history(self) -> Front:
        assert self.normaliser is not None
        front = Front(self.normaliser)
        for record, row in zip(self.complete, self.losses, strict=True):
            front.add(record.number, row)
        return front

    @property
    def hypervolumes(self) -> Array:
        """Hypervolume after each complete trial, ``(complete,)``."""
        return np.array(self._front_history.history if self.complete else [])

    @cached_property
    def winner(self) -> TrialRecord | None:
        """The winning trial, or None while there is no verdict."""
        return None if self.verdict is None else self.by_number[self.verdict.winner]

    @cached_property
    def leading(self) -> TrialRecord | None:
        """The winner, or until there is one the best trial by its search values."""
        if self.winner is not None or not self.complete:
            return self.winner
        return self.complete[int(np.argmin(self.scalars))]

    @cached_property
    def anchors(self) -> list[TrialRecord]:
        """All anchors, failed ones included, by number."""
        return sorted((r for r in self.records if r.kind == "anchor"), key=lambda r: r.number)

    @cached_property
    def best_anchor(self) -> TrialRecord | None:
        """The best complete anchor on the validation items, or on the search items while there are
        no others.
        """
        complete = [anchor for anchor in self.anchors if anchor.state == "complete"]
        if not complete or self.normaliser is None:
            return None
        scored = [anchor for anchor in complete if self.score(anchor, "validation") is not None]
        split: Split = "validation" if scored else "search"
        return min(scored or complete, key=lambda anchor: self._scalar(anchor, split))

    def score(self, record: TrialRecord, split: Split) -> Score | None:
        """Values and standard errors of a trial on a split, or None where it was not measured."""
        if split == "search":
            return Score(record.values, record.errors) if record.state == "complete" else None
        return (
            self.verdict.scores.get(split, {}).get(record.number)
            if self.verdict is not None
            else None
        )

    def _scalar(self, record: TrialRecord, split: Split) -> float:
        score = self.score(record, split)
        assert score is not None
        assert self.normaliser is not None
        return float(
            self.normaliser.scalarise(to_losses(score.values, self.objectives), self.weights)
        )


def label(record: TrialRecord) -> str:
    """What to call a trial: the anchor's name, else ``trial 37``."""
    return record.name or f"trial {record.number}"


@dataclass(frozen=True)
class Comparison:
    """The winner against the best anchor in one objective.

    Attributes:
        objective: Name.
        split: Items that both were measured on.
        winner, anchor: Value of each.
        winner_error, anchor_error: Standard errors, None where unknown.
        improvement: How much better the winner is, in the objective's unit; positive is better in
            either direction.
        low, high: 95 % interval of the improvement, None where no standard error is known.
        paired: Whether the interval comes from item-by-item differences; otherwise it is the wider
            one of two independent samples.
        optimism: How much better the winner looked on the search items than on the test items, None
            before the test.
    """

    objective: str
    split: Split
    winner: float
    winner_error: float | None
    anchor: float
    anchor_error: float | None
    improvement: float
    low: float | None
    high: float | None
    paired: bool
    optimism: float | None


def compare(data: ReportData) -> list[Comparison]:
    """The leading trial against the best anchor, per objective; empty when either is missing."""
    if data.leading is None or data.best_anchor is None:
        return []
    for split in reversed(SPLITS):
        winner = data.score(data.leading, split)
        anchor = data.score(data.best_anchor, split)
        if winner is not None and anchor is not None:
            return [
                _comparison(data, objective, split, winner, anchor) for objective in data.objectives
            ]
    return []


def _comparison(
    data: ReportData, objective: Objective, split: Split, winner: Score, anchor: Score
) -> Comparison:
    name = objective.name
    sign = float(-signs([objective])[0])
    improvement = sign * (winner.values[name] - anchor.values[name])
    error, paired = _difference_error(_paired_items(data, split, name), winner, anchor, name)
    return Comparison(
        objective=name,
        split=split,
        winner=winner.values[name],
        winner_error=winner.errors.get(name),
        anchor=anchor.values[name],
        anchor_error=anchor.errors.get(name),
        improvement=improvement,
        low=None if error is None else improvement - Z95 * error,
        high=None if error is None else improvement + Z95 * error,
        paired=paired,
        optimism=_optimism(data, objective),
    )


def _optimism(data: ReportData, objective: Objective) -> float | None:
    """How much better the leading trial looked on the search items than on the test items."""
    test = data.score(data.leading, "test") if data.leading is not None else None
    if test is None or data.leading is None:
        return None
    return float(
        -signs([objective])[0] * (data.leading.values[objective.name] - test.values[objective.name])
    )


def _paired_items(data: ReportData, split: Split, name: str) -> Array | None:
    """Leading trial's score less the best anchor's, item by item ``(items,)``, where both are
    known.
    """
    ours, theirs = (
        data.items.get(r.number, {}).get(name)
        for r in (data.leading, data.best_anchor)
        if r is not None
    )
    if (
        split != "test"
        or ours is None
        or theirs is None
        or len(ours) != len(theirs)
        or len(ours) < 2
    ):
        return None
    return ours - theirs


def _difference_error(
    items: Array | None, winner: Score, anchor: Score, name: str
) -> tuple[float | None, bool]:
    """Standard error of winner less anchor, and whether it is paired."""
    difference = winner.values[name] - anchor.values[name]
    size = max(abs(winner.values[name]), 1.0)
    # Only where a value is the mean of its items do item differences speak of it. (Logs keep them
    # in single precision.)
    if items is not None and math.isclose(items.mean(), difference, abs_tol=1e-5 * size):
        return float(items.std(ddof=1) / math.sqrt(len(items))), True
    if name not in winner.errors or name not in anchor.errors:
        return None, False
    return math.hypot(winner.errors[name], anchor.errors[name]), False


@dataclass(frozen=True, eq=False)
class Progress:
    """Best so far, after each complete trial.

    Attributes:
        numbers: Trial numbers, ``(complete,)``.
        values: Value of each trial, in the user's direction (one objective) or as weighted score.
        best: Best value so far.
        errors: Standard error of the best value so far, NaN where unknown.
        anchors: Anchor name -> value.
        title: What the values are.
        higher_is_better: Direction of the values.
    """

    numbers: npt.NDArray[np.int64]
    values: Array
    best: Array
    errors: Array
    anchors: Mapping[str, float]
    title: str
    higher_is_better: bool


def progress(data: ReportData) -> Progress:
    """The course of the study: the objective if there is one, else the weighted score.

    The weighted score is 1 less the scalarised loss: 1 equals the best anchor in every objective, 0
    the worst.
    """
    single = len(data.objectives) == 1
    values = data.losses[:, 0] * signs(data.objectives)[0] if single else 1.0 - data.scalars
    higher = not single or data.objectives[0].direction == "maximize"
    errors = np.array([_error(data, record) for record in data.complete])
    best = np.maximum.accumulate(values) if higher else np.minimum.accumulate(values)
    # The first trial that reached the current best is the one whose standard error counts.
    holder = np.maximum.accumulate(np.where(_improves(values, higher), np.arange(len(values)), 0))
    return Progress(
        numbers=np.array([record.number for record in data.complete], dtype=np.int64),
        values=values,
        best=best,
        errors=errors[holder] if len(errors) else errors,
        anchors={
            label(r): float(v)
            for r, v in zip(data.complete, values, strict=True)
            if r.kind == "anchor"
        },
        title=data.objectives[0].name if single else "weighted score",
        higher_is_better=higher,
    )


def _improves(values: Array, higher: bool) -> npt.NDArray[np.bool_]:
    values = values if higher else -values
    before = (
        np.concatenate(([-np.inf], np.maximum.accumulate(values)[:-1])) if len(values) else values
    )
    return np.asarray(values > before)


def _error(data: ReportData, record: TrialRecord) -> float:
    """Standard error of a trial's progress value, NaN where it is unknown; objectives count as
    independent.
    """
    errors = np.array([record.errors.get(o.name, np.nan) for o in data.objectives])
    if len(data.objectives) == 1:
        return float(errors[0])
    assert data.normaliser is not None
    slopes = np.asarray(data.weights) / (data.normaliser.high - data.normaliser.low)
    return float(np.sqrt(np.sum((slopes * errors) ** 2)))


@dataclass(frozen=True)
class FailureGroup:
    """Trials that failed for the same reason.

    Attributes:
        kind: ``infeasible``, ``error`` or ``lost``.
        message: Message of the first of them.
        trials: Their numbers.
    """

    kind: str
    message: str
    trials: tuple[int, ...]


def failures(data: ReportData) -> list[FailureGroup]:
    """Failures by kind and message (numbers inside a message aside), most frequent first."""
    groups: dict[tuple[str, str], list[TrialRecord]] = {}
    for record in sorted(data.records, key=lambda r: r.number):
        if record.failure is not None:
            key = (record.failure.kind, re.sub(r"\d+", "#", record.failure.message))
            groups.setdefault(key, []).append(record)
    listed = [
        FailureGroup(
            kind, without_secrets(members[0].failure.message), tuple(r.number for r in members)
        )
        for (kind, _), members in groups.items()
        if members[0].failure is not None
    ]
    return sorted(listed, key=lambda group: -len(group.trials))


@dataclass(frozen=True)
class Timing:
    """Seconds spent by workers in one phase, summed over all trials, and its share of the sum of
    the phases.
    """

    phase: str
    seconds: float
    share: float


def timings(data: ReportData) -> list[Timing]:
    """Where the workers' time went: merge, evaluate, descend where gradients were followed,
    overhead.
    """
    sums = {phase: math.fsum(r.seconds.get(phase, 0.0) for r in data.records) for phase in PHASES}
    if not sums["descend"]:
        del sums["descend"]
    total = math.fsum(sums.values())
    return [
        Timing(phase, seconds, seconds / total if total else 0.0) for phase, seconds in sums.items()
    ]


def busy_share(data: ReportData) -> float | None:
    """Share of the workers' time that went into trials; None where it is not recorded.

    A worker's time runs from the start of its first trial to the end of its last, so that breaks
    between sessions, after which workers are new processes, do not count as idling.
    """
    spans: dict[str, tuple[float, float]] = {}
    busy = 0.0
    for record in data.records:
        if record.worker and record.finished:
            spent = math.fsum(record.seconds.values())
            first, last = spans.get(record.worker, (math.inf, -math.inf))
            spans[record.worker] = (min(first, record.finished - spent), max(last, record.finished))
            busy += spent
    available = math.fsum(last - first for first, last in spans.values())
    return min(busy / available, 1.0) if available > 0 else None


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A trial's coefficients: ``values[k, b]`` for direction ``rows[k]`` and block
    ``columns[b]``.
    """

    trial: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Array


def heat_map(data: ReportData) -> HeatMap | None:
    """Mean coefficient of the leading trial per expert and block, weighted by parameters; None
    without coefficients.

    Blocks are the groups of granularity ``block``, so embedding, head and final norm have their own
    columns (modules for a model without numbered blocks). Without a layout the columns are the
    segments of the field.
    """
    if data.leading is None or data.leading.recipe.routing:
        return None
    field_ = data.leading.recipe.field
    experts = data.experts or tuple(source.name for source in data.leading.recipe.experts)
    rows = (
        experts
        if len(experts) == field_.directions
        else tuple(f"direction {k}" for k in range(field_.directions))
    )
    if data.layout is None:
        columns = tuple(f"segment {s}" for s in range(field_.segments))
        return HeatMap(data.leading.number, rows, columns, np.array(field_.values))
    columns, values = block_means(field_, data.layout)
    return HeatMap(data.leading.number, rows, columns, values)


def block_means(field_: Field, layout: Layout) -> tuple[tuple[str, ...], Array]:
    """Names of the blocks, and the mean coefficients ``(directions, blocks)`` over their
    parameters.
    """
    from mergesearch.spaces.groups import group_tensors

    try:
        groups = group_tensors(layout, "block")
    except InputError:  # no numbered blocks in this model
        groups = group_tensors(layout, "module")
    owner = {name: index for index, group in enumerate(groups) for name in group.tensors}
    specs = [spec for spec in layout.tensors if spec.name in owner]
    starts, stops = (
        np.array([getattr(s, end) for s in specs], dtype=np.int64) for end in ("start", "stop")
    )
    fine = field_.refine(np.concatenate([starts, stops]))
    # Padding between tensors belongs to none: it must not pull on a mean.
    tensor = np.searchsorted(starts, fine.boundaries[:-1], side="right") - 1
    inside = (tensor >= 0) & (fine.boundaries[:-1] < stops[tensor])
    block = np.array([owner[spec.name] for spec in specs])[tensor[inside]]
    lengths = np.diff(fine.boundaries)[inside].astype(np.float64)
    sums = [
        np.bincount(block, weights=row[inside] * lengths, minlength=len(groups))
        for row in fine.values
    ]
    totals = np.bincount(block, weights=lengths, minlength=len(groups))
    return tuple(group.name for group in groups), np.stack(sums) / totals


SECRET_KEY = re.compile(r"password|passwd|secret|token$|api_?key", re.IGNORECASE)


def without_secrets(value: Any) -> Any:
    """``value`` with what :func:`redact` hides, and values of keys that name a secret, replaced by
    ``***``.
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            key: "***"
            if SECRET_KEY.search(str(key)) and isinstance(item, str) and item
            else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return value
