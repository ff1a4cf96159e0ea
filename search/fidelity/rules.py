"""Rules that stop a trial which is clearly losing while it is being evaluated.

A trial is evaluated on the first items of the fixed order, then on more, and nothing is evaluated
twice. After each stage a rule decides by what is known:

* ``race``: stop when some leading trial is better with confidence in every objective, by paired
  differences on the same items (Maron and Moore 1994, "Hoeffding Races", here with normal intervals
  of paired differences), as far as the items that are left could still change it.
* ``halving``: stop unless among the best 1/η of all that reached this stage (Jamieson and Talwalkar
  2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization"; asynchronous as in
  Li 2020, "A System for Massively Parallel Hyperparameter Tuning").
* ``hyperband``: the same in brackets, of which some begin with more items (Li 2018, "Hyperband").
* ``subset``: stop after so many items unless better than the leading trial there.

What a stopped trial would have scored on all items is *estimated*, for the strategy alone: it is
never compared with complete trials, and never wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Measurement
from mergesearch.evaluators.base import ItemSubset

Array = npt.NDArray[np.float64]
Values = Mapping[str, float]

#: Every stage of a race has this many times the items of the one before.
GROWTH = 1.5


class EarlyStopRule(Protocol):
    """A rule that travels with a trial to its worker."""

    @property
    def stages(self) -> tuple[int, ...]:
        """Numbers of items after which it decides, rising, each less than all."""

    def items_at(self, index: int) -> ItemSubset:
        """The items of the stage of this index."""

    def stops(self, index: int, measured: Measurement) -> bool:
        """Whether the trial ends after the stage of this index, with what was measured there."""


@dataclass(frozen=True)
class StagedMeasurement:
    """The result of an evaluation in stages.

    Attributes:
        measurement: On all items, or on those until it was stopped.
        rungs: Items -> values, at every stage that it went through.
        stopped: Items until it was stopped; None where it was evaluated on all.
    """

    measurement: Measurement
    rungs: Mapping[int, Values]
    stopped: int | None


def measure_in_stages(
    evaluate: Callable[[ItemSubset], Measurement], rule: EarlyStopRule
) -> StagedMeasurement:
    """Evaluate on more and more items until the rule says stop, or on all."""
    rungs: dict[int, Values] = {}
    for index, stage in enumerate(rule.stages):
        measured = evaluate(rule.items_at(index))
        rungs[stage] = measured.values
        if rule.stops(index, measured):
            return StagedMeasurement(measured, rungs, stage)
    return StagedMeasurement(evaluate(None), rungs, None)


def would_pass(rule: EarlyStopRule | None, rungs: Mapping[int, Values]) -> bool:
    """Whether a rule lets a trial end that has these values at its stages.

    False where that is not known: values of some stage are missing, or the rule asks for more.
    """
    if rule is None or not rule.stages:
        return True
    if isinstance(rule, Race) or not all(stage in rungs for stage in rule.stages):
        return False
    return not any(
        rule.stops(index, Measurement(rungs[stage])) for index, stage in enumerate(rule.stages)
    )


@dataclass(frozen=True)
class Estimates:
    """What a stopped trial would have scored on all items.

    Attributes:
        values: Objective name -> estimated value; empty for trials that were not stopped.
        errors: Objective name -> its standard error as an estimate of the value on all conceivable
            items, where it is known.
    """

    values: Values = field(default_factory=dict)
    errors: Values = field(default_factory=dict)


@dataclass(frozen=True)
class NeverStop:
    """A rule that records the values at every stage and stops nothing."""

    stages: tuple[int, ...]

    def items_at(self, index: int) -> ItemSubset:
        """The first items of the fixed order."""
        return self.stages[index]

    def stops(self, index: int, measured: Measurement) -> bool:
        """False at every stage."""
        return False


@dataclass(frozen=True, eq=False)
class Race:
    """A rule by paired differences to leading trials.

    Attributes:
        stages: Numbers of items after which it decides.
        rivals: Item scores of the leading trials, objective -> ``(items,)``, on all items.
        signs: Objective -> factor from score to loss.
        confidence: Standard errors of the paired difference beyond which a trial is worse.
        selected: Indices of the items of the one stage ``(n,)``, where they are not the first of
            the fixed order.
    """

    stages: tuple[int, ...]
    rivals: tuple[Mapping[str, Array], ...]
    signs: Mapping[str, float]
    confidence: float
    selected: npt.NDArray[np.intp] | None = None

    def items_at(self, index: int) -> ItemSubset:
        """The first items of the fixed order, or those that were selected."""
        return self.stages[index] if self.selected is None else self.selected

    def stops(self, index: int, measured: Measurement) -> bool:
        """Whether some rival is better in every objective, with confidence."""
        return any(
            all(self._worse(name, measured, rival) for name in self.signs) for rival in self.rivals
        )

    def _worse(self, name: str, measured: Measurement, rival: Mapping[str, Array]) -> bool:
        theirs = rival[name][measured.item_indices[name]]
        ours = measured.items[name].astype(np.float32).astype(np.float64)  # as logs keep them
        loss, error = paired_difference(self.signs[name] * (ours - theirs), measured.weights[name])
        # Only the other items are unknown: a sample without replacement (Cochran 1977, eq. 2.20).
        unknown = 1 - len(ours) / len(rival[name])
        return loss > self.confidence * error * math.sqrt(unknown)


@dataclass(frozen=True, eq=False)
class Rungs:
    """A rule by comparison with all trials that reached the same stage.

    Attributes:
        stages: Numbers of items after which it decides.
        limits: Scalar loss that may not be exceeded at each stage; infinite where none is known.
        scalar: Values -> scalar loss.
    """

    stages: tuple[int, ...]
    limits: tuple[float, ...]
    scalar: Scalar

    def items_at(self, index: int) -> ItemSubset:
        """The first items of the fixed order."""
        return self.stages[index]

    def stops(self, index: int, measured: Measurement) -> bool:
        """Whether the scalar loss is beyond the stage's limit."""
        return self.scalar(measured.values) > self.limits[index]


