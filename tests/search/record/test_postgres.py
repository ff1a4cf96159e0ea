"""Studies in a real PostgreSQL: one driver each, and no trial lost or recorded twice."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import psycopg
import pytest

from mergesearch.merging import InputError, RunFolderError, StudyFailedError
from mergesearch.search.plan.loading import load_study
from mergesearch.search.record.lease import Holder, Lease, holder_of
from mergesearch.search.record.storage import StorageAway, open_engine, read_storage
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import open_run
from tests.commands import run_command
from tests.postgres import Gate, Server
from tests.search.studies import analytic, fingerprint, spec_of, write_study
from tests.waiting import PATIENT, wait_for

T = TypeVar("T")

pytestmark = pytest.mark.xdist_group("postgres")

TRIALS = 40
EVALUATOR = {"kind": "synthetic", "problem": "sphere", "items": 10, "noise": 0.05, "seconds": 0.02}


@pytest.fixture
def server(postgres: Server) -> Server:
    return postgres


@pytest.fixture
def url(server: Server) -> str:
    return server.url(database=server.database())


def study(url: str | None, name: str = "shared", **keys: object) -> dict:
    data = analytic(name, trials=TRIALS, evaluators=[EVALUATOR], **keys)
    return data if url is None else data | {"storage": url}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """The same study in a journal."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return fingerprint(run_study(spec_of(study(None), folder), folder / "run"))


