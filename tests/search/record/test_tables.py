"""Trials without Optuna's objects: tables and journals are what Optuna itself writes and reads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import psycopg
import pytest
import sqlalchemy as sa

from mergesearch.evaluators import Measurement
from mergesearch.merging import StudyFailedError
from mergesearch.search.dashboard.shown_storage import shown_storage
from mergesearch.search.record.attributes import TRIAL_KEYS
from mergesearch.search.record.journal_trials import JournalTrials
from mergesearch.search.record.optuna_trials import OptunaTrials
from mergesearch.search.record.postgres_trials import PostgresTrials, array_text
from mergesearch.search.record.storage import database_of, open_storage, read_storage
from mergesearch.search.record.tables import KNOWN_VERSIONS, TABLES, table
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.workers.messages import Failure, Outcome
from tests.postgres import Server
from tests.search.record.test_trial_log import OBJECTIVES, TEMPLATE, ask, decode
from tests.waiting import wait_for

pytestmark = pytest.mark.xdist_group("postgres")


@pytest.fixture
def url(postgres: Server) -> Iterator[str]:
    database = postgres.database()
    yield postgres.url(database=database)
    # Logs stay open as long as something remembers them, and a server has few connections.
    with psycopg.connect(postgres.address(), autocommit=True) as connection:
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
        connection.execute(query, [database])


def open_log(location: str | Path, name: str = "study") -> TrialLog:
    return TrialLog(open_storage(location), name, OBJECTIVES, decode, TEMPLATE)


def outcome(number: int) -> Outcome:
    """Results of all kinds, by number."""
    if number % 4 == 1:
        return Outcome("", None, Failure("error", 'a "quoted" \\ failure\n', "trace"), {})
    values = {"accuracy": 0.5, "loss": number / 3}
    items = {"accuracy": np.array([0.0, 1.0, 1.0])}
    measured = Measurement(values, {"accuracy": 0.1}, items, violations={"bound": number - 2.0})
    return Outcome("", measured, None, {"merge": 0.5, "evaluate": 1.0}, "host:1")


def fill(log: TrialLog, trials: int = 9, size: int = 3) -> TrialLog:
    """Rounds of results and of trials that are asked after them; the last ones stay running."""
    rng = np.random.default_rng(0)
    running: list[int] = []
    for start in range(0, trials, size):
        with log.batched_writes():
            for number in running:
                log.tell(number, outcome(number), number)
            running = [ask(log, rng.random(3), each) for each in range(start, start + size)]
    return log


def by_optuna(log: TrialLog) -> TrialLog:
    """The log, written through Optuna's objects."""
    log._trials = OptunaTrials(log._storage, log._study_id, log._access)
    return log


def seen(storage: optuna.storages.BaseStorage) -> list[tuple]:
    """What Optuna knows of each trial, but for times of day and of work."""
    study = optuna.load_study(study_name="study", storage=storage)
    told = [
        {key: text for key, text in trial.system_attrs.items() if "result" not in key}
        for trial in study.trials
    ]
    return [
        (
            trial.number,
            trial.state,
            trial.values,
            trial.params,
            trial.distributions,
            trial.user_attrs,
            attributes,
            sorted(trial.system_attrs),
            trial.datetime_start is None,
            trial.datetime_complete is None,
        )
        for trial, attributes in zip(study.trials, told, strict=True)
    ]


def records(log: TrialLog) -> list[tuple]:
    return [
        (
            record.number,
            record.state,
            None if record.point is None else record.point.tobytes(),
            record.recipe.digest,
            dict(record.values),
            {key: scores.tolist() for key, scores in record.items.items()},
            record.failure,
            dict(record.violations),
            record.tell_index,
        )
        for record in log.records
    ]


def test_the_tables_are_those_of_a_known_version(url: str) -> None:
    """What is pinned here is Optuna's own layout, which has no public Python interface."""
    rdb = optuna.storages.RDBStorage(open_log(url)._storage._backend.url)
    assert rdb.get_head_version() in KNOWN_VERSIONS
    assert rdb.get_current_version() in KNOWN_VERSIONS
    inspected = sa.inspect(rdb.engine)
    for name in TABLES:
        theirs = {column["name"]: column for column in inspected.get_columns(name)}
        for column in table(name).columns:
            kind = theirs[column.name]["type"]
            if isinstance(column.type, sa.Enum):
                assert (kind.name, kind.enums) == (column.type.name, list(column.type.enums))
            else:
                assert isinstance(kind, column.type._type_affinity)
        # All that must be given is given: others may be empty, or have defaults.
        needed = {
            key for key, each in theirs.items() if not each["nullable"] and not each["default"]
        }
        assert needed <= {column.name for column in table(name).columns} | {"study_name"}
    unique = inspected.get_unique_constraints("trial_system_attributes")
    assert ["trial_id", "key"] in [each["column_names"] for each in unique]


