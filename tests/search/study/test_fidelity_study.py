"""Whole studies with early stopping, with relative objectives, and with bounds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators.synthetic import Synthetic
from mergesearch.merging import InputError
from mergesearch.search.cli.check import describe_plan
from mergesearch.search.front import Normaliser
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.storage import read_storage
from mergesearch.search.report.caveats import caveats, ties
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exported import rescore
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.study.events import Event
from mergesearch.search.study.problem import trial_result
from tests.search.conftest import model_study
from tests.search.studies import analytic, fingerprint, run_in, spec_of

ITEMS = 400
RULES: dict[str, dict[str, Any]] = {
    "race": {"rule": "race"},
    "race of two objectives": {"rule": "race", "confidence": 1.0},
    "halving": {"rule": "halving", "min_items": 40},
    "hyperband": {"rule": "hyperband", "min_items": 20},
    "subset": {"rule": "subset", "min_items": 80, "estimate": "mean"},
    "subset of representatives": {
        "rule": "subset",
        "min_items": 60,
        "order": "representative",
        "estimate": "representative",
    },
}


def study(fidelity: Any, *, several: bool = False, **sections: Any) -> dict[str, Any]:
    problem: dict[str, Any] = {
        "kind": "synthetic",
        "items": ITEMS,
        "noise": 0.01,
        "problem": "ellipsoid",
    }
    if several:
        problem |= {"problem": "quadratic_tasks", "objectives": 2}
    strategy = "cma_parego" if several else "cma_es"
    given = {"evaluators": [problem], "fidelity": fidelity, "trials": 60, "strategy": strategy}
    return analytic("fidelity", **given | sections)


def searched(run: Run) -> list[Any]:
    return [record for record in run.log.records if record.kind == "search"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too few items": (
        study({"rule": "race", "min_items": 400}),
        "min_items: expected fewer than the 400",
    ),
    "no stage": (study({"rule": "halving", "min_items": 200}), "min_items: expected at most 133"),
    "no items": (
        study("race", evaluators=[{"kind": "synthetic", "problem": "sphere"}]),
        "race: expected evaluators with item scores",
    ),
    "anchors in a race": (
        study({"rule": "race", "order": "representative", "estimate": "representative"}),
        "order: representative: expected rule subset",
    ),
    "differences of anchors": (
        study({"rule": "subset", "order": "representative"}),
        "estimate: expected representative, mean or an IRT with order: representative",
    ),
    "unknown": (study("racing"), "fidelity.rule: input should be 'full', 'race'"),
}


class TestRules:
    @pytest.mark.parametrize("rule", RULES)
    def test_trials_are_stopped_and_never_win_and_a_resumed_run_is_the_same(
        self, tmp_path: Path, rule: str
    ) -> None:
        data = study(RULES[rule], several="two" in rule)
        whole = run_in(data, tmp_path / "whole")
        stopped = [record for record in searched(whole) if record.stopped is not None]
        assert 3 < len(stopped) < len(searched(whole))
        assert all(
            record.state == "partial" and set(record.estimates) == set(record.values)
            for record in stopped
        )
        assert all(record.stopped < ITEMS for record in stopped)
        assert whole.verdict is not None
        numbers = {record.number for record in stopped}
        assert not numbers & {whole.verdict.winner, *whole.verdict.leaders, *whole.verdict.front}

        def interrupt(event: Event) -> None:
            if event.kind == "trial" and event.record is not None and event.record.tell_index == 20:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_study(spec_of(data, tmp_path), tmp_path / "run", interrupt)
        resumed = run_in(data, tmp_path / "run")
        assert fingerprint(resumed) == fingerprint(whole)
        assert [record.estimates for record in resumed.log.records] == [
            r.estimates for r in whole.log.records
        ]

    def test_a_race_gets_as_far_with_fewer_evaluations(self, tmp_path: Path) -> None:
        budget = {"trials": 150}
        full = run_in(study("full", trials=150, budget=budget), tmp_path / "full")
        race = run_in(study("race", trials=150, budget=budget), tmp_path / "race")
        spent = [sum(r.evaluated or ITEMS for r in searched(run)) for run in (full, race)]
        assert spent[1] < 0.6 * spent[0]
        best = [run.trial(None).values["ellipsoid"] for run in (full, race)]
        start = full.log.records[0].values["ellipsoid"]
        assert best[1] < best[0] + 0.05 * (start - best[0])

    def test_errors_are_recorded_with_estimates_and_told_to_strategies(
        self, tmp_path: Path
    ) -> None:
        run = run_in(study("race"), tmp_path / "run")
        for record in searched(run):
            told = trial_result(run.plan, record, Normaliser(np.zeros(1), np.ones(1)))
            assert told.errors is not None
            if record.stopped is None:
                assert told.errors[0] == record.errors["ellipsoid"]
            else:
                assert told.errors[0] == record.estimate_errors["ellipsoid"]
                # The rival's own error is part of it.
                best = min(r.errors["ellipsoid"] for r in run.log.records if r.stopped is None)
                assert told.errors[0] > best

    def test_a_promising_estimate_is_measured_on_all_items_and_not_stopped_again(
        self, tmp_path: Path
    ) -> None:
        rule = {"rule": "halving", "min_items": 40, "estimate": "mean"}
        run = run_in(study(rule, several=True, strategy="nsga2"), tmp_path / "run")
        stopped = {r.recipe.digest: r for r in searched(run) if r.stopped is not None}
        again = [r for r in searched(run) if r.stopped is None and r.recipe.digest in stopped]
        assert again
        assert all(r.state == "complete" for r in again)
        assert all(r.number > stopped[r.recipe.digest].number for r in again)

    def test_what_is_left_of_stopped_trials_is_spent_on_others_and_pays(
        self, tmp_path: Path
    ) -> None:
        budget = {"evaluations": 40 * ITEMS}
        full = run_in(study("full", budget=budget), tmp_path / "full")
        race = run_in(study("race", budget=budget), tmp_path / "race")
        spent = sum(record.evaluated or ITEMS for record in race.log.records)
        assert len(race.log.records) > len(full.log.records) == 40
        assert spent <= 40 * ITEMS
        problem = Synthetic("ellipsoid", items=ITEMS, noise=0.01).problem(
            race.plan.space.lower.size
        )
        true = [problem.losses(run.trial(None).point)[0] for run in (full, race)]
        assert true[1] < 0.8 * true[0]

    def test_the_report_says_what_was_stopped_and_what_is_estimated(self, tmp_path: Path) -> None:
        run = run_in(study("race"), tmp_path / "run")
        lines = caveats(run.report_data())
        assert any("were stopped early" in line and "estimates" in line for line in lines)
        assert any("scored the same to the bit" in line for line in lines)
        assert "fidelity    race over 400 items, looks after 50, 75" in "\n".join(
            describe_plan(run.plan)
        )

    def test_estimates_by_item_response_need_scores_of_answers(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="expected item scores of 'ellipsoid' between 0 and 1"):
            run_in(study({"rule": "race", "estimate": "p_irt"}), tmp_path / "run")
        with pytest.raises(InputError, match="expected base and experts among the anchors"):
            run_in(study({"rule": "race", "estimate": "mp_irt"}), tmp_path / "ends")

    @pytest.mark.parametrize(
        "estimate",
        [*(pytest.param(name, marks=pytest.mark.slow) for name in ("p_irt", "mp_irt")), "gmp_irt"],
    )
    def test_estimates_by_item_response_resume_too(
        self, tmp_path: Path, pico_models: Path, pico_items: Path, estimate: str
    ) -> None:
        fidelity = {"rule": "subset", "min_items": 10, "estimate": estimate}
        section = relative(pico_items, {"metric": "accuracy"}, batch_size=4)
        data = model_study(
            pico_models, pico_items, evaluators=[section], fidelity=fidelity, strategy="cma_es"
        )
        whole = run_in(data, tmp_path / "whole")
        stopped = [record for record in searched(whole) if record.stopped is not None]
        assert stopped
        assert all(-0.25 <= record.estimates["accuracy"] <= 1.25 for record in stopped)
        assert any(record.estimates != record.values for record in stopped)

        def interrupt(event: Event) -> None:
            if event.kind == "trial" and event.record is not None and event.record.tell_index == 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_study(spec_of(data, tmp_path), tmp_path / "run", interrupt)
        resumed = run_in(data, tmp_path / "run")
        assert fingerprint(resumed) == fingerprint(whole)
        assert [record.estimates for record in resumed.log.records] == [
            r.estimates for r in whole.log.records
        ]

    @pytest.mark.parametrize("case", BAD)
    def test_what_cannot_be_served_is_refused(self, tmp_path: Path, case: str) -> None:
        data, message = BAD[case]
        with pytest.raises(InputError, match=message) as raised:
            plan_study(spec_of(data, tmp_path))
        assert "\n" not in str(raised.value)


def relative(items: Path, *objectives: dict[str, Any], **options: Any) -> dict[str, Any]:
    section = {"kind": "classification", "data": str(items), "domain": "domain", "id": "id"}
    return (
        section
        | {"experts": {"odd": "left", "even": "right"}, "objectives": list(objectives)}
        | options
    )


class TestReferences:
    def test_experts_are_one_at_home_on_every_split_and_exports_score_the_same(
        self, tmp_path: Path, pico_models: Path, pico_items: Path
    ) -> None:
        from mergesearch.merging.export.folder import export_model

        objectives = [
            {"name": "odd", "metric": "cross_entropy", "normalise": "expert", "domains": ["odd"]},
            {"name": "kept", "metric": "cross_entropy", "normalise": "base"},
        ]
        data = model_study(pico_models, pico_items, evaluators=[relative(pico_items, *objectives)])
        run = run_in(data, tmp_path / "run")
        by_name = {record.name: record for record in run.log.records if record.kind == "anchor"}
        assert run.verdict is not None
        for split in ("search", "validation", "test"):
            scores = run.verdict.scores.get(split, {})
            values = {
                name: scores[r.number].values if split != "search" else r.values
                for name, r in by_name.items()
            }
            assert values["expert left"]["odd"] == pytest.approx(1, abs=1e-12)
            assert values["base"]["kept"] == pytest.approx(1, abs=1e-12)
        record = run.trial(None)
        export_model(record.recipe, tmp_path / "out")
        again = rescore(open_run(tmp_path / "run"), record, tmp_path / "out")
        assert again.agreement.identical

    def test_unknown_experts_and_reference_scores_are_refused(
        self, tmp_path: Path, pico_models: Path, pico_items: Path
    ) -> None:
        section = relative(pico_items, {"normalise": "expert"}, experts={"odd": "lift"})
        data = model_study(pico_models, pico_items, evaluators=[section])
        with pytest.raises(
            InputError, match=r"relative to 'expert even': expected one of .*'expert left'"
        ):
            plan_study(spec_of(data, tmp_path))
        data = model_study(pico_models, pico_items, reference_scores={"expert lift": {"odd": 1.0}})
        with pytest.raises(
            InputError, match=r"reference_scores.expert lift: expected one of the anchors"
        ):
            plan_study(spec_of(data, tmp_path))

    def test_parents_that_score_otherwise_than_known_are_named_at_once(
        self, tmp_path: Path, pico_models: Path, pico_items: Path
    ) -> None:
        said: list[str] = []
        data = model_study(
            pico_models,
            pico_items,
            reference_scores={"base": {"odd": 2.0}, "average": {"odd": 3.0}},
        )
        run = run_study(
            spec_of(data, tmp_path),
            tmp_path / "run",
            lambda e: said.append(e.text) if e.kind == "warning" else None,
        )
        assert [line.split(":")[0] for line in said] == ["base", "average"]
        assert all("reference score" in line for line in said)
        assert said[0] in caveats(run.report_data())


class TestBounds:
    def test_winners_and_fronts_keep_them(
        self, tmp_path: Path, pico_models: Path, pico_items: Path
    ) -> None:
        bound = {
            "metric": "cross_entropy",
            "domains": ["odd"],
            "at_most": "base",
            "tolerance": 0.01,
        }
        section = relative(
            pico_items, {"metric": "accuracy", "domains": ["even"]}, constraints=[bound]
        )
        data = model_study(pico_models, pico_items, evaluators=[section], budget={"trials": 40})
        run = run_in(data, tmp_path / "run")
        complete = [record for record in run.log.records if record.state == "complete"]
        missed = {record.number for record in complete if not record.feasible}
        assert 0 < len(missed) < len(complete)
        assert run.verdict is not None
        assert run.verdict.scores["validation"][run.verdict.winner].feasible
        assert not missed & set(run.verdict.front)
        base = next(record for record in complete if record.name == "base")
        odd = "cross_entropy[odd] at most base"
        level = run.log.results.references("search")["base"]["cross_entropy/odd"]
        assert base.violations == {odd: pytest.approx(-0.01 / max(1.0, level), abs=1e-9)}
        for record in complete:
            storage = read_storage(tmp_path / "run" / "journal.log")
            trial = storage.get_trial(run.log._trials.ids[record.number])
            stored = trial.system_attrs["constraints"]
            assert stored == [record.violations[odd]]
        assert any("miss a bound" in line for line in caveats(run.report_data()))
        assert open_run(tmp_path / "run").log.records[3].violations == run.log.records[3].violations

    def test_an_evaluator_may_be_a_guard_alone(
        self, tmp_path: Path, pico_models: Path, pico_items: Path
    ) -> None:
        bound = {"metric": "cross_entropy", "domains": ["odd"], "at_most": "base"}
        apart = relative(pico_items, {"metric": "accuracy", "domains": ["even"]})
        guard = relative(pico_items) | {"objectives": [], "constraints": [bound]}
        data = model_study(pico_models, pico_items, evaluators=[apart, guard])
        run = run_in(data | {"budget": {"trials": 20}}, tmp_path / "run")
        together = apart | {"constraints": [bound]}
        data = model_study(pico_models, pico_items, evaluators=[together])
        other = run_in(data | {"budget": {"trials": 20}}, tmp_path / "other")
        assert [objective.name for objective in run.plan.objectives] == ["accuracy[even]"]
        assert [r.violations for r in run.log.records] == [r.violations for r in other.log.records]
        assert any(not record.feasible for record in run.log.records)
        assert run.verdict is not None
        assert other.verdict is not None
        assert run.verdict.winner == other.verdict.winner

    def test_bounds_alone_are_no_study(
        self, tmp_path: Path, pico_models: Path, pico_items: Path
    ) -> None:
        bound = {"metric": "cross_entropy", "at_most": "base"}
        guard = relative(pico_items) | {"objectives": [], "constraints": [bound]}
        data = model_study(pico_models, pico_items, evaluators=[guard])
        with pytest.raises(InputError, match="at least one objective, received bounds alone"):
            run_in(data, tmp_path / "run")
        nothing = guard | {"constraints": []}
        data = model_study(pico_models, pico_items, evaluators=[nothing])
        with pytest.raises(InputError, match="an objective or a bound, received neither"):
            run_in(data, tmp_path / "run")


class TestHonestWinner:
    def test_ties_are_those_that_validation_items_cannot_tell_apart(self, tmp_path: Path) -> None:
        noisy = [{"kind": "synthetic", "problem": "sphere", "items": 30, "noise": 0.3}]
        run = run_in(analytic("noisy", trials=40, evaluators=noisy), tmp_path / "noisy")
        data = run.report_data()
        tied = ties(data)
        assert data.winner not in tied
        ours = data.score(data.winner, "validation")
        for record in tied:
            theirs = data.score(record, "validation")
            spread = math.hypot(ours.errors["sphere"], theirs.errors["sphere"])
            assert abs(ours.values["sphere"] - theirs.values["sphere"]) < 3 * spread
        sharp = [{"kind": "synthetic", "problem": "sphere", "items": 30, "noise": 0.0}]
        run = run_in(analytic("sharp", trials=40, evaluators=sharp), tmp_path / "sharp")
        assert ties(run.report_data()) == []

    def test_leaders_are_nominated_by_what_is_sure_of_them(self, tmp_path: Path) -> None:
        from mergesearch.search.study.problem import study_normaliser
        from mergesearch.search.study.selection import choose_leaders

        run = run_in(analytic("sphere", trials=30), tmp_path / "run")
        records = [record for record in run.log.records if record.kind == "search"]
        plan = run.plan
        normaliser = study_normaliser(plan, run.log.records)
        bold = choose_leaders(records, plan.objectives, plan.weights, normaliser, 3)
        shy = choose_leaders(
            records, plan.objectives, plan.weights, normaliser, 3, confidence=1000.0
        )
        least = sorted(records, key=lambda r: r.errors["sphere"])[:3]
        assert shy == [record.number for record in least]
        assert bold != shy

    def test_no_repeats_where_none_are_wanted(self, tmp_path: Path) -> None:
        run = run_in(analytic("sphere", trials=20, selection={"repeats": 0}), tmp_path / "run")
        assert run.log.get_attr("repeats") is None
