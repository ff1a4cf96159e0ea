"""Damaged journals: named by line, repaired with all that stands, and resumed to the same end."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from mergesearch.merging import RunFolderError
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.runs.reading import read_run
from mergesearch.search.runs.repair.repairing import repair
from tests.fuzz.checking import run_verb
from tests.search.studies import analytic, fingerprint, run_in

#: A strategy whose every question follows from all results before it.
STUDY = analytic(trials=10, dim=2, strategy="cma_es")
Change = Callable[[list[bytes]], None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happened to."""
    return run_in(STUDY, tmp_path_factory.mktemp("repair") / "run")


@pytest.fixture
def damaged(finished: Run, tmp_path: Path) -> Callable[[Change], Path]:
    """Makes a copy of the run with a changed journal and no saved report."""

    def make(change: Change) -> Path:
        run = tmp_path / "run"
        shutil.copytree(
            finished.folder.path, run, ignore=shutil.ignore_patterns("report*", "*.png")
        )
        lines = (run / "journal.log").read_bytes().splitlines(keepends=True)
        change(lines)
        (run / "journal.log").write_bytes(b"".join(lines))
        return run

    return make


def garbled(*wanted: Callable[[dict], bool]) -> Change:
    """Overwrites the middle of the first line of each kind."""

    def change(lines: list[bytes]) -> None:
        for one in wanted:
            at = next(i for i, line in enumerate(lines) if is_json(line) and one(json.loads(line)))
            lines[at] = lines[at][:30] + bytes(40) + lines[at][60:]

    return change


def is_json(line: bytes) -> bool:
    """Whether a line is not garbled yet."""
    return bytes(1) not in line


def asks(number: int) -> Callable[[dict], bool]:
    """The line that creates a trial."""
    return lambda log: log["op_code"] == 4 and f'"number": {number},' in str(log["system_attrs"])


def tells(number: int) -> Callable[[dict], bool]:
    """The first line of a trial's result."""
    return lambda log: log["op_code"] == 9 and log["trial_id"] == number


def ends(number: int) -> Callable[[dict], bool]:
    """The line that finishes a trial."""
    return lambda log: log["op_code"] == 6 and log["trial_id"] == number


def sets(key: str) -> Callable[[dict], bool]:
    """A line that sets an attribute of the study."""
    return lambda log: log["op_code"] == 3 and f"mergesearch:{key}" in log["system_attr"]


def end_of(run: Run) -> tuple[object, ...]:
    """What an undisturbed and a repaired run share."""
    assert run.verdict is not None
    return fingerprint(run), run.verdict.winner, run.verdict.leaders


def test_a_damaged_line_is_named_with_a_way_on_and_nothing_is_written(
    damaged: Callable[[Change], Path],
) -> None:
    run = damaged(garbled(tells(4)))
    before = (run / "journal.log").read_bytes()
    line = before.splitlines().index(next(x for x in before.splitlines() if not is_json(x))) + 1
    for verb in (["show"], ["show", "--front"], ["export", "--out", str(run / "out")]):
        code, told = run_verb([verb[0], str(run), *verb[1:]])
        assert code == 2
        assert f"journal.log: line {line}: " in told
        assert f"`mergesearch repair {run}`" in told
    with pytest.raises(RunFolderError, match=f"line {line}: "):
        run_in(STUDY, run)
    assert (run / "journal.log").read_bytes() == before


def changed(wanted: Callable[[dict], bool], change: Callable[[dict], object]) -> Change:
    """Changes what a line says, so that it stays JSON."""

    def on_lines(lines: list[bytes]) -> None:
        at = next(i for i, line in enumerate(lines) if wanted(json.loads(line)))
        log = json.loads(lines[at])
        change(log)
        lines[at] = json.dumps(log).encode() + b"\n"

    return on_lines


def inside(attribute: str, **values: object) -> Callable[[dict], object]:
    """Changes members of the JSON text of an attribute."""

    def change(log: dict) -> None:
        held = log["system_attrs" if "system_attrs" in log else "system_attr"]
        held[attribute] = json.dumps(json.loads(held[attribute]) | values)

    return change


def has(attribute: str) -> Callable[[dict], bool]:
    """A line with an attribute of a trial."""
    return lambda log: attribute in (log.get("system_attr") or log.get("system_attrs") or {})


