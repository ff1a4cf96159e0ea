"""The study's fidelity: which rule may stop a trial, and estimates for the trials it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Measurement
from mergesearch.merging import InputError
from mergesearch.search import front
from mergesearch.search.fidelity.irt import ItemModel, choose_representatives, estimate, fit_items
from mergesearch.search.fidelity.rules import (
    EarlyStopRule,
    Estimates,
    NeverStop,
    Race,
    Rungs,
    Scalar,
    bracket_of,
    by_difference,
    difference_errors,
    halving_limit,
    race_stages,
    rung_stages,
    weighted_estimates,
)
from mergesearch.search.front import Normaliser, signs, to_losses
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.study.attempts import known_before_search

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
    """The fidelity of one study.

    Attributes:
        plan: The study.
        normaliser: Scale of the objectives.
        items: Number of search items.
        fitted: Objective and number of responses -> item parameters; a cache, since they follow
            from the log.
        representatives: Items that stand for others, and their weights, once they are known.
    """

    plan: Plan
    normaliser: Normaliser
    items: int
    fitted: dict[tuple[str, int], ItemModel] = field(default_factory=dict)
    representatives: list[tuple[npt.NDArray[np.intp], Array]] = field(default_factory=list)

    @property
    def section(self) -> FidelitySection:
        """The study's section ``fidelity``."""
        return self.plan.spec.fidelity

    @property
    def stages(self) -> tuple[int, ...]:
        """Numbers of items after which trials may be stopped."""
        return stages_of(self.section, self.items)

    def rule(self, number: int, records: Sequence[TrialRecord]) -> EarlyStopRule | None:
        """The rule for search trial ``number`` (counted from 0), by what is known now."""
        if self.section.rule == "full":
            return None
        if self.section.rule in ("race", "subset"):
            return self._race(records)
        return self._rungs(number, records)

    def estimates(
        self, measured: Measurement, stopped: int, records: Sequence[TrialRecord]
    ) -> Estimates:
        """Estimates of what a stopped trial would have scored on all items."""
        kind = self.section.estimate
        rival = self._best_at(stopped, records) if kind == "difference" else None
        if rival is not None:
            values = by_difference(measured.values, rival.rungs[stopped], rival.values)
            return Estimates(values, difference_errors(measured, rival.items, rival.errors))
        if kind in ("difference", "mean"):
            return Estimates(measured.values, measured.errors)
        if kind == "representative":
            weights = self._representatives(records)[1]
            return weighted_estimates(measured.items, weights)
        values = {
            name: self._by_response(
                kind, name, measured.items[name], measured.item_indices[name], records
            )
            for name in measured.values
        }
        # Item parameters say more than a plain mean of the same items, whose error is known.
        return Estimates(values, measured.errors)

    def _by_response(
        self,
        kind: str,
        name: str,
        observed: Array,
        indices: npt.NDArray[np.intp],
        records: Sequence[TrialRecord],
    ) -> float:
        """An estimate by item parameters, which are fitted to complete trials.

        They are fitted again when there are a tenth more complete trials.
        """
        complete = [record for record in records if record.state == "complete" and record.items]
        count = fitted_count(len(complete))
        known = complete[:count]
        key = (name, count)
        if key not in self.fitted:
            self.fitted[key] = fit_items(np.array([record.items[name] for record in known]))
        parents = np.array([_is_parent(record) for record in known])
        return estimate(kind, self.fitted[key], parents, observed, indices)

    def _representatives(
        self, records: Sequence[TrialRecord]
    ) -> tuple[npt.NDArray[np.intp], Array]:
        """Items that stand for others by the anchors' scores, and their weights."""
        if not self.representatives:
            known = [r for r in known_before_search(records) if r.state == "complete" and r.items]
            scores = np.concatenate(
                [np.array([r.items[o.name] for r in known]) for o in self.plan.objectives]
            )
            self.representatives.append(choose_representatives(scores, self.section.min_items))
        return self.representatives[0]

    def _best_at(self, stage: int, records: Sequence[TrialRecord]) -> TrialRecord | None:
        """The best complete trial whose values at the same stage are known."""
        known = [r for r in records if r.state == "complete" and stage in r.rungs]
        scalar = self._scalar
        return min(known, key=lambda record: scalar(record.values), default=None)

    @property
    def _scalar(self) -> Scalar:
        """From values of objectives to the scalar loss."""
        objectives = self.plan.objectives
        names = tuple(objective.name for objective in objectives)
        return Scalar(names, signs(objectives), self.plan.weights, self.normaliser.scale)

    def _rivals(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Leading trials that keep all bounds.

        With one objective this is the best trial, with several some of the front.
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

    def _race(self, records: Sequence[TrialRecord]) -> Race:
        names = [objective.name for objective in self.plan.objectives]
        factors = dict(zip(names, signs(self.plan.objectives).tolist(), strict=True))
        confidence = self.section.confidence if self.section.rule == "race" else 0.0
        scores = tuple(dict(rival.items) for rival in self._rivals(records))
        if self.section.order == "representative":
            selected = self._representatives(records)[0]
            return Race((len(selected),), scores, factors, confidence, selected)
        return Race(self.stages, scores, factors, confidence)

    def _rungs(self, number: int, records: Sequence[TrialRecord]) -> Rungs:
        skipped = 0
        stages = self.stages
        if self.section.rule == "hyperband":
            skipped = bracket_of(number, len(stages), self.section.eta)
        scalar = self._scalar
        limits = []
        for stage in stages[skipped:]:
            reached = [scalar(record.rungs[stage]) for record in records if stage in record.rungs]
            limits.append(halving_limit(reached, self.section.eta))
        return Rungs(stages[skipped:], tuple(limits), scalar)


def _is_parent(record: TrialRecord) -> bool:
    """Whether a trial is the base or an expert, unmerged."""
    return record.kind == "anchor" and (record.name == "base" or record.name.startswith("expert "))


def check_fidelity(section: FidelitySection, records: Sequence[TrialRecord], items: int) -> None:
    """Refuse representative items or item response theory where the anchors' scores allow neither.

    Raises:
        InputError: If anchors were not measured on all items, item scores are not between 0 and 1,
            or a value is not their plain mean.
    """
    if section.order == "representative":
        _check_representative(records, items)
    if section.rule != "full" and section.estimate.endswith("irt"):
        _check_responses(section.estimate, records)


def _check_representative(records: Sequence[TrialRecord], items: int) -> None:
    if not any(record.kind == "anchor" and record.items for record in records):
        raise InputError(
            "fidelity.order: representative: expected anchors that were measured, received none; "
            "set balanced"
        )
    for record in records:
        partial = next(
            (name for name, scores in record.items.items() if len(scores) != items), None
        )
        if partial is not None and record.state == "complete":
            raise InputError(
                "fidelity.order: representative: expected objectives over all search items, "
                f"received {partial!r} over some; set balanced"
            )


def _check_responses(estimate: str, records: Sequence[TrialRecord]) -> None:
    if estimate in ("mp_irt", "gmp_irt") and not any(_is_parent(record) for record in records):
        raise InputError(
            f"fidelity.estimate: {estimate}: expected base and experts among the anchors, received "
            "none; set anchors: default, or choose p_irt"
        )
    for record in records:
        for name, scores in record.items.items():
            if record.state == "complete" and (scores.min() < 0 or scores.max() > 1):
                raise InputError(
                    f"fidelity.estimate: {estimate}: expected item scores of {name!r} between 0 "
                    f"and 1, received {scores.min():g} to {scores.max():g}; choose difference"
                )
            if record.state == "complete" and abs(scores.mean() - record.values[name]) > 1e-5:
                raise InputError(
                    f"fidelity.estimate: {estimate}: expected {name!r} to be the mean of its "
                    "items, received domains of different sizes; choose difference"
                )


def stages_of(section: FidelitySection, items: int) -> tuple[int, ...]:
    """Numbers of items after which trials may be stopped, all below ``items``."""
    if section.rule == "race":
        return race_stages(items, section.min_items)
    if section.rule in ("halving", "hyperband"):
        return rung_stages(items, section.min_items, section.eta)
    return (section.min_items,) if section.rule == "subset" else ()


def anchor_rule(section: FidelitySection, items: int) -> EarlyStopRule | None:
    """The rule for anchors, which records their values at every stage and never stops them.

    Trials of the search are compared with these values.
    """
    stages = stages_of(section, items)
    return NeverStop(stages) if stages else None


def fitted_count(complete: int) -> int:
    """Number of complete trials, the first ones, that item parameters are fitted to.

    It grows in steps of a tenth, so that a fit serves for several trials.
    """
    count = min(complete, RESPONSES)
    step = 1
    while (larger := step + max(step // 10, 1)) <= count:
        step = larger
    return step
