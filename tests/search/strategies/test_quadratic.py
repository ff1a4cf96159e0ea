"""The quadratic model against its definition, and the strategy against CMA-ES alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.strategies.cma_es import CmaEs
from mergesearch.search.strategies.parts.coordinate_scales import CoordinateScales
from mergesearch.search.strategies.parts.quadratic_model import (
    COMMON,
    CONSTANT,
    descend,
    fit_quadratic,
    kernel,
)
from mergesearch.search.strategies.parts.trust_region import certain_ones
from mergesearch.search.strategies.quadratic import MOST, OF_THE_MODEL, Quadratic
from tests.search.strategies.test_cma_es import box, ellipsoid, minimise


def features(points: np.ndarray) -> np.ndarray:
    """Columns whose inner products are the model's kernel.

    They are the constant, slopes, all products of coordinates, and the common curvature.
    """
    dim = points.shape[1]
    products = np.einsum("ni,nj->nij", points, points).reshape(len(points), -1) / dim
    size = np.mean(points**2, axis=1, keepdims=True)
    constant = np.full((len(points), 1), np.sqrt(CONSTANT))
    return np.hstack([constant, points / np.sqrt(dim), products, np.sqrt(COMMON) * size])


def ridge(
    points: np.ndarray, losses: np.ndarray, weights: np.ndarray, penalty: float
) -> np.ndarray:
    """Coefficients of the features, from the normal equations."""
    columns = features(points)
    normal = columns.T @ (weights[:, None] * columns) + penalty * np.eye(columns.shape[1])
    return np.linalg.solve(normal, columns.T @ (weights * losses))


@pytest.fixture
def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((25, 3))
    losses = np.sum(points**2, axis=1) + points[:, 0] + 0.3 * rng.standard_normal(25)
    return points, losses, rng.uniform(0.2, 1.0, 25)


def standardised(losses: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    mean = np.average(losses, weights=weights)
    return mean, np.sqrt(np.average((losses - mean) ** 2, weights=weights))


def test_predictions_and_residuals_are_those_of_ridge_regression(sample) -> None:
    """Reference: explicit features, and really leaving each result out."""
    points, losses, weights = sample
    model = fit_quadratic(points, losses, weights)
    mean, spread = standardised(losses, weights)
    scaled = (losses - mean) / spread
    others = np.random.default_rng(1).standard_normal((5, 3))
    expected = mean + spread * features(others) @ ridge(points, scaled, weights, model.ridge)
    np.testing.assert_allclose(model.predict(others), expected, rtol=1e-8)
    for left_out in range(25):
        rest = np.arange(25) != left_out
        without = ridge(points[rest], scaled[rest], weights[rest], model.ridge)
        residual = losses[left_out] - (mean + spread * features(points[[left_out]]) @ without)[0]
        assert model.residuals[left_out] == pytest.approx(residual, rel=1e-6)


def test_deviation_is_that_of_the_coefficients(sample) -> None:
    points, losses, weights = sample
    model = fit_quadratic(points, losses, weights)
    columns = features(points)
    normal = columns.T @ (weights[:, None] * columns) / model.ridge + np.eye(columns.shape[1])
    where = np.array([[0.3, -0.2, 1.0]])
    variance = (features(where) @ np.linalg.solve(normal, features(where).T))[0, 0]
    expected = model.noise * np.sqrt(variance / model.ridge)
    assert model.deviation(where[0]) == pytest.approx(expected, rel=1e-6)


def test_what_is_unknown_is_the_variance_with_the_outstanding_results(sample) -> None:
    points, losses, weights = sample
    model = fit_quadratic(points, losses, weights)
    rng = np.random.default_rng(3)
    pending = rng.standard_normal((4, 3))
    where = rng.standard_normal((5, 3))
    columns = features(np.concatenate([points, pending]))
    all_weights = np.concatenate([weights, np.ones(4)])
    normal = columns.T @ (all_weights[:, None] * columns) / model.ridge + np.eye(columns.shape[1])
    expected = np.diag(features(where) @ np.linalg.solve(normal, features(where).T))
    np.testing.assert_allclose(model.unknown(where, pending), expected, rtol=1e-5)


def log_evidence(sample, scale: np.ndarray, penalty: float) -> float:
    """Gaussian likelihood of the standardised losses, at the best unit of the losses."""
    points, losses, weights = sample
    mean, spread = standardised(losses, weights)
    target = np.sqrt(weights) * (losses - mean) / spread
    root = np.sqrt(weights)
    covariance = kernel(points, points, scale) * np.outer(root, root)
    covariance += penalty * np.eye(len(target))
    fit = target @ np.linalg.solve(covariance, target) / len(target)
    return -0.5 * len(target) * np.log(fit) - 0.5 * np.linalg.slogdet(covariance)[1]


def test_the_ridge_has_the_most_evidence(sample) -> None:
    points, losses, weights = sample
    model = fit_quadratic(points, losses, weights)
    here, *others = (
        log_evidence(sample, np.ones(3), factor * model.ridge) for factor in (1.0, 0.1, 10.0)
    )
    assert here > max(others)
    mean, spread = standardised(losses, weights)
    alone = -0.5 * 25 * np.log(np.mean(weights * ((losses - mean) / spread) ** 2))
    assert model.evidence == pytest.approx(here - alone, rel=1e-9)


def test_the_gradient_by_the_scales_is_that_of_the_evidence(sample) -> None:
    """Reference: finite differences."""
    scale = np.array([0.7, 1.2, 1.5])
    model = fit_quadratic(*sample, scale)
    for place, slope in enumerate(model.scale_gradient()):
        step = np.exp(1e-5 * np.eye(3)[place])
        ends = [log_evidence(sample, scale * factor, model.ridge) for factor in (step, 1 / step)]
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_scaled_coordinates_give_the_same_quadratic_where_results_decide() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (40, 4))
    losses = points @ np.arange(4.0) + 2 * np.sum(points**2, axis=1)
    plain = fit_quadratic(points, losses, np.ones(40))
    scaled = fit_quadratic(points, losses, np.ones(40), np.array([0.5, 1.0, 1.5, 0.8]))
    np.testing.assert_allclose(scaled.curvature, plain.curvature, atol=1e-3)
    np.testing.assert_allclose(scaled.slope, plain.slope, atol=1e-3)


def test_the_scale_of_a_block_that_matters_grows() -> None:
    rng = np.random.default_rng(0)
    names = [f"{expert}/block {block}" for expert in "abc" for block in range(4)]
    matters = np.array([name.endswith("2") for name in names])
    points = rng.uniform(-1, 1, (60, 12))
    losses = points[:, matters] @ [1.0, -0.5, 0.8] + 0.1 * rng.standard_normal(60)
    scales = CoordinateScales(names, 12)
    before = fit_quadratic(points, losses, np.ones(60))
    for _ in range(40):
        model = fit_quadratic(points, losses, np.ones(60), scales.scale)
        scales.follow(model.scale_gradient())
    assert np.mean(scales.scale**2) == pytest.approx(1.0)
    assert np.min(scales.scale[matters]) > 1.5 * np.max(scales.scale[~matters])
    assert model.evidence > before.evidence + 5.0
    others = rng.uniform(-1, 1, (200, 12))
    truth = others[:, matters] @ [1.0, -0.5, 0.8]
    errors = [np.std(m.predict(others) - truth) for m in (model, before)]
    assert errors[0] < 0.8 * errors[1]


def test_coordinates_without_names_keep_their_scale() -> None:
    scales = CoordinateScales([], 3)
    assert not scales.learns
    scales.follow(np.array([1.0, -2.0, 5.0]))
    np.testing.assert_array_equal(scales.scale, 1.0)


def test_results_weigh_by_their_variance() -> None:
    np.testing.assert_allclose(certain_ones(np.full(5, 0.3)), 1.0)
    np.testing.assert_allclose(certain_ones(np.full(5, np.nan)), 1.0)
    weights = certain_ones(np.array([*[0.01] * 8, 0.08, np.nan]))  # one from an eighth of the items
    np.testing.assert_allclose(weights, [*[1.0] * 8, 0.125, 1.0])


def test_a_quadratic_is_recovered() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (40, 4))
    root = rng.standard_normal((4, 4))
    curvature = root @ root.T
    slope = rng.standard_normal(4)
    losses = 2.0 + points @ slope + 0.5 * np.sum((points @ curvature) * points, axis=1)
    model = fit_quadratic(points, losses, np.ones(40))
    np.testing.assert_allclose(model.curvature, curvature, atol=1e-4)
    np.testing.assert_allclose(model.slope, slope, atol=1e-4)
    assert model.value == pytest.approx(2.0, abs=1e-4)
    assert np.mean(model.residuals**2) < 1e-6 * np.var(losses)


def test_few_results_give_a_curvature_of_low_rank() -> None:
    points = np.random.default_rng(0).standard_normal((6, 20))
    model = fit_quadratic(points, np.sum(points**2, axis=1), np.ones(6))
    values = np.linalg.eigvalsh(model.curvature)
    common = np.median(values)
    assert np.sum(np.abs(values - common) > 1e-9) <= 6


def test_equal_losses_give_no_model() -> None:
    assert fit_quadratic(np.eye(4), np.full(4, 0.7), np.ones(4)) is None


def test_the_minimum_in_a_box_meets_the_optimality_conditions() -> None:
    rng = np.random.default_rng(2)
    root = rng.standard_normal((6, 6))
    curvature = root @ root.T + 0.1 * np.eye(6)
    slope = 3 * rng.standard_normal(6)
    lower = np.full(6, -0.5)
    upper = np.full(6, 0.7)
    minimum = descend(slope, curvature, 1 / np.linalg.norm(curvature, 2), lower, upper)
    gradient = curvature @ minimum + slope
    inside = (minimum > lower) & (minimum < upper)
    assert inside.any()
    assert not inside.all()
    np.testing.assert_allclose(gradient[inside], 0, atol=1e-2)
    assert np.all(gradient[minimum == lower] > 0)
    assert np.all(gradient[minimum == upper] < 0)


def ratio(strategy, function, trials: int, noise: float, seed: int) -> float:
    """True loss of the recommendation over that of the start.

    The trials are noisy, with eight outstanding.
    """
    rng = np.random.default_rng(seed)
    start = function(np.full(8, 0.3))
    minimise(
        strategy,
        lambda x: function(x) + noise * start * rng.standard_normal(),
        trials,
        in_flight=8,
        seed=seed,
    )
    return function(strategy.best()[0]) / start


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def test_on_noisy_quadratics_it_is_far_better_than_cma_es() -> None:
    model = []
    alone = []
    for seed in range(4):
        function, _ = ellipsoid(8, 1e3, seed)
        model.append(ratio(Quadratic(box(8), seed), function, 300, 0.02, seed))
        alone.append(ratio(CmaEs(box(8), seed), function, 300, 0.02, seed))
    assert geometric_mean(model) < 0.25 * geometric_mean(alone)


@pytest.mark.parametrize("shape", ["steps", "kinks"])
def test_where_losses_are_no_quadratic_it_is_not_worse_than_cma_es(shape: str) -> None:
    model = []
    alone = []
    for seed in range(3):
        bowl, optimum = ellipsoid(8, 30.0, seed)
        start = bowl(np.full(8, 0.3))
        if shape == "steps":
            # Plateaus of a twentieth of the start's loss, all but flat.
            functions = lambda x: np.floor(20 * bowl(x) / start) / 20 + 0.01 * bowl(x) / start  # noqa: B023, E731
        else:
            functions = lambda x: float(np.sum(np.abs(x - optimum)))  # noqa: B023, E731
        model.append(ratio(Quadratic(box(8), seed), functions, 250, 0.02, seed))
        alone.append(ratio(CmaEs(box(8), seed), functions, 250, 0.02, seed))
    assert geometric_mean(model) < 1.5 * geometric_mean(alone)


def test_in_noise_alone_the_model_is_not_trusted() -> None:
    rng = np.random.default_rng(0)
    strategy = Quadratic(box(6), 0)
    minimise(strategy, lambda x: rng.standard_normal(), 120)
    assert strategy._trusted() is None
    assert np.array_equal(strategy.best()[0], strategy._cma.best()[0])


def test_the_region_grows_on_a_quadratic_and_shrinks_in_a_bent_valley() -> None:
    rng = np.random.default_rng(0)
    smooth = Quadratic(box(4), 0)
    bent = Quadratic(box(4), 0)
    minimise(smooth, lambda x: float(np.sum((x - 0.6) ** 2)) + 0.01 * rng.standard_normal(), 150)
    # Rosenbrock 1960.
    minimise(
        bent,
        lambda x: float(np.sum(100 * (2 * x[1:] - 4 * x[:-1] ** 2) ** 2 + (1 - 2 * x[:-1]) ** 2)),
        150,
    )
    assert smooth._half > 0.5
    assert bent._half < 0.1


def anchored(problem: Problem, count: int) -> Problem:
    """With ``count`` anchors on a bowl around 0.6."""
    points = np.random.default_rng(7).uniform(0.1, 0.9, (count, problem.dim))
    anchors = tuple(TrialResult(None, p, np.array([float(np.sum((p - 0.6) ** 2))])) for p in points)
    return replace(problem, anchors=anchors)


def test_anchors_are_data() -> None:
    strategy = Quadratic(anchored(box(3), 12), 0)
    np.testing.assert_allclose(strategy.ask(1)[0].point, 0.6, atol=0.02)
    np.testing.assert_allclose(strategy.best()[0], 0.6, atol=1e-3)


def with_errors(problem: Problem, errors: list[float | None]) -> Problem:
    """With standard errors at the anchors."""
    anchors = tuple(
        replace(anchor, errors=None if error is None else np.array([error]))
        for anchor, error in zip(problem.anchors, errors, strict=True)
    )
    return replace(problem, anchors=anchors)


def test_a_result_with_a_large_error_moves_the_model_little() -> None:
    problem = anchored(box(3), 24)
    wrong = replace(problem.anchors[3], losses=problem.anchors[3].losses - 0.5)
    spoilt = replace(problem, anchors=(*problem.anchors[:3], wrong, *problem.anchors[4:]))
    errors: list[float | None] = [0.01] * 24
    trusting = Quadratic(with_errors(spoilt, errors), 0)
    errors[3] = 0.5
    careful = Quadratic(with_errors(spoilt, errors), 0)
    off = [np.max(np.abs(s.best()[0] - 0.6)) for s in (careful, trusting)]
    assert off[0] < 0.02 < 0.1 < off[1]


def test_equal_errors_change_nothing() -> None:
    problem = anchored(box(3), 24)
    plain = Quadratic(problem, 0)
    for errors in ([0.02] * 24, [np.nan] * 24):
        other = Quadratic(with_errors(problem, errors), 0)
        assert np.array_equal(plain.best()[0], other.best()[0])


def test_outstanding_proposals_of_the_model_differ() -> None:
    rng = np.random.default_rng(0)
    strategy = Quadratic(box(4), 0)
    minimise(strategy, lambda x: float(np.sum((x - 0.6) ** 2)) + 0.01 * rng.standard_normal(), 60)
    asked = strategy.ask(16)
    tickets = strategy._book.outstanding
    own = np.array([s.point for s, it in zip(asked, tickets, strict=True) if it == OF_THE_MODEL])
    assert len(own) == 12
    assert np.min(np.linalg.norm(own[:, None] - own, axis=2) + np.eye(12)) > 1e-4


def trusting(dim: int) -> Quadratic:
    """Asked and told one after the other until the model is trusted."""
    rng = np.random.default_rng(0)
    strategy = Quadratic(box(dim), 0)
    minimise(strategy, lambda x: float(np.sum((x - 0.6) ** 2)) + 0.01 * rng.standard_normal(), 60)
    assert strategy._trusted() is not None
    return strategy


def test_turns_change_up_to_a_population_and_then_cma_es_waits_for_its_own() -> None:
    strategy = trusting(4)
    strategy.ask(9)  # one more than the population
    early = strategy._book.outstanding
    assert [ticket == OF_THE_MODEL for ticket in early] == [True, False] * 4 + [True]
    strategy.ask(20)
    late = strategy._book.outstanding[9:]
    assert set(late) == {OF_THE_MODEL}
    theirs = next(id for id, ticket in strategy._book._tickets.items() if ticket != OF_THE_MODEL)
    strategy.tell([TrialResult(theirs, np.full(4, 0.6), np.array([0.0]))])
    strategy.ask(2)
    assert sum(ticket != OF_THE_MODEL for ticket in strategy._book.outstanding) == 4


def test_proposals_keep_apart_from_outstanding_ones() -> None:
    strategy = trusting(4)
    region = strategy._trusted()
    assert region is not None
    pending = np.array([region.draw(np.random.default_rng(1)) for _ in range(6)])
    drawn = {"draw": [], "draw_apart": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        drawn["draw"].append(region.draw(rng))
        rng = np.random.default_rng(seed)
        drawn["draw_apart"].append(region.draw_apart(rng, pending))
    offsets = (pending - region.centre) / region.half
    unknown = [
        np.mean(region.model.unknown((np.array(units) - region.centre) / region.half, offsets))
        for units in drawn.values()
    ]
    assert unknown[1] > 1.2 * unknown[0]


def test_failures_are_no_data_but_draw_the_region_in() -> None:
    strategy = Quadratic(anchored(box(3), 20), 0)
    model = strategy._region.model
    half = strategy._half
    strategy.tell([TrialResult(s.id, s.point, None) for s in strategy.ask(8)])
    assert strategy._region.model is model
    assert strategy._half == pytest.approx(half / 1.4**4)


def test_the_unit_of_the_losses_does_not_matter() -> None:
    plain = Quadratic(box(4), 3)
    scaled = Quadratic(box(4), 3)
    minimise(plain, lambda x: float(np.sum((x - 0.6) ** 2)), 80)
    minimise(scaled, lambda x: 1024.0 * float(np.sum((x - 0.6) ** 2)), 80)
    assert np.array_equal(plain.ask(1)[0].point, scaled.ask(1)[0].point)


def test_the_table_says_where_it_refuses() -> None:
    from mergesearch.search.strategies.table import STRATEGIES

    assert STRATEGIES["quadratic"].most == MOST
