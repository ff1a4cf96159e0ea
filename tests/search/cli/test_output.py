"""Foreign text where it is printed: on the terminal, in logs, in the report and in the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergesearch.merging import InputError
from mergesearch.merging.export.card_metadata import checked_card
from mergesearch.merging.foreign.shown import MESSAGE_LIMIT, printable
from mergesearch.merging.recipe_file import recipe_text
from mergesearch.search.cli import main as command_line
from mergesearch.search.cli.options import emit, say
from mergesearch.search.observers.event_log import EventLog
from mergesearch.search.observers.progress import make_observer
from mergesearch.search.report.page.elements import document
from mergesearch.search.study.events import Event

#: Clears a terminal, turns text round, ends a line.
EVIL = "\x1b[2J\u202eevil\r\x9b"


def test_an_error_is_cut_and_printable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise InputError(f"{EVIL}{'a' * 10_000}\nsecond line")

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(len(line) <= MESSAGE_LIMIT and printable(line) == line for line in lines)
    assert lines[1] == "mergesearch: error: second line"


def test_memory_that_cannot_be_had_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("mergesearch: error: expected enough memory")


def test_results_and_notes_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    emit(None, False, lambda: ["first", EVIL])
    say(EVIL + "a" * 1000)
    captured = capsys.readouterr()
    assert captured.out == "first\n\\x1b[2J\\u202eevil\\r\\x9b\n"
    assert len(captured.err) <= MESSAGE_LIMIT + 1
    assert printable(captured.err, keep="\n") == captured.err


@pytest.mark.parametrize("style", ["plain", "rich", "json"])
def test_progress_is_printable_and_its_brackets_are_no_markup(
    style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    observe, close = make_observer(style, ["x"])
    observe(Event("warning", f"[red]{EVIL}"))
    close()
    told = capsys.readouterr().err
    assert "evil" in told
    assert "[red]" in told
    assert "\u202e" not in told
    assert "\x1b[2J" not in told


def test_the_event_log_holds_short_printable_texts(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "study", "host:1")
    log.observe(Event("warning", EVIL + "a" * 1000))
    log.close()
    message = json.loads((tmp_path / "events.jsonl").read_text())["message"]
    assert len(message) <= MESSAGE_LIMIT
    assert printable(message) == message


def test_the_report_shows_escapes_and_its_data_stay_json() -> None:
    data = json.dumps({"name": EVIL + "\U000e0041"}, ensure_ascii=False)
    page = document(EVIL, f"<p>{EVIL}</p><script>{data}</script>", figures=False)
    assert printable(page, keep="\n") == page
    kept = page.partition("<script>")[2].partition("</script>")[0]
    assert json.loads(kept)["name"] == EVIL + "\U000e0041"


def test_the_card_and_a_recipe_show_escapes() -> None:
    card = checked_card("license: mit", f"# Merge of {EVIL}\n")
    assert printable(card, keep="\n") == card
    text = recipe_text({"base": EVIL, "experts": {"françois": "x"}})
    assert printable(text, keep="\n") == text
    assert "françois" in recipe_text({"experts": {"françois": "x"}})
