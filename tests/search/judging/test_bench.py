"""What is asked, what is recorded, and what follows from it."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mergesearch.evaluators import Measurement, Split
from mergesearch.evaluators.base import Exhibit, Output
from mergesearch.evaluators.preference.strengths import Comparison, fit_strengths
from mergesearch.merging import RunFolderError
from mergesearch.search.judging.address import read_address, written_address
from mergesearch.search.judging.bench import Bench, View
from mergesearch.search.judging.record import JudgingRecord
from mergesearch.search.judging.settled import settled
from mergesearch.search.record.trial_record import Score
from tests.search.cli.test_cli import refused

PNG = b"\x89PNG\r\n\x1a\n"


def exhibit(*texts: str, choices: int = 2) -> Exhibit:
    outputs = (Output(f"prompt {n}", "text", text.encode()) for n, text in enumerate(texts))
    return Exhibit("Which?", choices, tuple(outputs))


def bench_in(folder: Path, seed: int = 0) -> Bench:
    record = JudgingRecord(folder)
    record.mend()
    return Bench(record, seed)


def register(bench: Bench, recipe: str, *texts: str, split: Split = "search") -> None:
    bench.register("preference", split, recipe, exhibit(*texts), base=recipe == "base")


def prefer(bench: Bench, word: str, most: int = 100) -> list[View]:
    """Choose texts with a word, ties without, until nothing is open; what was shown."""
    shown = []
    while (view := bench.view()).state == "open" and len(shown) < most:
        assert view.left is not None
        assert view.right is not None
        left, right = (word in side.text for side in (view.left, view.right))
        choice = "tie" if left == right else "left" if left else "right"
        assert bench.choose(view.pair, choice)  # type: ignore[arg-type]
        shown.append(view)
    return shown


def value(bench: Bench, recipe: str) -> float:
    return bench.strength("preference", "search", recipe).value


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = bench_in(tmp_path)
    register(bench, "base", "plain 0", "plain 1")
    register(bench, "good", "good 0", "good 1")
    return bench


def test_a_taste_becomes_strengths_whatever_side_it_is_shown_on(
    bench: Bench, tmp_path: Path
) -> None:
    assert not bench.judged("preference", "search", "good")
    shown = prefer(bench, "good")
    assert [view.prompt for view in shown] == ["prompt 0", "prompt 1"]
    assert bench.judged("preference", "search", "good")
    expected = fit_strengths([Comparison("good", "base", "good")] * 2, "base").of["good"]
    assert bench.strength("preference", "search", "good") == expected
    register(bench, "bad", "bad 0", "bad 1")
    prefer(bench, "good")
    assert value(bench, "bad") < value(bench, "base") + 1e-12 == 1e-12 < value(bench, "good")
    # Blind: nothing that the page is told names a model.
    assert "good" not in {view.pair for view in shown} | {shown[0].question}


def test_each_choice_is_a_line_with_what_it_was_about(bench: Bench, tmp_path: Path) -> None:
    [view] = prefer(bench, "good", most=1)
    *_, line = (tmp_path / "judging.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert event.pop("time").endswith("+00:00")
    side = "left" if "good" in view.left.text else "right"  # type: ignore[union-attr]
    assert event.pop("choice") == side
    assert {*event} == {"event", "objective", "split", "pair", "prompt", "left", "right"}


def test_nobody_is_asked_about_equal_outputs_nor_twice_about_a_pair(bench: Bench) -> None:
    assert len(prefer(bench, "good")) == 2
    # On prompt 0 it writes what the base writes, and on prompt 1, against good, something new.
    register(bench, "mixed", "plain 0", "new 1")
    assert [view.prompt for view in prefer(bench, "good")] == ["prompt 1"]
    # All of its pairs are known: the base's text, and good 1 against new 1.
    register(bench, "late", "good 0", "new 1")
    assert bench.judged("preference", "search", "late")
    assert bench.view().state == "waiting"
    # The same outputs as the base are the base.
    register(bench, "copy", "plain 0", "plain 1")
    assert bench.strength("preference", "search", "copy").error == 0


def test_a_choice_can_be_taken_back_until_a_result_rests_on_it(
    bench: Bench, tmp_path: Path
) -> None:
    assert not bench.undo()
    first = bench.view()
    prefer(bench, "good", most=1)
    assert bench.view().undo
    assert bench.undo()
    assert not bench.view().undo
    again = bench.view()
    assert (again.pair, again.left, again.right) == (first.pair, first.left, first.right)
    prefer(bench, "plain")
    assert value(bench, "good") < 0
    assert not bench.undo()
    assert value(bench_in(tmp_path), "good") == value(bench, "good")


def test_what_is_not_open_is_not_recorded(bench: Bench, tmp_path: Path) -> None:
    before = (tmp_path / "judging.jsonl").read_bytes()
    assert not bench.choose("no such pair", "left")
    assert not bench.choose(bench.view().pair, "both")  # type: ignore[arg-type]
    [view] = prefer(bench, "good", most=1)
    assert not bench.choose(view.pair, "tie")
    after = (tmp_path / "judging.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == before.count(b"\n") + 1


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_torn_last_line_is_mended(bench: Bench, tmp_path: Path, cut: int) -> None:
    prefer(bench, "good", most=1)
    whole = bench_in(tmp_path).view()
    prefer(bench, "good")
    path = tmp_path / "judging.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    reader = Bench(JudgingRecord(tmp_path), 0)  # reads beside a driver, and mends nothing
    assert reader.view() == bench_in(tmp_path).view() == whole
    assert path.read_bytes().endswith(b"\n")


NAMES = dict.fromkeys(("pair", "prompt", "left", "right", "model"), "0" * 32)
PICTURE = {"prompt": "", "output": "0" * 32, "kind": "png", "text": "../../secret.png"}
LINES = [
    *("[]", "{}", '{"event": "undo", "pair": "x"}', "{", "\\ud800", "[" * 5_000, "9" * 5_000),
    json.dumps({"event": ["choice"]}),
    json.dumps({"event": "undo", "pair": "0" * 32}),
    json.dumps({"event": "choice", "objective": "preference", "choice": "left"} | NAMES),
    json.dumps(
        {"event": "model", "objective": "o", "split": "test", "recipe": "r", "question": ""}
        | {"model": "0" * 32, "outputs": [PICTURE], "slots": []}
    ),
    json.dumps(
        {"event": "model", "objective": "o", "split": "test", "recipe": "r", "question": ""}
        | {"model": "0" * 32, "outputs": [], "slots": [["1" * 32, "2" * 32]]}
    ),
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_damaged_record_is_refused_in_one_line(bench: Bench, tmp_path: Path, line: str) -> None:
    path = tmp_path / "judging.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(RunFolderError, match=r"judging\.jsonl: .*expected .*, received") as refused:
        bench_in(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_record_that_is_no_text_or_no_file_is_refused(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "judging.jsonl"
    path.write_bytes(path.read_bytes().replace(b"prompt", b"prompt\xff"))
    with pytest.raises(RunFolderError, match="line 1: expected UTF-8 text"):
        bench_in(tmp_path)
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("judging.jsonl")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make()
        with pytest.raises(RunFolderError, match="expected a file"):
            JudgingRecord(tmp_path).begin("study")


def test_outputs_of_an_earlier_session_stay(bench: Bench, tmp_path: Path) -> None:
    prefer(bench, "good", most=1)
    again = bench_in(tmp_path)
    register(again, "good", "other 0", "other 1")  # a device that rounds otherwise
    view = again.view()
    assert {side.text for side in (view.left, view.right) if side} == {"plain 1", "good 1"}


def test_the_record_of_another_study_is_moved_aside(tmp_path: Path) -> None:
    record = JudgingRecord(tmp_path)
    record.begin("one")
    bench = Bench(record, 0)
    register(bench, "base", "plain 0")
    before = (tmp_path / "judging.jsonl").read_bytes()
    JudgingRecord(tmp_path).begin("one")
    assert (tmp_path / "judging.jsonl").read_bytes() == before
    JudgingRecord(tmp_path).begin("another")
    assert (tmp_path / "judging-1.jsonl").read_bytes() == before
    assert Bench(JudgingRecord(tmp_path), 0).outputs_of("preference", "search", "base") is None


def test_a_lost_record_is_not_made_up(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="expected the base's outputs for search prompts"):
        register(bench_in(tmp_path), "good", "good 0")


def test_pictures_are_kept_beside_the_record(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    for recipe in ("base", "other"):
        pictures = (Output("a hat", "png", PNG + recipe.encode()),)
        shown = Exhibit("Which?", 1, pictures)
        bench.register("preference", "search", recipe, shown, base=recipe == "base")
    view = bench_in(tmp_path).view()
    assert view.left is not None
    assert view.left.kind == "png"
    assert bench.picture(view.left.text) in {PNG + b"base", PNG + b"other"}
    assert bench.picture("../judging.jsonl") is None


def test_a_page_that_waits_is_woken(bench: Bench) -> None:
    prefer(bench, "good")
    asks: list[View] = []
    version = bench.view().version

    def ask(after: Callable[[View], None]) -> threading.Thread:
        thread = threading.Thread(target=lambda: after(bench.view(version, 600)), daemon=True)
        thread.start()
        return thread

    thread = ask(asks.append)
    register(bench, "next", "next 0", "next 1")
    thread.join()
    assert asks[0].state == "open"
    version = asks[0].version
    thread = ask(asks.append)
    bench.close()
    thread.join()
    assert asks[1].state == "over"


def test_a_rebuilt_merge_has_the_recorded_value_if_it_makes_the_same(
    bench: Bench, tmp_path: Path
) -> None:
    prefer(bench, "good")
    known = bench.strength("preference", "search", "good")
    recorded = Score({"preference": known.value}, {"preference": known.error})

    def again(*texts: str) -> float:
        shown = {"preference": exhibit(*texts)}
        measured = Measurement({"preference": 0.0}, {"preference": 2.0}, exhibits=shown)
        return settled(measured, recorded, tmp_path, "search", "good").values["preference"]

    assert again("good 0", "good 1") == known.value
    assert math.isnan(again("good 0", "good 2"))


def test_the_address_is_for_its_owner_and_goes_with_the_driver(tmp_path: Path) -> None:
    assert "expected a running study with an evaluator of kind preference" in refused(
        "judge", tmp_path
    )
    with written_address(tmp_path, "http://127.0.0.1:1/token/"):
        assert read_address(tmp_path) == "http://127.0.0.1:1/token/"
        assert (tmp_path / "judging.url").stat().st_mode & 0o077 == 0
        refused("judge", tmp_path)  # left by a driver that was killed
    assert read_address(tmp_path) is None
    (tmp_path / "judging.url").write_text("https://elsewhere.example/")
    assert read_address(tmp_path) is None
