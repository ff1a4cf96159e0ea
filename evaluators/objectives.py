"""What users state: objectives and bounds made from scores by domain, as means, worst cases, or
relative to models.

A domain's value s is compared with what is known of it before it is reduced over domains:

* ``expert``: (s − r) / (e − r), e the value of the domain's own expert, r the level of chance (0
  unless given);
* ``base``: (s − r) / (b − r), b the value of the base: *retention* on tasks that a merge should not
  harm;
* ``chance``: (s − r) / (1 − r);
* ``forgetting``: max(0, b − s), or max(0, s − b) where less is better; minimised.

References are measured before the search, on the items of the split in question.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Measurement, Objective
from mergesearch.merging import InputError, NonFiniteError

Array = npt.NDArray[np.float64]
Direction = Literal["maximize", "minimize"]
#: Model -> ``metric/domain`` -> value.
References = Mapping[str, Mapping[str, float]]

#: Metric -> where better is.
DIRECTIONS: Mapping[str, Direction] = {
    "accuracy": "maximize",
    "cross_entropy": "minimize",
    "dice": "maximize",
    "iou": "maximize",
    "entropy": "minimize",
    "alignment": "minimize",
    "score": "maximize",
    "loss": "minimize",
    "tokens": "minimize",
    "log_perplexity": "minimize",
    "perplexity": "minimize",
}
#: Ranges below this are no range to normalise by.
TINY = 1e-9


@dataclass(frozen=True)
class Metric:
    """One objective, or one bound.

    Attributes:
        name: Its name, or None for one made from the rest.
        metric: What is measured, a key of :data:`DIRECTIONS` unless ``direction`` is given.
        domains: Domains to measure on, each once; None means all.
        reduce: ``mean`` of the domains' values, the ``worst`` domain, or their ``geometric_mean``.
        normalise: What a domain's value is compared with first, if anything.
        chance: Value of a guess, for all domains or by domain; 0 where it is not given.
        direction: Where better is; None: as the metric has it.
        at_least, at_most: Makes it a bound: a number, or ``base`` for what the base reaches.
        tolerance: How far the bound may be missed.
    """

    name: str | None = None
    metric: str = "accuracy"
    domains: Sequence[str] | None = None
    reduce: Literal["mean", "worst", "geometric_mean"] = "mean"
    normalise: Literal["expert", "base", "chance", "forgetting"] | None = None
    chance: float | Mapping[str, float] = 0.0
    direction: Direction | None = None
    at_least: float | Literal["base"] | None = None
    at_most: float | Literal["base"] | None = None
    tolerance: float = 0.0

    @property
    def label(self) -> str:
        """The name: ``accuracy``, ``accuracy[rotated]``, ``worst accuracy of expert``, unless one
        was given.
        """
        if self.name is not None:
            return self.name
        where = f"[{', '.join(self.domains)}]" if self.domains is not None else ""
        how = {"worst": "worst ", "geometric_mean": "geometric mean "}.get(self.reduce, "")
        if self.normalise == "forgetting":
            text = f"{how}forgetting of {self.metric}{where}"
        else:
            text = f"{how}{self.metric}{where}" + (
                f" of {self.normalise}" if self.normalise else ""
            )
        limits = (("at least", self.at_least), ("at most", self.at_most))
        return " ".join(
            [text, *(f"{words} {limit}" for words, limit in limits if limit is not None)]
        )

    @property
    def better(self) -> Direction:
        """Where better is."""
        if self.normalise == "forgetting":
            return "minimize"
        return self.direction or DIRECTIONS[self.metric]

    @property
    def bounds(self) -> bool:
        """Whether it is a bound, not an objective."""
        return self.at_least is not None or self.at_most is not None

    def chance_in(self, domain: str) -> float:
        """Value of a guess in a domain."""
        return self.chance.get(domain, 0.0) if isinstance(self.chance, Mapping) else self.chance


@dataclass(frozen=True, eq=False)
class DomainScore:
    """A metric in one domain.

    Attributes:
        value: The domain's value; the mean of ``items`` unless the metric is made of them
            otherwise.
        error: Its standard error.
        items: Score of each of the domain's items ``(n,)``, in the order of the split; better where
            the metric is.
        places: Where those items are in the split ``(n,)``.
        mean: Whether the value is the mean of the items.
    """

    value: float
    error: float
    items: Array
    places: npt.NDArray[np.intp]
    mean: bool = True


def score_domains(scores: Array, domains: npt.NDArray[np.str_]) -> dict[str, DomainScore]:
    """Domain -> mean of its items' scores, from those of a split ``(items,)`` and the domain of
    each.
    """
    found = {}
    for name in np.unique(domains).tolist():
        places = np.flatnonzero(domains == name)
        part = scores[places]
        found[name] = DomainScore(
            float(part.mean()), float(part.std() / math.sqrt(part.size)), part, places
        )
    return found


@dataclass(frozen=True, eq=False)
class Reduced:
    """A metric over its domains.

    Attributes:
        value, error: Its value and standard error.
        items: Scores of the items behind it ``(items,)``, in the order of the split.
        weights: Weight of each of them ``(items,)``, if the value is ``Σ weight · item``; else
            None.
        places: Where they are in the split ``(items,)``.
    """

    value: float
    error: float
    items: Array
    weights: Array | None
    places: npt.NDArray[np.intp]


def reduce_metric(
    metric: Metric,
    scores: Mapping[str, DomainScore],
    references: References | None = None,
    experts: Mapping[str, str] | None = None,
) -> Reduced:
    """Value, standard error and the item scores behind them.

    The mean over domains is the mean of the domains' values, its error that of independent ones;
    the worst domain brings its own error and items. Items of a normalised mean are normalised too,
    so that they add up to it.

    Args:
        metric: What to measure.
        scores: Domain -> score.
        references: What is known of other models; None gives NaN where it is needed.
        experts: Domain -> its expert, where that has another name.
    """
    # A small part of the items may lack a domain.
    chosen = (
        sorted(scores)
        if metric.domains is None
        else [domain for domain in metric.domains if domain in scores]
    )
    maps = [_relative(metric, domain, references, experts or {}) for domain in chosen]
    parts = [scores[domain] for domain in chosen]
    if metric.normalise == "forgetting":
        values = np.array(
            [
                _forgotten(metric, part.value, low)
                for part, (_, low) in zip(parts, maps, strict=True)
            ]
        )
        errors = np.array(
            [part.error if value else 0.0 for part, value in zip(parts, values, strict=True)]
        )
    else:
        values = np.array(
            [factor * (part.value - low) for part, (factor, low) in zip(parts, maps, strict=True)]
        )
        errors = np.array(
            [abs(factor) * part.error for part, (factor, _) in zip(parts, maps, strict=True)]
        )
    if metric.reduce == "worst":
        worst = int(np.argmin(values) if metric.better == "maximize" else np.argmax(values))
        return Reduced(
            float(values[worst]),
            float(errors[worst]),
            parts[worst].items,
            None,
            parts[worst].places,
        )
    places = np.concatenate([part.places for part in parts])
    order = np.argsort(places, kind="stable")
    linear = (
        metric.reduce == "mean"
        and metric.normalise != "forgetting"
        and all(part.mean for part in parts)
    )
    if not linear:
        items = np.concatenate([part.items for part in parts])[order]
        weights = None
    else:
        scaled = [
            factor * (part.items - low) for part, (factor, low) in zip(parts, maps, strict=True)
        ]
        items = np.concatenate(scaled)[order]
        weights = np.concatenate(
            [np.full(p.items.size, 1 / (p.items.size * len(parts))) for p in parts]
        )[order]
    if metric.reduce == "geometric_mean":
        value, error = _geometric_mean(values, errors)
    else:
        value = float(values.mean())
        error = math.sqrt(float(np.sum(errors**2))) / len(chosen)
    return Reduced(value, error, items, weights, places[order])


def measure(
    metrics: Sequence[Metric],
    scores: Mapping[str, Mapping[str, DomainScore]],
    references: References | None,
    experts: Mapping[str, str],
    everywhere: npt.NDArray[np.str_],
) -> Measurement:
    """Values of the objectives and violations of the bounds, from metric -> domain -> score.

    Args:
        metrics: Objectives and bounds.
        scores: On the items in question.
        references: Values of other models; None gives NaN where they are needed.
        experts: Domain -> its expert, where that has another name.
        everywhere: Domain of each item of the whole split ``(split,)``.

    Raises:
        NonFiniteError: If a domain's score is not finite; names the objective.
    """
    values = {}
    errors = {}
    items = {}
    weights = {}
    places = {}
    violations = {}
    for metric in metrics:
        known = scores[metric.metric]
        chosen = [domain for domain in known if metric.domains is None or domain in metric.domains]
        if not chosen or not all(math.isfinite(known[domain].value) for domain in chosen):
            raise NonFiniteError(f"objective {metric.label!r}")
        found = reduce_metric(metric, scores[metric.metric], references, experts)
        label = metric.label
        if metric.bounds:
            violations[label] = _violation(metric, found.value, scores, references, experts)
            continue
        values[label] = found.value
        errors[label] = found.error
        items[label] = found.items
        if found.weights is not None:
            own = np.flatnonzero(
                np.isin(everywhere, chosen if metric.domains is None else list(metric.domains))
            )
            weights[label] = found.weights
            places[label] = np.searchsorted(own, found.places)
    means = {
        f"{name}/{domain}": score.value
        for name, by in scores.items()
        for domain, score in by.items()
    }
    return Measurement(values, errors, items, means, violations, weights, places)


def needed_references(
    metrics: Sequence[Metric],
    domains: Mapping[str, Collection[str]] | Collection[str],
    experts: Mapping[str, str],
) -> frozenset[str]:
    """Names of the models that must be measured first: ``base``, and ``expert NAME`` of each domain
    in question.

    Args:
        metrics: Objectives and bounds.
        domains: All domains, or those of each metric.
        experts: Domain -> its expert, where that has another name.
    """
    found = set()
    for metric in metrics:
        known = domains[metric.metric] if isinstance(domains, Mapping) else domains
        if metric.normalise in ("base", "forgetting") or "base" in (
            metric.at_least,
            metric.at_most,
        ):
            found.add("base")
        if metric.normalise == "expert":
            found |= {f"expert {experts.get(domain, domain)}" for domain in metric.domains or known}
    return frozenset(found)


def objectives_of(metrics: Sequence[Metric]) -> tuple[Objective, ...]:
    """What is optimised."""
    return tuple(Objective(metric.label, metric.better) for metric in metrics if not metric.bounds)


def additive_of(metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Objectives that are weighted sums of their items' scores, if the domains' values are."""
    linear = (
        m for m in metrics if not m.bounds and m.reduce == "mean" and m.normalise != "forgetting"
    )
    return tuple(metric.label for metric in linear)


