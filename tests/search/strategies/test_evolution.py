"""NSGA-II, NSGA-III and SMS-EMOA beyond the contract: survival, hypervolume, refusals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mergesearch.evaluators.synthetic_problems import Problem as Analytic
from mergesearch.evaluators.synthetic_problems import make_problem
from mergesearch.merging import InputError
from mergesearch.search.front import hypervolume
from mergesearch.search.strategies.base import TrialResult
from mergesearch.search.strategies.nsga3 import reference_directions
from mergesearch.search.strategies.parts.evolution import Evolution, default_population
from tests.search.strategies.populations import anchor, asked, box, make, run, sphere

NAMES = ["nsga2", "nsga3", "sms_emoa"]
DIM = 8


def tasks(objectives: int, seed: int = 0, dim: int = DIM) -> Analytic:
    return make_problem("quadratic_tasks", dim, objectives=objectives, seed=seed)


def covered(losses: np.ndarray, problem: Analytic, dim: int = DIM) -> float:
    """Hypervolume as a share of the true front's.

    The reference point lies behind the front and the start.
    """
    front = np.array([problem.losses(point) for point in problem.pareto_set(200)])
    reference = 1.1 * np.maximum(front.max(axis=0), problem.losses(np.full(dim, 0.5)))
    return hypervolume(losses, reference) / hypervolume(front, reference)


def of_pymoo(name: str, problem: Analytic, objectives: int, trials: int, seed: int) -> np.ndarray:
    """Losses of pymoo's own generational algorithm from a first population like ours."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.moo.nsga3 import NSGA3
    from pymoo.algorithms.moo.sms import SMSEMOA
    from pymoo.core.problem import Problem as Box
    from pymoo.optimize import minimize

    seen: list[np.ndarray] = []

    class Task(Box):
        def _evaluate(self, points: np.ndarray, out: dict, *args: object, **kwargs: object) -> None:
            out["F"] = np.array([problem.losses(point) for point in points])
            seen.extend(out["F"])

    first = np.clip(0.5 + 0.2 * np.random.default_rng(seed).standard_normal((40, DIM)), 0, 1)
    algorithm = {
        "nsga2": lambda: NSGA2(pop_size=40, sampling=first),
        "nsga3": lambda: NSGA3(reference_directions(objectives, 40), pop_size=40, sampling=first),
        "sms_emoa": lambda: SMSEMOA(pop_size=40, sampling=first),
    }[name]()
    with warnings.catch_warnings():
        minimize(
            Task(n_var=DIM, n_obj=objectives, xl=0.0, xu=1.0),
            algorithm,
            ("n_eval", trials),
            seed=seed,
        )
    return np.array(seen[:trials])


@pytest.mark.parametrize(("name", "objectives"), [("nsga2", 2), ("nsga3", 4), ("sms_emoa", 4)])
def test_the_front_is_as_good_as_that_of_the_generational_algorithm(
    name: str, objectives: int
) -> None:
    ours = []
    theirs = []
    for seed in range(2):
        problem = tasks(objectives, seed)
        strategy = make(name, box(DIM, objectives, start=0.5, budget=300), seed)
        ours.append(covered(run(strategy, problem.losses, 300, in_flight=4), problem))
        theirs.append(covered(of_pymoo(name, problem, objectives, 300, seed), problem))
    assert np.mean(ours) > 0.95 * np.mean(theirs)


def test_zdt1_within_one_percent_of_the_reference() -> None:
    problem = make_problem("zdt1", 5)
    losses = run(make("nsga2", box(5, 2, start=0.5, budget=2000)), problem.losses, 2000)
    assert hypervolume(losses, [1.1, 1.1]) > 0.99 * (1.21 - 1 / 3)


