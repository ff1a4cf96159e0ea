"""From the scores of single domains to the values of objectives and the violations of bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Measurement
from mergesearch.evaluators.objectives import DIRECTIONS, Metric, References
from mergesearch.merging import InputError, NonFiniteError

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

#: Ranges below this are no range to normalise by.
TINY = 1e-9


@dataclass(frozen=True, eq=False)
class DomainScore:
    """A metric in one domain.

    Attributes:
        value: The domain's value; the mean of ``items`` unless the metric is made of them
            otherwise.
        error: Standard error of the value.
        items: Score of each of the domain's items ``(n,)``, in the order of the split; better where
            the metric is.
        item_indices: Indices of those items in the split ``(n,)``.
        mean: Whether the value is the mean of the items.
        value_of: Rows of its items ``(n,)`` -> the value of those; None where that is their mean,
            or not known.
    """

    value: float
    error: float
    items: Array
    item_indices: Indices
    mean: bool = True
    value_of: Callable[[Indices], float] | None = None


@dataclass(frozen=True, eq=False)
class MetricValue:
    """A metric over its domains.

    Attributes:
        value: The value.
        error: Standard error of the value.
        items: Scores of the items behind it ``(items,)``, in the order of the split.
        weights: Weight of each of them ``(items,)``, if the value is ``Σ weight · item``; else
            None.
        item_indices: Indices of the items in the split ``(items,)``.
    """

    value: float
    error: float
    items: Array
    weights: Array | None
    item_indices: Indices


@dataclass(frozen=True)
class _Scale:
    """The map ``factor · (s − offset)`` of a domain's scores."""

    factor: float
    offset: float

    def of(self, scores: Array) -> Array:
        """Map scores of any shape."""
        return self.factor * (scores - self.offset)


def score_domains(scores: Array, domains: npt.NDArray[np.str_]) -> dict[str, DomainScore]:
    """Domain -> mean of its items' scores.

    Args:
        scores: Score of each item ``(items,)``.
        domains: Domain of each item ``(items,)``.
    """
    by_domain = {}
    for name in np.unique(domains).tolist():
        indices = np.flatnonzero(domains == name)
        part = scores[indices]
        by_domain[name] = DomainScore(
            float(part.mean()), float(part.std() / math.sqrt(part.size)), part, indices
        )
    return by_domain


def reduce_metric(
    metric: Metric,
    scores: Mapping[str, DomainScore],
    references: References | None = None,
    experts: Mapping[str, str] | None = None,
) -> MetricValue:
    """Compute a metric's value, its standard error and the item scores behind them.

    The mean over domains is the mean of the domains' values, its error that of independent ones;
    the worst domain brings its own error and items. Items of a normalised mean are normalised too,
    so that they add up to it.

    Args:
        metric: What to measure.
        scores: Domain -> score.
        references: Values of other models; None gives NaN where they are needed.
        experts: Domain -> its expert, where that has another name.
    """
    # A small part of the items may lack a domain.
    chosen = (
        sorted(scores)
        if metric.domains is None
        else [domain for domain in metric.domains if domain in scores]
    )
    scales = [_scale(metric, domain, references, experts or {}) for domain in chosen]
    parts = [scores[domain] for domain in chosen]
    values, errors = _compared(metric, parts, scales)
    if metric.reduce == "worst":
        index = int(np.argmin(values) if metric.better == "maximize" else np.argmax(values))
        worst = parts[index]
        return MetricValue(
            float(values[index]), float(errors[index]), worst.items, None, worst.item_indices
        )
    if metric.reduce == "geometric_mean":
        value, error = _geometric_mean(values, errors)
    else:
        value = float(values.mean())
        error = math.sqrt(float(np.sum(errors**2))) / len(chosen)
    return _with_items(metric, value, error, parts, scales)


def measure(
    metrics: Sequence[Metric],
    scores: Mapping[str, Mapping[str, DomainScore]],
    references: References | None,
    experts: Mapping[str, str],
    everywhere: npt.NDArray[np.str_],
) -> Measurement:
    """Compute the values of the objectives and the violations of the bounds.

    Args:
        metrics: Objectives and bounds.
        scores: Metric -> domain -> score on the items in question.
        references: Values of other models; None gives NaN where they are needed.
        experts: Domain -> its expert, where that has another name.
        everywhere: Domain of each item of the whole split ``(split,)``.

    Raises:
        NonFiniteError: If a domain's score is not finite; names the objective.
    """
    results: dict[str, MetricValue] = {}
    violations = {}
    item_indices = {}
    for metric in metrics:
        label = metric.label
        chosen = _finite_domains(metric, scores[metric.metric])
        result = reduce_metric(metric, scores[metric.metric], references, experts)
        if metric.bounds:
            violations[label] = _violation(metric, result.value, scores, references, experts)
            continue
        results[label] = result
        if result.weights is not None:
            domains = chosen if metric.domains is None else list(metric.domains)
            own = np.flatnonzero(np.isin(everywhere, domains))
            item_indices[label] = np.searchsorted(own, result.item_indices)
    return Measurement(
        {label: result.value for label, result in results.items()},
        {label: result.error for label, result in results.items()},
        {label: result.items for label, result in results.items()},
        means={
            f"{name}/{domain}": score.value
            for name, by_domain in scores.items()
            for domain, score in by_domain.items()
        },
        violations=violations,
        weights={
            label: result.weights for label, result in results.items() if result.weights is not None
        },
        item_indices=item_indices,
    )


