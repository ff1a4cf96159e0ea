"""Rules that stop trials: stages, races, halving, Hyperband; and estimates on all items."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.evaluators import Measurement
from mergesearch.search.fidelity.irt import ItemModel, choose_representatives, estimate, fit_items
from mergesearch.search.fidelity.rules import (
    NeverStop,
    Race,
    Rungs,
    Scalar,
    bracket_of,
    by_difference,
    difference_errors,
    halving_limit,
    measure_in_stages,
    paired_difference,
    race_stages,
    rung_stages,
)
from mergesearch.search.front import Normaliser
from mergesearch.search.strategies.parts.noise import pooled
from mergesearch.search.strategies.parts.rungs import bracket_rungs
from mergesearch.search.study.early_stopping import fitted_count
from mergesearch.search.study.problem import penalised_losses


def on(scores: np.ndarray, count: int | None) -> Measurement:
    """The first items of one objective."""
    part = scores[:count]
    size = len(part)
    return Measurement(
        {"f": float(part.mean())},
        items={"f": part},
        weights={"f": np.full(size, 1 / size)},
        item_indices={"f": np.arange(size)},
    )


class TestStages:
    def test_evaluate_more_and_more_until_a_rule_stops(self) -> None:
        scores = np.arange(10.0)
        asked = []

        def evaluate(count: int | None) -> Measurement:
            asked.append(count)
            return on(scores, count)

        whole = measure_in_stages(evaluate, NeverStop((2, 5)))
        assert asked == [2, 5, None]
        assert whole.stopped is None
        assert whole.rungs == {2: {"f": 0.5}, 5: {"f": 2.0}}
        scalar = Scalar(("f",), np.ones(1), np.ones(1), np.array([[0.0, 1.0]]))
        stopped = measure_in_stages(evaluate, Rungs((2, 5), (1.0, 1.0), scalar))
        assert (stopped.stopped, stopped.measurement.values) == (5, {"f": 2.0})

    @given(items=st.integers(10, 5000), least=st.integers(2, 60), eta=st.integers(2, 5))
    @settings(max_examples=60, deadline=None)
    def test_numbers_rise_and_stay_below_all_items(self, items: int, least: int, eta: int) -> None:
        for stages in (race_stages(items, least), rung_stages(items, least, eta)):
            assert list(stages) == sorted(set(stages))
            assert all(least <= stage < items for stage in stages)

    def test_brackets_come_in_hyperbands_proportions(self) -> None:
        stages = 2
        eta = 3
        ours = [bracket_of(trial, stages, eta) for trial in range(60)]
        begins = bracket_rungs(stages + 1, eta)
        assert ours == [next(begins) for _ in range(60)]

    def test_one_of_eta_goes_on(self) -> None:
        assert halving_limit([], 3) == math.inf
        assert halving_limit([1.0], 3) == 1.0
        assert halving_limit([5.0, 1.0, 4.0, 2.0, 3.0], 3) == 2.0

    def test_halving_passes_a_third_of_what_comes_in_random_order(self) -> None:
        reached: list[float] = []
        passed = 0
        for loss in np.random.default_rng(0).random(600):
            passed += loss <= halving_limit(reached, 3)
            reached.append(loss)
        assert 0.28 < passed / 600 < 0.4


class TestRace:
    rival = np.tile([1.0, 1.0, 0.0, 1.0], 25)

    def stops(self, scores: np.ndarray, confidence: float = 2.0, **rivals: Any) -> bool:
        race = Race((50,), ({"f": rivals.get("rival", self.rival)},), {"f": -1.0}, confidence)
        return race.stops(0, on(scores, 50))

    def test_stops_what_is_clearly_worse_and_nothing_else(self) -> None:
        flipped = self.rival.copy()
        flipped[:20:2] = 1 - flipped[:20:2]
        assert self.stops(np.zeros(100))
        assert not self.stops(self.rival)
        assert not self.stops(np.ones(100))
        assert not self.stops(self.rival * (np.arange(100) != 3))

    def test_pairs_items_that_differ_in_difficulty(self) -> None:
        easy = np.repeat([0.0, 1.0], 50)[np.random.default_rng(0).permutation(100)]
        # Worse by a twentieth on every item: seen at once in pairs, lost in the spread of the items
        # otherwise.
        assert self.stops(easy - 0.05, rival=easy)
        unpaired = math.sqrt(2 * easy[:50].var() / 50)
        assert unpaired * 2 > 0.05

    def test_must_be_worse_in_every_objective_than_one_rival(self) -> None:
        good = np.ones(100)
        bad = np.zeros(100)

        def both(first: np.ndarray, second: np.ndarray) -> Measurement:
            one = on(first, 50)
            two = on(second, 50)
            return Measurement(
                {"f": 0.0, "g": 0.0},
                items={"f": one.items["f"], "g": two.items["f"]},
                weights={"f": one.weights["f"], "g": one.weights["f"]},
                item_indices={"f": one.item_indices["f"], "g": one.item_indices["f"]},
            )

        race = Race(
            (50,), ({"f": good, "g": bad}, {"f": bad, "g": good}), {"f": -1.0, "g": -1.0}, 2.0
        )
        assert not race.stops(0, both(good, bad))
        assert not race.stops(0, both(bad, bad))
        dominated = Race((50,), ({"f": good, "g": good},), {"f": -1.0, "g": -1.0}, 2.0)
        assert dominated.stops(0, both(bad, bad))
        assert not dominated.stops(0, both(good, bad))

    def test_few_items_that_are_left_change_little(self) -> None:
        rival = np.tile([1.0, 0.0], 500)
        ours = rival.copy()
        ours[:36:2], ours[101:127:2] = 0.0, 1.0  # 18 items lost, 13 won
        loss, error = paired_difference(rival[:900] - ours[:900], np.full(900, 1 / 900))
        assert 0.5 * error < loss < error
        race = Race((900,), ({"f": rival},), {"f": -1.0}, 1.0)
        assert race.stops(0, on(ours, 900))

    def test_error_of_a_paired_difference_is_that_of_a_mean(self) -> None:
        gaps = np.random.default_rng(1).standard_normal(40)
        mean, error = paired_difference(gaps, np.full(40, 1 / 40))
        assert mean == pytest.approx(gaps.mean())
        assert error == pytest.approx(gaps.std(ddof=1) / math.sqrt(40))

    def test_seldom_stops_the_better_of_two(self) -> None:
        rng = np.random.default_rng(2)
        wrong = 0
        for _ in range(300):
            difficulty = rng.random(400)
            rival, better = (
                (rng.random(400) < difficulty * skill).astype(float) for skill in (0.9, 1.0)
            )
            race = Race(race_stages(400, 50), ({"f": rival},), {"f": -1.0}, 2.0)
            wrong += (
                measure_in_stages(lambda count, scores=better: on(scores, count), race).stopped
                is not None
            )
        assert wrong / 300 < 0.05


class TestEstimates:
    def test_a_difference_carries_over_to_all_items(self) -> None:
        estimated = by_difference({"f": 0.6, "g": 2.0}, {"f": 0.5, "g": 3.0}, {"f": 0.7, "g": 2.5})
        assert estimated == pytest.approx({"f": 0.8, "g": 1.5})

    def test_a_difference_is_closer_than_the_plain_mean(self) -> None:
        rng = np.random.default_rng(3)
        plain = []
        paired = []
        for _ in range(200):
            rival = (rng.random(1000) < 0.6).astype(float)
            ours = np.where(rng.random(1000) < 0.1, 1 - rival, rival)
            part = {"f": ours[:100].mean()}
            estimated = by_difference(part, {"f": rival[:100].mean()}, {"f": rival.mean()})
            plain.append(part["f"] - ours.mean())
            paired.append(estimated["f"] - ours.mean())
        assert np.std(paired) < 0.7 * np.std(plain)


def responses(models: int, items: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers of random models, their chances, and abilities ``(models, 2)``."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(models, 2))
    a = rng.normal(size=(items, 2)) * 1.5
    b = rng.normal(size=items)
    chances = 1 / (1 + np.exp(-(theta @ a.T - b)))
    return (rng.random(chances.shape) < chances).astype(float), chances, theta


class TestItemResponse:
    def test_predicts_the_chances_that_made_the_answers(self) -> None:
        answers, chances, _ = responses(60, 300, 0)
        model = fit_items(answers)
        predicted = np.array([model.predict(ability) for ability in model.abilities])
        assert np.abs(predicted - chances).mean() < 0.12
        assert np.abs(0.5 - chances).mean() > 0.2

    def test_the_same_twice(self) -> None:
        answers, _, _ = responses(12, 100, 1)
        one = fit_items(answers)
        two = fit_items(answers)
        np.testing.assert_array_equal(one.difficulty, two.difficulty)

    @pytest.mark.parametrize("kind", ["p_irt", "mp_irt", "gp_irt", "gmp_irt"])
    def test_estimates_beat_the_plain_mean_of_few_items(self, kind: str) -> None:
        answers, _, _ = responses(80, 400, 2)
        known = answers[:60]
        parents = np.arange(60) < 8
        model = fit_items(known)
        rng = np.random.default_rng(3)
        errors = []
        plain = []
        for row in answers[60:]:
            indices = np.sort(rng.choice(400, 40, replace=False))
            errors.append(estimate(kind, model, parents, row[indices], indices) - row.mean())
            plain.append(row[indices].mean() - row.mean())
        assert np.std(errors) < np.std(plain)
        assert abs(np.mean(errors)) < 0.05

    def test_a_merge_of_known_models_is_recognised(self) -> None:
        """A merge whose ability is the average of two parents': mp-IRT needs few items."""
        rng = np.random.default_rng(4)
        model = ItemModel(
            rng.normal(size=(500, 2)) * 2,
            rng.normal(size=500),
            np.array([[1.5, -1.0], [-1.0, 1.5]]),
        )
        chances = model.predict(model.abilities.mean(axis=0))
        answers = (rng.random(500) < chances).astype(float)
        indices = np.arange(30)
        estimated = estimate("mp_irt", model, np.array([True, True]), answers[indices], indices)
        assert estimated == pytest.approx(answers.mean(), abs=0.06)

    def test_all_items_leave_nothing_to_estimate(self) -> None:
        answers, _, _ = responses(12, 50, 5)
        estimated = estimate(
            "p_irt", fit_items(answers), np.ones(12, bool), answers[0], np.arange(50)
        )
        assert estimated == pytest.approx(answers[0].mean())

    def test_parameters_are_fitted_to_a_number_that_grows_in_steps(self) -> None:
        steps = [fitted_count(count) for count in range(1, 400)]
        assert steps == sorted(steps)
        assert all(
            0.9 * count <= step <= count for count, step in zip(range(1, 200), steps, strict=False)
        )
        assert max(steps) <= 200


