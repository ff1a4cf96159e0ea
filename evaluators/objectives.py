"""Objectives and bounds as users state them: which metric, in which domains, relative to what.

A domain's value s is compared with a reference value before values are reduced over domains:

* ``expert``: (s − r) / (e − r), e the value of the domain's own expert, r the level of chance (0
  unless given);
* ``base``: (s − r) / (b − r), b the value of the base: *retention* on tasks that a merge should not
  harm;
* ``chance``: (s − r) / (1 − r);
* ``forgetting``: max(0, b − s), or max(0, s − b) where less is better; minimised.

References are measured before the search, on the items of the split in question.
:mod:`mergesearch.evaluators.reduction` computes the values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mergesearch.evaluators.base import Objective
from mergesearch.merging import InputError

Direction = Literal["maximize", "minimize"]
#: Model -> ``metric/domain`` -> value.
References = Mapping[str, Mapping[str, float]]

#: Metric -> direction in which it is optimised.
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
    "f1": "maximize",
    "spearman": "maximize",
    "pearson": "maximize",
    "squared_error": "minimize",
    "recall": "maximize",
    "ndcg": "maximize",
    "exact_match": "maximize",
    "chrf": "maximize",
    "rouge_l": "maximize",
    "wer": "minimize",
    "cer": "minimize",
    "span_f1": "maximize",
    "span_precision": "maximize",
    "span_recall": "maximize",
}
_SHARE = "a share from 0 to 1"
#: Metric -> unit of its values, for people.
UNITS: Mapping[str, str] = {
    **dict.fromkeys(("accuracy", "dice", "iou", "f1", "recall", "ndcg", "exact_match"), _SHARE),
    **dict.fromkeys(("span_f1", "span_precision", "span_recall", "rouge_l"), _SHARE),
    **dict.fromkeys(("cross_entropy", "entropy", "log_perplexity"), "nats"),
    **dict.fromkeys(("wer", "cer"), "errors for each word or letter"),
    **dict.fromkeys(("spearman", "pearson"), "a correlation from -1 to 1"),
    "tokens": "tokens",
}


@dataclass(frozen=True)
class Metric:
    """One objective, or one bound.

    Attributes:
        name: Its name, or None for one made from the rest.
        metric: The metric to measure, a key of :data:`DIRECTIONS` unless ``direction`` is given.
        domains: Domains to measure on, each once; None means all.
        reduce: ``mean`` of the domains' values, the ``worst`` domain, or their ``geometric_mean``.
        normalise: What a domain's value is compared with first, if anything.
        chance: Value of a guess, for all domains or by domain; 0 where it is not given.
        direction: Direction in which it is optimised; None takes the metric's own.
        at_least, at_most: Makes it a bound: a number, or the model whose value is the limit
            (``base``, ``expert NAME``).
        tolerance: How far the bound may be missed, in the unit of the value.
        unit: Of the value, for people; None takes that of :data:`UNITS`.
    """

    name: str | None = None
    metric: str = "accuracy"
    domains: Sequence[str] | None = None
    reduce: Literal["mean", "worst", "geometric_mean"] = "mean"
    normalise: Literal["expert", "base", "chance", "forgetting"] | None = None
    chance: float | Mapping[str, float] = 0.0
    direction: Direction | None = None
    at_least: float | str | None = None
    at_most: float | str | None = None
    tolerance: float = 0.0
    unit: str | None = None

    @property
    def label(self) -> str:
        """The given name, or one such as ``accuracy[rotated]`` or ``worst accuracy of expert``."""
        if self.name is not None:
            return self.name
        domains = f"[{', '.join(self.domains)}]" if self.domains is not None else ""
        how = {"worst": "worst ", "geometric_mean": "geometric mean "}.get(self.reduce, "")
        if self.normalise == "forgetting":
            text = f"{how}forgetting of {self.metric}{domains}"
        else:
            text = f"{how}{self.metric}{domains}" + (
                f" of {self.normalise}" if self.normalise else ""
            )
        limits = (("at least", self.at_least), ("at most", self.at_most))
        return " ".join(
            [text, *(f"{words} {limit}" for words, limit in limits if limit is not None)]
        )

    @property
    def better(self) -> Direction:
        """Direction in which the value is optimised."""
        if self.normalise == "forgetting":
            return "minimize"
        return self.direction or DIRECTIONS[self.metric]

    @property
    def bounds(self) -> bool:
        """Whether this is a bound, not an objective."""
        return self.at_least is not None or self.at_most is not None

    @property
    def allowance(self) -> str:
        """The tolerance with its unit, such as ``0.02 of accuracy (a share from 0 to 1)``."""
        if self.normalise in ("expert", "base", "chance"):
            what = f"{self.metric} relative to {self.normalise} (1 is as good)"
        elif self.unit is not None:
            return f"{self.tolerance:g} {self.unit}"
        else:
            unit = UNITS.get(self.metric, "its own unit")
            what = f"{self.metric} ({unit})"
        return f"{self.tolerance:g} of {what}"

    def chance_in(self, domain: str) -> float:
        """Value of a guess in a domain."""
        return self.chance.get(domain, 0.0) if isinstance(self.chance, Mapping) else self.chance


def needed_references(
    metrics: Sequence[Metric],
    domains: Mapping[str, Collection[str]] | Collection[str],
    experts: Mapping[str, str],
) -> frozenset[str]:
    """Names of the models that must be measured first: ``base``, ``expert NAME``.

    Args:
        metrics: Objectives and bounds.
        domains: All domains, or those of each metric.
        experts: Domain -> its expert, where that has another name.
    """
    names = set()
    for metric in metrics:
        known = domains[metric.metric] if isinstance(domains, Mapping) else domains
        names |= {limit for limit in (metric.at_least, metric.at_most) if isinstance(limit, str)}
        if metric.normalise in ("base", "forgetting"):
            names.add("base")
        if metric.normalise == "expert":
            names |= {f"expert {experts.get(domain, domain)}" for domain in metric.domains or known}
    return frozenset(names)


def objectives_of(metrics: Sequence[Metric]) -> tuple[Objective, ...]:
    """Name and direction of each objective, without the bounds."""
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


def extra_scores(names: Sequence[str], bounds: Sequence[Metric]) -> tuple[str, ...]:
    """Scores that bounds are about and that are no objectives, each once."""
    return tuple(dict.fromkeys(b.metric for b in bounds if b.metric not in names))


def tolerances_of(metrics: Sequence[Metric]) -> dict[str, str]:
    """Bound -> its tolerance with the unit, for those that have one."""
    return {m.label: m.allowance for m in metrics if m.bounds and m.tolerance}


def loss_factors(
    metrics: Sequence[Metric],
    domain: str,
    everywhere: Collection[str],
    weights: Mapping[str, float],
) -> dict[str, float]:
    """Metric -> its weight in the loss of one domain, over all objectives that measure there.

    Args:
        metrics: Objectives and bounds; bounds have no weight.
        domain: The domain in question.
        everywhere: All domains.
        weights: Objective -> weight.
    """
    factors: dict[str, float] = {}
    for metric in metrics:
        chosen = everywhere if metric.domains is None else set(metric.domains)
        weight = 0.0 if metric.bounds else weights.get(metric.label, 0.0)
        if weight and domain in chosen:
            factors[metric.metric] = factors.get(metric.metric, 0.0) + weight / len(chosen)
    return factors


def check_names(objectives: Sequence[Objective], where: str) -> tuple[str, ...]:
    """Names of objectives, in their order.

    Raises:
        InputError: If two have one name.
    """
    names = tuple(objective.name for objective in objectives)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"{where}.objectives: expected unique names, received {twice} twice; rename one"
        )
    return names


def check_metrics(metrics: Sequence[Metric], where: str, *, by_domain: bool) -> None:
    """Refuse repeated names and domains, domains where items have none, and no metric at all.

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
    if not metrics:
        raise InputError(f"{where}.objectives: expected an objective or a bound, received neither")