def constraints_of(metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Names of the bounds."""
    return tuple(metric.label for metric in metrics if metric.bounds)


def check_metrics(metrics: Sequence[Metric], where: str, *, by_domain: bool) -> None:
    """Refuse names twice, domains twice, and domains where items have none.

    Raises:
        InputError: In one line.
    """
    names = [metric.label for metric in metrics]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"{where}.objectives: expected unique names, received {twice} twice; give one a name"
        )
    again = next(
        (m for m in metrics if m.domains is not None and len(set(m.domains)) < len(m.domains)), None
    )
    if again is not None:
        raise InputError(
            f"{where}.objectives: expected each domain once, received {again.domains}; drop the "
            "repeat"
        )
    named = next((m.label for m in metrics if m.domains is not None or m.reduce != "mean"), None)
    if named is not None and not by_domain:
        raise InputError(
            f"{where}.domain: required key is missing: objective {named!r} needs a domain column"
        )
    if not any(not metric.bounds for metric in metrics):
        raise InputError(
            f"{where}.objectives: expected at least one objective beside bounds, received none"
        )


def _relative(
    metric: Metric, domain: str, references: References | None, experts: Mapping[str, str]
) -> tuple[float, float]:
    """Factor and offset of ``factor · (s − offset)``; for forgetting, 1 and the base's value."""
    low = metric.chance_in(domain)
    key = f"{metric.metric}/{domain}"
    if metric.normalise is None:
        return 1.0, 0.0
    if metric.normalise == "chance":
        return 1 / (1 - low), low
    model = f"expert {experts.get(domain, domain)}" if metric.normalise == "expert" else "base"
    if references is None:
        return math.nan, math.nan
    top = references[model][key]
    if metric.normalise == "forgetting":
        return 1.0, top
    if abs(top - low) < TINY:
        raise InputError(
            f"objective {metric.label!r}: expected {model} to differ from chance ({low:g}) in "
            f"{key}, received "
            f"{top:g}; normalise by something else"
        )
    return 1 / (top - low), low


def _forgotten(metric: Metric, value: float, base: float) -> float:
    up = (metric.direction or DIRECTIONS.get(metric.metric)) == "maximize"
    lost = base - value if up else value - base
    return lost if math.isnan(lost) else max(lost, 0.0)


def _geometric_mean(values: Array, errors: Array) -> tuple[float, float]:
    """Of values from 0 on (less counts as 0), and its error to first order."""
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
    """How far a bound is missed, 0 or less where it is kept; in units of the bound where that is
    above 1.
    """
    missed = []
    for bound, sign in ((metric.at_least, 1.0), (metric.at_most, -1.0)):
        if bound is None:
            continue
        level = (
            _base_level(metric, scores, references, experts) if bound == "base" else float(bound)
        )
        missed.append((sign * (level - value) - metric.tolerance) / max(1.0, abs(level)))
    return max(missed)


def _base_level(
    metric: Metric,
    scores: Mapping[str, Mapping[str, DomainScore]],
    references: References | None,
    experts: Mapping[str, str],
) -> float:
    if references is None:
        return math.nan
    means = references["base"]
    known = {
        domain: DomainScore(
            means[f"{metric.metric}/{domain}"], 0.0, score.items, score.places, mean=False
        )
        for domain, score in scores[metric.metric].items()
    }
    return reduce_metric(metric, known, references, experts).value
