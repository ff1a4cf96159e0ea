"""Trials of merges that were measured before: their results come from the record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators.synthetic import Synthetic
from mergesearch.merging import Field, Recipe, RunFolderError, Source, StudyFailedError
from mergesearch.search.api.frames import rows_of
from mergesearch.search.observers.progress import describe
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.report.costs import forecast, measured_trials
from mergesearch.search.report.page.cost_section import cost_section
from mergesearch.search.report.saved import saved_data
from mergesearch.search.report.tables import result_table
from mergesearch.search.report.writing import as_json
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.runs.publishing import report_data
from mergesearch.search.study.budget import spent
from mergesearch.search.study.events import Event
from mergesearch.search.study.known_merges import MOST_IN_A_ROW, KnownMerges, answer
from mergesearch.search.study.reporting import TrialReporter
from mergesearch.search.workers.messages import Failure
from tests.search.studies import analytic, fingerprint, run_in, spec_of

ITEMS = 40


def study(**sections: Any) -> dict[str, Any]:
    """A study whose strategy soon asks for the same merges: the optimum is a corner of the box."""
    problem = {"kind": "synthetic", "problem": "sphere", "items": ITEMS, "noise": 0.05}
    box = {"dim": 1, "bounds": [0.6, 1.0], "start": 0.8}
    given = {"strategy": "pcb_es", "evaluators": [problem], "space": box, "trials": 30}
    return analytic("known", **given | sections)


def promising_nothing(patch: pytest.MonkeyPatch) -> None:
    """Let the evaluator say nothing of repeated merges, as plug-ins do."""
    patch.setattr(Synthetic, "deterministic", False)


def repeats(run: Run) -> list[TrialRecord]:
    return [record for record in run.log.records if record.same_as is not None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("known") / "run"
    run_in(study(), folder)
    return open_run(folder)


def test_a_known_merge_is_not_measured_again(whole: Run) -> None:
    records = whole.log.records
    again = repeats(whole)
    assert len(again) > 5
    assert {record.kind for record in again} == {"search", "recommended"}
    for record in again:
        assert record.same_as is not None
        earlier = records[record.same_as]
        assert earlier.number < record.number
        assert earlier.same_as is None
        assert earlier.recipe.digest == record.recipe.digest
        assert earlier.state == record.state == "complete"
        assert earlier.values == record.values
        assert earlier.errors == record.errors
        np.testing.assert_array_equal(earlier.items["sphere"], record.items["sphere"])
        assert not record.seconds
        assert not record.worker
    measured = [record for record in records if record.same_as is None]
    assert all(record.seconds for record in measured)
    assert len({record.recipe.digest for record in measured}) == len(measured)


@pytest.mark.parametrize("fidelity", ["full", "halving", "race"])
def test_results_are_those_of_a_study_that_measures_all(
    fidelity: str, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = whole
    data = study()
    if fidelity != "full":
        data = study(fidelity={"rule": fidelity, "min_items": 10}, trials=20)
        run = run_in(data, tmp_path / "run")
    with monkeypatch.context() as patch:
        promising_nothing(patch)
        plain = run_in(data, tmp_path / "plain")
    assert repeats(run) or fidelity == "race"  # which wants scores of items at its stages
    assert not repeats(plain)
    assert fingerprint(run) == fingerprint(plain)
    assert run.verdict == plain.verdict
    for ours, theirs in zip(run.log.records, plain.log.records, strict=True):
        assert ours.rungs == theirs.rungs
        assert ours.stopped == theirs.stopped
        assert ours.estimates == theirs.estimates


def test_it_costs_a_trial_and_nothing_else(whole: Run) -> None:
    paid = spent(whole.log.records, lambda count: ITEMS if count is None else count)
    assert paid.trials == 30
    assert paid.evaluations == ITEMS * (30 - len(repeats(whole)))


def test_a_budget_of_evaluations_buys_more_trials_and_ends(tmp_path: Path) -> None:
    run = run_in(study(budget={"evaluations": 10 * ITEMS}), tmp_path / "run")
    assert len(run.log.records) > 15
    paid = spent(run.log.records, lambda count: ITEMS).evaluations
    assert 9 * ITEMS <= paid <= 10 * ITEMS  # what it recommends may be known


@pytest.mark.parametrize("result", [False, True], ids=["after the question", "after the result"])
def test_a_kill_at_a_known_merge_changes_nothing(whole: Run, tmp_path: Path, result: bool) -> None:
    lines = (whole.folder.path / "journal.log").read_bytes().splitlines(keepends=True)
    known = [index for index, line in enumerate(lines) if b'\\"same_as\\"' in line]
    third = repeats(whole)[2]
    stop = known[2] + 1
    if result:
        stop = next(
            index
            for index, line in enumerate(lines[stop:], stop + 1)
            if b"mergesearch:result" in line
        )
    folder = tmp_path / "run"
    shutil.copytree(whole.folder.path, folder)
    (folder / "journal.log").write_bytes(b"".join(lines[:stop]))
    cut = open_run(folder).log.records
    assert len(cut) == third.number + 1
    assert cut[-1].same_as == third.same_as
    resumed = run_study(spec_of(study(), tmp_path), folder)
    assert fingerprint(resumed) == fingerprint(whole)
    assert [r.same_as for r in resumed.log.records] == [r.same_as for r in whole.log.records]
    assert resumed.verdict == whole.verdict


def test_people_and_programs_see_which_trial_was_measured(whole: Run, tmp_path: Path) -> None:
    record = repeats(whole)[0]
    event = Event("trial", "search", record)
    told = f"trial {record.number}: sphere {record.values['sphere']:.4g} "
    assert describe(event, ["sphere"]) == f"{told}(the merge of trial {record.same_as}, known)"
    lines = (whole.folder.path / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [one["same_as"] for one in events if one["event"] == "trial" and "same_as" in one] == [
        each.same_as for each in repeats(whole)
    ]
    data = report_data(whole.folder, whole.plan, whole.log)
    assert as_json(data)["trials"][record.number]["same_as"] == record.same_as
    assert [row["same as"] for row in rows_of([record], data.objectives)] == [record.same_as]
    known = len(repeats(whole))
    assert f"{known} trials of a merge that was measured before" in cost_section(data)
    assert len(measured_trials(data)) == len(data.records) - known
    told_all = forecast(data)
    assert told_all is not None
    assert told_all.trials == len(data.records) - known
    kept = saved_data(whole.folder.path)
    assert kept is not None
    assert [r.same_as for r in kept.records] == [r.same_as for r in whole.log.records]
    assert {r.trial: r.same_as for r in result_table(data)} == {
        r.trial: whole.log.records[r.trial].same_as for r in result_table(kept)
    }


def test_a_record_of_a_later_trial_is_refused(whole: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole.folder.path, folder)
    journal = folder / "journal.log"
    record = repeats(whole)[0]
    old = f'\\"same_as\\": {record.same_as}'.encode()
    assert old in journal.read_bytes()
    journal.write_bytes(journal.read_bytes().replace(old, b'\\"same_as\\": 900'))
    with pytest.raises(RunFolderError, match="expected the merge of an earlier trial"):
        open_run(folder)


def test_a_known_merge_says_nothing_about_workers_that_fail() -> None:
    reporter = TrialReporter(lambda event: None, 2)
    broken = trial(1, 0.2, state="failed", failure=Failure("error", "no disk"))
    reporter.count(broken)
    reporter.count(trial(2, 0.5, same_as=0))
    with pytest.raises(StudyFailedError, match="2 trials failed in a row"):
        reporter.count(broken)


TEMPLATE = Recipe(Source("", ""), (), "task_arithmetic", Field.constant(4, [0.0]))


def trial(number: int, value: float, **fields: Any) -> TrialRecord:
    recipe = TEMPLATE.with_field(Field.constant(4, [value]))
    given = {
        "kind": "search",
        "name": "",
        "state": "complete",
        "suggestion": number,
        "point": np.array([value]),
        "merge": recipe,
        "tells_at_ask": number,
        "tell_index": number,
        "values": {"sphere": value},
    }
    return TrialRecord(number=number, **given | fields)


def found(records: list[TrialRecord], value: float = 0.5, items: int | None = None) -> int | None:
    evaluator = Synthetic("sphere")
    return KnownMerges(evaluator, records).find(trial(9, value).recipe, items)


class TestWhatServes:
    def test_a_complete_trial_of_the_same_merge(self) -> None:
        records = [trial(0, 0.1), trial(1, 0.5), trial(2, 0.5, same_as=1)]
        assert found(records) == 1
        assert found(records, 0.4) is None
        given = answer(trial(3, 0.5, state="running", same_as=1), records)
        assert given is not None
        assert given.measurement is not None
        assert given.measurement.values == {"sphere": 0.5}

    @pytest.mark.parametrize(
        "fields",
        [
            {"state": "running"},
            {"state": "failed"},
            {"state": "partial", "stopped": 10},
            {"state": "partial", "item_count": 10},
            {"state": "partial", "item_count": 0},
            {"gradient_items": 8},
            {"kind": "taken"},
            {"lost": True},
        ],
        ids=lambda fields: " ".join(f"{key} {value}" for key, value in fields.items()),
    )
    def test_others_do_not(self, fields: dict[str, Any]) -> None:
        records = [trial(0, 0.5, **fields)]
        assert found(records) is None
        assert answer(trial(1, 0.5, state="running", same_as=0), records) is None or (
            fields.get("item_count") == 10
        )

    def test_trials_on_as_many_items_serve_each_other(self) -> None:
        records = [trial(0, 0.5, state="partial", item_count=10)]
        assert found(records, items=10) == 0
        assert found(records, items=20) is None
        assert found([trial(0, 0.5, state="partial", item_count=0)], items=0) is None

    def test_after_some_in_a_row_one_is_measured(self) -> None:
        """A budget without a number of trials would not end otherwise."""
        records = [trial(0, 0.5)]
        records += [trial(number, 0.5, same_as=0) for number in range(1, MOST_IN_A_ROW)]
        assert found(records) == 0
        records.append(trial(MOST_IN_A_ROW, 0.5, same_as=0))
        assert found(records) is None
        records.append(trial(MOST_IN_A_ROW + 1, 0.5))
        assert found(records) == 0

    def test_a_trial_that_ends_serves_from_then_on(self) -> None:
        records = [trial(0, 0.1), trial(1, 0.5, state="running")]
        known = KnownMerges(Synthetic("sphere"), records)
        recipe = trial(2, 0.5).recipe
        assert known.find(recipe) is None
        records[1] = trial(1, 0.5)
        assert known.find(recipe) == 1
