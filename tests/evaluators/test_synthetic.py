"""Analytic problems: known optima and fronts, noise as declared, faults on demand."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.evaluators import SPLITS
from mergesearch.evaluators.spec.evaluators import parse_evaluators
from mergesearch.evaluators.synthetic import Faults, Synthetic
from mergesearch.evaluators.synthetic_problems import PROBLEMS, Problem, make_problem, optimum
from mergesearch.merging import InputError
from tests.evaluators.items import candidate_at, recipe_at
from tests.waiting import PATIENT

Array = npt.NDArray[np.float64]

QUADRATICS = ["sphere", "ellipsoid", "quadratic_tasks"]


def gradient(problem: Problem, x: Array, step: float = 1e-4) -> Array:
    """Central differences ``(objectives, dim)``; exact for quadratics up to rounding."""
    steps = step * np.eye(x.size)
    return np.stack(
        [(problem.losses(x + e) - problem.losses(x - e)) / (2 * step) for e in steps], axis=1
    )


def dominate(ones: Array, others: Array, slack: float = 1e-12) -> npt.NDArray[np.bool_]:
    """Row by row, with broadcasting: no worse anywhere (within rounding), and better somewhere."""
    return np.all(ones <= others + slack, axis=-1) & np.any(ones < others - slack, axis=-1)


class TestProblems:
    @pytest.mark.parametrize("dim", [1, 2, 17])
    @pytest.mark.parametrize("name", QUADRATICS)
    def test_the_gradient_vanishes_at_each_optimum(self, name: str, dim: int) -> None:
        problem = make_problem(name, dim, seed=4)
        best = optimum(name, dim, seed=4)
        assert best.points.shape == (problem.objectives, dim)
        assert np.all((best.points > 0) & (best.points < 1))
        for task, point in enumerate(best.points):
            np.testing.assert_allclose(gradient(problem, point)[task], 0, atol=1e-7)
            np.testing.assert_array_equal(best.losses[task], problem.losses(point))
        np.testing.assert_array_equal(np.diag(best.losses), 0)

    @pytest.mark.parametrize(
        ("name", "condition"), [("sphere", 1), ("ellipsoid", 1e3), ("quadratic_tasks", 10)]
    )
    def test_eigenvalues_are_as_documented(self, name: str, condition: float) -> None:
        dim = 9
        problem = make_problem(name, dim)
        for task, centre in enumerate(optimum(name, dim).points):

            def loss(x: Array, task: int = task, centre: Array = centre) -> float:
                return float(problem.losses(centre + x)[task])

            unit = np.eye(dim)
            hessian = np.array([[loss(a + b) - loss(a) - loss(b) for b in unit] for a in unit]) / 2
            eigenvalues = np.linalg.eigvalsh(hessian)
            np.testing.assert_allclose(eigenvalues[[0, -1]], [1, condition], rtol=1e-9)

    def test_sphere_is_the_squared_distance(self) -> None:
        x = np.random.default_rng(0).random(6)
        expected = np.sum((x - optimum("sphere", 6).points[0]) ** 2)
        np.testing.assert_allclose(make_problem("sphere", 6).losses(x), [expected], rtol=1e-14)

    def test_tasks_pull_in_different_directions(self) -> None:
        best = optimum("quadratic_tasks", 5, objectives=3)
        assert best.losses.shape == (3, 3)
        assert np.all(best.losses[~np.eye(3, dtype=bool)] > 0.01)

    def test_zdt1_agrees_with_the_paper(self) -> None:
        problem = make_problem("zdt1", 30)
        # On the front g = 1; off it, the definition of Zitzler, Deb and Thiele 2000, written out.
        for point in problem.pareto_set(9):
            first, second = problem.losses(point)
            assert second == pytest.approx(1 - np.sqrt(first), abs=1e-12)
        x = np.random.default_rng(1).random(30)
        g = 1 + 9 / 29 * sum(x[1:])
        np.testing.assert_allclose(
            problem.losses(x), [x[0], g * (1 - (x[0] / g) ** 0.5)], rtol=1e-13
        )

    def test_zdt1_grows_outside_the_unit_box(self) -> None:
        problem = make_problem("zdt1", 3)
        edge = np.array([0.3, 0.0, 1.0])
        outside = np.array([0.3, -0.2, 1.1])
        np.testing.assert_allclose(
            problem.losses(outside), problem.losses(edge) + 0.04 + 0.01, rtol=1e-12
        )

    @pytest.mark.parametrize(
        ("name", "objectives", "dim"),
        [
            ("quadratic_tasks", 2, 4),
            ("quadratic_tasks", 3, 4),
            ("quadratic_tasks", 2, 1),
            ("zdt1", 2, 4),
        ],
    )
    def test_no_point_dominates_the_pareto_set(self, name: str, objectives: int, dim: int) -> None:
        problem = make_problem(name, dim, objectives=objectives, seed=2)
        generator = np.random.default_rng(0)
        front = problem.pareto_set(20)
        assert front.shape == (objectives + 20, dim)
        # Anywhere in the box, and close to the set, where a wrong one would be found out.
        near = np.repeat(front, 100, axis=0) + 0.02 * generator.standard_normal(
            (100 * len(front), dim)
        )
        points = np.concatenate([generator.random((2000, dim)), near, front])
        losses = np.array([problem.losses(point) for point in points])
        on_front = np.array([problem.losses(point) for point in front])
        for row in on_front:
            assert not losses[dominate(losses, row)].size, row
        assert np.mean([dominate(row, losses).any() for row in on_front]) > 0.5

    @given(seed=st.integers(0, 1000), weight=st.floats(0.05, 0.95))
    @settings(max_examples=25, deadline=None)
    def test_a_trade_off_is_stationary_for_its_weights(self, seed: int, weight: float) -> None:
        problem = make_problem("quadratic_tasks", 5, seed=seed)
        weights = np.array([weight, 1 - weight])
        np.testing.assert_allclose(
            weights @ gradient(problem, problem.tradeoff(weights)), 0, atol=1e-7
        )

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_the_seed_decides(self, name: str) -> None:
        x = np.random.default_rng(0).random(4)
        make_problem.cache_clear()
        first = make_problem(name, 4, seed=1).losses(x)
        make_problem.cache_clear()
        np.testing.assert_array_equal(make_problem(name, 4, seed=1).losses(x), first)
        if name != "zdt1":  # which has nothing random in it
            assert np.all(make_problem(name, 4, seed=2).losses(x) != first)


class TestMeasurements:
    def test_without_noise_the_losses_are_exact(self) -> None:
        x = [0.1, 0.9, 0.4]
        evaluator = Synthetic("quadratic_tasks", seed=5)
        expected = make_problem("quadratic_tasks", 3, seed=5).losses(np.array(x))
        for split in SPLITS:
            measured = evaluator.evaluate(candidate_at(x), split)
            assert measured.values == dict(
                zip(("task 1", "task 2"), expected.tolist(), strict=True)
            )
            assert not measured.errors
            assert not measured.items
        assert evaluator.problem(3).losses(np.array(x)).tolist() == expected.tolist()

    @pytest.mark.parametrize(
        ("options", "names"),
        [
            ({"problem": "sphere"}, ["sphere"]),
            ({"problem": "zdt1"}, ["f1", "f2"]),
            ({"problem": "quadratic_tasks", "objectives": 1}, ["quadratic_tasks"]),
            ({"problem": "quadratic_tasks", "objectives": 3}, ["task 1", "task 2", "task 3"]),
        ],
    )
    def test_names_of_objectives(self, options: dict[str, Any], names: list[str]) -> None:
        assert [objective.name for objective in Synthetic(**options).objectives] == names

    @pytest.mark.parametrize("items", [0, 1, 25])
    def test_noise_has_the_standard_deviation_that_was_asked_for(self, items: int) -> None:
        evaluator = Synthetic("sphere", noise=0.2, items=items)
        points = np.random.default_rng(0).random((600, 2))
        truth = evaluator.problem(2)
        residuals = [
            evaluator.evaluate(candidate_at(x), "search").values["sphere"] - truth.losses(x)[0]
            for x in points
        ]
        # Standard error of a mean of 600 is 0.2 / 24.5, of a standard deviation 0.2 / 34.6: four of
        # each.
        assert abs(np.mean(residuals)) < 4 * 0.2 / 24.5
        assert abs(np.std(residuals) - 0.2) < 4 * 0.2 / 34.6

    def test_noise_is_independent_between_splits_and_seeds(self) -> None:
        points = np.random.default_rng(0).random((400, 2))

        def noise(seed: int, split: Any) -> list[float]:
            evaluator = Synthetic("sphere", noise=1.0, seed=seed)
            truth = make_problem("sphere", 2, seed=seed)
            measured = [evaluator.evaluate(candidate_at(x), split).values["sphere"] for x in points]
            return [value - truth.losses(x)[0] for value, x in zip(measured, points, strict=True)]

        draws = [noise(0, "search"), noise(0, "validation"), noise(0, "test"), noise(1, "search")]
        correlations = np.corrcoef(draws)[~np.eye(4, dtype=bool)]
        assert np.abs(correlations).max() < 4 / np.sqrt(400)

    def test_items_have_the_mean_and_the_standard_error_of_the_value(self) -> None:
        evaluator = Synthetic("quadratic_tasks", noise=0.3, items=400)
        assert evaluator.provides == {"items", "gradient"}
        x = [0.2, 0.5]
        measured = evaluator.evaluate(candidate_at(x), "test")
        losses = dict(
            zip(("task 1", "task 2"), evaluator.problem(2).losses(np.array(x)), strict=True)
        )
        for name, scores in measured.items.items():
            assert scores.shape == (400,)
            assert measured.values[name] == pytest.approx(scores.mean(), abs=1e-12)
            assert measured.errors[name] == pytest.approx(scores.std() / 20, rel=1e-12)
            assert measured.errors[name] == pytest.approx(0.3, rel=0.2)
            assert abs(measured.values[name] - losses[name]) < 4 * measured.errors[name]

    def test_seconds_are_spent(self) -> None:
        import time

        started = time.perf_counter()
        Synthetic("sphere", seconds=0.05).evaluate(candidate_at([0.5]), "search")
        assert time.perf_counter() - started >= 0.05


class TestFaults:
    SHARES = Faults(nan=0.2, error=0.1, kill=0.05)

    def test_shares_are_about_as_asked(self) -> None:
        fates = [self.SHARES.of(recipe_at([number]).digest) for number in range(4000)]
        for name in ("nan", "error", "kill"):
            share = getattr(self.SHARES, name)
            assert abs(fates.count(name) / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000)

    def test_all_or_none(self) -> None:
        digests = [recipe_at([number]).digest for number in range(200)]
        assert {Faults().of(digest) for digest in digests} == {None}
        assert {Faults(error=1.0).of(digest) for digest in digests} == {"error"}

    def test_the_same_recipes_fail_each_time_in_the_same_way(self) -> None:
        evaluator = Synthetic("sphere", faults=Faults(nan=0.3, error=0.3))
        kinds = set()
        for number in range(60):
            candidate = candidate_at([number / 60, 0.5])
            fate = Faults(nan=0.3, error=0.3).of(candidate.recipe.digest)
            kinds.add(fate)
            for split in SPLITS:
                if fate == "error":
                    with pytest.raises(
                        RuntimeError, match=f"recipe {candidate.recipe.digest} fails"
                    ):
                        evaluator.evaluate(candidate, split)
                else:
                    value = evaluator.evaluate(candidate, split).values["sphere"]
                    assert np.isnan(value) == (fate == "nan")
        assert kinds == {None, "nan", "error"}

    def test_kill_kills_the_process(self) -> None:
        code = """