def test_a_database_of_an_unknown_version_is_left_to_optuna(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(open_log(url)._trials, PostgresTrials)
    monkeypatch.setattr("mergesearch.search.record.storage.KNOWN_VERSIONS", frozenset())
    log = fill(open_log(url))
    assert isinstance(log._trials, OptunaTrials)
    assert database_of(log._storage) is None
    assert records(open_log(url)) == records(log)


def test_optuna_sees_of_each_way_what_it_sees_of_its_own(postgres: Server, tmp_path: Path) -> None:
    ours = postgres.url(database=postgres.database())
    theirs = postgres.url(database=postgres.database())
    journal = tmp_path / "journal.log"
    logs = [fill(open_log(ours)), fill(by_optuna(open_log(theirs))), fill(open_log(journal))]
    assert isinstance(logs[2]._trials, JournalTrials)
    expected = seen(read_storage(theirs))
    assert [state.name for _, state, *_ in expected] == [
        *("COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE", "FAIL"),
        *["RUNNING"] * 3,
    ]
    assert seen(read_storage(ours)) == expected
    assert seen(read_storage(journal)) == expected
    file = optuna.storages.journal.JournalFileBackend(str(journal))
    assert seen(optuna.storages.JournalStorage(file)) == expected
    for location, log in zip((ours, theirs, journal), logs, strict=True):
        assert records(open_log(location)) == records(log) == records(logs[0])


def test_a_record_of_optunas_objects_goes_on_in_rounds(url: str) -> None:
    """A study that an earlier version began."""
    fill(by_optuna(open_log(url)), trials=6)
    log = open_log(url)
    with log.batched_writes():
        for number in (3, 4, 5):
            log.tell(number, outcome(number), number)
        assert ask(log, np.zeros(3), 6) == 6
    again = open_log(url)
    assert [record.state for record in again.records] == [
        *("complete", "failed", "complete", "complete", "complete", "failed", "running")
    ]


def test_a_round_is_there_as_a_whole_or_not_at_all(url: str) -> None:
    log = open_log(url)
    number = ask(log, np.zeros(3), 0)
    with log.batched_writes():
        log.tell(number, outcome(number), 0)
        ask(log, np.ones(3), 1)
        assert [record.state for record in open_log(url).records] == ["running"]
    assert [record.state for record in open_log(url).records] == ["complete", "running"]


def test_a_round_that_the_server_refuses_at_its_commit_is_not_there(url: str) -> None:
    """No answer to a statement of the round is taken for the answer to its commit."""
    log = open_log(url)
    number = ask(log, np.zeros(3), 0)
    address = url.replace("@", f":{os.environ['PGPASSWORD']}@")
    with psycopg.connect(address, autocommit=True) as other:
        other.execute(REFUSAL)
        other.execute(
            "CREATE CONSTRAINT TRIGGER refusal AFTER INSERT ON trial_values DEFERRABLE "
            "INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
        )

        def write() -> None:
            with log.batched_writes():
                log.tell(number, outcome(0), 0)
                ask(log, np.ones(3), 1)

        with pytest.raises(StudyFailedError, match="refused at its commit"):
            write()
        assert [record.state for record in open_log(url).records] == ["running"]
        other.execute("DROP TRIGGER refusal ON trial_values")
    log._trials.flush()
    assert [record.state for record in open_log(url).records] == ["complete", "running"]


REFUSAL = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'refused at its commit'; END $$
"""


def test_arrays_are_read_as_they_were_written(url: str) -> None:
    texts = ["", "NULL", 'a "quoted" \\ one', "{1,2}", " a\nb\t", "\\\\", "é—漢", "'", "%s"]
    numbers = [0.1, -1e-300, 5e-324, 1.7976931348623157e308, float("inf"), 3.0, None]
    address = url.replace("@", f":{os.environ['PGPASSWORD']}@")
    with psycopg.connect(address) as connection:
        written = [array_text(texts), array_text(numbers), array_text(()), array_text([3, -1])]
        query = "SELECT %s::text[], %s::float8[], %s::text[], %s::int[]"
        read = connection.execute(query, written).fetchone()
    assert read == (texts, numbers, [], [3, -1])


def test_what_is_told_of_a_trial_is_told_once_it_is_recorded(url: str, tmp_path: Path) -> None:
    for location in (url, tmp_path / "journal.log"):
        log = open_log(location)
        heard: list[int] = []
        with log.batched_writes():
            with log.batched_writes():
                ask(log, np.zeros(3), 0)
                log.once_recorded(lambda heard=heard, at=location: heard.append(count(at)))
            assert not heard
        assert heard == [1]
        log.once_recorded(lambda heard=heard: heard.append(0))
        assert heard == [1, 0]


def count(location: str | Path) -> int:
    """Trials that another process finds."""
    return len(open_log(location).records)


def test_an_announcement_is_dropped_where_nothing_could_be_recorded(url: str) -> None:
    log = open_log(url)
    heard: list[str] = []
    fill(open_log(url), trials=3)

    def write() -> None:
        with log.batched_writes():
            ask(log, np.zeros(3), 0)
            log.once_recorded(lambda: heard.append("asked"))

    with pytest.raises(StudyFailedError, match="expected trial 0 to be this driver's"):
        write()
    assert heard == []


@pytest.mark.parametrize("rival", ["asks", "tells"])
def test_another_drivers_trials_and_results_are_never_written_over(url: str, rival: str) -> None:
    first = open_log(url)
    ask(first, np.zeros(3), 0)
    second = open_log(url)
    if rival == "asks":
        ask(second, np.ones(3), 1)
        with pytest.raises(StudyFailedError, match="expected trial 1 to be this driver's"):
            ask(first, np.zeros(3), 1)
    else:
        second.tell(0, outcome(0), 0)

        def write() -> None:
            with first.batched_writes():
                first.tell(0, outcome(3), 0)
                ask(first, np.zeros(3), 1)

        with pytest.raises(StudyFailedError, match="expected a running trial"):
            write()
    assert len(open_log(url).records) == (2 if rival == "asks" else 1)


def test_a_trial_that_is_added_by_other_ways_stops_the_driver(url: str) -> None:
    log = fill(open_log(url), trials=3)
    optuna.load_study(study_name="study", storage=read_storage(url)).ask()
    with pytest.raises(StudyFailedError, match="expected trial 3 to be this driver's"):
        ask(log, np.ones(3), 3)


def test_a_round_waits_for_whoever_adds_trials_by_other_ways(url: str) -> None:
    """Optuna locks the study's row for each trial; so does a round."""
    log = fill(open_log(url), trials=3)
    address = url.replace("@", f":{os.environ['PGPASSWORD']}@")
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    with psycopg.connect(address) as other:
        other.execute("SELECT study_id FROM studies FOR UPDATE")
        writing = threading.Thread(target=ask, args=(log, np.ones(3), 3))
        writing.start()
        with psycopg.connect(address, autocommit=True) as watching:
            database = watching.info.dbname
            wait_for(lambda: watching.execute(query, [database]).fetchone()[0], pause=0.01)
            assert count(url) == 3
    writing.join()
    assert count(url) == 4


class TestShown:
    def test_a_dashboard_is_shown_all_but_what_is_ours(self, url: str, tmp_path: Path) -> None:
        for location in (url, tmp_path / "journal.log"):
            fill(open_log(location))
            study = read_storage(location).get_all_studies()[0]._study_id
            whole = read_storage(location).get_all_trials(study)
            shown = shown_storage(location).get_all_trials(study)
            for trial in whole:
                kept = {k: v for k, v in trial.system_attrs.items() if k not in TRIAL_KEYS}
                trial._system_attrs = kept
            assert shown == whole
            assert [trial._trial_id for trial in shown] == [trial._trial_id for trial in whole]
            assert any("constraints" in trial.system_attrs for trial in shown)
            # Studies read a database through a cache of Optuna's: importances and plots do.
            by_study = optuna.load_study(study_name="study", storage=shown_storage(location))
            assert by_study.get_trials() == shown

    def test_studies_of_others_are_shown_as_they_are(self, url: str) -> None:
        open_log(url)
        theirs = optuna.create_study(storage=open_log(url)._storage._backend, study_name="theirs")
        for number in range(3):
            trial = theirs.ask()
            trial.suggest_categorical("kind", ["a", None])
            trial.suggest_int("count", 1, 9)
            trial.set_user_attr("about", {"nested": [number]})
            for step, value in enumerate((1.0, np.inf, np.nan)):
                trial.report(value, step)
            if number:
                theirs.tell(trial, -np.inf if number == 1 else 2.0)
        storage = shown_storage(url)
        shown = storage.get_all_trials(theirs._study_id)
        assert [repr(trial) for trial in shown] == [repr(trial) for trial in theirs.trials]
        running = [optuna.trial.TrialState.RUNNING]
        assert len(storage.get_all_trials(theirs._study_id, states=running)) == 1
        theirs.tell(0, 3.0)
        again = storage.get_all_trials(theirs._study_id, deepcopy=False)
        assert again[0].value == 3.0
        assert again[1] is storage.get_all_trials(theirs._study_id, deepcopy=False)[1]
        with pytest.raises(KeyError):
            storage.get_all_trials(99)