def start(path: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = run_command(path, folder, *more)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished_trials(url: str) -> int:
    """Trials that the database holds as finished."""
    address = url.replace("@", f":{os.environ['PGPASSWORD']}@")
    with psycopg.connect(address) as connection:
        try:
            return connection.execute(
                "SELECT count(*) FROM trials WHERE state <> 'RUNNING'"
            ).fetchone()[0]
        except psycopg.errors.UndefinedTable:
            return 0


def await_finished(url: str, count: int, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: finished_trials(url) >= count, process, pause=0.05)


def test_a_study_is_the_same_in_postgresql_as_in_a_journal(
    url: str, tmp_path: Path, undisturbed: list[tuple]
) -> None:
    run = run_study(spec_of(study(url), tmp_path), tmp_path / "run")
    assert fingerprint(run) == undisturbed
    assert fingerprint(open_run(tmp_path / "run")) == undisturbed
    assert not (tmp_path / "run" / "journal.log").exists()


@pytest.mark.slow
def test_a_killed_driver_is_followed_by_one_in_another_folder(
    url: str, tmp_path: Path, undisturbed: list[tuple]
) -> None:
    """A driver that is known to be dead is not outlasted: its lease would be, for an hour."""
    path = write_study(study(url, driver={"lease_seconds": 3600}), tmp_path)
    first = start(path, tmp_path / "one host")
    await_finished(url, 12, first)
    first.kill()
    first.wait()
    before = finished_trials(url)
    assert 12 <= before < TRIALS
    second = start(path, tmp_path / "another host")
    _, errors = second.communicate(timeout=PATIENT)
    assert second.returncode == 0, errors
    assert fingerprint(open_run(tmp_path / "another host")) == undisturbed


def connections(url: str) -> int:
    """How many connections the database has, beside this one."""
    address = url.replace("@", f":{os.environ['PGPASSWORD']}@")
    with psycopg.connect(address) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
        return connection.execute(query, [connection.info.dbname]).fetchone()[0] - 1


def test_a_second_driver_is_refused_with_the_name_of_the_first(url: str, tmp_path: Path) -> None:
    data = study(url, driver={"lease_seconds": 12})
    path = write_study(data | {"evaluators": [EVALUATOR | {"seconds": 0.1}]}, tmp_path)
    first = start(path, tmp_path / "one")
    await_finished(url, 5, first)
    first.send_signal(signal.SIGSTOP)  # so that it does not end before the other comes
    before = connections(url)
    second = start(path, tmp_path / "two")
    # One is for the record, the next one for the lease.
    wait_for(lambda: connections(url) > before + 1, second, pause=0.05)
    first.send_signal(signal.SIGCONT)
    _, errors = second.communicate(timeout=PATIENT)
    assert second.returncode == 2
    assert f"found process {first.pid} on" in errors
    assert errors.count("\n") <= 2, errors
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert holder_of(open_engine(url), "shared") is None


@pytest.mark.slow
def test_several_studies_share_a_database(
    url: str, tmp_path: Path, undisturbed: list[tuple]
) -> None:
    running = []
    for name, seed in (("shared", 7), ("other", 8)):
        data = study(url, name) | ({} if name == "shared" else {"seed": seed})
        (tmp_path / name).mkdir()
        running.append(start(write_study(data, tmp_path / name), tmp_path / name / "run"))
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert fingerprint(open_run(tmp_path / "shared" / "run")) == undisturbed
    assert fingerprint(open_run(tmp_path / "other" / "run")) != undisturbed


def test_another_study_of_the_same_name_is_refused(url: str, tmp_path: Path) -> None:
    run_study(spec_of(study(url) | {"budget": {"trials": 9}}, tmp_path), tmp_path / "one")
    with pytest.raises(RunFolderError, match=r"differs in seed: 7 -> 9; restore"):
        run_study(
            spec_of(study(url) | {"budget": {"trials": 9}, "seed": 9}, tmp_path), tmp_path / "two"
        )


@pytest.mark.slow
def test_a_server_that_crashes_and_an_unreachable_one_cost_no_trial(
    server: Server, tmp_path: Path, undisturbed: list[tuple]
) -> None:
    gate = Gate(server.port)
    database = server.database()
    url = server.url(gate.port, database)
    direct = server.url(database=database)
    process = start(write_study(study(url), tmp_path), tmp_path / "run")
    await_finished(direct, 8, process)
    server.stop(signal.SIGQUIT)  # as in a crash: transactions in flight are lost
    time.sleep(1)
    server.start()
    await_finished(direct, 16, process)
    gate.cut()
    time.sleep(4)
    assert process.poll() is None
    gate.open()
    _, errors = process.communicate(timeout=120)
    gate.cut()
    assert process.returncode == 0, errors
    assert errors.count("trying again for up to 300 s") == 2
    assert errors.count("answers again after") == 2
    assert server.password not in errors
    spec = load_study(write_study(study(direct), tmp_path))
    assert fingerprint(run_study(spec, tmp_path / "run again")) == undisturbed


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_a_commit_whose_answer_is_lost_is_not_repeated(
    url: str, tmp_path: Path, undisturbed: list[tuple], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks at some commits, before the server has them, or after."""
    from sqlalchemy.engine.default import DefaultDialect

    from mergesearch.search.record.postgres_trials import PostgresTrials

    commit = DefaultDialect.do_commit
    send = PostgresTrials._send
    count = 0
    random = np.random.default_rng(0)

    def broken(connection: psycopg.Connection, act: Callable[[], T]) -> T:
        nonlocal count
        count += 1
        cut = count > 20 and random.random() < 0.1 and connection.info.dbname in url
        if cut and when == "before":
            connection.close()
        done = act()
        if cut:
            connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return done

    def breaking(dialect: DefaultDialect, pooled: object) -> None:
        broken(pooled.dbapi_connection, lambda: commit(dialect, pooled))

    def breaking_round(trials: PostgresTrials, parameters: dict) -> object:
        trials._connection = trials._connection or trials._engine.raw_connection()
        connection = trials._connection.driver_connection
        try:
            return broken(connection, lambda: send(trials, parameters))
        except psycopg.Error as error:
            trials._connection.invalidate()
            trials._connection = None
            raise StorageAway(str(error)) from error

    monkeypatch.setattr(DefaultDialect, "do_commit", breaking)
    monkeypatch.setattr(PostgresTrials, "_send", breaking_round)
    run = run_study(spec_of(study(url), tmp_path), tmp_path / "run")
    assert count > 80
    assert fingerprint(run) == undisturbed


@pytest.mark.slow
def test_a_storage_that_stays_away_ends_the_study_resumably(server: Server, tmp_path: Path) -> None:
    gate = Gate(server.port)
    database = server.database()
    data = study(
        server.url(gate.port, database), driver={"patience_seconds": 2, "lease_seconds": 600}
    )
    process = start(write_study(data, tmp_path), tmp_path / "run")
    await_finished(server.url(database=database), 8, process)
    gate.cut()
    _, errors = process.communicate(timeout=PATIENT)
    assert process.returncode == 1
    assert "storage: expected it to come back within 2 s" in errors.splitlines()[-1]
    assert "Traceback" not in errors


class TestLease:
    def lease(
        self, url: str, seconds: float = 1.0, process: str = "elsewhere:1", name: str = "somebody"
    ) -> Lease:
        return Lease(open_engine(url), "s", seconds, holder=Holder(name, process))

    def test_it_is_refused_while_the_holder_beats_and_free_after_release(self, url: str) -> None:
        first = self.lease(url)
        second = self.lease(url, name="newcomer")
        first.take()
        with pytest.raises(RunFolderError, match="found somebody; wait"):
            second.take()
        first.release()
        second.take()
        assert holder_of(open_engine(url), "s") == "newcomer"
        second.release()

    def test_a_silent_holder_is_outlasted_and_may_not_write_again(self, url: str) -> None:
        first = self.lease(url)
        second = self.lease(url, name="newcomer")
        first.take()
        first._released.set()  # its thread stops beating, as in a stopped process
        began = time.monotonic()
        second.take()
        assert 0.9 < time.monotonic() - began < 10
        first._released.clear()
        first._confirmed = 0.0  # as long ago as the machine's start
        with pytest.raises(StudyFailedError, match="found newcomer, which took it over"):
            first.check()
        second.check()
        second.release()

    def test_of_many_newcomers_one_wins(self, url: str) -> None:
        leases = [self.lease(url, 2.0, name=f"driver {n}") for n in range(6)]
        won = []
        refused = []

        def contend(lease: Lease) -> None:
            try:
                lease.take()
                won.append(lease)
            except RunFolderError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=contend, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENT)
        assert (len(won), len(refused)) == (1, 5)
        assert all(won[0]._holder.name in text for text in refused)
        won[0].release()

    def test_a_holder_whose_process_is_gone_from_this_machine_is_not_waited_for(
        self, url: str
    ) -> None:
        gone = subprocess.Popen(["true"])
        gone.wait()
        process = Holder.here().process.rpartition(":")[0] + f":{gone.pid}"
        first = self.lease(url, 600.0, process=process)
        first.take()
        first._released.set()
        second = self.lease(url, 600.0)
        began = time.monotonic()
        second.take()
        assert time.monotonic() - began < 5
        second.release()


def test_a_reader_needs_no_right_to_write(server: Server, url: str, tmp_path: Path) -> None:
    """What a dashboard's account has; and reading creates nothing."""
    database = url.rpartition("/")[2]
    with pytest.raises(RunFolderError, match="expected a database with studies, found none"):
        read_storage(url)
    run = run_study(spec_of(study(url) | {"budget": {"trials": 9}}, tmp_path), tmp_path / "run")
    with psycopg.connect(server.address(database), autocommit=True) as connection:
        name = f"reader_{database}"
        connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{server.password}'")
        connection.execute(f"GRANT USAGE ON SCHEMA public TO {name}")
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}")
    reading = read_storage(url.replace("mergesearch@", f"{name}@"))
    assert reading.get_n_trials(reading.get_study_id_from_name("shared")) == len(run.log.records)
    with pytest.raises(Exception, match="An exception is raised"):
        reading.set_study_system_attr(reading.get_study_id_from_name("shared"), "x", 1)
    with pytest.raises(RunFolderError, match="found none"):
        read_storage(f"sqlite:///{tmp_path}/nothing.db")
    assert not (tmp_path / "nothing.db").exists()


def test_storages_that_cannot_hold_a_lease_and_plain_passwords_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"storage: expected a database's URL .* received redis://cache/0"
    ):
        load_study(write_study(study("redis://cache/0"), tmp_path))
    with pytest.raises(InputError, match=r"expected the password as \$\{NAME\}") as error:
        load_study(write_study(study("postgresql://me:hunter2@db/x"), tmp_path))
    assert "hunter2" not in str(error.value)
