"""Damaged run folders: the journal, the study, the report's data, events, and what lies beside."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

from tests.fuzz.checking import demand, read_or_refuse, run_verb
from tests.fuzz.journals import ATTRIBUTES, TRIALS
from tests.fuzz.mutations import ANY, JSON, JSON_LINES, LINES, TEXT, Mutation, mutated
from tests.fuzz.odd_files import ODD, clear, put_odd_file
from tests.search.studies import analytic, run_in

KIND = "run_folders"

#: Share of damaged journals that are repaired, and of these that are resumed, which takes longer.
REPAIRED = 0.25
RESUMED = 0.01
#: One seed in so many that would begin a study with a damaged run does.
BEGUN = 4
#: Share of runs with damage in a second file.
SECOND = 0.1
#: Files that a report leaves in the folder and that nothing reads; copying them takes time.
UNREAD = ("*.html", "*.png", "*.csv", "*.parquet", "report.json")
#: Verbs that read a run: what follows the run's folder; RUN, OTHER and OUT are places.
VERBS: tuple[tuple[str, ...], ...] = (
    ("show", "RUN"),
    ("show", "RUN", "--front"),
    ("show", "RUN", "--failed"),
    ("show", "RUN", "--json"),
    ("repair", "RUN"),
    ("recipe", "RUN"),
    ("recipe", "RUN", "--trial", "2", "--json"),
    ("report", "RUN", "--out", "OUT"),
    ("report", "RUN", "--trials", "OUT.csv"),
    ("compare", "OTHER", "RUN"),
    ("compare", "RUN", "OTHER", "--json"),
    ("replay", "RUN"),
    ("export", "RUN", "--out", "OUT"),
)
#: Verbs that take longest; one seed in so many that would run them does.
SLOW = {"report": 6, "compare": 3}


TWO = [
    {"kind": "synthetic", "problem": "sphere", "items": 12, "noise": 0.05},
    {"kind": "synthetic", "problem": "ellipsoid", "items": 12, "noise": 0.05},
]
#: The studies of these runs.
DATA = {
    "finished": analytic(trials=6, dim=2),
    "open": analytic(trials=5, dim=2, evaluators=TWO, strategy="sobol"),
}


def prepare(folder: Path) -> None:
    """Make the real runs."""
    for name, data in DATA.items():
        run_in(data, folder / name)
        (folder / name / "name").write_text(name)
    for name in DATA:
        for pattern in UNREAD:
            for file in (folder / name).glob(pattern):
                file.unlink()
    journal = folder / "open" / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: 2 * len(lines) // 3]))
    (folder / "open" / "report_data.json").unlink(missing_ok=True)


def check(prepared: Path, scratch: Path, seed: int) -> None:
    """Damage one file of a run, and read the run in the ways that verbs do.

    Raises:
        Finding: If a promise does not hold.
    """
    draw = Random(seed)
    source = prepared / draw.choice([*DATA])
    run = scratch / "run"
    clear(run)
    shutil.copytree(source, run)
    names = draw.choices([*FILES], [often for often, _ in FILES.values()], k=1)
    names += [draw.choice([*FILES])] if draw.random() < SECOND else []
    for name in names:
        _damage(run / name, draw, FILES[name][1])
    if "journal.log" in names:
        clear(run / "report_data.json")
    if not draw.randrange(ODD):
        put_odd_file(run / names[0], draw)
    elif names == ["journal.log"] and draw.random() < REPAIRED:
        _repair(run, draw)
        return
    before = _content(run)
    _read(run, draw, prepared / "finished")
    after = _content(run)
    demand(
        before == after, f"expected a folder as it was, received other {_changed(before, after)}"
    )


#: File -> how often it is damaged, and the mutations that suit it.
FILES: dict[str, tuple[int, tuple[dict[str, Mutation], ...]]] = {
    "journal.log": (12, (LINES, JSON_LINES, ATTRIBUTES, ATTRIBUTES, TRIALS, TRIALS, ANY, TEXT)),
    "study.yaml": (3, (TEXT, LINES, ANY)),
    "report_data.json": (4, (JSON, JSON, TEXT, ANY)),
    "environment.json": (1, (JSON, TEXT, ANY)),
    "events.jsonl": (1, (LINES, JSON_LINES, ANY)),
    "driver.lock": (1, (ANY,)),
}


def _content(run: Path) -> dict[str, bytes]:
    """File -> its bytes, of regular files alone."""
    return {
        file.name: file.read_bytes()
        for file in run.iterdir()
        if file.is_file() and not file.is_symlink()
    }


def _damage(file: Path, draw: Random, tables: tuple[dict[str, Mutation], ...]) -> None:
    data = file.read_bytes() if file.is_file() else b"{}"
    file.write_bytes(mutated(data, draw, *tables))


def _read(run: Path, draw: Random, other: Path) -> None:
    from mergesearch.search.runs.cleaning import unused_weights
    from mergesearch.search.runs.listed import list_runs
    from mergesearch.search.runs.reading import read_run

    way = draw.randrange(18)
    if way < len(VERBS):
        _run_a_verb(VERBS[way], run, other, draw)
    elif way == 13:
        for row in read_or_refuse(lambda: list(list_runs(run.parent))) or ():
            read_or_refuse(row.to_dict)
    elif way == 14:
        read_or_refuse(lambda: unused_weights(run.parent))
    elif way == 15 and not draw.randrange(BEGUN):
        _begin_with(run, draw)
    else:
        read_or_refuse(lambda: read_run(run))


def _run_a_verb(words: tuple[str, ...], run: Path, other: Path, draw: Random) -> None:
    out = run.parent / "out"
    if draw.randrange(SLOW.get(words[0], 1)):
        words = VERBS[0]
    paths = {"RUN": str(run), "OTHER": str(other), "OUT": str(out), "OUT.csv": f"{out}.csv"}
    run_verb([paths.get(word, word) for word in words])
    clear(out)


def _begin_with(run: Path, draw: Random) -> None:
    """Begin another study with what the run found, or with its scores."""
    start = draw.choice(({"run": str(run)}, {"priors": [str(run)]}, {"scores": [str(run)]}))
    begun = run.parent / "begun"
    clear(begun)
    read_or_refuse(lambda: run_in(DATA["finished"] | {"start": start}, begun))


def _repair(run: Path, draw: Random) -> None:
    """Repair a journal; then the run must be shown, and go on or say why it does not."""
    from mergesearch.search.record.journal_lines import first_damage

    damaged = (run / "journal.log").read_bytes()
    code, told = run_verb(["repair", str(run), "--yes"])
    demand(code == 0, f"expected a repair, received {told}")
    kept = run / "journal.log.original-1"
    demand(not kept.exists() or kept.read_bytes() == damaged, "expected the journal to be kept")
    left = first_damage(run / "journal.log")
    demand(left is None, f"expected a journal that stands, received {left}")
    run_verb(["show", str(run)], codes=(0,))
    if draw.random() < RESUMED:
        read_or_refuse(lambda: run_in(DATA[run.joinpath("name").read_text()], run))


def _changed(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
