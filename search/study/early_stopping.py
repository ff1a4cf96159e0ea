"""The study's rule of fidelity at work: which watch a trial gets, and what is told of those that it
stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Measurement
from mergesearch.merging import InputError
from mergesearch.search import front
from mergesearch.search.fidelity.irt import ItemModel, choose_anchors, estimate, fit_items
from mergesearch.search.fidelity.rules import (
    EarlyStopRule,
    NeverStop,
    Race,
    Rungs,
    Scalar,
    bracket_of,
    by_difference,
    halving_limit,
    race_stages,
    rung_stages,
)
from mergesearch.search.front import Normaliser, signs, to_losses
from mergesearch.search.record.trial_record import TrialRecord

if TYPE_CHECKING:
    from mergesearch.search.plan.plan import Plan
    from mergesearch.search.spec.sections import FidelitySection

Array = npt.NDArray[np.float64]

#: Most responses that item parameters are fitted to.
RESPONSES = 200
#: Leading trials that a race is run against, where there are several objectives.
RIVALS = 8


@dataclass(frozen=True, eq=False)
class EarlyStopping:
    """The rule of one study.

    Attributes:
        plan: The study.
        normaliser: Scale of the objectives.
        items: Number of search items.
        fitted: Objective and number of responses -> item parameters; what the log says, kept.
        chosen: Items that stand for others, and their weights, once they are known.
    """

    plan: Plan
    normaliser: Normaliser
    items: int
    fitted: dict[tuple[str, int], ItemModel] = field(default_factory=dict)
    chosen: list[tuple[npt.NDArray[np.intp], Array]] = field(default_factory=list)

    @property
    def section(self) -> FidelitySection:
        """What the study says of it."""
        return self.plan.spec.fidelity

    @property
    def stages(self) -> tuple[int, ...]:
        """When trials are looked at."""
        return stages_of(self.section, self.items)

    def watch(self, number: int, records: Sequence[TrialRecord]) -> EarlyStopRule | None:
        """The rule for search trial ``number`` (counted from 0), by what is known now."""
        if self.section.rule == "full":
            return None
        if self.section.rule in ("race", "subset"):
            rivals = self._rivals(records)
            names = [objective.name for objective in self.plan.objectives]
            factors = dict(zip(names, signs(self.plan.objectives).tolist(), strict=True))
            confidence = self.section.confidence if self.section.rule == "race" else 0.0
            scores = tuple(dict(rival.items) for rival in rivals)
            stages = self.stages
            if self.section.order == "representative":
                selected = self._anchor_items(records)[0]
                return Race((len(selected),), scores, factors, confidence, selected)
            return Race(stages, scores, factors, confidence)
        return self._rungs(number, records)

    def estimates(
        self, measured: Measurement, stopped: int, records: Sequence[TrialRecord]
    ) -> dict[str, float]:
        """What a stopped trial would have scored on all items, as far as can be told."""
        kind = self.section.estimate
        if kind == "mean":
            return dict(measured.values)
        if kind == "representative":
            weights = self._anchor_items(records)[1]
            return {name: float(weights @ scores) for name, scores in measured.items.items()}
        if kind == "difference":
            rival = self._compared(stopped, records)
            if rival is None:
                return dict(measured.values)
            return by_difference(measured.values, rival.rungs[stopped], rival.values)
        return {
            name: self._by_response(
                kind, name, measured.items[name], measured.places[name], records
            )
            for name in measured.values
        }

    def _by_response(
        self,
        kind: str,
        name: str,
        observed: Array,
        places: npt.NDArray[np.intp],
        records: Sequence[TrialRecord],
    ) -> float:
        """By item parameters of the complete trials, fitted anew when there are a tenth more of
        them.
        """
        complete = [record for record in records if record.state == "complete" and record.items]
        count = fitted_to(len(complete))
        known = complete[:count]
        key = (name, count)
        if key not in self.fitted:
            self.fitted[key] = fit_items(np.array([record.items[name] for record in known]))
        ends = np.array([_is_end(record) for record in known])
        return estimate(kind, self.fitted[key], ends, observed, places)

    def _anchor_items(self, records: Sequence[TrialRecord]) -> tuple[npt.NDArray[np.intp], Array]:
        """Items that stand for others by what the anchors scored, and their weights."""
        if not self.chosen:
            known = [r for r in records if r.kind == "anchor" and r.state == "complete" and r.items]
            scores = np.concatenate(
                [np.array([r.items[o.name] for r in known]) for o in self.plan.objectives]
            )
            self.chosen.append(choose_anchors(scores, self.section.min_items))
        return self.chosen[0]

    def check_responses(self, records: Sequence[TrialRecord]) -> None:
        """Refuse item response theory on scores that are none.

        Raises:
            InputError: If item scores are not between 0 and 1, or the value is not their plain
                mean.
        """
        irt = self.section.estimate.endswith("irt")
        anchored = self.section.order == "representative"
        if anchored and not any(record.kind == "anchor" and record.items for record in records):
            raise InputError(
                "fidelity.order: anchors: expected anchors that were measured, received none; set "
                "balanced"
            )
        for record in records if anchored else ():
            odd = next(
                (name for name, scores in record.items.items() if len(scores) != self.items), None
            )
            if odd is not None and record.state == "complete":
                raise InputError(
                    "fidelity.order: anchors: expected objectives over all search items, received "
                    f"{odd!r} over some; "
                    "set balanced"
                )
        if self.section.rule == "full" or not irt:
            return
        if self.section.estimate in ("mp_irt", "gmp_irt") and not any(
            _is_end(record) for record in records
        ):
            raise InputError(
                f"fidelity.estimate: {self.section.estimate}: expected base and experts among the "
                "anchors, received "
                "none; set anchors: default, or choose p_irt"
            )
        for record in records:
            for name, scores in record.items.items():
                if record.state == "complete" and (scores.min() < 0 or scores.max() > 1):
                    raise InputError(
                        f"fidelity.estimate: {self.section.estimate}: expected item scores of "
                        f"{name!r} between 0 and "
                        f"1, received {scores.min():g} to {scores.max():g}; choose difference"
                    )
                if record.state == "complete" and abs(scores.mean() - record.values[name]) > 1e-5:
                    raise InputError(
                        f"fidelity.estimate: {self.section.estimate}: expected {name!r} to be the "
                        "mean of its items, "
                        "received domains of different sizes; choose difference"
                    )

    def _compared(self, stopped: int, records: Sequence[TrialRecord]) -> TrialRecord | None:
        """The best complete trial that was looked at after as many items."""
        known = [r for r in records if r.state == "complete" and stopped in r.rungs]
        return min(known, key=self._scalar, default=None)

    def _scalar(self, record: TrialRecord) -> float:
        return self._of(record.values)

    @property
    def _of(self) -> Scalar:
        objectives = self.plan.objectives
        names = tuple(objective.name for objective in objectives)
        return Scalar(names, signs(objectives), self.plan.weights, self.normaliser.scale)

    def _rivals(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Leading trials that keep all bounds: the best, or with several objectives some of the
        front.
        """
        complete = [r for r in records if r.state == "complete" and r.items and r.feasible]
        if not complete:
            return []
        losses = np.array([to_losses(record.values, self.plan.objectives) for record in complete])
        scalars = self.normaliser.scalarise(losses, self.plan.weights)
        count = 1 if losses.shape[1] == 1 else RIVALS
        return [
            complete[row] for row in front.choose_leaders(losses, scalars, self.normaliser, count)
        ]

    def _rungs(self, number: int, records: Sequence[TrialRecord]) -> Rungs:
        skipped = 0
        stages = self.stages
        if self.section.rule == "hyperband":
            skipped = bracket_of(number, len(stages), self.section.eta)
        left = stages[skipped:]
        scalar = self._of
        limits = []
        for stage in left:
            reached = [scalar(record.rungs[stage]) for record in records if stage in record.rungs]
            limits.append(halving_limit(reached, self.section.eta))
        return Rungs(left, tuple(limits), scalar)


