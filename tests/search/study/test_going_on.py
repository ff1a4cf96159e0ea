"""Going on: budgets that change, failed trials that are measured again, corrections, early ends."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import MergesearchError, RunFolderError, StudyFailedError
from mergesearch.search.record.allowances import allowances, changes_after_test
from mergesearch.search.record.trial_record import standing_failures
from mergesearch.search.report.headline import sentences
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.study.events import Event
from tests.search.studies import analytic, fingerprint, run_in, spec_of

#: Little is done after the search.
SHORT = {"repeats": 0, "leaders": 1}


def short(**sections: Any) -> dict[str, Any]:
    return analytic(**{"dim": 3, "selection": SHORT} | sections)


def searched(run: Run) -> list[tuple[Any, ...]]:
    """Points and values of the trials that the strategy suggested."""
    return [
        (record.suggestion, record.point.tobytes(), tuple(record.values.values()))
        for record in run.log.records
        if record.suggestion is not None and record.point is not None
    ]


def interrupt_after(results: int, data: dict[str, Any], folder: Path, **options: bool) -> None:
    """Run until the strategy has been told so many results, then as after Ctrl-C."""

    def stop(event: Event) -> None:
        if event.kind == "trial" and event.record is not None:
            index = event.record.tell_index
            if index is not None and index + 1 >= results:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(spec_of(data, folder.parent), folder, stop, **options)


class TestBudget:
    def test_a_finished_run_goes_on_as_if_it_had_never_ended(self, tmp_path: Path) -> None:
        first = run_in(short(trials=12), tmp_path / "run")
        grown = run_in(short(trials=22), tmp_path / "run")
        whole = run_in(short(trials=21), tmp_path / "whole")
        assert len(grown.log.records) == 22
        assert fingerprint(grown)[:12] == fingerprint(first)
        # The first recommendation stays among the trials, and the strategy recommends again.
        kinds = Counter(record.kind for record in grown.log.records)
        assert kinds == {"anchor": 1, "search": 19, "recommended": 2}
        assert searched(grown) == searched(whole)
        assert grown.verdict is not None
        assert grown.plan.spec.budget.trials == 22
        assert open_run(tmp_path / "run").plan.spec.budget.trials == 22
        begun, changed = allowances(grown.log)
        assert (begun.budget.trials, begun.trial) == (12, 0)
        assert (changed.trial, changed.asked, changed.told) == (12, 10, 10)
        assert changed.suggestions == 19
        # Whether to go on was decided by someone who could see the test scores.
        sentence = "The budget was raised from 12 to 22 trials after test scores had been shown"
        assert any(line.startswith(sentence) for line in sentences(grown.report_data()))
        # The same command again changes nothing; the old budget is less than what has run.
        before = (tmp_path / "run" / "journal.log").read_bytes()
        assert fingerprint(run_in(short(trials=22), tmp_path / "run")) == fingerprint(grown)
        with pytest.raises(RunFolderError, match=r"budget\.trials: expected at least 22.*12"):
            run_in(short(trials=12), tmp_path / "run")
        assert (tmp_path / "run" / "journal.log").read_bytes() == before

    @pytest.mark.slow
    def test_a_strategy_is_told_the_new_horizon_at_the_same_place_in_every_session(
        self, tmp_path: Path
    ) -> None:
        """Gradients lead for a quarter of the budget; it grows while they do."""
        data = short(trials=14, strategy="gradient_warm_cma")
        more = data | {"budget": {"trials": 30}}
        interrupt_after(2, data, tmp_path / "run")
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        grown = run_in(more, tmp_path / "run")
        interrupt_after(9, more, tmp_path / "again")
        assert fingerprint(run_in(more, tmp_path / "again")) == fingerprint(grown)
        assert allowances(grown.log)[1].asked == 2
        assert changes_after_test(grown.log) == []
        unchanged = run_in(data, tmp_path / "unchanged")
        assert searched(grown)[:2] == searched(unchanged)[:2]
        assert searched(grown)[:12] != searched(unchanged)[:12]

    @pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
    def test_every_place_of_death_goes_on_to_the_same_end(self, tmp_path: Path, step: int) -> None:
        """Also while the change itself is being recorded."""
        run_in(short(trials=8), tmp_path / "run")
        ended = (tmp_path / "run" / "journal.log").read_bytes().count(b"\n")
        shutil.copy(tmp_path / "run" / "study.yaml", tmp_path / "before.yaml")
        grown = run_in(short(trials=12), tmp_path / "run")
        lines = (tmp_path / "run" / "journal.log").read_bytes().splitlines(keepends=True)
        for cut in (*range(ended, ended + 6), len(lines) - 2)[::step]:
            folder = tmp_path / f"cut{cut}"
            shutil.copytree(tmp_path / "run", folder)
            (folder / "journal.log").write_bytes(b"".join(lines[:cut]) + lines[cut][:9])
            if cut < ended + 5:  # the study is written once the log knows
                shutil.copy(tmp_path / "before.yaml", folder / "study.yaml")
            again = run_in(short(trials=12), folder)
            assert fingerprint(again) == fingerprint(grown), cut
            assert again.verdict == grown.verdict

    @pytest.mark.slow
    def test_limits_of_another_kind_come_and_go(self, tmp_path: Path) -> None:
        """A time in the place of a number of trials, and the other way round."""
        timed = short(budget={"seconds": 1e-3}, strategy="sobol")
        first = run_in(timed, tmp_path / "run")
        assert len(first.log.records) < 9
        counted = run_in(timed | {"budget": {"trials": 9}}, tmp_path / "run")
        assert len(counted.log.records) == 9
        assert fingerprint(counted)[: len(first.log.records)] == fingerprint(first)
        evaluated = run_in(timed | {"budget": {"evaluations": 600}}, tmp_path / "run")
        assert len(evaluated.log.records) == 12
        used = r"budget\.evaluations: expected at least 600, which this run has spent, received 599"
        with pytest.raises(RunFolderError, match=used):
            run_in(timed | {"budget": {"evaluations": 599}}, tmp_path / "run")


#: A scorer that fails on some recipes while a file is there.
SCORER = '''
from pathlib import Path


def score(recipe, split, broken, above, below):
    """Mean of the coefficients."""
    value = float(recipe.field.values.mean())
    if Path(broken).exists() and above < value < below:
        raise ValueError("the tokenizer is missing")
    return value
'''


def scored(folder: Path, below: float, *, above: float = -9.0, **sections: Any) -> dict[str, Any]:
    """A study of that scorer, broken for means between two until :func:`mend` is called."""
    (folder / "scorer.py").write_text(SCORER)
    (folder / "broken").touch()
    evaluator = {
        "kind": "python",
        "function": "scorer.py:score",
        "objectives": [{"name": "score", "direction": "minimize"}],
        "model": "none",
        "inputs": {"broken": str(folder / "broken"), "above": above, "below": below},
    }
    return short(evaluators=[evaluator], allow_code=True, **sections)


def mend(folder: Path) -> None:
    (folder / "broken").unlink()


class TestFailures:
    def test_failed_trials_are_measured_again_and_told_as_results_of_others(
        self, tmp_path: Path
    ) -> None:
        data = scored(tmp_path, 0.28, trials=14)
        first = run_in(data, tmp_path / "run")
        failed = [record.number for record in first.log.records if record.state == "failed"]
        assert len(failed) >= 3
        mend(tmp_path)
        again = run_study(spec_of(data, tmp_path), tmp_path / "run", retry_failed=True)
        records = again.log.records
        # They cost no trial of the budget, and the failures stay in the record.
        assert fingerprint(again)[:14] == fingerprint(first)
        assert [record.retry_of for record in records[14:]] == failed
        assert standing_failures(records) == []
        for record in records[14:]:
            assert record.retry_of is not None
            assert record.recipe.digest == records[record.retry_of].recipe.digest
            assert record.state == "complete"
        told = [record.tell_index for record in records[14:]]
        suggestions = sum(record.kind == "search" for record in first.log.records)
        assert told == [*range(suggestions, suggestions + len(failed))]
        # The strategy goes on with them, the same in every session.
        more = data | {"budget": {"trials": 24}}
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        grown = run_in(more, tmp_path / "run")
        assert sum(record.retry_of is None for record in grown.log.records) == 24
        interrupt_after(suggestions + len(failed) + 4, more, tmp_path / "again")
        assert fingerprint(run_in(more, tmp_path / "again")) == fingerprint(grown)

    @pytest.mark.slow
    def test_a_retry_that_is_interrupted_is_finished_without_the_flag(self, tmp_path: Path) -> None:
        data = scored(tmp_path, 0.28, trials=14)
        first = run_in(data, tmp_path / "run")
        failed = len(standing_failures(first.log.records))
        mend(tmp_path)
        suggestions = sum(record.kind == "search" for record in first.log.records)
        interrupt_after(suggestions + 1, data, tmp_path / "run", retry_failed=True)
        again = run_in(data, tmp_path / "run")
        assert len(again.log.records) == 14 + failed
        assert standing_failures(again.log.records) == []
        assert again.verdict is not None

    @pytest.mark.slow
    def test_what_fails_again_stays_failed_and_is_told_once(self, tmp_path: Path) -> None:
        data = scored(tmp_path, 0.28, trials=14)
        first = run_in(data, tmp_path / "run")
        again = run_study(spec_of(data, tmp_path), tmp_path / "run", retry_failed=True)
        failed = standing_failures(again.log.records)
        assert [record.retry_of for record in failed] == [
            record.number for record in standing_failures(first.log.records)
        ]
        assert {record.tell_index for record in failed} == {None}
        assert again.verdict == first.verdict

    @pytest.mark.slow
    def test_an_anchor_that_is_mended_late_changes_nothing_that_was_asked(
        self, tmp_path: Path, pico_models: Path
    ) -> None:
        data = scored(tmp_path, 0.4, above=0.01, trials=20, max_consecutive_failures=99) | pair_of(
            pico_models
        )
        first = run_in(data, tmp_path / "run")
        failed = standing_failures(first.log.records)
        late = [record.number for record in failed if record.kind == "anchor"]
        assert late
        mend(tmp_path)
        again = run_study(spec_of(data, tmp_path), tmp_path / "run", retry_failed=True)
        assert standing_failures(again.log.records) == []
        assert fingerprint(again)[: len(first.log.records)] == fingerprint(first)
        mended = [record for record in again.log.records if record.retry_of in late]
        assert all(record.tell_index is not None for record in mended)
        anchors = [record.number for record in again.report_data().anchors]
        assert not set(anchors) & set(late)
        assert again.verdict is not None
        assert {record.number for record in mended} <= set(again.verdict.scores["validation"])
        more = data | {"budget": {"trials": 26}}
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        grown = run_in(more, tmp_path / "run")
        told = sum(record.tell_index is not None for record in again.log.records)
        interrupt_after(told + 2, more, tmp_path / "again")
        assert fingerprint(run_in(more, tmp_path / "again")) == fingerprint(grown)


def pair_of(models: Path) -> dict[str, Any]:
    """Sections of a study with weights."""
    experts = [str(models / "left"), str(models / "right")]
    return {"base": str(models / "base"), "experts": experts, "space": {}}


class TestEarlyEnd:
    def test_a_study_whose_every_anchor_fails_stops_at_once_and_goes_on_when_mended(
        self, tmp_path: Path
    ) -> None:
        data = scored(tmp_path, 9.0, trials=9)
        for _ in range(2):
            with pytest.raises(StudyFailedError) as error:
                run_in(data, tmp_path / "run")
            reason = "no anchor could be measured, of 1: .*the tokenizer is missing.*--retry-failed"
            assert error.match(reason)
            assert "\n" not in str(error.value)
            stopped = open_run(tmp_path / "run")
            assert len(stopped.log.records) == 1
            assert stopped.verdict is None
        mend(tmp_path)
        whole = run_in(data, tmp_path / "whole")
        run = run_study(spec_of(data, tmp_path), tmp_path / "run", retry_failed=True)
        assert run.log.records[1].retry_of == 0
        assert searched(run) == searched(whole)
        assert len(run.log.records) == 10

    def test_a_study_whose_base_fails_stops_at_once(
        self, tmp_path: Path, pico_models: Path
    ) -> None:
        data = scored(tmp_path, 0.01, trials=30) | pair_of(pico_models)
        with pytest.raises(StudyFailedError, match=r"the base could not be measured: .*tokenizer"):
            run_in(data, tmp_path / "run")
        records = open_run(tmp_path / "run").log.records
        assert [record.name for record in records if record.state == "failed"] == ["base"]
        assert {record.state for record in records[1:]} == {"running"}
        mend(tmp_path)
        run = run_study(spec_of(data, tmp_path), tmp_path / "run", retry_failed=True)
        assert run.verdict is not None
        assert {record.name for record in standing_failures(run.log.records)} == set()

    def test_a_corrected_study_takes_the_folder_of_one_without_results(
        self, tmp_path: Path
    ) -> None:
        data = scored(tmp_path, 9.0, trials=9)
        with pytest.raises(StudyFailedError):
            run_in(data, tmp_path / "run")
        corrected = short(trials=9, seed=3, dim=4)
        run = run_in(corrected, tmp_path / "run")
        assert fingerprint(run) == fingerprint(run_in(corrected, tmp_path / "fresh"))
        assert open_run(tmp_path / "run").plan.spec.seed == 3
        with pytest.raises(RunFolderError, match=r"seed: 3 -> 4.*only budget, workers"):
            run_in(corrected | {"seed": 4}, tmp_path / "run")

    @pytest.mark.slow
    @pytest.mark.parametrize("storage", ["sqlite:///nowhere/log.db", "sqlite:///log.db"])
    def test_also_where_the_failure_came_before_the_first_trial(
        self, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A database that is not there, and one in which the workers' model does not load."""
        monkeypatch.chdir(tmp_path)
        data = scored(tmp_path, 9.0, trials=9, storage=storage)
        with pytest.raises(MergesearchError):
            run_in(data, tmp_path / "run")
        mended = {"budget": {"trials": 10}, "storage": "sqlite:///log.db"}
        mend(tmp_path)
        run = run_in(data | mended | {"seed": 2}, tmp_path / "run")
        assert len(run.log.records) == 10
        assert run.verdict is not None