class TestRepresentatives:
    def test_every_way_of_answering_has_one_that_stands_for_it(self) -> None:
        ways = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]], float)
        owners = np.repeat(np.arange(4), (10, 20, 30, 40))[
            np.random.default_rng(0).permutation(100)
        ]
        indices, weights = choose_representatives(ways[:, owners], 4)
        assert sorted(owners[indices].tolist()) == [0, 1, 2, 3]
        assert {
            int(owner): round(weight, 2)
            for owner, weight in zip(owners[indices], weights, strict=True)
        } == {
            0: 0.1,
            1: 0.2,
            2: 0.3,
            3: 0.4,
        }

    def test_weighted_representatives_are_closer_than_as_many_items_at_random(self) -> None:
        answers, _, _ = responses(60, 500, 6)
        indices, weights = choose_representatives(answers[:40], 40)
        rng = np.random.default_rng(7)
        errors = [weights @ row[indices] - row.mean() for row in answers[40:]]
        plain = [
            row[rng.choice(500, 40, replace=False)].mean() - row.mean() for row in answers[40:]
        ]
        assert np.std(errors) < np.std(plain)

    def test_the_same_twice(self) -> None:
        answers, _, _ = responses(20, 200, 8)
        one = choose_representatives(answers, 30)
        two = choose_representatives(answers, 30)
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1].sum() == pytest.approx(1)


