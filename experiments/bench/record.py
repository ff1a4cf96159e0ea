"""Measures the record of a study: writing, opening, memory of a trial, and the dashboard's page.

A database is written in rounds, as the driver does: the results that came, and the trials asked
after them, are one transaction. Beside each rate stands what the server itself commits in the same
seconds, one row at a time; blocks of all of them are interleaved, and medians are shown. The way
through Optuna's own objects is measured beside ours, on fewer trials.

Run it with ``python -m experiments.bench.record [--postgres URL]``; without a URL it starts a
server of its own from the installed programs (Debian: ``postgresql``).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from experiments.bench.timing import timed
from mergesearch.evaluators import Measurement, Objective
from mergesearch.merging import Field, Recipe, Source
from mergesearch.search.dashboard.access import Access
from mergesearch.search.dashboard.answers import Answer
from mergesearch.search.dashboard.serving import build_application
from mergesearch.search.dashboard.shown_storage import shown_storage
from mergesearch.search.record.optuna_trials import OptunaTrials
from mergesearch.search.record.postgres_trials import PostgresTrials
from mergesearch.search.record.storage import open_engine, open_storage, read_storage
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.workers.messages import Outcome
from tests import postgres

OBJECTIVES = (Objective("accuracy", "maximize"),)
#: Parameters that dashboards plot, at most as many as a study records.
SUMMARIES = 8
#: Trials of a block that is timed, and how many blocks.
BLOCK = 64
BLOCKS = 7


#: A request of a browser, but for its path.
BROWSER = {
    "REQUEST_METHOD": "GET",
    "QUERY_STRING": "",
    "HTTP_HOST": "localhost",
    "HTTP_ACCEPT_ENCODING": "gzip",
    "SERVER_NAME": "localhost",
    "SERVER_PORT": "80",
    "wsgi.url_scheme": "http",
}


class Writer:
    """Writes a study of one objective to a storage, round by round.

    Args:
        location: Journal file, or URL of a database.
        dim: Dimensions of its points.
        name: Of the study.
        by_optuna: Write through Optuna's objects, as versions before 0.5 did.
    """

    def __init__(
        self, location: str | Path, dim: int, name: str = "study", *, by_optuna: bool = False
    ) -> None:
        self._dim = dim
        self._decode = decoder(dim)
        self._rng = np.random.default_rng(0)
        self.log = open_log(location, dim, name)
        if by_optuna:
            log = self.log
            log._trials = OptunaTrials(log._storage, log._study_id, log._access)
        self._running: list[int] = []
        self._told = 0

    def round(self, size: int) -> None:
        """Record the results of the trials that run, and ask others."""
        with self.log.batched_writes():
            for number in self._running:
                self.log.tell(number, _outcome(number), self._told)
                self._told += 1
            self._running = [self._ask() for _ in range(size)]

    def _ask(self) -> int:
        point = self._rng.random(self._dim)
        record = self.log.ask(
            "search",
            self._decode(point),
            point=point,
            suggestion=len(self.log.records),
            tells_at_ask=self._told,
            summary={f"s{index}": float(value) for index, value in enumerate(point[:SUMMARIES])},
            bounds=(0, 1),
        )
        return record.number


def _outcome(number: int) -> Outcome:
    measured = Measurement({"accuracy": 1 / (1 + number)}, {"accuracy": 0.1}, {})
    seconds = {"merge": 0.5, "evaluate": 1.0, "overhead": 0.1}
    return Outcome(str(number), measured, None, seconds, "host:12345")


def template(dim: int) -> Recipe:
    """The recipe of a study with a segment for each dimension."""
    field = Field(np.arange(dim + 1), np.zeros((1, dim)))
    return Recipe(Source("", ""), (), "task_arithmetic", field)


def decoder(dim: int) -> Callable[[Any], Recipe]:
    """Point -> recipe."""
    whole = template(dim)
    return lambda point: whole.with_field(Field(whole.field.boundaries, point[None]))


def open_log(location: str | Path, dim: int, name: str = "study") -> TrialLog:
    """The study's log, created if need be."""
    return TrialLog(open_storage(location), name, OBJECTIVES, decoder(dim), template(dim))