def _is_end(record: TrialRecord) -> bool:
    """Whether it is one of the models that merges are made of."""
    return record.kind == "anchor" and (record.name == "base" or record.name.startswith("expert "))


def stages_of(section: FidelitySection, items: int) -> tuple[int, ...]:
    """Numbers of items after which trials are looked at, all below ``items``."""
    if section.rule == "race":
        return race_stages(items, section.min_items)
    if section.rule in ("halving", "hyperband"):
        return rung_stages(items, section.min_items, section.eta)
    return (section.min_items,) if section.rule == "subset" else ()


def anchor_watch(section: FidelitySection, items: int) -> EarlyStopRule | None:
    """Anchors are never stopped, but looked at after as many items, for what comes after to be
    compared with.
    """
    stages = stages_of(section, items)
    return NeverStop(stages) if stages else None


def fitted_to(complete: int) -> int:
    """To how many of the complete trials, the first ones, item parameters are fitted: steps of a
    tenth.
    """
    count = min(complete, RESPONSES)
    step = 1
    while (larger := step + max(step // 10, 1)) <= count:
        step = larger
    return step


def told_losses(losses: Array, violations: Mapping[str, float], normaliser: Normaliser) -> Array:
    """Losses ``(objectives,)`` of a trial as strategies see them: behind the worst anchor if it
    misses a bound.

    The more it misses the further (Deb 2000, "An efficient constraint handling method for genetic
    algorithms": any trial that keeps the bounds is better than any that does not, and of those the
    one that misses less is better).
    """
    missed = sum(max(value, 0.0) for value in violations.values())
    if not missed:
        return losses
    low = normaliser.low
    high = normaliser.high
    return np.asarray(np.maximum(losses, high) + (high - low) * missed)