@pytest.mark.parametrize("objectives", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_better_than_random_at_the_same_budget(name: str, objectives: int) -> None:
    problem = tasks(objectives)
    share = {
        strategy: covered(
            run(make(strategy, box(DIM, objectives, start=0.5)), problem.losses, 300, 8), problem
        )
        for strategy in (name, "sobol")
    }
    assert share[name] > 1.15 * share["sobol"]


def crowding(losses: np.ndarray) -> np.ndarray:
    """Crowding distances in a front of two objectives, infinite at its ends.

    Deb 2002, sec. III-B: the sum of the distances between neighbours.
    """
    order = np.argsort(losses[:, 0])
    distance = np.full(len(losses), np.inf)
    span = np.ptp(losses, axis=0)
    for rank in range(1, len(order) - 1):
        before = losses[order[rank - 1]]
        after = losses[order[rank + 1]]
        distance[order[rank]] = np.sum(np.abs(after - before) / span)
    return distance


def volume_alone(losses: np.ndarray) -> np.ndarray:
    """The volume that each point of a front covers alone (Beume 2007).

    It reaches up to pymoo's reference point of 11 ranges.
    """
    unit = (losses - losses[:-1].min(axis=0)) / np.ptp(losses[:-1], axis=0)
    whole = hypervolume(unit, [11.0, 11.0])
    return np.array(
        [
            whole - hypervolume(np.delete(unit, row, axis=0), [11.0, 11.0])
            for row in range(len(unit))
        ]
    )


@pytest.mark.parametrize(("name", "worth"), [("nsga2", crowding), ("sms_emoa", volume_alone)])
def test_the_member_worth_least_leaves(
    name: str, worth: Callable[[np.ndarray], np.ndarray]
) -> None:
    """On a concave front of one curve, where dominance decides nothing."""
    rng = np.random.default_rng(2)
    strategy = make(name, box(2, 2), population=6)
    crowd = np.empty((0, 2))
    for x in rng.permutation(np.linspace(0.02, 0.98, 25)):
        point = np.array([x, 0.5])
        losses = np.array([x, 1 - x**2])
        strategy.tell([TrialResult(None, point, losses)])
        crowd = np.vstack([crowd, losses])
        if len(crowd) > 6:
            crowd = np.delete(crowd, int(np.argmin(worth(crowd))), axis=0)
        members = strategy._members.get("F")
        np.testing.assert_allclose(np.sort(members, axis=0), np.sort(crowd, axis=0))
        crowd = members  # in the order of the members: the newcomer comes last


@pytest.mark.parametrize("name", NAMES)
def test_who_leaves_dominates_nobody_who_stays(name: str) -> None:
    problem = tasks(3)
    strategy = make(name, box(DIM, 3, start=0.5), population=15)
    left = 0
    for _ in range(120):
        suggestion = strategy.ask(1)[0]
        losses = problem.losses(suggestion.point)
        before = [*strategy._members.get("F"), losses] if len(strategy._members) else [losses]
        strategy.tell([TrialResult(suggestion.id, suggestion.point, losses)])
        stay = strategy._members.get("F")
        for gone in before:
            if not np.any(np.all(stay == gone, axis=1)):
                left += 1
                assert not np.any(np.all(gone <= stay, axis=1) & np.any(gone < stay, axis=1))
    assert left > 90
    assert len(strategy._members) == 15


@pytest.mark.parametrize("name", NAMES)
def test_anchors_are_members_without_being_asked(name: str) -> None:
    problem = tasks(2)
    anchors = tuple(anchor(np.full(DIM, value), problem.losses) for value in (0.2, 0.4, 0.8))
    strategy = make(name, box(DIM, 2, start=0.4, anchors=anchors))
    assert len(strategy._members) == 3
    points = asked(strategy, problem.losses, 60)
    np.testing.assert_allclose(np.sort(points[:3, 0]), [0.3, 0.5, 0.6])  # midpoints come first
    for known in anchors:
        assert not np.any(np.all(points == known.point, axis=1))


def test_failures_and_partial_results_never_become_members_and_foreign_results_do() -> None:
    problem = tasks(2)
    strategy = make("nsga2", box(DIM, 2))
    mine, other = strategy.ask(2)
    strategy.tell([TrialResult(mine.id, mine.point, None)])
    strategy.tell([replace(anchor(np.full(DIM, 0.1), problem.losses), evaluated=5)])
    assert len(strategy._members) == 0
    strategy.tell(
        [
            anchor(np.full(DIM, 0.7), problem.losses),
            TrialResult(other.id, other.point, problem.losses(other.point)),
        ]
    )
    assert len(strategy._members) == 2
    strategy.tell(
        [TrialResult(None, np.full(DIM, 0.7), np.zeros(2))]
    )  # the same point, measured again
    assert len(strategy._members) == 2
    assert np.any(np.all(strategy._members.get("F") == 0, axis=1))


@pytest.mark.parametrize("name", NAMES)
def test_a_leading_member_with_estimated_losses_is_asked_once_more(name: str) -> None:
    strategy = make(name, box(4, 2))
    lucky, poor = strategy.ask(2)
    strategy.tell([TrialResult(lucky.id, lucky.point, np.full(2, -1.0), estimated=5)])
    strategy.tell([TrialResult(poor.id, poor.point, np.full(2, 1.0), estimated=5)])
    again = strategy.ask(1)[0]
    assert again.items is None
    assert np.array_equal(again.point, lucky.point)
    strategy.tell([TrialResult(again.id, again.point, np.full(2, 0.5))])
    assert isinstance(strategy, Evolution)
    # The whole result takes the place of the estimate.
    assert sorted(strategy._members.get("F").tolist()) == [[0.5, 0.5], [1.0, 1.0]]
    strategy.tell([TrialResult(None, lucky.point, np.full(2, -1.0), estimated=5)])
    assert sorted(strategy._members.get("F").tolist()) == [[0.5, 0.5], [1.0, 1.0]]
    others = [suggestion.point for suggestion in strategy.ask(20)]
    assert not any(np.array_equal(point, lucky.point) for point in others)
    assert not any(np.array_equal(point, poor.point) for point in others)


@pytest.mark.parametrize("name", NAMES)
def test_no_point_is_proposed_twice(name: str) -> None:
    """Faces of the box and a failing region make equal children likely.

    pymoo alone would repeat several of them.
    """
    strategy = make(name, box(2, 2, start=0.0), population=6)
    foreign = anchor([0.0, 0.0], lambda x: x + 0.0)  # where the strategy would begin
    strategy.tell([foreign])
    points = asked(strategy, lambda x: x + 0.0, 300)
    assert len(np.unique(np.vstack([points, foreign.point]), axis=0)) == 301


@pytest.mark.parametrize("name", NAMES)
def test_every_draw_comes_from_the_strategys_own_generator(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pymoo makes a generator from the clock wherever it is not handed one."""
    problem = tasks(2)
    strategy = make(name, box(DIM, 2))

    def refuse(*args: object) -> None:
        raise AssertionError("pymoo made a generator of its own")

    monkeypatch.setattr(np.random, "default_rng", refuse)
    asked(
        strategy, lambda point: np.round(problem.losses(point)), 150
    )  # rounded: many ties to break


@pytest.mark.parametrize("name", NAMES)
def test_the_filters_of_warnings_stay_as_they_were(name: str) -> None:
    before = list(warnings.filters)
    asked(make(name, box(DIM, 2)), tasks(2).losses, 60)
    assert warnings.filters == before


@pytest.mark.parametrize("name", NAMES)
def test_losses_in_other_units_change_nothing(name: str) -> None:
    """Scaling by powers of two is exact, so the points are the same to the bit."""
    problem = tasks(2)
    factor = np.array([2.0**20, 2.0**-20])
    scaled = replace(box(DIM, 2), scale=np.array([[0.0, factor[0]], [0.0, factor[1]]]))
    plain = asked(make(name, box(DIM, 2)), problem.losses, 120)
    assert np.array_equal(
        plain, asked(make(name, scaled), lambda point: factor * problem.losses(point), 120)
    )


def test_nsga2_with_one_objective_is_a_genetic_algorithm() -> None:
    strategy = make("nsga2", box(5), population=20)
    losses = run(strategy, sphere, 800)
    assert losses.min() < 1e-3
    assert (
        strategy._members.get("F").max() == np.sort(losses.ravel())[19]
    )  # elitist: the 20 best, no others


@pytest.mark.parametrize(
    ("objectives", "most"), [(2, 40), (3, 40), (4, 40), (5, 40), (8, 40), (10, 20)]
)
def test_reference_directions_cover_the_simplex(objectives: int, most: int) -> None:
    directions = reference_directions(objectives, most)
    np.testing.assert_allclose(directions.sum(axis=1), 1.0)
    assert np.all(directions >= 0)
    assert np.all(directions.max(axis=0) == 1.0)  # every corner
    assert np.any(np.all(directions > 0, axis=1))  # and something inside
    assert len(np.unique(directions.round(9), axis=0)) == len(directions)
    assert len(directions) <= most + objectives
    if objectives == 3:
        assert len(directions) == math.comb(7 + 2, 2)


def test_the_population_leaves_room_for_generations() -> None:
    assert [default_population(budget) for budget in (10, 100, 200, 5000)] == [10, 20, 40, 40]


@pytest.mark.parametrize(
    ("name", "objectives", "message"),
    [
        (
            "nsga3",
            1,
            "strategy.name: expected two objectives or more for nsga3, received 1; choose nsga2",
        ),
        (
            "sms_emoa",
            1,
            "strategy.name: expected 2 to 6 objectives for sms_emoa, received 1; choose nsga2",
        ),
        (
            "sms_emoa",
            7,
            "strategy.name: expected 2 to 6 objectives for sms_emoa, received 7; choose nsga3",
        ),
    ],
)
def test_numbers_of_objectives_that_it_cannot_work_with_are_refused(
    name: str, objectives: int, message: str
) -> None:
    with pytest.raises(InputError) as error:
        make(name, box(4, objectives))
    assert str(error.value) == message
