"""The best anchor of a study with bounds keeps them, and anchors that do not are marked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mergesearch.evaluators import Objective
from mergesearch.merging import Field, Recipe, Source
from mergesearch.search.record.trial_record import Score, TrialRecord, Verdict
from mergesearch.search.report.caveats import caveats
from mergesearch.search.report.comparison import compare
from mergesearch.search.report.data import ReportData
from mergesearch.search.report.gains import anchor_intervals, gains
from mergesearch.search.report.headline import headline
from mergesearch.search.report.page.html_page import render
from mergesearch.search.report.saved import saved_data, saved_text
from mergesearch.search.report.tables import result_table, text_lines
from mergesearch.search.report.writing import as_json
from mergesearch.search.runs.publishing import _trial_note

ACCURACY = Objective("accuracy", "maximize")
BOUND = "perplexity at most 7"
#: Value and missed bound of the anchors, and of the trial that wins.
BASE = (0.60, -0.1)
AVERAGE = (0.70, -0.2)
EXPERT = (0.92, 0.47)
WINNER = (0.75, -0.1)


def score(value: float, missed: float) -> Score:
    return Score({"accuracy": value}, {"accuracy": 0.004}, violations={BOUND: missed})


def study(*anchors: tuple[float, float], winner: tuple[float, float] = WINNER) -> ReportData:
    """Anchors that score alike on all splits, and the trial that won."""
    scores = {number: score(*each) for number, each in enumerate([*anchors, winner])}
    source = Source("base", "base")

    def record(number: int, scored: Score) -> TrialRecord:
        anchor = number < len(anchors)
        recipe = Recipe(source, (source,), "average", Field.constant(1, [0.5]), layout="none")
        return TrialRecord(
            number=number,
            kind="anchor" if anchor else "search",
            name=f"anchor {number}" if anchor else "",
            suggestion=None if anchor else 0,
            point=None,
            merge=recipe,
            tells_at_ask=0,
            tell_index=None,
            state="complete",
            values=scored.values,
            errors=scored.errors,
            violations=scored.violations,
        )

    records = [record(number, scored) for number, scored in scores.items()]
    held_out = {"validation": scores, "test": scores}
    verdict = Verdict(len(anchors), (), (len(anchors),), held_out)
    return ReportData("small", "runs/small", (ACCURACY,), [1.0], records, verdict)


class TestBestAnchor:
    @pytest.mark.parametrize("finished", [True, False])
    def test_it_is_the_best_of_those_that_keep_the_bounds(self, finished: bool) -> None:
        data = study(BASE, EXPERT, AVERAGE)
        data = data if finished else replace(data, verdict=None)
        assert data.best_anchor is not None
        assert data.best_anchor.name == "anchor 2"
        assert data.leading is not None
        assert data.leading.number == 3
        line = headline(data)[1]
        assert "0.0500 better than the best anchor (anchor 2)" in line
        split = "validation" if finished else "search"
        marked = f"Anchors that miss a bound on {split} items, and so are not the best: anchor 1."
        assert marked in caveats(data)

    def test_where_none_keeps_them_it_is_the_one_that_misses_least_and_so_said(self) -> None:
        data = study((0.95, 0.9), EXPERT, (0.99, 2.0))
        assert data.best_anchor is not None
        assert data.best_anchor.name == "anchor 1"
        told = (
            "No anchor keeps the bounds on validation items; the one that misses them least "
            "(anchor 1) counts as the best."
        )
        assert told in caveats(data)
        assert compare(data)[0].anchor == EXPERT[0]
        (gain,) = gains(data, anchor_intervals(data))
        assert gain.anchors == 3

    def test_without_bounds_nothing_changes(self) -> None:
        data = study(BASE, EXPERT)
        records = [replace(record, violations={}) for record in data.records]
        free = {n: replace(s, violations={}) for n, s in data.verdict.scores["test"].items()}
        verdict = replace(data.verdict, scores={"validation": free, "test": free})
        data = replace(data, records=records, verdict=verdict)
        assert data.best_anchor is data.records[1]
        assert not [line for line in caveats(data) if "bound" in line]

    def test_a_gain_is_one_over_the_anchors_that_keep_them(self) -> None:
        data = study(BASE, EXPERT, AVERAGE)
        intervals = anchor_intervals(data)
        assert {each.anchor: each.kept for each in intervals} == {
            "anchor 0": True,
            "anchor 1": False,
            "anchor 2": True,
        }
        (gain,) = gains(data, intervals)
        assert (gain.claimed, gain.anchors, gain.left_out) == (True, 2, 1)
        assert gain.worse_than == ()
        said = "better than every anchor that keeps the bounds (95 % interval of the gain over"
        (line,) = [line for line in headline(data) if said in line]
        assert "best of 2 anchors within the bounds" in line


class TestMarks:
    def test_what_misses_a_bound_is_marked_everywhere(self) -> None:
        data = study(BASE, EXPERT, AVERAGE)
        mark = f"misses {BOUND}"
        assert [row.marks for row in result_table(data)] == ["", mark, "best anchor", "winner"]
        assert any(mark in line for line in text_lines(data))
        rows = as_json(data)["result"]
        missed = [row["scores"]["test"]["missed"] for row in rows]
        assert missed == [[], [BOUND], [], []]
        page = render(data)
        assert mark in page
        assert "anchor 1 (misses a bound)" in page
        once = {n: score(*AVERAGE) for n in range(4)} | {2: score(0.7, 0.1)}
        verdict = replace(data.verdict, scores={**data.verdict.scores, "test": once})
        again = result_table(replace(data, verdict=verdict))
        assert again[2].marks == f"best anchor, misses {BOUND} on test items"
        assert f"misses {BOUND} on test items" in _trial_note(data, data.records[1], "")
        assert "misses" not in _trial_note(data, data.records[0], "")

    def test_a_tolerance_stands_beside_its_bound(self, tmp_path) -> None:
        data = replace(study(BASE, EXPERT), tolerances={BOUND: "0.2 of perplexity (its own unit)"})
        told = f"1 of 3 complete trials misses a bound ({BOUND}, tolerance 0.2 of perplexity"
        assert any(line.startswith(told) for line in caveats(data))
        (tmp_path / "report_data.json").write_text(saved_text(data))
        again = saved_data(tmp_path)
        assert again is not None
        assert caveats(again) == caveats(data)
