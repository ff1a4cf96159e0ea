"""Damaged records of judges: what is shown, what was chosen, and what follows from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random

from mergesearch.evaluators.base import Exhibit, Output
from mergesearch.search.judging.bench import Bench
from mergesearch.search.judging.record import JudgingRecord
from tests.fuzz.checking import read_or_refuse
from tests.fuzz.mutations import ANY, JSON_LINES, LINES, TEXT, mutated
from tests.fuzz.odd_files import ODD, clear, put_odd_file

KIND = "judging"
RECORD = "judging.jsonl"
_MERGES = ("base", "good", "bad")
_PNG = b"\x89PNG\r\n\x1a\n"


def prepare(folder: Path) -> None:
    """Record three models, of texts and of pictures, with some choices, one of them undone."""
    record = JudgingRecord(folder)
    record.begin("study")
    bench = Bench(record, 0)
    for merge in _MERGES:
        texts = [Output(f"prompt {n}", "text", f"{merge} {n} \u00e9".encode()) for n in range(2)]
        picture = Output("prompt", "png", _PNG + merge.encode())
        whole = {"text": Exhibit("Which?", 2, tuple(texts)), "picture": Exhibit("?", 1, (picture,))}
        for objective, exhibit in whole.items():
            bench.register(objective, "search", merge, exhibit, base=merge == "base")
    for choice in ("left", "right", "tie"):
        bench.choose(bench.view().pair, choice)  # type: ignore[arg-type]
    bench.undo()


def check(prepared: Path, scratch: Path, seed: int) -> None:
    """Damage a record, and go on with it in the ways of a driver and of the page.

    Raises:
        Finding: If a promise does not hold.
    """
    draw = Random(seed)
    folder = scratch / "run"
    clear(folder)
    folder.mkdir()
    content = (prepared / RECORD).read_bytes()
    (folder / RECORD).write_bytes(mutated(content, draw, LINES, JSON_LINES, JSON_LINES, TEXT, ANY))
    if not draw.randrange(ODD):
        put_odd_file(folder / RECORD, draw)
    record = JudgingRecord(folder)
    if draw.random() < 0.5:
        read_or_refuse(partial(record.begin, "study"))
    bench = read_or_refuse(partial(Bench, record, 0))
    if bench is not None:
        _use(bench, draw)


def _use(bench: Bench, draw: Random) -> None:
    """Judge what is open, and ask for all that a study asks for."""
    view = read_or_refuse(bench.view)
    for shown in (view.left, view.right):
        if shown is not None and shown.kind != "text":
            read_or_refuse(partial(bench.picture, shown.text), OSError)
    if view.state == "open":
        read_or_refuse(partial(bench.choose, view.pair, draw.choice(("left", "right", "tie"))))
    for objective in ("text", "picture"):
        for merge in _MERGES:
            known = read_or_refuse(partial(bench.outputs_of, objective, "search", merge))
            if known is not None:
                read_or_refuse(partial(bench.judged, objective, "search", merge))
                read_or_refuse(partial(bench.strength, objective, "search", merge))
    read_or_refuse(bench.undo)