class TestBounds:
    normaliser = Normaliser(np.array([0.0, 1.0]), np.array([1.0, 3.0]))

    def test_losses_of_a_trial_that_keeps_them_stay_as_they_are(self) -> None:
        losses = np.array([0.2, 1.5])
        assert penalised_losses(losses, {"safe": -0.1}, self.normaliser) is losses

    @given(missed=st.floats(1e-6, 1), more=st.floats(1e-6, 1))
    @settings(max_examples=30, deadline=None)
    def test_what_misses_them_is_behind_every_anchor_and_by_how_much(
        self, missed: float, more: float
    ) -> None:
        one, two = (
            penalised_losses(np.array([-5.0, 1.0]), {"safe": m}, self.normaliser)
            for m in (missed, missed + more)
        )
        assert np.all(one > self.normaliser.high)
        assert np.all(two > one)


class TestErrors:
    def test_those_of_a_difference_hold_on_new_items(self) -> None:
        """Over many draws of items, the estimate misses the truth by about its error."""
        rng = np.random.default_rng(0)
        misses = []
        for _ in range(300):
            shared = rng.standard_normal(200)
            rival = shared + 0.3 * rng.standard_normal(200)
            ours = shared[:50] + 0.5 + 0.3 * rng.standard_normal(50)
            known = {"f": float(rival.std() / math.sqrt(200))}
            measured = replace(on(ours, None), errors={"f": 1.0})
            values = by_difference(
                measured.values, {"f": float(rival[:50].mean())}, {"f": float(rival.mean())}
            )
            error = difference_errors(measured, {"f": rival}, known)["f"]
            misses.append((values["f"] - 0.5) / error)
        assert 0.85 < np.std(misses) < 1.15

    def test_without_scores_of_items_it_is_that_of_the_plain_mean(self) -> None:
        measured = Measurement({"f": 1.0}, errors={"f": 0.2})
        assert difference_errors(measured, {}, {"f": 0.1}) == {"f": 0.2}
        assert difference_errors(Measurement({"f": 1.0}), {}, {"f": 0.1}) == {}


class TestToldToCma:
    @given(
        behind=st.lists(st.floats(0.001, 2), min_size=3, max_size=13),
        errors=st.lists(st.floats(0.05, 0.5), min_size=13, max_size=13),
    )
    @settings(max_examples=50, deadline=None)
    def test_estimates_move_to_the_middle_and_never_before_the_leader(
        self, behind: list[float], errors: list[float]
    ) -> None:
        """A leader on all items, and trials that it stopped on few: each is worse, and unsure."""
        scores = 0.3 + np.array([0.0, *behind])
        squares = np.array([0.01, *errors[: len(behind)]]) ** 2
        ranked = pooled(scores, squares)
        middle = np.median(scores)
        assert ranked[0] == scores[0]
        assert np.argmin(ranked) == 0
        assert np.all(np.abs(ranked - middle) <= np.abs(scores - middle) + 1e-12)

    def test_the_less_sure_of_two_equal_estimates_is_nearer_to_the_middle(self) -> None:
        ranked = pooled(
            np.array([0.0, 0.4, 0.4, 0.2, 0.1]), np.array([0.01, 0.1, 0.3, 0.1, 0.1]) ** 2
        )
        assert 0.2 < ranked[2] < ranked[1] < 0.4
