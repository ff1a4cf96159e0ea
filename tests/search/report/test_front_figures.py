"""The front as a figure, and what the panel beside it shows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mergesearch.search.report.coefficients import mean_coefficients
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.front_figures import front_figure, matrix_figure
from mergesearch.search.report.front_points import MOST_BARS
from mergesearch.search.report.page.panel import panel_data
from mergesearch.search.report.preference import preferred
from mergesearch.search.report.wording import plus_minus
from tests.search.report.test_report import make_study

pytestmark = pytest.mark.xdist_group("report")


@pytest.fixture(scope="module")
def two() -> ReportData:
    return make_study(2)


def trace(figure: dict, name: str) -> dict:
    return next(each for each in figure["data"] if each.get("name") == name)


def test_every_point_says_trial_scores_and_mean_coefficients(two):
    figure = front_figure(two)
    shown = [n for each in figure["data"] for n in each.get("customdata", [])]
    assert set(shown) == {record.number for record in two.complete.records}
    front = trace(figure, "front")
    for number, text in zip(front["customdata"], front["text"], strict=True):
        record = two.by_number[number]
        assert text.startswith(f"<b>trial {number}</b>")
        for name in ("accuracy", "cross_entropy"):
            assert f"{name}: {plus_minus(record.values[name], record.errors[name])}" in text
        means = mean_coefficients(record.recipe.field)
        for name, mean in zip(two.experts, means, strict=True):
            assert f"{name} {mean:.3g}" in text


def test_error_bars_are_standard_errors_and_leave_out_large_fronts(two):
    records = [replace(r, errors={"accuracy": r.number / 1000}) for r in two.records]
    figure = front_figure(replace(two, records=records))
    front = trace(figure, "front")
    assert front["error_x"]["array"] == [number / 1000 for number in front["customdata"]]
    assert "error_y" not in front  # no errors are known
    numbers = tuple(r.number for r in two.complete.records[7:]) * 1
    assert len(numbers) > MOST_BARS
    crowded = front_figure(replace(two, verdict=replace(two.verdict, front=numbers)))
    assert "error_x" not in trace(crowded, "front")
    assert "error_x" in trace(crowded, "winner")


def test_outliers_and_far_anchors_do_not_stretch_the_axes(two):
    before = front_figure(two)["layout"]
    far = {"accuracy": -50.0, "cross_entropy": 900.0}
    changed = [replace(r, values=far) if r.number == 0 or r.number == 7 else r for r in two.records]
    assert two.by_number[0].name == "base"
    assert two.by_number[7].kind == "search"
    after = front_figure(replace(two, records=changed))["layout"]
    for axis in ("xaxis", "yaxis"):
        width = before[axis]["range"][1] - before[axis]["range"][0]
        assert after[axis]["range"][1] - after[axis]["range"][0] < 1.5 * width
    named = {each["text"]: each for each in after["annotations"]}
    assert "accuracy: -50.00" in named["← base"]["hovertext"]
    assert named["← base"]["x"] == after["xaxis"]["range"][0]


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_the_axes_hold_the_front_and_the_winner(objectives):
    data = make_study(objectives)
    layout = (front_figure(data) if objectives == 2 else matrix_figure(data))["layout"]
    names = [objective.name for objective in data.objectives]
    axes = dict(zip(names, ("xaxis", "xaxis2", "xaxis3"), strict=False))
    axes[names[-1]] = ["yaxis", "yaxis2", "yaxis3"][objectives - 2]
    for name, axis in axes.items():
        low, high = layout[axis]["range"]
        assert all(low < record.values[name] < high for record in [*data.front, data.winner])


def test_anchors_and_the_winner_are_named(two):
    figure = front_figure(two)
    beside = [
        text
        for each in figure["data"]
        if each.get("mode") == "markers+text"
        for text in each["text"]
    ]
    at_the_edge = [each["text"] for each in figure["layout"]["annotations"]]
    assert f"winner: trial {two.winner.number}" in beside
    for anchor in two.anchors:
        assert anchor.name in beside or any(text.endswith(anchor.name) for text in at_the_edge)


def test_the_cube_names_the_anchors_that_it_shows():
    data = make_study(3)
    figure = front_figure(data)
    assert trace(figure, "winner")["text"] == [f"winner: trial {data.winner.number}"]
    assert trace(figure, "winner")["hovertext"][0].startswith(f"<b>trial {data.winner.number}")
    (note,) = figure["layout"]["annotations"]
    beyond = note["text"].split("<br>")[1:]
    assert sorted([*trace(figure, "anchor")["text"], *beyond]) == sorted(
        anchor.name for anchor in data.anchors
    )


def test_fewer_dominated_trials_can_be_drawn(two):
    assert len(trace(front_figure(two, most=10), "trial")["x"]) <= 10
    assert len(trace(front_figure(two), "trial")["x"]) > 20


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_the_compromise_is_that_of_prefer(objectives):
    data = make_study(objectives, 200)
    members = panel_data(data)["members"]
    losses = np.array([member["l"] for member in members])
    names = [objective.name for objective in data.objectives]
    picked = set()
    for weights in itertools.product((0, 40, 100), repeat=objectives):
        if any(weights):
            # As the script does: the first of the least.
            scalars = losses @ (np.array(weights) / sum(weights))
            best = members[int(np.argmin(scalars))]["n"]
            pairs = [f"{name}={weight}" for name, weight in zip(names, weights, strict=True)]
            assert best == preferred(data, pairs).number
            picked.add(best)
    assert len(picked) > 1


def test_the_panel_knows_every_complete_trial(two):
    told = panel_data(two)
    by_number = {each["n"]: each for each in told["trials"]}
    assert set(by_number) == {record.number for record in two.complete.records}
    winner = by_number[two.winner.number]
    assert winner["t"] == f"trial {two.winner.number} · winner, front, search"
    for split in ("search", "validation", "test"):
        score = two.score(two.winner, split)
        expected = [plus_minus(score.values[o.name], score.errors[o.name]) for o in two.objectives]
        assert winner["s"][split] == expected
    assert [float(text) for text in winner["c"]] == pytest.approx(
        mean_coefficients(two.winner.recipe.field), rel=1e-2
    )
    assert "9".join(told["recipe"]) == f"mergesearch recipe {two.run} --trial 9"
    assert "9".join(told["export"]).endswith("--trial 9 --out digits-2-trial-9")
