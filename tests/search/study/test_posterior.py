"""The final choice: what nominees are expected to score given the search and the validation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mergesearch.evaluators import Objective
from mergesearch.merging import Field, Recipe, Source
from mergesearch.search.front import Normaliser
from mergesearch.search.record.trial_record import Score, TrialRecord
from mergesearch.search.study.posterior import fit_nominees, posterior_losses, update
from mergesearch.search.study.selection import choose_winner

LOSS = Objective("loss", "minimize")
UNIT = Normaliser(np.zeros(1), np.ones(1))
ALL = np.ones(1)
ITEMS = 400


def trial(number: int, point: np.ndarray, items: np.ndarray, kind: str = "search") -> TrialRecord:
    source = Source("base", "base")
    field = Field.constant(1, np.array([float(number)]))
    return TrialRecord(
        number=number,
        kind=kind,
        name="",
        suggestion=number,
        point=point,
        merge=Recipe(source, (Source("one", "one"),), "average", field, layout="none"),
        tells_at_ask=0,
        tell_index=number,
        state="complete",
        values={"loss": float(items.mean())},
        errors={"loss": float(items.std() / np.sqrt(ITEMS))},
        items={"loss": items},
    )


def scored(items: np.ndarray) -> Score:
    return Score({"loss": float(items.mean())}, {"loss": float(items.std() / 20)}, {"loss": items})


def bowl(rng: np.random.Generator, trials: int = 60) -> list[TrialRecord]:
    """Trials around the optimum of a bowl; the last one is the recommendation, at the optimum."""
    points = [*(0.5 + 0.2 * rng.standard_normal((trials, 3))), np.full(3, 0.5)]
    noise = rng.standard_normal((trials + 1, ITEMS))
    depths = [float(((point - 0.5) ** 2).sum()) for point in points]
    records = [
        trial(number, point, depth + noise[number])
        for number, (point, depth) in enumerate(zip(points, depths, strict=True))
    ]
    records[-1] = replace(records[-1], kind="recommended")
    return records


def expected(records: list[TrialRecord], validation: dict[int, Score]) -> dict[int, float]:
    found = posterior_losses(records, [*validation], validation, (LOSS,), ALL, UNIT, np.ones(3))
    assert found is not None
    return found


def luckiest(records: list[TrialRecord], count: int = 5) -> list[int]:
    ranked = sorted(records[:-1], key=lambda record: record.values["loss"])
    return [record.number for record in ranked[:count]]


class TestPosterior:
    def test_the_fit_is_nearer_to_the_truth_than_the_measurements(self):
        rng = np.random.default_rng(0)
        points = rng.random((40, 2))
        losses = np.sin(3 * points[:, 0]) + 0.1 * rng.standard_normal(40)
        mean, spread = fit_nominees(points, losses, 20, 0.01)
        truth = np.sin(3 * points[:20, 0])
        missed = np.std(mean - truth)
        assert missed < 0.75 * np.std(losses[:20] - truth)
        assert missed / 2 < np.sqrt(np.diag(spread).mean()) < 2 * missed
        assert np.linalg.eigvalsh(spread).min() > -1e-10

    def test_the_update_is_the_conditional_distribution(self):
        rng = np.random.default_rng(0)
        root = rng.standard_normal((2, 4, 4))
        spread, noise = root @ root.transpose(0, 2, 1)
        mean, values = rng.standard_normal((2, 4))
        vague = 1e7 * np.ones((4, 4))  # of the level that validation items add to all
        gain = spread @ np.linalg.inv(spread + noise + vague)
        np.testing.assert_allclose(
            update(mean, spread, values, noise), mean + gain @ (values - mean), atol=1e-5
        )
        shifted = update(mean, spread, values + 10.0, noise)
        np.testing.assert_allclose(shifted, update(mean, spread, values, noise))

    def test_luck_is_drawn_back_to_the_neighbours(self):
        """Five lucky trials and the optimum: the luckiest on validation items is no better."""
        wins = []
        lucky = []
        for seed in range(12):
            rng = np.random.default_rng(seed)
            records = bowl(rng)
            numbers = [records[-1].number, *luckiest(records)]
            depths = [float(((records[n].point - 0.5) ** 2).sum()) for n in numbers]
            validation = {
                number: scored(depth + rng.standard_normal(ITEMS))
                for number, depth in zip(numbers, depths, strict=True)
            }
            values = expected(records, validation)
            wins.append(depths[numbers.index(min(values, key=values.__getitem__))])
            lucky.append(depths[int(np.argmin([validation[n].values["loss"] for n in numbers]))])
        assert np.mean(wins) < 0.6 * np.mean(lucky)

    def test_a_leader_that_is_truly_better_displaces_a_bad_recommendation(self):
        rng = np.random.default_rng(0)
        records = bowl(rng)
        noise = rng.standard_normal(ITEMS)
        records[-1] = replace(
            trial(records[-1].number, np.full(3, 0.9), noise + 0.5), kind="recommended"
        )
        numbers = [records[-1].number, *luckiest(records)]
        validation = {n: scored(records[n].items["loss"] + noise / 10) for n in numbers}
        values = expected(records, validation)
        assert max(values, key=values.__getitem__) == numbers[0]

    def test_validation_decides_where_it_is_certain(self):
        rng = np.random.default_rng(0)
        records = bowl(rng)
        noise = rng.standard_normal(ITEMS)
        numbers = [records[-1].number, *luckiest(records)]
        validation = {n: scored(noise + 0.05 * (n != numbers[3])) for n in numbers}
        values = expected(records, validation)
        assert min(values, key=values.__getitem__) == numbers[3]

    def test_values_that_items_do_not_explain_use_their_errors(self):
        rng = np.random.default_rng(0)
        records = [replace(record, items={}) for record in bowl(rng)]
        numbers = [records[-1].number, *luckiest(records)]
        validation = {
            n: Score({"loss": records[n].values["loss"]}, {"loss": 0.05}) for n in numbers
        }
        values = expected(records, validation)
        assert set(values) == set(numbers)
        assert np.isfinite(list(values.values())).all()

    @pytest.mark.filterwarnings("error")
    def test_trials_that_all_score_alike_are_expected_to(self):
        """Classifiers that name one class whatever the coefficients, for instance."""
        items = np.repeat([1.0, 0.0], [24, ITEMS - 24])  # whose covariance rounds to below zero
        points = np.random.default_rng(0).random((13, 3))
        records = [trial(number, point, items) for number, point in enumerate(points)]
        validation = {number: scored(items) for number in (12, 3, 7)}
        alike = Normaliser(np.full(1, items.mean()), np.full(1, items.mean() + 1))
        values = posterior_losses(
            records, [*validation], validation, (LOSS,), ALL, alike, np.ones(3)
        )
        assert values is not None
        assert np.ptp([*values.values()]) < 1e-9

    @pytest.mark.parametrize("trials", [3, 60])
    def test_without_trials_or_errors_nothing_is_expected(self, trials):
        records = [replace(r, items={}, errors={}) for r in bowl(np.random.default_rng(0), trials)]
        validation = {records[-1].number: Score({"loss": 0.1}, {})}
        assert (
            posterior_losses(records, [*validation], validation, (LOSS,), ALL, UNIT, np.ones(3))
            is None
        )

    def test_several_objectives_and_a_fixed_coordinate(self):
        rng = np.random.default_rng(0)
        accuracy = Objective("accuracy", "maximize")

        def with_accuracy(each):
            return replace(
                each,
                values={**each.values, "accuracy": -each.values["loss"]},
                items={**each.items, "accuracy": -each.items["loss"]},
            )

        records = bowl(rng)
        numbers = [records[-1].number, *luckiest(records)]
        validation = {n: scored(rng.standard_normal(ITEMS)) for n in numbers}
        single = expected(records, validation)
        both = posterior_losses(
            [with_accuracy(record) for record in records],
            numbers,
            {n: with_accuracy(score) for n, score in validation.items()},
            (LOSS, accuracy),
            np.array([0.5, 0.5]),
            Normaliser(np.array([0.0, 0.0]), np.ones(2)),
            np.ones(3),
        )
        # Accuracy is the loss with another sign: the same objective twice changes nothing.
        assert both == pytest.approx(single)


class TestChoice:
    scores = {  # noqa: RUF012
        number: Score({"loss": value}, {})
        for number, value in enumerate([0.3, 0.5, 0.2, 0.25, 0.4])
    }

    def choose(self, posterior: dict[int, float] | None, **changed: float) -> int | None:
        scores = self.scores | {int(k[1:]): Score({"loss": v}, {}) for k, v in changed.items()}
        return choose_winner(scores, (LOSS,), ALL, UNIT, posterior)

    def test_the_expected_best_of_those_that_beat_every_anchor_wins(self):
        assert self.choose(None) == 2
        assert self.choose({4: 0.1, 3: 0.2, 2: 0.3}) == 3  # 4 loses to anchor 0

    def test_an_anchor_wins_where_no_leader_beats_it(self):
        assert self.choose({4: 0.1, 3: 0.2, 2: 0.3}, n0=0.2) == 0
        assert self.choose({4: 0.1, 3: 0.2, 2: 0.3}, n1=0.1) == 1

    def test_the_recommendation_wins_ties(self):
        assert self.choose({3: 0.2, 2: 0.2}) == 3

    def test_a_leader_that_misses_a_bound_does_not_win(self):
        missed = Score({"loss": 0.1}, {}, violations={"bound": 0.1})
        scores = {**self.scores, 3: missed}
        assert choose_winner(scores, (LOSS,), ALL, UNIT, {3: 0.0, 2: 0.3}) == 2