import numpy as np
from mergesearch.evaluators import Candidate
from mergesearch.evaluators.synthetic import Faults, Synthetic
from mergesearch.merging import Field, Recipe, Source
recipe = Recipe(Source("", ""), (), "task_arithmetic", Field.constant(1, [0.5]))
print(Synthetic("sphere").evaluate(Candidate(recipe), "search").values, flush=True)
Synthetic("sphere", faults=Faults(kill=1.0)).evaluate(Candidate(recipe), "search")
print("still here")
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENT
        )
        assert done.returncode == -signal.SIGKILL
        assert "sphere" in done.stdout
        assert "still here" not in done.stdout


class TestWrongOptions:
    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            ({"problem": "rosenbrock"}, ["synthetic.problem", "'ellipsoid'", "'rosenbrock'"]),
            (
                {"problem": "sphere", "objectives": 2},
                ["synthetic.objectives", "expected 1 for sphere", "received 2"],
            ),
            (
                {"problem": "zdt1", "objectives": 3},
                ["synthetic.objectives", "expected 2 for zdt1", "received 3"],
            ),
            (
                {"problem": "quadratic_tasks", "objectives": 0},
                ["objectives", "at least 1", "received 0"],
            ),
            (
                {"problem": "sphere", "faults": Faults(nan=0.6, kill=0.6)},
                ["synthetic.faults", "at most 1", "0.6"],
            ),
        ],
    )
    def test_one_line_says_what_is_allowed(self, options: dict[str, Any], parts: list[str]) -> None:
        with pytest.raises(InputError) as caught:
            Synthetic(**options)
        message = str(caught.value)
        assert "\n" not in message
        assert all(part in message for part in parts), message

    def test_zdt1_needs_two_coordinates(self) -> None:
        with pytest.raises(
            InputError, match=r"zdt1 needs at least 2 coordinates, received 1; set space\.dim"
        ):
            make_problem("zdt1", 1)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("noise", -1.0),
            ("items", -1),
            ("seconds", -0.1),
            ("faults", {"nan": 1.5}),
            ("colour", "red"),
            ("seed", -1),
        ],
    )
    def test_the_study_file_refuses_values_out_of_range(self, key: str, value: Any) -> None:
        with pytest.raises(ValueError, match=key):
            parse_evaluators([{"kind": "synthetic", "problem": "sphere", key: value}])
