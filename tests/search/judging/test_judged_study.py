"""Studies that people judge, with judges who are programs and speak HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergesearch.evaluators.preference.strengths import Comparison, Strength, fit_strengths
from mergesearch.merging.export.folder import export_model
from mergesearch.search.judging.bench import Bench
from mergesearch.search.judging.record import JudgingRecord
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exported import rescore
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.study.events import Event
from mergesearch.search.study.graceful_stop import GracefulStop
from tests.search.judging.judged import Judge, judged_study, make_home
from tests.search.studies import spec_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("judged"))


def run_judged(
    data: dict[str, Any], folder: Path, most: int | None = None
) -> tuple[Run | None, list[dict[str, Any]]]:
    """Run a study whose judge stops it after so many choices; the run, and what was judged."""
    stop = GracefulStop()
    judges: list[Judge] = []

    def interrupt() -> None:
        stop.requested = True
        for listener in stop.listeners:
            listener()

    def observe(event: Event) -> None:
        if event.kind == "judging" and not judges:
            judges.append(Judge(event.text.split()[-1], most=most, then=interrupt))

    try:
        run = run_study(spec_of(data, folder.parent), folder, observe, graceful_stop=stop)
    except KeyboardInterrupt:
        run = None
    judges[0].join()
    return run, judges[0].views


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Recorded events of a kind."""
    events = map(json.loads, (folder / "judging.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == kind]


def test_a_judge_leads_the_search_and_resumes_it(tmp_path: Path, home: Path) -> None:
    data = judged_study(home, budget={"trials": 3})
    folder = tmp_path / "run"
    run, before = run_judged(data, folder, most=4)
    assert run is None
    assert not (folder / "judging.url").exists()
    run, after = run_judged(data, folder)
    assert run is not None
    assert run.verdict is not None
    # Nobody is asked twice, and no choice is lost.
    asked = [view["pair"] for view in (*before, *after)]
    assert len(asked) == len(set(asked)) == len(lines(folder, "choice"))
    assert [event["pair"] for event in lines(folder, "choice")] == asked
    # The last trial is worth what all choices on search prompts say, whatever side it was on.
    complete = [record for record in run.log.records if record.state == "complete"]
    assert len(complete) == 3
    assert all(0 < record.errors["preference"] <= 2 for record in complete)
    last = complete[-1]
    expected = by_taste(lines(folder, "model"))[last.recipe.digest]
    assert last.values["preference"] == pytest.approx(expected.value, abs=1e-12)
    assert last.errors["preference"] == pytest.approx(expected.error, abs=1e-12)
    # Held-out prompts decide.
    assert set(run.verdict.scores) == {"validation", "test"}
    assert {event["split"] for event in lines(folder, "choice")} == {"search", "validation", "test"}
    # The winner's record is read without asking anybody.
    record = run.trial(None)
    export_model(record.recipe, tmp_path / "out")
    again = rescore(open_run(folder), record, tmp_path / "out")
    assert (again.split, again.agreement.identical) == ("test", True)


def by_taste(models: list[dict[str, Any]]) -> dict[str, Strength]:
    """Merge -> its strength on the search prompts, if the longer of two texts is preferred."""
    searched = [event for event in models if event["split"] == "search"]
    texts = {event["model"]: [row["text"] for row in event["outputs"]] for event in searched}
    comparisons = []
    for event in searched:
        for number, (_, opponent) in enumerate(event["slots"]):
            pair = (event["model"], opponent)
            one, other = (len(texts[model][number]) for model in pair)
            same = one == other
            comparisons.append(Comparison(*pair, None if same else pair[int(other > one)]))
    fitted = fit_strengths(comparisons, searched[0]["model"]).of
    return {event["recipe"]: fitted[event["model"]] for event in searched}


def test_the_record_alone_gives_the_same_bench(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "run"
    run_judged(judged_study(home), folder, most=4)
    record = folder / "judging.jsonl"
    whole = Bench(JudgingRecord(folder), seed=0).view()
    with record.open("a") as file:
        file.write('{"event": "choice", "pair": "to')  # a kill in the middle of a write
    torn = JudgingRecord(folder)
    torn.mend()
    mended = Bench(torn, seed=0).view()
    assert mended == whole
    assert whole.done == 4
    assert record.read_text().endswith("\n")


@pytest.mark.slow
def test_ray_workers_write_and_one_of_two_objectives_is_measured(
    tmp_path: Path, home: Path
) -> None:
    data = judged_study(home)
    data["evaluators"] = [*data["evaluators"], {"kind": "distance"}]
    data["workers"] = {"count": 2}
    run, views = run_judged(data | {"budget": {"trials": 5}}, tmp_path / "run")
    assert run is not None
    assert len(views) == len(lines(tmp_path / "run", "choice")) > 0
    for record in run.log.records:
        assert record.state == "complete"
        assert set(record.values) == {"preference", "distance"}
        assert record.values["distance"] > 0
        assert record.errors["preference"] > 0
