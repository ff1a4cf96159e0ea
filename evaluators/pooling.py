"""Metrics that are made of all items of a domain together, such as F1 scores and correlations.

An evaluator scores their parts item by item: scores named ``metric/part``. Standard errors are
those of a jackknife that leaves out one of some groups of items at a time (Efron 1982, "The
Jackknife, the Bootstrap and Other Resampling Plans"), equation (3.1) for groups.

Differences between merges need more than the errors of both: values that are no weighted sums of
items, of these metrics and of worst domains and geometric means, are worked out on resamples of the
items too, which are the same for all merges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Measurement
from mergesearch.evaluators.items import resamples
from mergesearch.evaluators.objectives import Metric, References
from mergesearch.evaluators.reduction import DomainScore, reduce_metric, score_domains

Array = npt.NDArray[np.float64]
#: The parts of a metric, each ``(items,)`` -> its value.
Pool = Callable[[Sequence[Array]], float]

#: Groups of items, one of which is left out at a time.
GROUPS = 20


def is_part(name: str) -> bool:
    """Whether a score is a part of a pooled metric."""
    return "/" in name


def pooled_domains(
    metric: str,
    pool: Pool,
    scores: Mapping[str, Array],
    indices: npt.NDArray[np.intp],
    domains: npt.NDArray[np.str_],
) -> dict[str, DomainScore]:
    """Domain -> value of a pooled metric, with its error.

    Args:
        metric: Its name; a score of that name is each item's own, else the first part is.
        pool: Computes the value from the parts.
        scores: Name -> score of each item ``(items,)``.
        indices: Indices of the items in the split ``(items,)``.
        domains: Domain of each item ``(items,)``.
    """
    parts = [values for name, values in scores.items() if name.startswith(f"{metric}/")]
    own = score_domains(scores.get(metric, parts[0]), domains)
    found = {}
    for name, score in own.items():
        rows = score.item_indices
        chosen = [part[rows] for part in parts]
        found[name] = replace(
            score,
            value=pool(chosen),
            error=jackknife_error(pool, chosen),
            item_indices=indices[rows],
            mean=False,
            value_of=partial(_value_of, pool, chosen),
        )
    return found


def _value_of(pool: Pool, parts: Sequence[Array], rows: npt.NDArray[np.intp]) -> float:
    """The value of the items at some rows."""
    return pool([part[rows] for part in parts])


def jackknife_error(pool: Pool, parts: Sequence[Array]) -> float:
    """Standard error of a value from its values without one group of the items each."""
    count = len(parts[0])
    groups = min(GROUPS, count)
    if groups < 2:
        return 0.0
    member = np.arange(count) % groups
    values = np.array([pool([part[member != left] for part in parts]) for left in range(groups)])
    spread = float(((values - values.mean()) ** 2).sum())
    return float(np.sqrt((groups - 1) / groups * spread))


def with_resamples(
    measured: Measurement,
    metrics: Sequence[Metric],
    scores: Mapping[str, Mapping[str, DomainScore]],
    references: References | None,
    experts: Mapping[str, str],
) -> Measurement:
    """The measurement with the values, on resamples of the items, of what is no sum over items.

    Values of references count as known.

    Args:
        measured: As :func:`mergesearch.evaluators.reduction.measure` made it of the rest.
        metrics: Objectives and bounds.
        scores: Metric -> domain -> score.
        references: Values of other models; None gives NaN where they are needed.
        experts: Domain -> its expert, where that has another name.
    """
    resampled = {}
    for metric in metrics:
        by_domain = {
            name: score
            for name, score in scores[metric.metric].items()
            if metric.domains is None or name in metric.domains
        }
        known = all(each.mean or each.value_of is not None for each in by_domain.values())
        if not metric.bounds and metric.label not in measured.weights and known:
            drawn = {name: resampled_values(score, name) for name, score in by_domain.items()}
            values = _reduced(metric, drawn, references, experts)
            if np.isfinite(values).all():
                resampled[metric.label] = values
    return replace(measured, resampled=resampled)


def resampled_values(score: DomainScore, name: str) -> Array:
    """A domain's value on each resample of its items ``(resamples,)``.

    Args:
        score: Of the domain.
        name: Of the domain, which seeds the draws.
    """
    value_of = score.value_of or (lambda rows: float(score.items[rows].mean()))
    return np.array([value_of(rows) for rows in resamples(name, len(score.items))])


def _reduced(
    metric: Metric,
    drawn: Mapping[str, Array],
    references: References | None,
    experts: Mapping[str, str],
) -> Array:
    """A metric's values ``(resamples,)`` from those of its domains ``(resamples,)``."""
    no_items = np.empty(0)
    nowhere = np.empty(0, np.intp)
    values = []
    for row in zip(*drawn.values(), strict=True):
        scores = {
            name: DomainScore(float(value), 0.0, no_items, nowhere, mean=False)
            for name, value in zip(drawn, row, strict=True)
        }
        values.append(reduce_metric(metric, scores, references, experts).value)
    return np.array(values)
