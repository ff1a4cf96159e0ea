"""Values on resamples of the items, from which differences between merges get paired intervals."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mergesearch.evaluators.base import Measurement
from mergesearch.evaluators.items import RESAMPLES, resamples
from mergesearch.evaluators.metrics.answers import macro_f1
from mergesearch.evaluators.metrics.correlation import pearson
from mergesearch.evaluators.metrics.spans import span_f1
from mergesearch.evaluators.objectives import Metric
from mergesearch.evaluators.pooling import Pool, pooled_domains, with_resamples
from mergesearch.evaluators.reduction import DomainScore, measure, score_domains
from mergesearch.search.record.trial_record import Score
from mergesearch.search.report.simultaneous import critical_value, deviation_of
from mergesearch.search.study.measuring import score_of

Array = npt.NDArray[np.float64]
#: Domains of other sizes, their items mixed.
DOMAINS = np.array(["a", "b", "c", "c", "b", "c"] * 9)
REFERENCES = {"base": {"accuracy/a": 0.6, "accuracy/b": 0.4, "accuracy/c": 0.5}}


def measured(
    scores: Mapping[str, DomainScore], *metrics: Metric, references: Any = REFERENCES
) -> Measurement:
    by_metric = {metric.metric: scores for metric in metrics}
    plain = measure(metrics, by_metric, references, {}, DOMAINS)
    return with_resamples(plain, metrics, by_metric, references, {})


def brute_force(domains: npt.NDArray[np.str_], value: Any) -> Array:
    """Values of a function of the resampled rows by domain, by a plain loop of our own."""
    draws = {}
    for name in np.unique(domains).tolist():
        rows = np.flatnonzero(domains == name)
        rng = np.random.default_rng([zlib.crc32(name.encode()), len(rows)])
        draws[name] = [rows[rng.integers(len(rows), size=len(rows) - 1)] for _ in range(RESAMPLES)]
    return np.array(
        [value({name: rows[index] for name, rows in draws.items()}) for index in range(RESAMPLES)]
    )


def accuracies(items: Array, rows: Mapping[str, Any]) -> Array:
    return np.array([items[of_domain].mean() for of_domain in rows.values()])


REDUCTIONS: dict[str, tuple[Metric, Any]] = {
    "worst": (Metric(reduce="worst"), lambda means: means.min()),
    "geometric mean": (
        Metric(reduce="geometric_mean"),
        lambda means: np.prod(means) ** (1 / 3),
    ),
    "worst of two": (Metric(reduce="worst", domains=["a", "c"]), lambda m: min(m[0], m[2])),
    "worst of base": (
        Metric(reduce="worst", normalise="base"),
        lambda means: (means / [0.6, 0.4, 0.5]).min(),
    ),
    "forgetting": (
        Metric(normalise="forgetting"),
        lambda means: np.maximum([0.6, 0.4, 0.5] - means, 0).mean(),
    ),
    "worst loss": (Metric(reduce="worst", direction="minimize"), lambda means: means.max()),
}


@pytest.mark.parametrize("case", REDUCTIONS)
def test_reductions_agree_with_a_loop_of_our_own(case: str) -> None:
    metric, reduced = REDUCTIONS[case]
    items = np.random.default_rng(0).random(len(DOMAINS))
    ours = measured(score_domains(items, DOMAINS), metric).resampled[metric.label]
    expected = brute_force(DOMAINS, lambda rows: reduced(accuracies(items, rows)))
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def counts(generator: np.random.Generator) -> list[Array]:
    """Right, answered and true spans of each item."""
    right = generator.integers(0, 4, len(DOMAINS)).astype(float)
    more = generator.integers(0, 3, (2, len(DOMAINS)))
    return [right, right + more[0], right + more[1]]


POOLS: dict[str, tuple[Pool, Any]] = {
    "span_f1": (span_f1, counts),
    "f1": (macro_f1, lambda generator: [each for _ in range(2) for each in counts(generator)]),
    "pearson": (pearson, lambda generator: list(generator.random((2, len(DOMAINS))))),
}


@pytest.mark.parametrize("name", POOLS)
def test_metrics_of_all_items_together_agree_with_a_loop_of_our_own(name: str) -> None:
    pool, make = POOLS[name]
    parts: Sequence[Array] = make(np.random.default_rng(1))
    scores = {f"{name}/{place}": part for place, part in enumerate(parts)}
    pooled = pooled_domains(name, pool, scores, np.arange(len(DOMAINS)), DOMAINS)
    metric = Metric(metric=name)
    ours = measured(pooled, metric).resampled[name]

    def value(rows: Mapping[str, Any]) -> float:
        return float(np.mean([pool([part[one] for part in parts]) for one in rows.values()]))

    np.testing.assert_allclose(ours, brute_force(DOMAINS, value), rtol=1e-12)


def test_sums_of_weighted_items_and_bounds_need_no_resamples() -> None:
    scores = score_domains(np.random.default_rng(0).random(len(DOMAINS)), DOMAINS)
    bound = Metric(reduce="worst", at_least=0.1)
    assert measured(scores, Metric(), Metric(normalise="base"), bound).resampled == {}


def test_what_a_program_alone_can_value_has_none() -> None:
    scores = {
        name: DomainScore(0.5, 0.1, each.items, each.item_indices, mean=False)
        for name, each in score_domains(np.ones(len(DOMAINS)), DOMAINS).items()
    }
    assert measured(scores, Metric(reduce="worst")).resampled == {}


def test_draws_are_the_same_each_time_and_others_in_another_domain() -> None:
    first = np.stack(list(resamples("a", 9)))
    assert np.array_equal(first, np.stack(list(resamples("a", 9))))
    assert not np.array_equal(first, np.stack(list(resamples("b", 9))))
    assert first.shape == (RESAMPLES, 8)
    assert [rows.tolist() for rows in resamples("a", 1)][:2] == [[0], [0]]


def pair_of(
    generator: np.random.Generator, sizes: Sequence[int], gap: float
) -> tuple[list[Array], list[Array]]:
    """Scores of two merges on the same items of each domain, which share most of their noise."""
    hard = [generator.standard_normal(size) for size in sizes]
    ours = [
        0.1 * k + each + 0.4 * generator.standard_normal(len(each)) for k, each in enumerate(hard)
    ]
    theirs = [
        0.1 * k + e - gap + 0.4 * generator.standard_normal(len(e)) for k, e in enumerate(hard)
    ]
    return ours, theirs


def score(items: Sequence[Array], *metrics: Metric) -> Score:
    domains = np.concatenate([[name] * len(each) for name, each in zip("abc", items, strict=False)])
    scores = score_domains(np.concatenate(items), domains)
    by_metric = {metric.metric: scores for metric in metrics}
    plain = measure(metrics, by_metric, None, {}, domains)
    return score_of(with_resamples(plain, metrics, by_metric, None, {}))


def test_the_error_of_a_mean_is_that_of_the_closed_form() -> None:
    """A value that is not taken for a mean: the worst of one domain."""
    ours, theirs = pair_of(np.random.default_rng(2), [30], 0.0)
    metric = Metric(reduce="worst")
    deviation = deviation_of(metric.label, score(ours, metric), score(theirs, metric))
    gaps = ours[0] - theirs[0]
    assert deviation is not None
    assert deviation.paired
    assert deviation.error == pytest.approx(gaps.std(ddof=1) / np.sqrt(30), rel=0.1)
    # Each merge alone varies far more than the difference does.
    assert deviation.error < 0.7 * ours[0].std() / np.sqrt(30)
    assert critical_value([deviation]) == pytest.approx(2.045, abs=0.04)  # Student's t, 29 degrees


def coverage(metric: Metric, sizes: Sequence[int], truth: float, times: int) -> float:
    """Share of intervals that hold the true difference, in repeated draws of all items."""
    generator = np.random.default_rng(5)
    held = []
    for _ in range(times):
        ours, theirs = (score(each, metric) for each in pair_of(generator, sizes, truth))
        deviation = deviation_of(metric.label, ours, theirs)
        assert deviation is not None
        difference = ours.values[metric.label] - theirs.values[metric.label]
        held.append(abs(difference - truth) <= critical_value([deviation]) * deviation.error)
    return float(np.mean(held))


def test_intervals_of_the_worst_domain_hold_about_as_often_as_they_say() -> None:
    assert coverage(Metric(reduce="worst"), [25, 40], 0.2, 20) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[12, 12, 12], [25, 40, 60], [200, 300]], ids=str)
def test_intervals_of_the_worst_domain_hold_in_95_percent(sizes: Sequence[int]) -> None:
    """Those of a few items hold more often: their tails are those of the smallest domain."""
    assert coverage(Metric(reduce="worst"), sizes, 0.2, 400) >= 0.93
