"""Intervals of the winner against all anchors at once, and the gains that a report claims."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mergesearch.evaluators import Objective
from mergesearch.merging import Field, Recipe, Source
from mergesearch.search.record.array_text import pack_items, unpack_items
from mergesearch.search.record.trial_record import Score, TrialRecord, Verdict
from mergesearch.search.report.caveats import caveats
from mergesearch.search.report.comparison import compare
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.gains import anchor_intervals, gains
from mergesearch.search.report.headline import headline
from mergesearch.search.report.page.html_page import render
from mergesearch.search.report.saved import saved_data, saved_text
from mergesearch.search.report.simultaneous import (
    Deviation,
    critical_value,
    paired_deviation,
    resampled_deviation,
)
from mergesearch.search.report.writing import as_json

ACCURACY = Objective("accuracy", "maximize")
LOSS = Objective("loss", "minimize")


def study(
    *scores: Score, objectives: tuple[Objective, ...] = (ACCURACY,), winner: int | None = None
) -> ReportData:
    """Anchors with these scores on all splits, and as the last one the trial that won."""
    source = Source("base", "base")

    def record(number: int, score: Score) -> TrialRecord:
        anchor = number < len(scores) - 1
        field = Field.constant(1, np.array([float(number)]))
        return TrialRecord(
            number=number,
            kind="anchor" if anchor else "search",
            name=f"anchor {number}" if anchor else "",
            suggestion=None if anchor else 0,
            point=None,
            merge=Recipe(source, (Source("one", "one"),), "average", field, layout="none"),
            tells_at_ask=0,
            tell_index=None,
            state="complete",
            values=score.values,
            errors=score.errors,
        )

    measured = dict(enumerate(scores))
    won = len(scores) - 1 if winner is None else winner
    verdict = Verdict(won, (), (len(scores) - 1,), {"validation": measured, "test": measured})
    records = [record(number, score) for number, score in measured.items()]
    weights = [1 / len(objectives)] * len(objectives)
    return ReportData("small", "runs/small", objectives, weights, records, verdict)


def scored(**items: np.ndarray) -> Score:
    """The score whose values are the means of these items."""
    return Score(
        {name: float(row.mean()) for name, row in items.items()},
        {name: float(row.std() / np.sqrt(len(row))) for name, row in items.items()},
        items,
    )


class TestCriticalValue:
    def test_one_comparison_needs_the_quantile_of_one(self):
        assert critical_value([Deviation(0.1)]) == pytest.approx(1.96, abs=0.03)
        items = np.random.default_rng(0).standard_normal(6)
        student = critical_value([Deviation(1.0, items)])
        assert student == pytest.approx(2.571, abs=0.06)  # Student's t with five degrees

    def test_independent_comparisons_need_what_sidak_says(self):
        # The quantile 1 - (1 - 0.95 ** (1 / 8)) / 2 of the normal distribution.
        assert critical_value([Deviation(0.1)] * 8) == pytest.approx(2.727, abs=0.03)

    def test_comparisons_that_move_together_need_no_more_than_one(self):
        items = np.random.default_rng(0).standard_normal(5000)
        alike = [Deviation(size, size * items) for size in (0.1, 1.0, -3.0)]
        assert critical_value(alike) == pytest.approx(1.96, abs=0.03)

    def test_many_against_one_need_what_dunnett_tabulates(self):
        rng = np.random.default_rng(0)
        ours = rng.standard_normal(4000)
        rows = [ours - rng.standard_normal(4000) for _ in range(5)]
        # Dunnett 1964, table for two sides, five comparisons, many degrees of freedom: 2.51.
        assert critical_value([paired_deviation(row) for row in rows]) == pytest.approx(
            2.51, abs=0.03
        )

    def test_what_has_no_spread_counts_nothing(self):
        assert critical_value([Deviation(0.0), Deviation(0.0)]) == 0.0
        assert critical_value([Deviation(0.0), Deviation(0.1)]) == critical_value([Deviation(0.1)])

    def test_it_is_the_same_each_time(self):
        rows = [Deviation(1.0, row) for row in np.random.default_rng(0).standard_normal((4, 30))]
        assert critical_value(rows) == critical_value(rows)


class TestPairedDeviation:
    def test_the_error_is_that_of_a_mean(self):
        gaps = np.random.default_rng(0).standard_normal(50)
        deviation = paired_deviation(gaps)
        assert deviation.error == pytest.approx(gaps.std(ddof=1) / np.sqrt(50))
        assert deviation.items is not None
        assert deviation.items.sum() == pytest.approx(0)

    def test_domains_of_other_sizes_are_samples_of_their_own(self):
        rng = np.random.default_rng(0)
        few = 5 + rng.standard_normal(20)
        many = rng.standard_normal(80)
        weights = np.repeat([1 / 40, 1 / 160], [20, 80])
        deviation = paired_deviation(np.concatenate([few, many]), weights)
        expected = np.hypot(few.std(ddof=1) / np.sqrt(20), many.std(ddof=1) / np.sqrt(80)) / 2
        assert deviation.error == pytest.approx(expected)

    def test_a_handful_of_answers_that_differ_is_not_certain(self):
        answers = np.zeros(200)
        assert paired_deviation(answers).error > 0
        answers[:4] = 1
        assert answers.mean() < 1.96 * paired_deviation(answers).error


class TestIntervals:
    def test_all_intervals_hold_together_in_95_percent(self):
        """Five anchors that are equally good: pointwise intervals would hold in 81 %."""
        rng = np.random.default_rng(3)
        held = []
        for _ in range(120):
            hard = rng.standard_normal(60)
            answers = [scored(accuracy=hard + rng.standard_normal(60)) for _ in range(6)]
            held.append(all(each.verdict == "tie" for each in anchor_intervals(study(*answers))))
        assert 0.91 <= np.mean(held) <= 0.99

    def test_a_gain_needs_every_anchor(self):
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((3, 400))
        close = scored(accuracy=noise[0] + 0.95)
        far = scored(accuracy=noise[1])
        ours = scored(accuracy=noise[2] + 1.0)
        data = study(far, close, ours)
        (gain,) = gains(data, anchor_intervals(data))
        assert not gain.claimed
        assert gain.ties == ("anchor 1",)
        assert gain.low < 0 < gain.high
        data = study(far, far, ours)
        (gain,) = gains(data, anchor_intervals(data))
        assert gain.claimed
        assert gain.ties == ()
        assert 0 < gain.low < gain.improvement < gain.high
        assert "better than every anchor" in " ".join(headline(data))

    def test_a_loss_that_is_lower_is_a_gain_and_an_anchor_can_be_better(self):
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((2, 2, 400)) / 10
        data = study(
            scored(accuracy=noise[0, 0] + 2, loss=noise[0, 1] + 2),
            scored(accuracy=noise[1, 0], loss=noise[1, 1]),
            objectives=(ACCURACY, LOSS),
        )
        worse, better = gains(data, anchor_intervals(data))
        assert (worse.objective, worse.claimed, worse.worse_than) == (
            "accuracy",
            False,
            ("anchor 0",),
        )
        assert (better.objective, better.claimed) == ("loss", True)
        assert any("better than the winner: anchor 0" in line for line in headline(data))

    def test_the_same_merge_ties_with_itself(self):
        answers = scored(accuracy=(np.arange(50) % 3 > 0).astype(float))
        data = study(answers, answers)
        (gain,) = gains(data, anchor_intervals(data))
        assert not gain.claimed
        assert gain.ties == ("anchor 0",)

    def test_values_that_items_do_not_explain_use_their_errors(self):
        items = {"accuracy": np.arange(20.0)}
        first = Score({"accuracy": 0.5}, {"accuracy": 0.03}, items)
        second = Score({"accuracy": 0.7}, {"accuracy": 0.04}, items)
        (interval,) = anchor_intervals(study(first, second))
        assert not interval.paired
        assert interval.error == pytest.approx(0.05)
        assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.05, rel=0.02)

    def test_without_errors_there_is_nothing_to_claim(self):
        data = study(Score({"accuracy": 0.5}, {}), Score({"accuracy": 0.7}, {}))
        (interval,) = anchor_intervals(data)
        assert (interval.low, interval.verdict) == (None, "unknown")
        assert gains(data, [interval]) == []
        assert headline(data)[-1].startswith("accuracy: 0.7 on test items")

    def test_an_anchor_that_won_gains_nothing(self):
        answers = [scored(accuracy=np.arange(20.0) + shift) for shift in (1, 0, 0)]
        data = study(*answers, winner=0)
        assert [each.trial for each in anchor_intervals(data)] == [1]
        assert gains(data, anchor_intervals(data)) == []

    def test_nothing_is_compared_before_the_test(self):
        assert anchor_intervals(replace(study(scored(accuracy=np.ones(9))), verdict=None)) == []

    def test_domains_of_other_sizes_are_paired_by_their_weights(self):
        rng = np.random.default_rng(0)
        weights = {"accuracy": np.repeat([1 / 40, 1 / 160], [20, 80])}

        def answered(shift: float) -> Score:
            items = rng.standard_normal(100) + shift
            value = float(weights["accuracy"] @ items)
            return Score({"accuracy": value}, {"accuracy": 0.3}, {"accuracy": items}, {}, weights)

        data = study(answered(0.0), answered(3.0))
        assert anchor_intervals(data)[0].paired
        verdict = data.verdict
        assert verdict is not None
        unweighted = {n: replace(s, weights={}) for n, s in verdict.scores["test"].items()}
        scores = {**verdict.scores, "test": unweighted}
        assert not anchor_intervals(replace(data, verdict=replace(verdict, scores=scores)))[
            0
        ].paired
        packed = unpack_items(pack_items(weights["accuracy"]))
        assert len(np.unique(packed)) == 2


class TestReport:
    def test_page_json_and_console_say_the_same(self):
        rng = np.random.default_rng(0)
        shifts = (0.0, 0.1, 1.0)
        data = study(*(scored(accuracy=rng.standard_normal(90) + shift) for shift in shifts))
        told = as_json(data)
        first, second = told["against_anchors"]
        assert first["improvement"] < second["improvement"]
        assert told["gains"][0]["low"] == min(first["low"], second["low"])
        page = render(data)
        for each in (first, second):
            assert f">{each['anchor']}<" in page
            assert f"{each['low']:+.2f} to {each['high']:+.2f}" in page
        assert f"{told['gains'][0]['low']:+.2f}" in " ".join(headline(data))

    def test_a_leader_that_was_luckier_on_validation_items_is_named(self):
        worst, lucky, chosen = (scored(accuracy=np.arange(9.0) + shift) for shift in (0, 2, 1))
        data = study(worst, lucky, chosen)
        assert any("Anchor 1 scored better on validation items" in line for line in caveats(data))
        assert not any("scored better" in line for line in caveats(study(worst, chosen, lucky)))


def resampled(values: dict[str, float], draws: dict[str, np.ndarray], items: int = 40) -> Score:
    """A score of values that items do not make up, known on resamples of them."""
    rows = {name: np.arange(float(items)) for name in values}
    errors = dict.fromkeys(values, 0.3)
    return Score(values, errors, rows, resampled=draws)


class TestResampled:
    def pair(self, noise: float = 0.01) -> ReportData:
        """An anchor and a winner that is 0.1 better, whose resamples move together."""
        rng = np.random.default_rng(0)
        shared = 0.3 * rng.standard_normal(500)
        drawn = [{"accuracy": v + shared + noise * rng.standard_normal(500)} for v in (0.5, 0.6)]
        first, second = (
            resampled({"accuracy": v}, d) for v, d in zip((0.5, 0.6), drawn, strict=True)
        )
        return study(first, second)

    def test_values_that_are_no_means_are_paired_by_their_resamples(self):
        data = self.pair()
        (interval,) = anchor_intervals(data)
        assert interval.paired
        assert interval.error == pytest.approx(0.01 * np.sqrt(2), rel=0.1)
        (gain,) = gains(data, [interval])
        assert gain.claimed
        (comparison,) = compare(data)
        assert comparison.paired
        assert comparison.high - comparison.low == pytest.approx(2 * 1.96 * interval.error)
        assert not any("unpaired" in line for line in headline(data))
        assert anchor_intervals(data) == anchor_intervals(self.pair())

    def test_runs_without_resamples_stay_unpaired(self):
        data = self.pair()
        verdict = data.verdict
        old = {n: replace(s, resampled={}) for n, s in verdict.scores["test"].items()}
        scores = {**verdict.scores, "test": old}
        data = replace(data, verdict=replace(verdict, scores=scores))
        (interval,) = anchor_intervals(data)
        assert not interval.paired
        assert interval.error == pytest.approx(0.3 * np.sqrt(2))
        assert any("unpaired" in line for line in headline(data))

    def test_merges_that_score_alike_on_all_resamples_do_not_differ(self):
        same = resampled({"accuracy": 0.5}, {"accuracy": np.linspace(0, 1, 500)})
        (interval,) = anchor_intervals(study(same, same))
        assert (interval.error, interval.verdict) == (0.0, "tie")

    def test_a_few_items_have_the_tails_of_a_few(self):
        rng = np.random.default_rng(0)
        draws = rng.standard_normal((2, 500))
        few = [resampled_deviation(row, 6) for row in draws[:1]]
        many = [resampled_deviation(row, 5000) for row in draws[:1]]
        assert critical_value(few) == pytest.approx(2.571, abs=0.06)  # Student's t, five degrees
        assert critical_value(many) == pytest.approx(1.96, abs=0.03)
        together = [resampled_deviation(row, 5000) for row in (draws[0], 2 * draws[0])]
        assert critical_value(together) == pytest.approx(1.96, abs=0.03)

    def test_a_report_that_is_read_back_says_the_same(self, tmp_path):
        data = self.pair()
        (tmp_path / "report_data.json").write_text(saved_text(data))
        again = saved_data(tmp_path)
        assert again is not None
        ours, theirs = anchor_intervals(data)[0], anchor_intervals(again)[0]
        assert theirs.paired
        assert (theirs.low, theirs.high) == pytest.approx((ours.low, ours.high), rel=1e-5)

    def test_means_over_unequal_domains_are_paired_in_the_comparison_too(self):
        rng = np.random.default_rng(0)
        weights = {"accuracy": np.repeat([1 / 40, 1 / 160], [20, 80])}
        hard = rng.standard_normal(100)

        def answered(shift: float) -> Score:
            items = hard + 0.1 * rng.standard_normal(100) + shift
            value = float(weights["accuracy"] @ items)
            return Score({"accuracy": value}, {"accuracy": 0.3}, {"accuracy": items}, {}, weights)

        (comparison,) = compare(study(answered(0.0), answered(0.2)))
        assert comparison.paired
        assert 0 < comparison.low < 0.2 < comparison.high < 0.3
