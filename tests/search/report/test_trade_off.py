"""The headline of several objectives: what was traded, and which trial loses in none of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mergesearch.search.dashboard.note import note_markdown
from mergesearch.search.record.trial_record import Score
from mergesearch.search.report.comparison import trade_off
from mergesearch.search.report.headline import sentences
from mergesearch.search.report.wording import change, size_of
from mergesearch.search.report.writing import ReportData, as_json, write_report
from tests.search.report.test_report import make_study

Pair = tuple[float, float]
#: Accuracy (higher is better) and cross-entropy (lower is better) of anchors.
AVERAGE = (0.7, 0.6)
OTHERS = (0.5, 1.0)


def score(pair: Pair, **violations: float) -> Score:
    values = {"accuracy": pair[0], "cross_entropy": pair[1]}
    return Score(values, dict.fromkeys(values, 0.015), violations=violations)


def study(winner: Mapping[str, Pair], *others: Pair) -> ReportData:
    """A finished study of two objectives with these scores of the winner and of other leaders."""
    data = make_study(2)
    first, *rest = data.verdict.leaders
    anchors = {
        anchor.number: score(AVERAGE if anchor.name == "average" else OTHERS)
        for anchor in data.anchors
    }
    assert len(others) <= len(rest)
    leaders = {first: score(winner["validation"])}
    leaders |= {number: score(pair) for number, pair in zip(rest, others, strict=False)}
    scores = {"validation": anchors | leaders, "test": anchors | {first: score(winner["test"])}}
    return replace(data, verdict=replace(data.verdict, scores=scores))


def test_a_trade_off_names_the_best_leader_that_loses_in_nothing(tmp_path: Path) -> None:
    data = study(
        {"validation": (0.8, 0.65), "test": (0.75, 0.62)},
        (0.71, 0.59),
        (0.72, 0.58),
        (0.9, 0.61),
    )
    winner, _, named, _ = data.verdict.leaders[:4]
    command = f"mergesearch export runs/digits-2 --trial {named} --out digits-2-trial-{named}"
    first, second, *lines = sentences(data)
    assert first == (
        f"Winner: trial {winner}, a trade-off: `accuracy` 0.050 better, `cross_entropy` 0.020 "
        "worse than the best anchor (average) on test items."
    )
    assert second == (
        f"Trial {named} loses on none of the objectives: `accuracy` 0.020 better, `cross_entropy` "
        f"0.020 better on validation items, not measured on test items. To export it: `{command}`."
    )
    assert lines[0].startswith("accuracy: 0.750 ± 0.015 on test items, 0.050 better than")

    written = as_json(data)
    assert written["headline"][:2] == [first, second]
    traded = written["trade_off"]
    assert traded["split"] == "test"
    assert traded["decided_on"] == "validation"
    assert traded["improvements"] == {
        "accuracy": pytest.approx(0.05),
        "cross_entropy": pytest.approx(-0.02),
    }
    assert traded["alternative"]["trial"] == named
    assert traded["alternative"]["export"] == command
    assert set(traded["alternative"]["improvements"]) == {"search", "validation"}

    write_report(data, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "a trade-off: <code>accuracy</code> 0.050 better" in page
    assert f"<code>{command}</code>" in page
    assert json.loads((tmp_path / "report.json").read_text())["trade_off"] == traded
    note = note_markdown("digits-2", data.run, data.objectives, lines=sentences(data))
    assert "a trade-off: \\`accuracy\\` 0.050 better" in note
    assert f"Trial {named} loses on none of the objectives" in note


def test_a_trade_off_says_where_no_leader_loses_in_nothing() -> None:
    data = study({"validation": (0.8, 0.65), "test": (0.75, 0.62)}, (0.9, 0.61), (0.69, 0.4))
    first, second, *_ = sentences(data)
    assert "a trade-off" in first
    assert second == (
        "Every trial of the search that was scored on validation items loses to the best anchor on "
        "at least one objective there."
    )
    assert as_json(data)["trade_off"]["alternative"] is None


def test_the_winner_itself_may_lose_in_nothing_on_the_items_that_chose_it() -> None:
    data = study({"validation": (0.8, 0.55), "test": (0.75, 0.62)}, (0.71, 0.59))
    assert sentences(data)[1] == (
        "On validation items, on which it was chosen, it loses on none of the objectives: "
        "`accuracy` 0.100 better, `cross_entropy` 0.050 better."
    )


def test_a_leader_that_misses_a_bound_is_not_named() -> None:
    data = study({"validation": (0.8, 0.65), "test": (0.75, 0.62)}, (0.72, 0.58))
    missing = data.verdict.leaders[1]
    validation = data.verdict.scores["validation"] | {missing: score((0.72, 0.58), safety=0.1)}
    scores = {**data.verdict.scores, "validation": validation}
    traded = trade_off(replace(data, verdict=replace(data.verdict, scores=scores)))
    assert traded.alternative is None


@pytest.mark.parametrize("test", [(0.75, 0.55), (0.75, 0.6), (0.6, 0.7), (0.75, 0.6 + 1e-16)])
def test_a_winner_that_is_better_or_worse_throughout_trades_nothing(test: Pair) -> None:
    data = study({"validation": (0.8, 0.55), "test": test}, (0.72, 0.58))
    assert sentences(data)[0] == f"Winner: trial {data.verdict.winner}."
    assert as_json(data)["trade_off"] is None


def test_an_unfinished_study_decides_on_search_items() -> None:
    data = make_study(2, finished=False)
    values = {"accuracy": 0.7, "cross_entropy": 0.6}
    low = {"accuracy": 0.5, "cross_entropy": 1.0}
    traded = {"accuracy": 0.95, "cross_entropy": 0.65}
    safe = {"accuracy": 0.71, "cross_entropy": 0.6}
    given = {5: values, 7: traded, 8: safe}
    records = [
        replace(record, state="complete", failure=None, values=given.get(record.number, low))
        for record in data.records
    ]
    first, second, *_ = sentences(replace(data, records=records))
    assert first.startswith("Best so far: trial 7, a trade-off: `accuracy` 0.250 better, ")
    assert first.endswith("worse than the best anchor (average) on search items.")
    assert second.startswith("Trial 8 loses on none of the objectives: `accuracy`")
    assert "0.010 better, `cross_entropy` equal on search items. To export it:" in second


def test_one_objective_trades_nothing() -> None:
    data = make_study(1)
    assert sentences(data)[0] == f"Winner: trial {data.verdict.winner}."
    assert as_json(data)["trade_off"] is None


def test_changes_are_worded_by_their_size() -> None:
    assert change(0.0, 0.02) == "equal"
    assert change(-0.0123, 0.02) == "0.012 worse"
    assert change(0.00012, 0.02) == "0.00012 better"
    assert size_of(-0.5, None) == "0.5"
