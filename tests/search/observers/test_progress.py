"""How far workers are with loading, in every style of progress."""

from __future__ import annotations

import json

import pytest

from mergesearch.search.observers.progress import make_observer
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
