"""Choice of the winner on items that the search has not seen.

The best of many noisy scores is partly luck (the optimism gap), so the search's own scores only
nominate: a few leaders and every anchor are re-evaluated on validation items, and one of them wins
and is reported once on test items. Anchors compete too, and a winner is never worse than the best
anchor on validation items. Of the leaders that are better than every anchor there, the one wins
that is best by all that is known of it (:mod:`mergesearch.search.study.posterior`): the luckiest of
several noisy leaders would often displace a recommendation that is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators import Objective
from mergesearch.search import front
from mergesearch.search.front import Normaliser, nondominated, to_losses
from mergesearch.search.record.trial_record import Score, TrialRecord
from mergesearch.search.study.estimated_front import has_estimate


def choose_leaders(
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    weights: npt.NDArray[np.float64],
    normaliser: Normaliser,
    count: int,
    confidence: float = 0.0,
    estimates: Mapping[int, npt.NDArray[np.float64]] | None = None,
) -> list[int]:
    """Nominate trials: the strategy's recommendation, then up to ``count`` of the best.

    With one objective these have the best scores; with several they are the best weighted sum, the
    best of each objective, and the members that add most hypervolume. ``confidence`` standard
    errors are taken off each score, so that of equal scores the one that is known better comes
    first. Trials of the same merge are counted once; trials that miss a bound are nominated only
    where no trial keeps them all.

    ``estimates`` (trial -> losses ``(objectives,)``) take the place of observed losses. Trials that
    have none are then not nominated, since their luck is not known.

    Returns:
        Numbers of the trials.
    """
    distinct: dict[str, TrialRecord] = {}
    for record in records:
        if record.kind != "anchor" and record.state == "complete":
            distinct.setdefault(record.recipe.digest, record)
    nominees = [record for record in distinct.values() if record.feasible] or list(
        distinct.values()
    )
    recommended = [record.number for record in nominees if record.kind == "recommended"]
    if not nominees:
        return []
    if estimates:
        nominees = [record for record in nominees if has_estimate(record, estimates)] or nominees
    known = estimates or {}
    losses = np.array(
        [known.get(record.number, to_losses(record.values, objectives)) for record in nominees]
    )
    errors = np.array([[record.errors.get(o.name, 0.0) for o in objectives] for record in nominees])
    losses = losses + confidence * errors
    scalars = normaliser.scalarise(losses, weights)
    leaders = [
        nominees[row].number for row in front.choose_leaders(losses, scalars, normaliser, count)
    ]
    return list(dict.fromkeys([*recommended, *leaders]))


def choose_winner(
    scores: Mapping[int, Score],
    objectives: Sequence[Objective],
    weights: npt.NDArray[np.float64],
    normaliser: Normaliser,
    posterior: Mapping[int, float] | None = None,
) -> int | None:
    """Number of the winning trial; None without scores.

    The best weighted sum of validation values wins. With a ``posterior``, that decides only whether
    an anchor wins, and otherwise which leaders are better than every anchor; of these, the best by
    the posterior wins. Of equals the earliest wins, so anchors come first. Trials that miss a bound
    win only where all do, and then the one that misses least.

    Args:
        scores: Trial -> score on validation items.
        objectives: The study's.
        weights: Importance of each objective, summing to 1, ``(objectives,)``.
        normaliser: Scale of the objectives.
        posterior: Leader -> expected weighted loss, the recommendation first: it wins ties.
    """
    if not scores:
        return None
    feasible = sorted(number for number in scores if scores[number].feasible)
    numbers = feasible or [
        min(sorted(scores), key=lambda number: max(scores[number].violations.values()))
    ]
    losses = np.array([to_losses(scores[number].values, objectives) for number in numbers])
    scalars = normaliser.scalarise(losses, weights)
    best = numbers[int(np.argmin(scalars))]
    if posterior is None or best not in posterior:
        return best
    measured = dict(zip(numbers, scalars.tolist(), strict=True))
    level = min((measured[n] for n in numbers if n not in posterior), default=np.inf)
    better = [n for n in posterior if n in measured and measured[n] < level]
    return min(better, key=lambda number: posterior[number])


def front_numbers(
    records: Sequence[TrialRecord], objectives: Sequence[Objective]
) -> tuple[int, ...]:
    """Numbers of the trials that no other trial dominates on the search items."""
    complete = [record for record in records if record.state == "complete" and record.feasible]
    if not complete:
        return ()
    losses = np.array([to_losses(record.values, objectives) for record in complete])
    return tuple(
        record.number
        for record, member in zip(complete, nondominated(losses), strict=True)
        if member
    )