RESULT = "mergesearch:result"
ASKED = "mergesearch:asked"
WRONG = {
    "an unknown operation": (ends(2), lambda log: log.update(op_code=99), "op_code"),
    "no operation": (ends(2), lambda log: log.pop("op_code"), "expected the key 'op_code'"),
    "a trial out of range": (ends(2), lambda log: log.update(trial_id=999), "received 999"),
    "a negative trial": (ends(2), lambda log: log.update(trial_id=-1), "trial_id"),
    "an infinite value": (ends(2), lambda log: log.update(values=[float("inf")]), "finite"),
    "a state that is a text": (ends(2), lambda log: log.update(state="1"), "state"),
    "a trial that ends before it begins": (asks(3), lambda log: log.update(state=1), "state"),
    "no moment": (ends(2), lambda log: log.update(datetime_complete="soon"), "moment"),
    "seconds that are a number": (has(RESULT), inside(RESULT, seconds=3), "seconds"),
    "errors that are texts": (has(RESULT), inside(RESULT, errors={"sphere": "x"}), "errors"),
    "a result of trial true": (has(RESULT), inside(RESULT, tell_index=True), "tell_index"),
    "a point that is no base64": (asks(3), inside(ASKED, point="%%%"), "base64"),
    "a point that is cut": (asks(3), inside(ASKED, point="AAAA"), "base64"),
    "an unknown kind": (asks(3), inside(ASKED, kind="guess"), "kind"),
    "packed scores that are cut": (
        has("mergesearch:items"),
        inside("mergesearch:items", sphere="f50:eAEByAA3"),
        "packed scores",
    ),
    "a choice that is a text": (
        sets("verdict"),
        inside("mergesearch:verdict", winner="3"),
        "winner",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_line_of_another_shape_is_named(wrong: str, damaged: Callable[[Change], Path]) -> None:
    wanted, change, told = WRONG[wrong]
    run = damaged(changed(wanted, change))
    with pytest.raises(RunFolderError, match=r"journal\.log: line \d+: ") as refused:
        open_run(run).report_data()
    assert told in str(refused.value)
    assert "mergesearch repair" in str(refused.value)
    made = repair(run, write=True)
    assert [each.reason for each in made.salvage.damages]
    open_run(run).report_data()


LOSSES = {
    "a result": ((tells(4),), (4,), ()),
    "the end of a trial": ((ends(5),), (5,), ()),
    "two results": ((tells(3), ends(7)), (3, 7), ()),
    "a question": ((asks(6),), (), (6,)),
    "a question and its result": ((asks(6), tells(6)), (), (6,)),
    "a result of an anchor": ((tells(0),), (0,), ()),
    "a score of the final choice": ((sets("score:validation:0"),), (), ()),
    "the final choice": ((sets("verdict"),), (), ()),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_repaired_study_ends_as_if_nothing_had_been_lost(
    loss: str, damaged: Callable[[Change], Path], finished: Run
) -> None:
    wanted, again, asked = LOSSES[loss]
    run = damaged(garbled(*wanted))
    broken = (run / "journal.log").read_bytes()
    made = repair(run, write=True)
    assert made.salvage.again == again
    assert made.salvage.asked == asked
    assert (run / "journal.log.original-1").read_bytes() == broken
    assert len(read_run(run).records) == len(finished.log.records)
    assert end_of(run_in(STUDY, run)) == end_of(finished)


def one_gap(first: Callable[[dict], bool], last: Callable[[dict], bool]) -> Change:
    """Puts one unreadable line in the place of all from one to another, which stays."""

    def change(lines: list[bytes]) -> None:
        logs = [json.loads(line) for line in lines]
        start = next(i for i, log in enumerate(logs) if first(log))
        stop = next(i for i, log in enumerate(logs) if last(log))
        lines[start:stop] = [bytes(40) + b"\n"]

    return change


def test_questions_that_are_lost_in_a_row_keep_their_order(
    damaged: Callable[[Change], Path], finished: Run
) -> None:
    run = damaged(one_gap(asks(4), tells(6)))
    made = repair(run, write=True)
    assert made.salvage.asked == (4, 5, 6)
    end = run_in(STUDY, run)
    told = [record.tells_at_ask for record in end.log.records if record.kind == "search"]
    assert told == sorted(told)
    assert fingerprint(end) == fingerprint(finished)


def test_a_trial_of_the_search_without_its_point_is_named(
    damaged: Callable[[Change], Path],
) -> None:
    def change(lines: list[bytes]) -> None:
        at = next(i for i, line in enumerate(lines) if asks(4)(json.loads(line)))
        lines[at] = re.sub(rb'(point\\": )\\"[^"]*"', rb"\1null", lines[at])

    with pytest.raises(RunFolderError, match=r"line \d+: .*expected the point of a search trial"):
        open_run(damaged(change))


def test_a_lost_anchor_is_measured_under_another_number(
    damaged: Callable[[Change], Path], finished: Run
) -> None:
    run = damaged(garbled(asks(0)))
    made = repair(run, write=True)
    assert made.salvage.gone == (0,)
    again = run_in(STUDY, run)
    anchors = [record for record in again.log.records if record.kind == "anchor"]
    assert [record.number for record in anchors] == [len(finished.log.records)]
    assert fingerprint(again)[1:-1] == fingerprint(finished)[1:]


def test_a_question_without_its_record_is_shown_and_not_exported(
    damaged: Callable[[Change], Path],
) -> None:
    run = damaged(garbled(asks(6)))
    repair(run, write=True)
    assert run_verb(["show", str(run)], codes=(0,))
    with pytest.raises(RunFolderError, match="trial 6, which a repair could not recover"):
        open_run(run).trial(6)


def test_the_dry_run_says_the_same_and_writes_nothing(damaged: Callable[[Change], Path]) -> None:
    run = damaged(garbled(tells(4), asks(7)))
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    _, told = run_verb(["repair", str(run)], codes=(0,))
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before
    assert "trial 4: measured again" in told
    assert "trial 7: asked and measured again" in told
    assert f"`mergesearch repair {run} --yes`" in told
    consequences = repair(run, write=True).salvage.consequences
    assert set(consequences) < set(told.splitlines())


def test_lines_that_two_writers_joined_are_taken_apart(
    damaged: Callable[[Change], Path], finished: Run
) -> None:
    def join(lines: list[bytes]) -> None:
        lines[9] = lines[9].rstrip()
        lines[20] = lines[20][:50] + lines[20]

    run = damaged(join)
    made = repair(run, write=True)
    assert made.salvage.kept == len(finished.log.records)
    assert not made.salvage.loses
    assert end_of(open_run(run)) == end_of(finished)


@pytest.mark.parametrize("ending", [b"\r", b"\x1c", b" ", b"\xc2\x85"])
def test_lines_that_an_editor_ended_otherwise_are_taken_apart(
    ending: bytes, damaged: Callable[[Change], Path], finished: Run
) -> None:
    def rewrite(lines: list[bytes]) -> None:
        lines[:] = [line[:-1] + ending for line in lines]

    run = damaged(rewrite)
    assert repair(run, write=True).salvage.kept == len(finished.log.records)
    assert end_of(open_run(run)) == end_of(finished)


def test_a_run_that_stands_needs_no_repair(damaged: Callable[[Change], Path]) -> None:
    run = damaged(lambda lines: None)
    before = sorted(file.name for file in run.iterdir())
    _, told = run_verb(["repair", str(run), "--yes"], codes=(0,))
    assert "nothing to repair" in told
    assert sorted(file.name for file in run.iterdir()) == before


def test_nothing_is_repaired_under_a_driver(damaged: Callable[[Change], Path]) -> None:
    run = damaged(garbled(tells(4)))
    folder = RunFolder(run)
    folder.hold()
    try:
        for write in (False, True):
            with pytest.raises(RunFolderError, match="process"):
                repair(run, write=write)
    finally:
        folder.release()
    assert not (run / "journal.log.original-1").exists()


def test_a_repair_is_told_when_the_run_goes_on(damaged: Callable[[Change], Path]) -> None:
    run = damaged(garbled(tells(4)))
    repair(run, write=True)
    run_in(STUDY, run)
    warnings = read_run(run).warnings
    assert any("the journal was repaired (1 damaged line)" in line for line in warnings)


def test_a_second_repair_keeps_both_originals(damaged: Callable[[Change], Path]) -> None:
    run = damaged(garbled(tells(4)))
    repair(run, write=True)
    lines = (run / "journal.log").read_bytes().splitlines(keepends=True)
    lines[5] = b"\xff\n"
    (run / "journal.log").write_bytes(b"".join(lines))
    repair(run, write=True)
    assert (run / "journal.log.original-2").read_bytes() == b"".join(lines)
    assert (run / "journal.log.original-1").exists()


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_said(damaged: Callable[[Change], Path]) -> None:
    run = damaged(garbled(tells(4)))
    run.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert run_verb(["repair", str(run)], codes=(0,))
        with pytest.raises(RunFolderError, match="expected a folder that can be written"):
            repair(run, write=True)
    finally:
        run.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("name", ["journal.log", "study.yaml", "report_data.json", "driver.lock"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(
    name: str, damaged: Callable[[Change], Path]
) -> None:
    run = damaged(lambda lines: None)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    code, _ = run_verb(["show", str(run)])
    assert code == (0 if name in ("report_data.json", "driver.lock") else 2)
