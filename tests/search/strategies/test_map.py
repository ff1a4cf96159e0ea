"""MAP beyond the contract: the surrogate, its front, and what is measured next."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mergesearch.evaluators.synthetic_problems import make_problem
from mergesearch.merging import InputError
from mergesearch.search.front import hypervolume, nondominated
from mergesearch.search.strategies.base import Problem, TrialResult
from mergesearch.search.strategies.map import Map
from mergesearch.search.strategies.parts.map_design import vertices
from mergesearch.search.strategies.parts.map_front import (
    Region,
    choose,
    descend,
    predict,
    predict_front,
    weightings,
)
from mergesearch.search.strategies.parts.map_ridge import (
    RIDGES,
    OneSigned,
    Quadratic,
    Ridge,
    _by_points,
    _by_unknowns,
)
from mergesearch.search.strategies.parts.map_search import nearness
from mergesearch.search.strategies.parts.map_surrogate import Link, fit_model, fit_models
from mergesearch.search.strategies.sobol import Sobol


def box(
    dim: int, objectives: int = 2, *, budget: int = 200, start: float = 0.5, **facts
) -> Problem:
    known = {
        "scale": np.tile([0.0, 1.0], (objectives, 1)),
        "weights": np.full(objectives, 1 / objectives),
        "signs": np.ones(objectives),
        **facts,
    }
    return Problem(np.zeros(dim), np.ones(dim), np.full(dim, start), objectives, budget, **known)


def a_quadratic(dim: int, seed: int, *, convex: bool = False) -> Quadratic:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((dim, dim))
    return Quadratic(0.7, rng.standard_normal(dim), root @ root.T if convex else root + root.T)


def drive(strategy, function, trials: int, in_flight: int = 4) -> np.ndarray:
    """Results in another order than asked; the measured points in order of results."""
    rng = np.random.default_rng(0)
    outstanding = []
    points = []
    asked = 0
    while len(points) < trials:
        while len(outstanding) < in_flight and asked < trials:
            outstanding += strategy.ask(1)
            asked += 1
        done = outstanding.pop(int(rng.integers(len(outstanding))))
        points.append(done.point)
        strategy.tell([TrialResult(done.id, done.point, function(done.point))])
    return np.array(points)


def tasks(dim: int, objectives: int, seed: int, budget: int, start: float = 0.5):
    """``quadratic_tasks`` with the start as anchor, and a measure of points.

    The measure is the share of its front's volume that they cover.
    """
    made = make_problem("quadratic_tasks", dim, objectives=objectives, seed=seed)
    optimal = np.array([made.losses(x) for x in made.pareto_set(400 if objectives == 2 else 3000)])
    low = optimal.min(axis=0)
    nadir = optimal[:objectives].max(axis=0)
    known = TrialResult(None, np.full(dim, start), made.losses(np.full(dim, start)))
    problem = box(
        dim,
        objectives,
        budget=budget,
        start=start,
        anchors=(known,),
        scale=np.stack([low, known.losses], axis=1),
    )

    def covered(points: np.ndarray) -> float:
        reached = np.array([made.losses(x) for x in points])
        volumes = [
            hypervolume((rows - low) / (nadir - low), np.full(objectives, 1.1))
            for rows in (reached, optimal)
        ]
        return volumes[0] / volumes[1]

    return made.losses, problem, covered


# --- the surrogate
# ----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_as_many_points_as_unknowns_recover_a_quadratic(dim: int) -> None:
    truth = a_quadratic(dim, seed=dim)
    points = np.random.default_rng(3).uniform(-0.5, 1.5, ((dim + 1) * (dim + 2) // 2, dim))
    fitted = fit_model(points, truth(points)).coefficients()
    np.testing.assert_allclose(fitted.A, truth.A, atol=1e-6)
    np.testing.assert_allclose(fitted.b, truth.b, atol=1e-6)
    assert fitted.e == pytest.approx(truth.e, abs=1e-6)


def test_the_chosen_model_recovers_a_quadratic_too() -> None:
    truth = a_quadratic(4, seed=1)
    points = np.random.default_rng(0).random((16, 4))
    model = fit_models(points, truth(points)[:, None], [1.0])[0]
    assert (model.shape, model.link.name) == ("free", "identity")
    np.testing.assert_allclose(model.coefficients().A, truth.A, atol=1e-6)
    assert model.error < 1e-6


def refit(
    offsets: np.ndarray, gains: np.ndarray, penalty: float, weights: np.ndarray, target: np.ndarray
):
    """Penalised least squares with explicit unknowns.

    There is one for each entry of b and of A, one for the diagonal of A and one for its trace.
    """
    rows, columns = np.triu_indices(offsets.shape[1], 1)
    squares = offsets**2
    parts = [
        np.ones((len(offsets), 1)),
        offsets,
        np.sqrt(gains[0] / 4) * squares.sum(axis=1, keepdims=True),
        np.sqrt(gains[1] / 4) * squares,
        np.sqrt(gains[2] / 4) * squares,
        np.sqrt(gains[2] / 2) * offsets[:, rows] * offsets[:, columns],
    ]
    features = np.hstack(parts)
    ridge = np.sqrt(penalty) * np.eye(features.shape[1])[1:]
    root = np.sqrt(weights)
    left = np.vstack([features * root[:, None], ridge])
    right = np.concatenate([target * root, np.zeros(len(ridge))])
    return features, np.linalg.lstsq(left, right, rcond=None)[0]


@pytest.mark.parametrize("count", [9, 40])
@pytest.mark.parametrize("shape", ["linear", "bowl", "diagonal", "free"])
def test_leave_one_out_in_closed_form_is_what_refitting_gives(shape: str, count: int) -> None:
    rng = np.random.default_rng(count)
    offsets = rng.standard_normal((count, 4))
    weights = rng.uniform(0.1, 2.0, count)
    target = a_quadratic(4, 0)(offsets) + rng.standard_normal(count)
    design = Ridge.of(offsets, shape, weights)
    for ridge in (1e-5, 1e-1):
        closed = design.residuals(target[None], np.array([ridge]))[0, 0]
        for out in range(count):
            kept = weights / weights.mean() * (np.arange(count) != out)
            features, solution = refit(offsets, design.gains, ridge * design.unit, kept, target)
            assert closed[out] == pytest.approx(target[out] - features[out] @ solution, abs=1e-7)


def test_leave_one_out_of_the_projected_fit_is_what_refitting_gives() -> None:
    rng = np.random.default_rng(1)
    offsets = rng.standard_normal((30, 3))
    target = a_quadratic(3, 0)(offsets) + 0.1 * rng.standard_normal(30)
    projected = OneSigned(Ridge.of(offsets, "free"), Ridge.of(offsets, "linear"))
    unit = projected.free.unit
    flat = projected.linear
    A = projected.quadratic(target, 1e-3).A
    assert np.linalg.eigvalsh(A).min() > -1e-12
    rest = target - 0.5 * np.einsum("nd,de,ne->n", offsets, A, offsets)
    ridge = RIDGES[np.argmin(np.mean(flat.residuals(rest[None], RIDGES)[0] ** 2, axis=1))]
    closed = projected.residuals(target, 1e-3, np.arange(30))
    rows, columns = np.triu_indices(3, 1)
    for out in range(30):
        kept = (np.arange(30) != out).astype(float)
        gains = projected.free.gains
        _, solution = refit(offsets, gains, 1e-3 * unit, kept, target)
        trace, axes, diagonal, crossed = np.split(solution[4:], [1, 4, 7])
        left = np.diag(
            np.sqrt(gains[0]) * trace[0] + np.sqrt(gains[1]) * axes + np.sqrt(gains[2]) * diagonal
        )
        left[rows, columns] = left[columns, rows] = np.sqrt(gains[2] / 2) * crossed
        values, vectors = np.linalg.eigh(left)
        left = (vectors * np.maximum(values, 0)) @ vectors.T
        rest = target - 0.5 * np.einsum("nd,de,ne->n", offsets, left, offsets)
        features, line = refit(offsets, np.zeros(3), ridge * flat.unit, kept, rest)
        assert closed[out] == pytest.approx(rest[out] - features[out] @ line, abs=1e-7)


def test_unknowns_and_points_give_the_same_design() -> None:
    offsets = np.random.default_rng(0).standard_normal((12, 3))
    gains = np.array([1.3, 0.2, 0.7])
    root = np.random.default_rng(1).uniform(0.5, 1.5, 12)
    (small, few), (large, many) = (
        way(offsets, gains, root / np.sqrt(np.mean(root**2))) for way in (_by_unknowns, _by_points)
    )
    np.testing.assert_allclose((small * few) @ small.T, (large * many) @ large.T, atol=1e-10)


@pytest.mark.parametrize(
    ("link", "low", "high"), [(Link("logistic"), -0.99, -0.01), (Link("softplus", 2.0), 0.1, 50.0)]
)
def test_links_are_inverted_and_their_slope_is_the_derivative(
    link: Link, low: float, high: float
) -> None:
    losses = np.linspace(low, high, 50)
    latent = link.to_latent(losses)
    np.testing.assert_allclose(link.to_loss(latent), losses, atol=1e-12)
    np.testing.assert_allclose(
        link.slope(latent),
        (link.to_loss(latent + 1e-6) - link.to_loss(latent - 1e-6)) / 2e-6,
        rtol=1e-5,
    )
    assert np.all(np.isfinite(link.to_latent(np.array([-1.0, 0.0]))))


def test_scores_that_are_logistic_in_a_quadratic_are_recovered() -> None:
    """Also where they saturate: points at 0 or 1 say little and weigh little."""
    truth = replace(a_quadratic(3, 2, convex=True), e=-4.0)
    rng = np.random.default_rng(0)
    points = rng.uniform(-1.5, 1.5, (80, 3))
    fresh = rng.uniform(-1.0, 1.0, (200, 3))
    losses = Link("logistic").to_loss(truth(points))
    assert np.mean((losses < -0.999) | (losses > -0.001)) >= 0.1
    model = fit_models(points, losses[:, None], [-1.0], polish=True)[0]
    assert model.link.name == "logistic"
    assert np.max(np.abs(model.predict(fresh) - Link("logistic").to_loss(truth(fresh)))) < 0.02
    straight = fit_model(points, losses)
    assert straight.error > 5 * model.error


def test_gauss_newton_steps_lower_the_left_out_error() -> None:
    rng = np.random.default_rng(4)
    points = rng.uniform(-1, 1, (60, 4))
    share = (
        rng.binomial(100, -Link("logistic").to_loss(a_quadratic(4, 5, convex=True)(points) - 2.0))
        / 100
    )
    closed, polished = (
        fit_models(points, -share[:, None], [-1.0], polish=way)[0] for way in (False, True)
    )
    assert polished.error < closed.error


def test_softplus_where_it_fits_better_identity_where_not() -> None:
    points = np.random.default_rng(0).uniform(-2, 2, (60, 2))
    latent = Quadratic(-2.0, np.ones(2), np.eye(2))(points)
    losses = np.stack([np.logaddexp(0.0, latent), latent - latent.min()], axis=1)
    assert [model.link.name for model in fit_models(points, losses, [1.0, 1.0])] == [
        "softplus",
        "identity",
    ]


def test_few_noisy_points_of_a_bowl_give_a_bowl() -> None:
    rng = np.random.default_rng(7)
    points = rng.uniform(-1, 1, (30, 6))
    losses = np.sum(points**2, axis=1) + 0.2 * rng.standard_normal(30)
    model = fit_models(points, losses[:, None], [1.0])[0]
    assert np.linalg.eigvalsh(model.quadratic.A).min() > -1e-12
    fresh = rng.uniform(-1, 1, (500, 6))
    error = model.predict(fresh) - np.sum(fresh**2, axis=1)
    assert np.std(error) < 0.5 * np.std(
        fit_model(points, losses).predict(fresh) - np.sum(fresh**2, axis=1)
    )


def test_fewer_points_than_unknowns_still_tell_where_the_bowl_ends() -> None:
    """150 points in 60 dimensions find the optimum to a third of its distance.

    A quadratic has 1,891 unknowns there.
    """
    rng = np.random.default_rng(0)
    points = 0.2 * rng.standard_normal((150, 60))
    optimum = 0.2 * rng.standard_normal(60)
    model = fit_models(points, np.sum((points - optimum) ** 2, axis=1)[:, None], [1.0])[0]
    fitted = model.coefficients()
    minimum = np.linalg.solve(fitted.A, -fitted.b)
    assert np.linalg.norm(minimum - optimum) < 0.33 * np.linalg.norm(optimum)


def test_translation_and_scale_of_the_points_change_nothing() -> None:
    rng = np.random.default_rng(2)
    points = rng.random((20, 3))
    fresh = rng.random((5, 3))
    losses = a_quadratic(3, 0)(points)[:, None] + 0.1 * rng.standard_normal((20, 1))
    here = fit_models(points, losses, [1.0])[0].predict(fresh)
    there = fit_models(5.0 + 3.0 * points, losses, [1.0])[0].predict(5.0 + 3.0 * fresh)
    np.testing.assert_allclose(here, there, atol=1e-8)


# --- its front
# ----------------------------------------------------------------------------


def two_models(dim: int = 4, count: int = 60, seed: int = 0):
    made = make_problem("quadratic_tasks", dim, seed=seed)
    points = np.clip(0.5 + 0.2 * np.random.default_rng(seed).standard_normal((count, dim)), 0, 1)
    losses = np.array([made.losses(x) for x in points])
    return made, points, fit_models(points, losses, [1.0, 1.0])


def test_weightings_sum_to_one_and_reach_every_end() -> None:
    for objectives in (1, 2, 4, 8):
        weights = weightings(objectives, 60, np.full(objectives, 0.3))
        np.testing.assert_allclose(weights.sum(axis=1), 1.0)
        assert np.all(weights > 0)
        assert np.all(weights.max(axis=0) > 0.9)


def test_descent_ends_where_the_weighted_sum_is_smallest() -> None:
    from scipy.optimize import minimize

    _, points, models = two_models()
    region = Region.of(models[0].frame, points)
    weights = weightings(2, 10, np.zeros(2))
    solutions = descend(models, weights, np.zeros((len(weights), 4)), region)
    bounds = list(zip(region.lower, region.upper, strict=True))
    for row, u in zip(weights, solutions, strict=True):

        def loss(x, row=row):
            return float(
                sum(w * model.quadratic(x[None])[0] for w, model in zip(row, models, strict=True))
            )

        assert loss(u) < minimize(loss, np.zeros(4), method="L-BFGS-B", bounds=bounds).fun + 1e-6


def test_the_front_covers_what_nsga2_finds_on_the_same_models() -> None:
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem as Pymoo
    from pymoo.optimize import minimize

    _, points, models = two_models()

    class Surrogate(Pymoo):
        def __init__(self) -> None:
            super().__init__(n_var=4, n_obj=2, xl=points.min(axis=0), xu=points.max(axis=0))

        def _evaluate(self, x, out, *args, **kwargs) -> None:
            out["F"] = predict(models, x)

    reached = minimize(Surrogate(), NSGA2(pop_size=60), ("n_gen", 60), seed=1).F
    ours = predict_front(models, points, np.full(2, 0.5)).losses
    low = reached.min(axis=0)
    high = reached.max(axis=0)
    volumes = [
        hypervolume((losses - low) / (high - low), np.full(2, 1.1)) for losses in (ours, reached)
    ]
    assert volumes[0] > volumes[1]


def test_predicted_points_lie_where_points_were_measured() -> None:
    """The truth gets better and better far outside; the models must not be believed there."""
    rng = np.random.default_rng(0)
    points = 0.5 + 0.1 * rng.standard_normal((40, 3))
    models = fit_models(points, np.stack([points.sum(axis=1), -points[:, 0]], axis=1), [1.0, 1.0])
    front = predict_front(models, points, np.full(2, 0.5)).points
    assert np.all((front >= points.min(axis=0) - 1e-12) & (front <= points.max(axis=0) + 1e-12))
    frame = models[0].frame
    distance = np.linalg.norm(frame.offsets(points), axis=1).max()
    assert np.all(np.linalg.norm(frame.offsets(front), axis=1) <= distance + 1e-9)


def test_what_is_chosen_adds_most_volume_each_time() -> None:
    rng = np.random.default_rng(1)
    front = rng.random((30, 3))
    known = rng.random((10, 3))
    front = front[nondominated(front)]
    reference = np.maximum(1.1, front.max(axis=0) + 0.1 * np.ptp(front, axis=0))
    picked = choose(front, known, 4)
    for count in range(4):
        have = np.vstack([known, front[picked[:count]]])
        gains = [hypervolume(np.vstack([have, row]), reference) for row in front]
        assert gains[picked[count]] == pytest.approx(max(gains))
    assert choose(front, front, 4) == []


def test_many_objectives_are_chosen_from_without_volumes() -> None:
    front = np.random.default_rng(0).random((100, 9))
    picked = choose(front, front[:20], 8)
    assert len(set(picked)) == 8
    assert min(picked) >= 20


def test_points_near_the_front_matter_most() -> None:
    losses = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.8], [3.0, 3.0]])
    near = nearness(losses)
    assert near[0] == near[1] == 1.0
    assert near[2] == 1.0  # on the front itself
    assert near[3] < 0.05
    assert np.all(np.isfinite(nearness(np.ones((3, 2)))))


# --- the strategy
# ----------------------------------------------------------------------------


def test_zdt1_within_one_percent_of_the_true_volume() -> None:
    """Not quadratic: f2 has a square root. The volume below (1.1, 1.1) is 0.1 + 2/3 + 0.11."""
    made = make_problem("zdt1", 5)
    points = drive(Map(box(5, budget=200), 0), made.losses, 200)
    assert hypervolume([made.losses(x) for x in points], [1.1, 1.1]) > 0.99 * (0.21 + 2 / 3)


@pytest.mark.parametrize(("objectives", "trials", "gate"), [(2, 120, 0.98), (4, 240, 0.95)])
def test_covers_the_front_of_quadratic_tasks(objectives: int, trials: int, gate: float) -> None:
    losses, problem, covered = tasks(8, objectives, 0, trials)
    points = drive(Map(problem, 0), losses, trials, in_flight=8)
    assert covered(points) > gate
    assert covered(points) > covered(drive(Sobol(problem, 0), losses, trials)) + 0.1


def test_noise_of_items_costs_little() -> None:
    """Accuracies from 500 items: the true volume that is reached, in a space of six coordinates."""
    made = make_problem("quadratic_tasks", 6, seed=1)
    optimal = np.array([made.losses(x) for x in made.pareto_set(200)])
    rng = np.random.default_rng(0)

    def accuracy(losses: np.ndarray) -> np.ndarray:
        return 1.0 / (1.0 + np.exp(2.0 * losses - 3.0))

    problem = box(6, budget=160, signs=-np.ones(2), scale=np.tile([-1.0, 0.0], (2, 1)))
    points = drive(
        Map(problem, 0), lambda x: -rng.binomial(500, accuracy(made.losses(x))) / 500, 160
    )
    reached, best = (
        -accuracy(np.array(rows)) for rows in ([made.losses(x) for x in points], optimal)
    )
    worst = best.max(axis=0)
    assert hypervolume(reached - worst, [0.02, 0.02]) > 0.95 * hypervolume(
        best - worst, [0.02, 0.02]
    )


def test_preferences_move_along_the_front() -> None:
    losses, problem, _ = tasks(4, 2, 1, 80)
    strategy = Map(problem, 0)
    assert np.array_equal(strategy.query([1, 1]), strategy.query([1, 1]))
    drive(strategy, losses, 80)
    reached = np.array(
        [losses(strategy.query([share, 1 - share])) for share in np.linspace(0, 1, 9)]
    )
    assert np.all(np.diff(reached[:, 0]) <= 1e-3)
    assert np.all(np.diff(reached[:, 1]) >= -1e-3)
    assert reached[0, 0] > 2 * reached[-1, 0]
    np.testing.assert_array_equal(strategy.query([2, 6]), strategy.query([1, 3]))


def test_the_recommendation_beats_the_luckiest_noisy_trial() -> None:
    """Under strong noise the model averages; the luckiest trial is lucky."""
    gains = []
    for seed in range(4):
        losses, problem, _ = tasks(4, 2, seed, 80)
        rng = np.random.default_rng(seed)
        seen = []

        def noisy(x, losses=losses, rng=rng, seen=seen):
            seen.append((losses(x) + 0.2 * rng.standard_normal(2), losses(x)))
            return seen[-1][0]

        strategy = Map(problem, seed)
        drive(strategy, noisy, 80)
        lucky = min(seen, key=lambda pair: problem.scalarise(pair[0]))[1]
        gains.append(problem.scalarise(lucky) - problem.scalarise(losses(strategy.best()[0])))
    assert np.mean(gains) > 0


def test_outstanding_points_are_not_proposed_again() -> None:
    """Four fits without new results spread over the front, a hundredth of it apart."""
    losses, problem, _ = tasks(3, 2, 0, 100)
    strategy = Map(problem, 0, explore=0.0)
    drive(strategy, losses, 40)
    points = np.array([suggestion.point for suggestion in strategy.ask(32)])
    predicted = predict(strategy._search.models(), points)
    predicted = predicted / np.ptp(predicted, axis=0)
    distance = np.linalg.norm(predicted[:, None] - predicted[None], axis=2)
    assert distance[np.triu_indices(32, 1)].min() > 0.003


def test_what_anchors_measured_is_not_asked_again() -> None:
    problem = box(3)
    corners = [problem.start, *vertices(problem)]
    known = replace(problem, anchors=tuple(TrialResult(None, x, np.ones(2)) for x in corners))
    asked = [suggestion.point for suggestion in Map(problem, 0).ask(4)]
    np.testing.assert_array_equal(asked, corners)
    for suggestion in Map(known, 0).ask(9):
        assert not any(np.allclose(suggestion.point, corner) for corner in corners)


def test_questions_change_nothing() -> None:
    losses, problem, _ = tasks(3, 2, 0, 60)
    silent = Map(problem, 0)
    talkative = Map(problem, 0)
    for _ in range(40):
        a = silent.ask(1)[0]
        b = talkative.ask(1)[0]
        assert np.array_equal(a.point, b.point)
        for strategy, told in ((silent, a), (talkative, b)):
            strategy.tell([TrialResult(told.id, told.point, losses(told.point))])
        talkative.query([1, 2])
        talkative.best()


def test_failures_and_short_evaluations_are_never_fitted() -> None:
    losses, problem, _ = tasks(3, 2, 0, 60)
    plain = Map(problem, 0)
    troubled = Map(problem, 0)
    for _ in range(12):
        point = plain.ask(1)[0].point
        plain.tell([TrialResult(None, point, losses(point))])
        troubled.tell(
            [TrialResult(None, point, losses(point)), TrialResult(None, point + 0.01, None)]
        )
        troubled.tell(
            [
                TrialResult(None, point, np.full(2, 9.0), evaluated=5),
                TrialResult(None, point, np.array([np.nan, 1.0])),
            ]
        )
    assert np.array_equal(plain.query([1, 1]), troubled.query([1, 1]))


def test_a_failing_place_is_left() -> None:
    """The optimum of one task always fails; the search goes on elsewhere."""
    losses, problem, _ = tasks(3, 2, 0, 100)
    optimum = make_problem("quadratic_tasks", 3, seed=0).pareto_set(0)[0]
    strategy = Map(problem, 0, explore=0.0)
    failures = 0
    for _ in range(100):
        suggestion = strategy.ask(1)[0]
        fails = bool(np.linalg.norm(suggestion.point - optimum) < 0.05)
        failures += fails
        strategy.tell(
            [
                TrialResult(
                    suggestion.id, suggestion.point, None if fails else losses(suggestion.point)
                )
            ]
        )
    assert 1 <= failures < 10


def test_too_many_coordinates_are_refused_with_a_way_out() -> None:
    with pytest.raises(
        InputError, match="at most 256 coordinates for map, received 300; choose a coarser space"
    ):
        Map(box(300), 0)


def test_a_loss_with_a_large_error_moves_its_model_little() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (40, 2))
    losses = np.stack([np.sum((points - c) ** 2, axis=1) for c in (0.3, 0.7)], axis=1)
    spoilt = losses.copy()
    spoilt[5, 0] += 3.0
    certainty = np.ones((40, 2))
    certainty[5, 0] = 1e-4
    careful, other = fit_models(points, spoilt, [1.0, 1.0], certainty=certainty)
    trusting, _ = fit_models(points, spoilt, [1.0, 1.0])
    off = [np.max(np.abs(m.predict(points) - losses[:, 0])) for m in (careful, trusting)]
    assert off[0] < 0.1 * off[1]
    np.testing.assert_allclose(other.predict(points), losses[:, 1], atol=1e-3)
