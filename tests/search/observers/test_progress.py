"""How far workers are with loading, in every style of progress."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from mergesearch.merging import Field, Recipe, Source
from mergesearch.search.observers.progress import make_observer
from mergesearch.search.record.trial_record import Score, TrialRecord
from mergesearch.search.study.events import Event
from mergesearch.search.workers.loading import Loading, describe_loading

TEXT = "2 workers, preparing weights: 145 of 290, 8.1 GB, 4 min left"
HALF = Event("loading", TEXT, done=145, total=290)


@pytest.mark.parametrize(("loading", "text"), [
    (Loading("reading the items"), "reading the items"),
    (Loading("preparing weights", 1, 290, 10**8, 1.0), "preparing weights: 1 of 290, 0.1 GB"),
    (Loading("preparing weights", 145, 290, 8 * 10**9, 240.0),
     "preparing weights: 145 of 290, 8 GB, 4 min left"),
    (Loading("preparing weights", 280, 290, 0, 240.0),
     "preparing weights: 280 of 290, less than a minute left"),
    (Loading("collecting", 7, 0, 0, 60.0), "collecting: 7"),
])  # fmt: skip
def test_what_is_done_and_left_is_a_phrase(loading: Loading, text: str) -> None:
    assert describe_loading(loading) == text


def test_plain_lines_do_not_crowd(capsys: pytest.CaptureFixture[str]) -> None:
    observe, close = make_observer("plain", ["accuracy"])
    for _ in range(3):
        observe(HALF)
    observe(Event("phase", "search"))
    close()
    assert capsys.readouterr().err.splitlines() == [f"loading: {TEXT}", "search ..."]


def trial(number: int, value: float) -> TrialRecord:
    recipe = Recipe(Source("", ""), (), "average", Field.constant(1, [1.0]))
    return TrialRecord(
        number=number,
        kind="search",
        name="",
        state="complete",
        suggestion=number,
        point=np.zeros(1),
        merge=recipe,
        tells_at_ask=0,
        tell_index=number,
        values={"accuracy": value},
    )


def test_plain_lines_leave_out_no_trial(capsys: pytest.CaptureFixture[str]) -> None:
    observe, close = make_observer("plain", ["accuracy"])
    observe(Event("phase", "search", total=400))
    for number in range(300):
        event = Event("trial", "search", trial(number, 0.5), number + 1, 400)
        observe(replace(event, best={"accuracy": 0.75}))
    close()
    _, *lines = capsys.readouterr().err.splitlines()
    numbers = [int(re.search(r"trial (\d+): accuracy 0.5", line)[1]) for line in lines]
    assert numbers == [*range(300)]
    assert lines[0].endswith("(best accuracy 0.75; less than a minute left)")
    assert sum("best accuracy" in line for line in lines) < 20


@pytest.mark.parametrize("style", ["plain", "rich"])
def test_re_evaluations_show_their_own_scores(
    style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    observe, close = make_observer(style, ["accuracy"])
    observe(Event("phase", "test", total=2))
    score = Score({"accuracy": 0.875}, {})
    observe(Event("score", "test", trial(7, 0.5), 1, 2, score))
    observe(Event("score", "test", trial(8, 0.5), 2, 2, None))
    close()
    shown = capsys.readouterr().err
    assert "trial 8: failed" in shown
    assert "0.5" not in shown
    assert ("accuracy 0.875" in shown) == (style == "plain")  # a bar shows the latest alone


def test_a_bar_has_the_best_so_far_and_every_phase_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    observe, close = make_observer("rich", ["accuracy"])
    observe(Event("phase", "opening"))
    observe(Event("phase", "search", total=2))
    event = Event("trial", "search", trial(0, 0.5), 1, 2)
    observe(replace(event, best={"accuracy": 0.75}))
    close()
    opening, search = capsys.readouterr().err.splitlines()[-2:]
    assert re.match(r"opening +.* 1/1 ", opening)
    assert re.match(r"search +.* 1/2 .*best accuracy 0.75  trial 0: accuracy 0.5", search)


def test_programs_get_every_event(capsys: pytest.CaptureFixture[str]) -> None:
    observe, _ = make_observer("json", ["accuracy"])
    observe(HALF)
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["done"], line["total"]) == ("loading", 145, 290)


def test_a_terminal_shows_one_bar_for_loading(capsys: pytest.CaptureFixture[str]) -> None:
    observe, close = make_observer("rich", ["accuracy"])
    observe(Event("loading", "1 worker, reading the items"))
    observe(HALF)
    close()
    shown = capsys.readouterr().err
    (line,) = shown.splitlines()[-1:]
    assert line.startswith("loading")
    assert line.strip().endswith(TEXT)