@contextlib.contextmanager
def committing(url: str) -> Iterator[Callable[[], None]]:
    """What commits a row of 500 characters, for one answer of the server, as a round needs."""
    engine = open_engine(url)
    connection = engine.raw_connection()
    bare: Any = connection.driver_connection
    bare.autocommit = True
    bare.execute("CREATE TABLE bench (text varchar(600))")
    try:
        yield lambda: bare.execute("INSERT INTO bench VALUES (%s)", ["x" * 500])
    finally:
        bare.execute("DROP TABLE bench")
        connection.close()
        engine.dispose()


def writing(url: str, sizes: tuple[int, ...] = (1, 8, 64)) -> dict[str, Any]:
    """Trials a second in rounds of several sizes, beside the server's own commits."""
    with committing(url) as commit:

        def commits() -> None:
            for _ in range(BLOCK):
                commit()

        ways: dict[str, tuple[Callable[[], None], int]] = {"commits": (commits, BLOCK)}
        for size in sizes:
            ours = Writer(url, 8, f"rounds of {size}")
            ways[f"rounds of {size}"] = (partial(_rounds, ours, size, BLOCK), BLOCK)
        theirs = Writer(url, 8, "optuna", by_optuna=True)
        ways["through Optuna"] = (partial(_rounds, theirs, 1, BLOCK // 8), BLOCK // 8)
        figures = _rates(ways)
    for size in sizes:
        found = figures[f"rounds of {size}"]
        found["of_commit_rate"] = found["per_second"] / figures["commits"]["per_second"]
        found["of_optuna"] = found["per_second"] / figures["through Optuna"]["per_second"]
    return figures | {"statements": statements(url, sizes)}


def _rates(ways: Mapping[str, tuple[Callable[[], None], int]]) -> dict[str, dict[str, float]]:
    """Way -> trials a second and CPU time of one, of blocks that write so many trials each."""
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for index in range(BLOCKS + 1):
        for way, (block, count) in ways.items():
            wall, cpu = timed(block)
            if index:  # the first of each warms up
                times[way].append((wall / count, cpu / count))
    return {
        way: {
            "per_second": 1 / statistics.median(wall for wall, _ in each),
            # What a machine that does nothing else would come near to.
            "fastest_per_second": 1 / min(wall for wall, _ in each),
            "cpu_ms": 1e3 * statistics.median(cpu for _, cpu in each),
        }
        for way, each in times.items()
    }


def _rounds(writer: Writer, size: int, trials: int) -> None:
    for _ in range(trials // size):
        writer.round(size)


def statements(url: str, sizes: tuple[int, ...]) -> dict[str, float]:
    """Statements for a trial, by the size of a round."""
    counts: dict[str, float] = {}
    for size, by_optuna in [*((size, False) for size in sizes), (1, True)]:
        writer = Writer(url, 8, f"counted {size} {by_optuna}", by_optuna=by_optuna)
        writer.round(size)
        rounds = 8
        with counted() as count:
            for _ in range(rounds):
                writer.round(size)
        name = "through Optuna" if by_optuna else f"rounds of {size}"
        counts[name] = count[0] / size / rounds
    return counts


@contextlib.contextmanager
def counted() -> Iterator[list[float]]:
    """Number of the statements that are sent through SQLAlchemy or by rounds meanwhile."""
    count = [0.0]

    def note(*_: Any) -> None:
        count[0] += 1

    send = PostgresTrials._send

    def sending(trials: PostgresTrials, parameters: Mapping[str, Any]) -> tuple[int, list[int]]:
        count[0] += 2  # the lock, and the round
        return send(trials, parameters)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    PostgresTrials._send = sending  # type: ignore[method-assign, assignment]
    try:
        yield count
    finally:
        PostgresTrials._send = send  # type: ignore[method-assign]
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def opening(location: str | Path, dim: int, name: str) -> dict[str, float]:
    """Seconds to open a log."""
    wall, cpu = timed(lambda: open_log(location, dim, name))
    return {"seconds": wall, "cpu_seconds": cpu}


def memory(location: str | Path, dim: int, name: str) -> dict[str, float]:
    """Bytes of memory that a trial of an open log takes, its point of 8 bytes a number included."""
    gc.collect()
    tracemalloc.start()
    log = open_log(location, dim, name)
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {"bytes_per_trial": taken / len(log.records), "of_it_point": 8 * dim}


def opening_by_optuna(location: str | Path, name: str) -> dict[str, float]:
    """Seconds in which Optuna itself reads all trials of a study."""
    storage = read_storage(location)
    study = storage.get_study_id_from_name(name)
    wall, cpu = timed(lambda: storage.get_all_trials(study, deepcopy=False))
    return {"seconds": wall, "cpu_seconds": cpu}


def page(location: str | Path, name: str) -> dict[str, float]:
    """Seconds of what the dashboard's page of a study asks for: first, and once more at once."""
    storage = shown_storage(location)
    study = storage.get_study_id_from_name(name)
    application = build_application(storage, Access(None, None, False, any_host=True), None, {})
    answers: list[Answer] = []

    def ask(path: str) -> None:
        answers.append(Answer.of(application, {"PATH_INFO": path, **BROWSER}))

    path = f"/api/studies/{study}"
    first, first_cpu = timed(lambda: ask(path))
    again, again_cpu = timed(lambda: ask(path))
    rest, rest_cpu = timed(lambda: ask(f"{path}/param_importances"))
    return {
        "seconds": first,
        "cpu_seconds": first_cpu,
        "again_seconds": again,
        "again_cpu_seconds": again_cpu,
        "importances_seconds": rest,
        "importances_cpu_seconds": rest_cpu,
        "MB": len(answers[0].body) / 1e6,
    }


def fill(location: str | Path, dim: int, trials: int, name: str) -> dict[str, float]:
    """Record a study of so many trials in rounds of a hundred; trials a second, and CPU of each."""
    writer = Writer(location, dim, name)
    wall, cpu = timed(partial(_rounds, writer, 100, trials))
    writer.round(0)
    return {"per_second": trials / wall, "cpu_ms": 1e3 * cpu / trials}


def _say(what: str, figures: Any) -> None:
    """Show what is known so far."""
    print(f"{what}: {json.dumps(figures, default=float)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def database(url: str | None) -> Iterator[str]:
    """A database to write to."""
    if url is not None:
        yield url
        return
    with postgres.serve() as server:
        yield server.url()


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2_000, help="of the study that is shown")
    parser.add_argument("--postgres", metavar="URL")
    arguments = parser.parse_args([] if __name__ != "__main__" else None)
    trials = arguments.trials
    figures: dict[str, Any] = {}
    import optuna_dashboard  # noqa: F401  # whose imports take seconds, once

    with tempfile.TemporaryDirectory() as folder, database(arguments.postgres) as url:
        figures["writing"] = writing(url)
        _say("writing", figures["writing"])
        places: dict[str, str | Path] = {
            "journal": Path(folder) / "journal.log",
            "postgresql": url,
        }
        for place, location in places.items():
            fill(location, 8, trials, "small")
            figures[place] = {
                "opening": opening(location, 8, "small"),
                "memory": memory(location, 8, "small"),
            }
            _say(place, figures[place])
        figures["optuna"] = {"opening": opening_by_optuna(url, "small")}
        _say("optuna", figures["optuna"])
        for place, location in places.items():
            other = Path(folder) / "wide.log" if isinstance(location, Path) else location
            figures[place]["writing, wide"] = fill(other, arguments.dim, trials, "wide")
            figures[place]["opening, wide"] = opening(other, arguments.dim, "wide")
            figures[place]["page, wide"] = page(other, "wide")
            _say(place, figures[place])
    print(json.dumps({"record": figures}, indent=1, default=float))


if __name__ == "__main__":
    main()