@dataclass(frozen=True, eq=False)
class Scalar:
    """Weighted sum of losses in units of the anchors' range.

    Attributes:
        names: Objectives.
        signs: Factor from value to loss ``(objectives,)``.
        weights: Importance ``(objectives,)``.
        scale: Losses ``(objectives, 2)`` that map to 0 and 1.
    """

    names: tuple[str, ...]
    signs: Array
    weights: Array
    scale: Array

    def __call__(self, values: Values) -> float:
        """The scalar loss."""
        losses = self.signs * np.array([values[name] for name in self.names])
        return float(
            np.sum(
                self.weights * (losses - self.scale[:, 0]) / (self.scale[:, 1] - self.scale[:, 0])
            )
        )


def paired_difference(losses: Array, weights: Array) -> tuple[float, float]:
    """Weighted mean of differences ``(items,)`` and its standard error.

    The spread is that around the overall mean, also where weights come from domains: differences
    between domains make the error larger, never smaller.
    """
    mean = float(weights @ losses)
    count = len(losses)
    if count < 2:
        return mean, math.inf
    return mean, math.sqrt(float(np.sum((weights * (losses - mean)) ** 2)) * count / (count - 1))


def race_stages(items: int, least: int) -> tuple[int, ...]:
    """Numbers of items from ``least`` on, each :data:`GROWTH` times the last, below ``items``."""
    stages = []
    size = float(least)
    while round(size) < items:
        stages.append(round(size))
        size *= GROWTH
    return tuple(stages)


def rung_stages(items: int, least: int, eta: int) -> tuple[int, ...]:
    """Rising numbers of items that lead to ``items`` by factors of ``eta``, from ``least`` on."""
    stages: list[int] = []
    while items / eta ** (len(stages) + 1) >= least:
        stages.append(round(items / eta ** (len(stages) + 1)))
    return tuple(reversed(stages))


def halving_limit(losses: Sequence[float], eta: int) -> float:
    """Scalar loss up to which one more trial belongs to the best 1/η of all.

    It is infinite while there are no others. The best of fewer than η goes on, as the best of η
    would.
    """
    survivors = (len(losses) + 1) // eta
    if not losses:
        return math.inf
    return float(np.sort(losses)[max(survivors, 1) - 1])


def bracket_of(trial: int, stages: int, eta: int) -> int:
    """How many of the first stages a trial skips: its bracket of Hyperband.

    The brackets come in turn, in the proportions of their sizes: bracket s of 0, ..., s_max has
    ⌈(s_max + 1) / (s + 1) · η^s⌉ trials and skips s_max − s stages (Li 2018, algorithm 1).
    """
    sizes = [-(-(stages + 1) * eta**s // (s + 1)) for s in reversed(range(stages + 1))]
    position = trial % sum(sizes)
    for skipped, size in enumerate(sizes):
        if position < size:
            return skipped
        position -= size
    raise AssertionError("a position is below the sum of the sizes")


def by_difference(values: Values, rival_values: Values, rival_whole: Values) -> dict[str, float]:
    """Estimate the values of a stopped trial on all items by its difference to another trial.

    The difference varies less than either (a control variate), since merges of one family agree on
    most items.

    Args:
        values: Of the stopped trial, on the items of its last stage.
        rival_values: Of the other trial, on the same items.
        rival_whole: Of the other trial, on all items.
    """
    return {name: rival_whole[name] + value - rival_values[name] for name, value in values.items()}


def difference_errors(
    measured: Measurement, rival_items: Mapping[str, Array], rival_errors: Values
) -> dict[str, float]:
    """Standard errors of :func:`by_difference`, where they are known.

    The rival's own error and that of the paired difference add up. That is an upper bound where the
    difference is larger on items on which the rival is worse, as for merges of one family. Without
    scores of items, the error is that of the plain mean.
    """
    errors = {}
    for name, error in measured.errors.items():
        errors[name] = error
        weights = measured.weights.get(name)
        theirs = rival_items.get(name)
        if weights is None or theirs is None or name not in rival_errors:
            continue
        differences = measured.items[name] - theirs[measured.item_indices[name]]
        paired = paired_difference(differences, weights)[1]
        errors[name] = math.hypot(rival_errors[name], paired)
    return _finite(errors)


def weighted_estimates(items: Mapping[str, Array], weights: Array) -> Estimates:
    """Weighted sums of item scores ``(items,)`` and their standard errors."""
    pairs = {name: paired_difference(scores, weights) for name, scores in items.items()}
    values = {name: value for name, (value, _) in pairs.items()}
    return Estimates(values, _finite({name: error for name, (_, error) in pairs.items()}))


def _finite(errors: Values) -> dict[str, float]:
    return {name: error for name, error in errors.items() if math.isfinite(error)}
