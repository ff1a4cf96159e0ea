"""Objectives relative to models, means over domains, and bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.evaluators.objectives import Metric, needed_references
from mergesearch.evaluators.reduction import measure, reduce_metric, score_domains
from mergesearch.merging import InputError, NonFiniteError

DOMAINS = np.array(["a", "a", "a", "b", "b", "c"])
SCORES = np.array([1.0, 0.0, 1.0, 1.0, 1.0, 0.5])
REFERENCES = {
    "base": {"accuracy/a": 0.5, "accuracy/b": 0.8, "accuracy/c": 0.25},
    "expert a": {"accuracy/a": 0.9},
    "expert b": {"accuracy/b": 0.8},
    "expert sea": {"accuracy/c": 0.75},
}
EXPERTS = {"c": "sea"}


def reduced(**options: Any) -> Any:
    return reduce_metric(Metric(**options), score_domains(SCORES, DOMAINS), REFERENCES, EXPERTS)


class TestReductions:
    def test_means_worst_and_geometric_mean_of_domains(self) -> None:
        assert reduced().value == pytest.approx((2 / 3 + 1 + 0.5) / 3)
        assert reduced(reduce="worst").value == 0.5
        assert reduced(reduce="geometric_mean").value == pytest.approx((2 / 3 * 1 * 0.5) ** (1 / 3))

    def test_normalised_by_expert_base_and_chance(self) -> None:
        chance = {"a": 0.1, "b": 0.2}
        by_expert = [(2 / 3 - 0.1) / 0.8, (1 - 0.2) / 0.6, 0.5 / 0.75]
        assert reduced(normalise="expert", chance=chance).value == pytest.approx(np.mean(by_expert))
        assert reduced(normalise="base").value == pytest.approx(
            np.mean([2 / 3 / 0.5, 1 / 0.8, 0.5 / 0.25])
        )
        assert reduced(normalise="chance", chance=0.25).value == pytest.approx(
            np.mean([5 / 9, 1, 1 / 3])
        )

    def test_forgetting_counts_losses_alone_and_is_minimised(self) -> None:
        forgetting = Metric(normalise="forgetting", domains=["a", "b"])
        assert forgetting.better == "minimize"
        references = {"base": {"accuracy/a": 0.9, "accuracy/b": 0.5}}
        result = reduce_metric(forgetting, score_domains(SCORES, DOMAINS), references)
        assert result.value == pytest.approx((0.9 - 2 / 3) / 2)
        worse = Metric(metric="cross_entropy", normalise="forgetting")
        risen = reduce_metric(
            worse, score_domains(SCORES[:3], DOMAINS[:3]), {"base": {"cross_entropy/a": 0.5}}
        )
        assert risen.value == pytest.approx(2 / 3 - 0.5)

    @pytest.mark.parametrize("normalise", [None, "expert", "base", "chance"])
    def test_weighted_items_add_up_to_the_value(self, normalise: Any) -> None:
        result = reduced(normalise=normalise, chance=0.1)
        assert result.weights is not None
        assert result.weights @ result.items == pytest.approx(result.value)
        assert result.item_indices.tolist() == list(range(6))

    @pytest.mark.parametrize(
        "options", [{"reduce": "worst"}, {"reduce": "geometric_mean"}, {"normalise": "forgetting"}]
    )
    def test_what_is_no_mean_has_no_weights(self, options: dict[str, Any]) -> None:
        assert reduced(**options).weights is None

    @given(
        values=st.lists(st.floats(0.05, 1), min_size=6, max_size=6),
        reduce=st.sampled_from(["mean", "worst", "geometric_mean"]),
        normalise=st.sampled_from([None, "expert", "base", "chance"]),
    )
    @settings(max_examples=60, deadline=None)
    def test_better_items_never_make_it_worse(
        self, values: list[float], reduce: Any, normalise: Any
    ) -> None:
        metric = Metric(reduce=reduce, normalise=normalise)
        lower, higher = (
            reduce_metric(metric, score_domains(np.array(row), DOMAINS), REFERENCES, EXPERTS).value
            for row in (values, [value + 0.1 for value in values])
        )
        assert higher >= lower - 1e-12

    def test_errors_are_those_of_independent_domains(self) -> None:
        errors = [
            part.std() / math.sqrt(part.size) for part in (SCORES[:3], SCORES[3:5], SCORES[5:])
        ]
        scale = [1 / 0.5, 1 / 0.8, 1 / 0.25]
        expected = math.sqrt(sum((e * s) ** 2 for e, s in zip(errors, scale, strict=True))) / 3
        assert reduced(normalise="base").error == pytest.approx(expected)

    def test_an_expert_that_only_guesses_is_refused(self) -> None:
        with pytest.raises(
            InputError, match=r"expected expert b to differ from chance \(0.8\) in accuracy/b"
        ):
            reduced(normalise="expert", chance=0.8)


class TestBounds:
    def violations(self, *metrics: Metric, references: Any = REFERENCES) -> dict[str, float]:
        scores = {"accuracy": score_domains(SCORES, DOMAINS)}
        measured = measure([Metric(), *metrics], scores, references, EXPERTS, DOMAINS)
        assert list(measured.values) == ["accuracy"]
        return dict(measured.violations)

    def test_are_measured_as_what_is_missing(self) -> None:
        result = self.violations(
            Metric(domains=["a"], at_least="base"),
            Metric(domains=["c"], at_least=0.6, tolerance=0.02),
            Metric(name="low", at_most=0.5),
        )
        assert result == pytest.approx(
            {
                "accuracy[a] at least base": 0.5 - 2 / 3,
                "accuracy[c] at least 0.6": 0.08,
                "low": (2 / 3 + 1 + 0.5) / 3 - 0.5,
            }
        )

    def test_the_base_keeps_its_own_bound(self) -> None:
        references = {
            "base": {
                f"accuracy/{name}": score.value
                for name, score in score_domains(SCORES, DOMAINS).items()
            }
        }
        result = self.violations(Metric(reduce="worst", at_least="base"), references=references)
        assert result["worst accuracy at least base"] == 0


class TestMeasurement:
    def test_without_references_what_needs_them_is_unknown_and_means_are_there(self) -> None:
        measured = measure(
            [Metric(normalise="base")],
            {"accuracy": score_domains(SCORES, DOMAINS)},
            None,
            {},
            DOMAINS,
        )
        assert math.isnan(measured.values["accuracy of base"])
        assert measured.means == pytest.approx(
            {"accuracy/a": 2 / 3, "accuracy/b": 1, "accuracy/c": 0.5}
        )

    def test_scores_that_are_not_finite_are_named(self) -> None:
        with pytest.raises(NonFiniteError, match="'accuracy'"):
            measure(
                [Metric()], {"accuracy": score_domains(SCORES * np.nan, DOMAINS)}, {}, {}, DOMAINS
            )

    def test_places_are_those_among_the_items_of_the_objective(self) -> None:
        rows = np.array([0, 3, 5])
        scores = score_domains(SCORES[rows], DOMAINS[rows])
        from dataclasses import replace

        placed = {
            name: replace(score, item_indices=rows[score.item_indices])
            for name, score in scores.items()
        }
        measured = measure([Metric(domains=["b", "c"])], {"accuracy": placed}, {}, {}, DOMAINS)
        assert measured.item_indices["accuracy[b, c]"].tolist() == [0, 2]

    def test_references_that_are_needed_are_known_by_name(self) -> None:
        metrics = [Metric(normalise="expert", domains=["a", "c"]), Metric(at_least="base")]
        assert needed_references(metrics, DOMAINS.tolist(), EXPERTS) == {
            "base",
            "expert a",
            "expert sea",
        }
        assert needed_references([Metric()], ["a"], {}) == frozenset()