def _finite_domains(metric: Metric, scores: Mapping[str, DomainScore]) -> list[str]:
    """The domains that a metric is measured on, all of which have finite scores."""
    chosen = [domain for domain in scores if metric.domains is None or domain in metric.domains]
    if not chosen or not all(math.isfinite(scores[domain].value) for domain in chosen):
        raise NonFiniteError(f"objective {metric.label!r}")
    return chosen


def _compared(
    metric: Metric, parts: Sequence[DomainScore], scales: Sequence[_Scale]
) -> tuple[Array, Array]:
    """Values and errors ``(domains,)`` after the comparison with references."""
    pairs = list(zip(parts, scales, strict=True))
    if metric.normalise == "forgetting":
        values = np.array([_forgotten(metric, part.value, scale.offset) for part, scale in pairs])
        errors = np.array(
            [part.error if value else 0.0 for part, value in zip(parts, values, strict=True)]
        )
    else:
        values = np.array([scale.factor * (part.value - scale.offset) for part, scale in pairs])
        errors = np.array([abs(scale.factor) * part.error for part, scale in pairs])
    return values, errors


def _with_items(
    metric: Metric,
    value: float,
    error: float,
    parts: Sequence[DomainScore],
    scales: Sequence[_Scale],
) -> MetricValue:
    """A value with the items of all its domains, and their weights where it is linear in them."""
    indices = np.concatenate([part.item_indices for part in parts])
    order = np.argsort(indices, kind="stable")
    linear = (
        metric.reduce == "mean"
        and metric.normalise != "forgetting"
        and all(part.mean for part in parts)
    )
    if not linear:
        items = np.concatenate([part.items for part in parts])[order]
        return MetricValue(value, error, items, None, indices[order])
    scaled = [scale.of(part.items) for part, scale in zip(parts, scales, strict=True)]
    items = np.concatenate(scaled)[order]
    sizes = [part.items.size for part in parts]
    weights = np.concatenate([np.full(size, 1 / (size * len(parts))) for size in sizes])[order]
    return MetricValue(value, error, items, weights, indices[order])


def _scale(
    metric: Metric, domain: str, references: References | None, experts: Mapping[str, str]
) -> _Scale:
    """The map that normalises a domain's scores; for forgetting, 1 and the base's value."""
    low = metric.chance_in(domain)
    key = f"{metric.metric}/{domain}"
    if metric.normalise is None:
        return _Scale(1.0, 0.0)
    if metric.normalise == "chance":
        return _Scale(1 / (1 - low), low)
    model = f"expert {experts.get(domain, domain)}" if metric.normalise == "expert" else "base"
    if references is None:
        return _Scale(math.nan, math.nan)
    top = references[model][key]
    if metric.normalise == "forgetting":
        return _Scale(1.0, top)
    if abs(top - low) < TINY:
        raise InputError(
            f"objective {metric.label!r}: expected {model} to differ from chance ({low:g}) in "
            f"{key}, received {top:g}; normalise by something else"
        )
    return _Scale(1 / (top - low), low)


def _forgotten(metric: Metric, value: float, base: float) -> float:
    """How much worse a value is than the base's, 0 where it is not."""
    up = (metric.direction or DIRECTIONS.get(metric.metric)) == "maximize"
    lost = base - value if up else value - base
    return lost if math.isnan(lost) else max(lost, 0.0)


def _geometric_mean(values: Array, errors: Array) -> tuple[float, float]:
    """Geometric mean of values, of which negative ones count as 0, and its error to first order."""
    if np.isnan(values).any():
        return math.nan, math.nan
    if (values <= 0).any():
        return 0.0, float(errors.max())
    mean = float(np.exp(np.log(values).mean()))
    return mean, mean * math.sqrt(float(np.sum((errors / values) ** 2))) / len(values)


def _violation(
    metric: Metric,
    value: float,
    scores: Mapping[str, Mapping[str, DomainScore]],
    references: References | None,
    experts: Mapping[str, str],
) -> float:
    """How far a bound is missed, 0 or less where it is kept.

    The unit is the size of the bound where that is above 1.
    """
    missed = []
    for bound, sign in ((metric.at_least, 1.0), (metric.at_most, -1.0)):
        if bound is None:
            continue
        level = (
            _level(bound, metric, scores, references, experts)
            if isinstance(bound, str)
            else float(bound)
        )
        missed.append((sign * (level - value) - metric.tolerance) / max(1.0, abs(level)))
    return max(missed)


def _level(
    model: str,
    metric: Metric,
    scores: Mapping[str, Mapping[str, DomainScore]],
    references: References | None,
    experts: Mapping[str, str],
) -> float:
    """The value of the metric that a model reaches."""
    if references is None:
        return math.nan
    means = references[model]
    known = {
        domain: DomainScore(
            means[f"{metric.metric}/{domain}"], 0.0, score.items, score.item_indices, mean=False
        )
        for domain, score in scores[metric.metric].items()
    }
    return reduce_metric(metric, known, references, experts).value
