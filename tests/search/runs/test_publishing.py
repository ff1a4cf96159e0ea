"""What a run publishes in the dashboard beside its trials: figures, and notes of trials."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging.recipe_file import load_recipe
from mergesearch.search.dashboard.access import Access
from mergesearch.search.dashboard.serving import build_application
from mergesearch.search.record.storage import read_storage
from mergesearch.search.report.saved import saved_data
from mergesearch.search.report.wording import plus_minus
from mergesearch.search.runs import publishing
from mergesearch.search.runs.opened import Run
from tests.browser import CHROMIUM, browsing
from tests.search.conftest import model_study
from tests.search.dashboard.test_dashboard import call, serving
from tests.search.studies import analytic, run_in

pytestmark = pytest.mark.xdist_group("publishing")
THREE = {"kind": "synthetic", "problem": "quadratic_tasks", "objectives": 3, "items": 40}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    study = analytic(trials=40, evaluators=[THREE], strategy="nsga2")
    return run_in(study, tmp_path_factory.mktemp("publishing") / "run")


@pytest.fixture(scope="module")
def detail(run: Run) -> dict[str, Any]:
    """The study as browsers get it."""
    storage = read_storage(run.folder.path / "journal.log")
    application = build_application(storage, Access(), None, {})
    return dict(json.loads(call(application, "/api/studies/0")[2]))


def test_the_dashboard_has_the_figures_of_the_report(run, detail):
    figures = {
        each["id"]: json.loads(each["graph_object"]) for each in detail["plotly_graph_objects"]
    }
    assert set(figures) == {"front", "pairs"}
    winner = run.report_data().winner.number
    for figure in figures.values():
        star = next(trace for trace in figure["data"] if trace["name"] == "winner")
        assert star["customdata"] == [winner]
        assert "mean coefficients:" in star.get("hovertext", star["text"])[0]
        assert figure["layout"]["height"] == publishing.SHOWN_HEIGHT


def test_trials_that_matter_have_a_note_with_scores_and_commands(run, detail):
    data = run.report_data()
    notes = {trial["number"]: trial["note"]["body"] for trial in detail["trials"]}
    noted = {number for number, body in notes.items() if body}
    assert noted == {data.winner.number, *(r.number for r in [*data.anchors, *data.recommended])}
    body = notes[data.winner.number]
    assert f"mergesearch export {data.run} --trial {data.winner.number} --out" in body
    assert f"mergesearch recipe {data.run} --trial {data.winner.number}" in body
    test = data.score(data.winner, "test")
    name = data.objectives[0].name
    assert f"{name} on test items: {plus_minus(test.values[name], test.errors.get(name))}" in body


def test_recipes_of_the_winner_and_the_front_are_files_of_the_study(run, detail, tmp_path):
    data = run.report_data()
    storage = read_storage(run.folder.path / "journal.log")
    application = build_application(storage, Access(), None, {}, run.folder.artifacts)
    offered = {each["filename"]: each["artifact_id"] for each in detail["artifacts"]}
    numbers = {data.winner.number, *(record.number for record in data.recommended)}
    assert offered.keys() == {f"recipe-of-trial-{number}.yaml" for number in numbers}
    notes = {trial["number"]: trial["note"]["body"] for trial in detail["trials"]}
    for number in numbers:
        address = f"/artifacts/0/{offered[f'recipe-of-trial-{number}.yaml']}"
        assert f"[Recipe]({address})" in notes[number]
        status, headers, content = call(application, address)
        assert status.startswith("200")
        assert headers["Content-Type"].startswith("text/plain")
        assert "Access-Control-Allow-Origin" not in headers
        file = tmp_path / f"{number}.yaml"
        file.write_bytes(content)
        assert load_recipe(file).digest == run.log.records[number].recipe.digest
    for method in ("POST", "DELETE"):
        assert call(application, address, REQUEST_METHOD=method)[0].startswith("405")


def test_attributes_of_trials_are_short(detail):
    for trial in detail["trials"]:
        assert all(len(str(each["value"])) <= 24 for each in trial["user_attrs"])


def test_what_is_published_again_replaces_what_was_there(run, detail):
    publishing.publish(run.folder, run.plan, run.log)
    storage = read_storage(run.folder.path / "journal.log")
    again = json.loads(call(build_application(storage, Access(), None, {}), "/api/studies/0")[2])
    assert again["plotly_graph_objects"] == detail["plotly_graph_objects"]
    assert again["artifacts"] == detail["artifacts"]
    assert len([*run.folder.artifacts.iterdir()]) == len(detail["artifacts"])
    for before, after in zip(detail["trials"], again["trials"], strict=True):
        assert after["note"]["body"] == before["note"]["body"]


@pytest.mark.slow
def test_the_driver_records_what_it_knew_of_weights_and_costs(
    pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    study = model_study(pico_models, pico_items, budget={"trials": 9}, operator="iso_c")
    run = run_in(study, tmp_path / "run")
    data = run.report_data()
    experts = list(study["experts"])
    assert [row["expert"] for row in data.lineages] == experts
    assert data.untouched
    assert data.predicted_seconds["prepare"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Lineage of the experts" in page
    assert html.escape(data.untouched[1:]) in page
    read = saved_data(tmp_path / "run")
    assert read is not None
    assert read.lineages == data.lineages
    assert read.untouched == data.untouched


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_a_browser_draws_the_figures_and_shows_the_notes(run: Run, tmp_path: Path) -> None:
    winner = run.report_data().winner
    journal = run.folder.path / "journal.log"
    with serving(journal) as url, browsing(tmp_path / "profile") as browser:
        browser.open(f"{url}dashboard/studies/0")
        for name in ("front", "pairs"):
            place = f"document.getElementById('user-defined-plot:{name}')"
            browser.until(f"{place} && {place}.data")
            browser.run(f"{place}.scrollIntoView()")
            shown = browser.run(f"{place}.data.find((t) => t.name === 'winner').customdata")
            assert shown == [winner.number]
            browser.picture(tmp_path / f"{name}.png")
        browser.open(f"{url}dashboard/studies/0/trials?numbers={winner.number}")
        browser.until(f"document.body.innerText.includes('--trial {winner.number} --out')")
        browser.picture(tmp_path / "trial.png")
        assert browser.complaints == []
