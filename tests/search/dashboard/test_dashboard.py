"""The dashboard over a real journal, served by a real process and ended as a user would."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import optuna
import optuna_dashboard
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mergesearch.evaluators import Measurement, Objective
from mergesearch.merging import Field, InputError, Recipe, RunFolderError, Source
from mergesearch.search.dashboard.access import Access, find_token, is_loopback, read_token
from mergesearch.search.dashboard.note import note_markdown
from mergesearch.search.dashboard.serving import build_application, likely_paths, serve
from mergesearch.search.dashboard.shared_answers import SharedAnswers
from mergesearch.search.dashboard.shown_storage import shown_storage
from mergesearch.search.record.storage import open_storage
from mergesearch.search.record.trial_log import TrialLog
from mergesearch.search.workers.messages import Outcome

#: The servers of this file are started once, by one worker.
pytestmark = pytest.mark.xdist_group("dashboard")

OBJECTIVES = (Objective("accuracy", "maximize"), Objective("loss_*x*", "minimize"))
NOTE = note_markdown(
    "digits", "runs/digits", OBJECTIVES, winner=1, front=[1, 0], lines=["Winner: trial 1."]
)
# The server's own output says nothing, so the first line is the URL.
SERVE = """
import json
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this behind
from pathlib import Path
from mergesearch.search.dashboard.serving import serve
options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
options["reports"] = {name: Path(path) for name, path in options.get("reports", {}).items()}
report = Path(sys.argv[2]) if sys.argv[2] else None
serve(sys.argv[1], report, port=0, ready=lambda url: print(url, flush=True), **options)
print("ended", flush=True)
"""
TOKEN = "correct-horse-battery-staple"
TEMPLATE = Recipe(Source("", ""), (), "task_arithmetic", Field(np.arange(2), np.zeros((1, 1))))


def make_study(storage: optuna.storages.BaseStorage) -> None:
    study = optuna.create_study(
        storage=storage, study_name="digits", directions=["maximize", "minimize"]
    )
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        study.set_metric_names([objective.name for objective in OBJECTIVES])
    for number in range(3):
        trial = optuna.trial.create_trial(
            values=[0.5 + 0.125 * number, 1.0 - 0.25 * number],
            params={"mean rotated": 0.1 * number},
            distributions={"mean rotated": optuna.distributions.FloatDistribution(-1, 2)},
        )
        study.add_trial(trial)
    optuna_dashboard.save_note(study, NOTE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a run")
    make_study(JournalStorage(JournalFileBackend(str(folder / "journal.log"))))
    return folder


@contextlib.contextmanager
def serving(storage: Path | str, report: Path | str = "", **options: Any) -> Iterator[str]:
    """URL of a server in a process of its own, which must end well."""
    command = [sys.executable, "-c", SERVE, str(storage), str(report), json.dumps(options)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        url = process.stdout.readline().strip()
        try:
            assert url.startswith("http://127.0.0.1:"), process.stderr.read()
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate()
    assert process.returncode == 0
    assert output == "ended\n"
    assert errors == ""


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[str]:
    with serving(run / "journal.log", run / "report.html") as url:
        yield url


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('team')}/studies.db"
    make_study(optuna.storages.RDBStorage(url))
    return url


@pytest.fixture(scope="module")
def closed(database: str) -> Iterator[str]:
    """A server that wants a token and lets notes be written."""
    with serving(database, token=TOKEN, allow_writes=True) as url:
        yield url


def ask(
    url: str, method: str = "GET", body: Any = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """One request, no redirect followed; ``_`` in a header's name stands for ``-``."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = None if body is None else json.dumps(body)
    target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    try:
        connection.request(
            method, target, data, named | ({"Content-Type": "application/json"} if data else {})
        )
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def test_the_study_is_shown_with_names_directions_trials_and_note(server):
    studies = json.loads(ask(f"{server}api/studies")[2])["study_summaries"]
    assert [study["study_name"] for study in studies] == ["digits"]
    detail = json.loads(ask(f"{server}api/studies/{studies[0]['study_id']}")[2])
    assert detail["name"] == "digits"
    assert detail["directions"] == ["maximize", "minimize"]
    assert detail["objective_names"] == ["accuracy", "loss_*x*"]
    assert [trial["values"] for trial in detail["trials"]] == [
        [0.5, 1.0],
        [0.625, 0.75],
        [0.75, 0.5],
    ]
    assert detail["note"]["body"] == NOTE


def test_the_page_itself_is_served(server):
    status, headers, _ = ask(server)
    assert (status, headers["Location"]) == (302, f"{server}dashboard")
    status, headers, page = ask(headers["Location"])
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert b"<script" in page


def test_it_can_only_be_read(server, run):
    before = (run / "journal.log").read_bytes()
    for method, path in [
        ("DELETE", "api/studies/0"),
        ("POST", "api/studies"),
        ("PUT", "api/studies/0/note"),
        ("POST", "report"),
        ("PATCH", ""),
    ]:
        status, headers, body = ask(server + path, method)
        assert status == 405
        assert headers["Allow"] == "GET, HEAD"
        assert body == b"This dashboard is read-only.\n"
    assert (run / "journal.log").read_bytes() == before
    assert len(json.loads(ask(f"{server}api/studies")[2])["study_summaries"]) == 1


def test_the_report_is_served_as_it_is_now(server, run):
    status, _, text = ask(f"{server}report")
    assert status == 404
    assert b"mergesearch run" in text
    for content in (b"<!doctype html><p>first", "<!doctype html><p>zweite Fassung – ß".encode()):
        (run / "report.html").write_bytes(content)
        status, headers, page = ask(f"{server}report")
        assert (status, page) == (200, content)
        assert headers["Content-Type"] == "text/html; charset=utf-8"
    status, headers, page = ask(f"{server}report/", "HEAD")
    assert (status, page, headers["Content-Length"]) == (200, b"", str(len(content)))


def test_new_trials_appear_while_it_runs(server, run):
    storage = JournalStorage(JournalFileBackend(str(run / "journal.log")))
    before = len(json.loads(ask(f"{server}api/studies/0")[2])["trials"])
    optuna.load_study(study_name="digits", storage=storage).ask()
    # The dashboard itself looks again after two seconds at the earliest.
    deadline = 40
    for _ in range(deadline):
        if len(json.loads(ask(f"{server}api/studies/0")[2])["trials"]) == before + 1:
            return
        time.sleep(0.25)
    pytest.fail("the new trial did not appear within ten seconds")


def test_a_database_url_is_served_with_all_its_studies(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    storage = optuna.storages.RDBStorage(url)
    make_study(storage)
    optuna.create_study(storage=storage, study_name="letters")
    with serving(url) as address:
        studies = json.loads(ask(f"{address}api/studies")[2])["study_summaries"]
        assert [study["study_name"] for study in studies] == ["digits", "letters"]
        detail = json.loads(ask(f"{address}api/studies/{studies[1]['study_id']}")[2])
        assert (detail["name"], detail["trials"]) == ("letters", [])


def test_a_port_in_use_is_refused_with_the_next_step(run):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(InputError, match=f"free port, received {port}, .* `--port 0`") as info:
            serve(run / "journal.log", None, port=port)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "--port: expected 0 to 65535, received 70000"),
        (
            {"port": 0, "host": "192.0.2.1", "insecure": True},
            "--host: expected an address to listen on",
        ),
        (
            {"port": 0, "host": "192.0.2.1", "token": TOKEN},
            "--host: expected an address to listen on",
        ),
        (
            {"port": 0, "host": "0.0.0.0"},
            "expected a loopback address for a dashboard without a token",
        ),
        ({"port": 0, "host": "::"}, "--token-file FILE"),
        ({"port": 0, "token": "short"}, "expected a token of 16 or more"),
        ({"port": 0, "proxy_header": "X Forwarded"}, "proxy header: expected a header's name"),
        ({"port": 0, "token": TOKEN, "allow_writes": True}, "writes: expected a database's URL"),
    ],
)
def test_an_address_or_access_that_cannot_be_is_refused(run, options, message):
    with pytest.raises(InputError, match=message) as info:
        serve(run / "journal.log", None, **options)
    assert "\n" not in str(info.value)
    assert TOKEN not in str(info.value)


def test_a_missing_journal_is_refused_and_not_created(tmp_path):
    with pytest.raises(RunFolderError, match="expected the journal of a run"):
        serve(str(tmp_path / "journal.log"), None, port=0)
    assert os.listdir(tmp_path) == []


def test_the_note_names_front_report_and_export_command():
    assert "mergesearch export runs/digits --trial 1 --out digits-trial-1" in NOTE
    assert "[Report](/report)" in NOTE
    assert "Front: trials 1, 0." in NOTE
    assert r"loss\_\*x\* (minimize)" in NOTE
    unfinished = note_markdown("d", "my runs/d", OBJECTIVES[:1], front=[3])
    assert "mergesearch export 'my runs/d' --trial N --out d-trial-N" in unfinished
    assert "Front" not in unfinished  # one objective has a winner, not a front


def test_importing_the_dashboard_loads_no_optuna():
    code = (
        "import sys, mergesearch.search.dashboard; print(sorted({'optuna', 'optuna_dashboard'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def write_trials(
    url: str,
    objectives: tuple[Objective, ...],
    results: list[tuple[list[float], float | None]],
    name: str = "bounded",
) -> TrialLog:
    """Trials with values and how far they miss a bound, by the log of a run."""
    log = TrialLog(open_storage(url), name, objectives, lambda point: TEMPLATE, TEMPLATE)
    for place, (values, missed) in enumerate(results):
        asked = log.ask(
            "search", TEMPLATE, suggestion=place, summary={"x": place / 100}, bounds=(0, 1)
        )
        named = {objective.name: value for objective, value in zip(objectives, values, strict=True)}
        violations = {} if missed is None else {"accuracy at least base": missed}
        log.tell(
            asked.number, Outcome("", Measurement(named, violations=violations), None, {}), place
        )
    return log


def detail_in(application: Any, query: str = "") -> dict[str, Any]:
    """What an application in this process answers about its first study."""
    body = call(application, "/api/studies/1", QUERY_STRING=query)[2]
    return json.loads(body, parse_constant=pytest.fail)


class TestBounds:
    @pytest.mark.parametrize(
        ("objectives", "results", "best"),
        [
            (OBJECTIVES[:1], [([0.9], 0.1), ([0.7], -0.1), ([0.8], 0.0), ([0.6], -0.2)], [2]),
            pytest.param(
                OBJECTIVES[:1],
                [([0.9], 0.1), ([0.8], float("inf")), ([0.7], 1e-9)],
                [],
                marks=pytest.mark.slow,
            ),
            pytest.param(
                OBJECTIVES[:1], [([0.5], None), ([0.9], 0.1)], [0], marks=pytest.mark.slow
            ),
            # 0 dominates all but misses the bound; 3 is dominated by 1, and 4 fits beside it.
            (
                OBJECTIVES,
                [
                    ([0.9, 0.1], 0.5),
                    ([0.8, 0.2], -1.0),
                    ([0.8, 0.2], 0.1),
                    ([0.7, 0.3], 0.0),
                    ([0.9, 0.4], 0.0),
                ],
                [1, 4],
            ),
            pytest.param(OBJECTIVES, [([0.9, 0.1], 0.5)], [], marks=pytest.mark.slow),
            pytest.param(
                OBJECTIVES,
                [([0.9, 0.3], -0.5), ([0.8, 0.2], -0.5), ([0.7, 0.3], 0.0)],
                [0, 1],
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_the_best_trials_keep_them(self, tmp_path, objectives, results, best):
        url = f"sqlite:///{tmp_path}/study.db"
        write_trials(url, objectives, results)
        application = build_application(open_storage(url), Access(), None, {})
        detail = detail_in(application)
        assert [trial["number"] for trial in detail["best_trials"]] == best
        assert [len(trial["constraints"]) for trial in detail["trials"]] == [
            0 if missed is None else 1 for _, missed in results
        ]
        # A viewer asks for the trials that are new to it; the best ones come all the same.
        rest = detail_in(application, f"after={len(results)}")
        assert rest["trials"] == []
        assert rest["best_trials"] == detail["best_trials"]
        assert detail_in(application, "after=1")["trials"] == detail["trials"][1:]

    @pytest.mark.parametrize("objectives", [OBJECTIVES[:1], OBJECTIVES])
    def test_anchors_are_among_them_only_while_nothing_else_is_there(self, tmp_path, objectives):
        storage = open_storage(tmp_path / "journal.log")
        log = TrialLog(storage, "known", objectives, lambda point: TEMPLATE, TEMPLATE)
        names = [objective.name for objective in objectives]
        for kind, name, values in (
            ("anchor", "base", [0.9, 0.1]),
            ("search", "", [0.8, 0.2]),
            ("taken", "run-1", [0.8, 0.4]),
        ):
            asked = log.ask(kind, TEMPLATE, name=name, summary={"x": 0.5}, bounds=(0, 1))
            named = dict(zip(names, values, strict=False))
            log.tell(asked.number, Outcome("", Measurement(named), None, {}), None)
            shown = shown_storage(tmp_path / "journal.log")
            application = build_application(shown, Access(), None, {})
            detail = json.loads(call(application, "/api/studies/0")[2])
            assert [trial["number"] for trial in detail["best_trials"]] == [min(asked.number, 1)]
            about = {each["key"]: each["value"] for each in detail["trials"][-1]["user_attrs"]}
            assert about["kind"] == kind
            assert about.get("name", "") == name

    def test_without_bounds_the_answer_is_the_dashboards_own(self, tmp_path):
        url = f"sqlite:///{tmp_path}/study.db"
        make_study(optuna.storages.RDBStorage(url))
        bare = optuna_dashboard.wsgi(open_storage(url))
        application = build_application(open_storage(url), Access(), None, {})
        assert detail_in(application) == json.loads(call(bare, "/api/studies/1")[2])

    def test_a_prepared_answer_waits_for_the_first_viewer(self, tmp_path):
        fill = open_storage(tmp_path / "journal.log")
        for name in ("first", "second"):
            TrialLog(fill, name, OBJECTIVES, lambda point: TEMPLATE, TEMPLATE)
        storage = shown_storage(tmp_path / "journal.log")
        asked: list[str] = []
        dashboard = optuna_dashboard.wsgi(storage)

        def counted(environ, start_response):
            asked.append(environ["PATH_INFO"])
            return dashboard(environ, start_response)

        shared = SharedAnswers(counted)
        paths = likely_paths(storage)
        assert paths == ["/api/studies", "/api/studies/1", "/api/studies/0"]
        shared.prepare(paths)
        assert asked == paths
        assert [json.loads(call(shared, path)[2])["name"] for path in paths[1:]] == [
            *("second", "first")
        ]
        assert asked == paths

    def test_what_there_is_not_is_refused(self, server):
        assert ask(f"{server}api/studies/99")[0] == 404
        for after in ("-1", "x", ""):
            assert ask(f"{server}api/studies/0?after={after}")[0] == 400


def call(application: Any, path: str, **environ: str) -> tuple[str, dict[str, str], bytes]:
    started: list[Any] = []
    base = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "HTTP_HOST": "localhost",
    }
    chunks = application(
        base | {"wsgi.errors": sys.stderr} | environ, lambda *args: started.extend(args)
    )
    return started[0], dict(started[1]), b"".join(chunks)


@pytest.mark.slow
class TestCost:
    def test_a_second_poll_reads_no_finished_trial_again(self, tmp_path):
        import sqlalchemy

        url = f"sqlite:///{tmp_path}/study.db"
        log = write_trials(url, OBJECTIVES, [([number / 60, 0.5], -0.1) for number in range(60)])
        storage = open_storage(url)
        application = build_application(storage, Access(), None, {})
        read: list[str] = []
        listen = sqlalchemy.event.listens_for(storage._backend.engine, "before_cursor_execute")
        listen(lambda connection, cursor, statement, *rest: read.append(statement))

        def poll() -> list[int]:
            read.clear()
            body = call(application, "/api/studies/1")[2]
            return [trial["number"] for trial in json.loads(body)["trials"]]

        def poll_anew() -> list[int]:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                numbers = poll()
                if read:
                    return numbers
                time.sleep(0.1)
            return pytest.fail("nothing was read again within a minute")

        def of_trials() -> list[str]:
            return [statement for statement in read if "FROM trial_" in statement]

        assert poll() == list(range(60))
        assert of_trials()
        assert poll() == list(range(60))
        assert read == []  # within seconds nothing is read at all
        assert poll_anew() == list(range(60))
        assert of_trials() == []
        log.ask("search", TEMPLATE, suggestion=60, summary={"x": 0.5}, bounds=(0, 1))
        assert poll_anew() == list(range(61))  # and a new one is found
        assert of_trials()

    def test_viewers_at_once_share_one_answer(self, tmp_path):
        import sqlalchemy

        url = f"sqlite:///{tmp_path}/study.db"
        write_trials(url, OBJECTIVES, [([number / 60, 0.5], -0.1) for number in range(60)])
        storage = open_storage(url)
        application = build_application(storage, Access(), None, {})
        read: list[str] = []
        listen = sqlalchemy.event.listens_for(storage._backend.engine, "before_cursor_execute")
        listen(lambda connection, cursor, statement, *rest: read.append(statement))
        viewers = [
            threading.Thread(target=call, args=(application, "/api/studies/1")) for _ in range(8)
        ]
        for viewer in viewers:
            viewer.start()
        for viewer in viewers:
            viewer.join()
        assert sum("FROM trial_params" in statement for statement in read) == 1

    def test_long_answers_are_compressed_for_those_who_accept_it(self, tmp_path):
        url = f"sqlite:///{tmp_path}/study.db"
        write_trials(url, OBJECTIVES, [([number / 60, 0.5], -0.1) for number in range(60)])
        with serving(url) as address:
            plain = ask(f"{address}api/studies/1")
            small = ask(f"{address}api/studies/1", Accept_Encoding="br, gzip;q=0.5")
            refused = ask(f"{address}api/studies/1", Accept_Encoding="br, gzip;q=0")
            assert ask(f"{address}api/meta", Accept_Encoding="gzip")[1]["Content-Encoding"] is None
            script = ask(f"{address}static/bundle.js", Accept_Encoding="gzip")
            assert b"optuna" in gzip.decompress(script[2]).lower()  # once, not twice
        assert (plain[1]["Content-Encoding"], small[1]["Content-Encoding"]) == (None, "gzip")
        assert small[1]["Vary"] == "Accept-Encoding"
        assert gzip.decompress(small[2]) == plain[2] == refused[2]
        assert len(small[2]) < len(plain[2]) / 4


class TestToken:
    PATHS = (
        "",
        "dashboard",
        "api/studies",
        "api/studies/1",
        "static/bundle.js",
        "report",
        "artifacts/1/ab",
        "csv/1",
    )

    @pytest.mark.parametrize("path", PATHS)
    def test_nothing_is_shown_without_it(self, closed, path):
        wrong = {"Cookie": "mergesearch_000000000000=99999999999.aa"}
        for query, headers in [
            ("", {}),
            ("?token=", {}),
            ("?token=wrong-horse-battery-st", {}),
            ("", wrong),
        ]:
            status, found, body = ask(f"{closed}{path}{query}", **headers)
            assert status == 401
            assert found["WWW-Authenticate"].startswith("Bearer")
            assert body.count(b"\n") == 1
            assert b"?token=TOKEN" in body
            assert TOKEN.encode() not in body
        assert ask(f"{closed}{path}", Authorization="Bearer wrong-horse-battery-st")[0] == 401
        assert ask(f"{closed}{path}", Authorization=f"Basic {TOKEN}")[0] == 401
        assert ask(f"{closed}{path}", Authorization=f"Bearer {TOKEN}")[0] != 401

    def test_once_given_a_cookie_stands_for_it(self, closed):
        status, headers, body = ask(f"{closed}dashboard/studies/1?token={TOKEN}&best=true")
        assert (status, headers["Location"], body) == (303, "/dashboard/studies/1?best=true", b"")
        cookie = headers["Set-Cookie"]
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {
            part.strip() for part in cookie.split(";")
        }
        assert "Secure" not in cookie  # it would not come back over plain HTTP
        assert TOKEN not in cookie
        kept = cookie.partition(";")[0]
        assert ask(f"{closed}api/studies", Cookie=f"other=1; {kept}")[0] == 200
        name, _, value = kept.partition("=")
        until, _, digest = value.partition(".")
        later = f"{name}={int(until) + 1}.{digest}"
        assert ask(f"{closed}api/studies", Cookie=later)[0] == 401
        assert (
            ask(f"{closed}api/studies", Cookie=kept[:-1] + ("0" if kept[-1] != "0" else "1"))[0]
            == 401
        )

    def test_a_cookie_ends(self):
        from mergesearch.search.dashboard.access import _cookie_name, _session

        application = build_application(
            optuna.storages.InMemoryStorage(), Access(TOKEN, any_host=True), None, {}
        )
        for seconds, status in ((60, "200 OK"), (-1, "401 Unauthorized")):
            cookie = f"{_cookie_name(TOKEN)}={_session(TOKEN, int(time.time()) + seconds)}"
            assert call(application, "/api/studies", HTTP_COOKIE=cookie)[0] == status

    def test_behind_tls_the_cookie_stays_there(self, closed):
        assert (
            "; Secure" in ask(f"{closed}?token={TOKEN}", X_Forwarded_Proto="https")[1]["Set-Cookie"]
        )

    def test_a_link_on_another_site_gets_a_page_that_goes_on(self, closed):
        """A browser would not send a strict cookie along a redirect that another site began."""
        status, headers, page = ask(f"{closed}report?token={TOKEN}", Sec_Fetch_Site="cross-site")
        assert status == 200
        assert "SameSite=Strict" in headers["Set-Cookie"]
        assert b'content="0;url=/report"' in page

    @pytest.mark.parametrize(
        "path", ["//elsewhere.test/", "/%5C%5Celsewhere.test", "/a%0d%0aSet-Cookie:%20b"]
    )
    def test_the_redirect_stays_here(self, closed, path):
        location = ask(f"{closed.rstrip('/')}/?token={TOKEN}".replace("/?", f"{path}?"))[1][
            "Location"
        ]
        assert location.startswith("/")
        assert location[1] not in "/\\"
        assert "\r" not in location

    def test_answers_are_kept_from_frames_and_guesses_of_their_kind(self, closed):
        headers = ask(f"{closed}dashboard", Authorization=f"Bearer {TOKEN}")[1]
        assert (headers["X-Frame-Options"], headers["X-Content-Type-Options"]) == (
            "SAMEORIGIN",
            "nosniff",
        )


class TestWrites:
    """With a token and from the dashboard's own page, notes can be edited; nothing else ever."""

    def test_a_note_is_written_and_seen_at_once(self, closed):
        key = f"Bearer {TOKEN}"
        own = closed.rstrip("/")
        detail = json.loads(ask(f"{closed}api/studies/1", Authorization=key)[2])
        note = {"version": detail["note"]["version"] + 1, "body": "Seen by the team."}
        assert (
            ask(f"{closed}api/studies/1/note", "PUT", note, Authorization=key, Origin=own)[0] == 204
        )
        assert json.loads(ask(f"{closed}api/studies/1", Authorization=key)[2])["note"] == note
        trial = detail["trials"][0]["trial_id"]
        assert (
            ask(
                f"{closed}api/studies/1/{trial}/note",
                "PUT",
                note | {"version": 1},
                Authorization=key,
            )[0]
            == 204
        )

    def test_other_sites_cannot_write(self, closed):
        note = {"version": 1000, "body": "not ours"}
        cookie = ask(f"{closed}?token={TOKEN}")[1]["Set-Cookie"].partition(";")[0]
        port = urlsplit(closed).port
        for headers in (
            {"Origin": "http://elsewhere.test"},
            {"Origin": "null"},
            {"Origin": f"http://127.0.0.1:{port + 1}"},
            {"Origin": f"http://localhost:{port}"},
            {"Origin": closed.rstrip("/"), "Sec_Fetch_Site": "same-site"},
            {},  # browsers always say where a write comes from
        ):
            assert (
                ask(f"{closed}api/studies/1/note", "PUT", note, Cookie=cookie, **headers)[0] == 403
            )
        foreign = {"Authorization": f"Bearer {TOKEN}", "Origin": "http://elsewhere.test"}
        assert ask(f"{closed}api/studies/1/note", "PUT", note, **foreign)[0] == 403
        assert ask(f"{closed}api/studies/1/note", "PUT", note, Origin=closed.rstrip("/"))[0] == 401

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("DELETE", "api/studies/1"),
            ("POST", "api/studies"),
            ("POST", "api/studies/1/rename"),
            ("POST", "api/trials/1/tell"),
            ("POST", "api/trials/1/user-attrs"),
            ("POST", "api/artifacts/1"),
            ("PUT", "api/studies/1/preference_feedback_component"),
            ("PUT", "api/studies/1/../1/note/x"),
            ("POST", "api/studies/1/note"),
        ],
    )
    def test_results_cannot_be_changed(self, closed, method, path):
        headers = {"Authorization": f"Bearer {TOKEN}", "Origin": closed.rstrip("/")}
        assert ask(f"{closed}{path}", method, {}, **headers)[0] == 405
        assert len(json.loads(ask(f"{closed}api/studies", **headers)[2])["study_summaries"]) == 1

    def test_they_need_a_token(self, database):
        with pytest.raises(InputError, match="writes: expected a token"):
            serve(database, None, port=0, allow_writes=True)


class _Proxy(http.server.BaseHTTPRequestHandler):
    """Knows users by their password and tells the server behind it who they are, as nginx would."""

    behind = ""

    def do_GET(self) -> None:
        headers = {"Accept-Encoding": "identity"}
        if self.headers["Authorization"] == "Basic YWRhOnB3":
            headers["X-Forwarded-User"] = "ada"
        # What a proxy hands on of the client's own headers.
        headers |= {name: value for name, value in self.headers.items() if "_" in name}
        connection = http.client.HTTPConnection(urlsplit(self.behind).netloc, timeout=30)
        connection.request("GET", self.path, headers=headers)
        reply = connection.getresponse()
        status = reply.status
        body = reply.read()
        connection.close()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def proxy(behind: str) -> Iterator[str]:
    handler = type("Handler", (_Proxy,), {"behind": behind})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as front:
        thread = threading.Thread(target=front.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{front.server_port}/"
        front.shutdown()
        thread.join()


def test_behind_a_proxy_only_known_users_are_let_in(database):
    with serving(database, proxy_header="X-Forwarded-User") as url, proxy(url) as front:
        assert ask(f"{front}api/studies", Authorization="Basic YWRhOnB3")[0] == 200
        status, _, body = ask(f"{front}api/studies")
        assert (status, body) == (
            401,
            b"expected X-Forwarded-User, received none; open it through the proxy\n",
        )
        assert ask(f"{url}api/studies", X_Forwarded_User=" ")[0] == 401
        # To WSGI it would be the same header, and proxies do not take it away.
        assert raw(url, "X_Forwarded_User: mallory") == 401
        assert raw(front, "X_Forwarded_User: mallory") == 401
        assert raw(url, "X-Forwarded-User: ada") == 200


def raw(url: str, header: str) -> int:
    """Status of a request with one header more, as it is written here."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(
            f"GET /api/studies HTTP/1.1\r\nHost: {parts.netloc}\r\n{header}\r\n\r\n".encode()
        )
        return int(connection.recv(1 << 16).split()[1])


def test_without_a_token_only_this_machines_names_open_it(server):
    """A page elsewhere can have its own name point to this machine."""
    port = urlsplit(server).port
    assert [
        ask(f"{server}api/studies", Host=f"{name}:{port}")[0] for name in ("localhost", "[::1]")
    ] == [200, 200]
    for name in ("elsewhere.test", "127.0.0.1.elsewhere.test", "", "[::"):
        assert ask(f"{server}api/studies", Host=f"{name}:{port}")[0] == 403


def test_reports_of_several_runs_are_served_by_name(run, tmp_path):
    (tmp_path / "a.html").write_text("<p>a")
    reports = {"digits & co": str(tmp_path / "a.html"), "later": str(tmp_path / "b.html")}
    with serving(run / "journal.log", reports=reports) as url:
        index = ask(f"{url}report")
        assert b'href="/report/digits%20%26%20co">digits &amp; co<' in index[2]
        assert ask(f"{url}report/digits%20%26%20co")[2] == b"<p>a"
        assert ask(f"{url}report/later")[0] == 404
        assert ask(f"{url}report/../journal.log")[0] == 404


class TestTokenFile:
    def test_a_missing_one_is_made_for_its_owner_alone(self, tmp_path):
        path = tmp_path / "new" / "token"
        token = read_token(path)
        assert len(token) >= 43
        assert path.stat().st_mode & 0o777 == 0o600
        assert read_token(path) == find_token(path, {}) == token
        assert read_token(tmp_path / "another") != token

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
    def test_one_that_others_can_read_is_refused(self, tmp_path, mode):
        path = tmp_path / "token"
        path.write_text(TOKEN)
        path.chmod(mode)
        with pytest.raises(InputError, match=f"received mode 0{mode:o}; run `chmod 600`") as info:
            read_token(path)
        assert TOKEN not in str(info.value)

    @pytest.mark.parametrize(
        "content",
        [b"", b"short", b"two words in one token", "zu große Geheimnisse".encode(), b"\xff" * 20],
    )
    def test_one_without_a_good_token_is_refused(self, tmp_path, content):
        path = tmp_path / "token"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(InputError, match=r"expected a (file with a )?token") as info:
            read_token(path)
        assert "\n" not in str(info.value)

    def test_a_folder_is_refused(self, tmp_path):
        with pytest.raises(
            InputError, match="expected a file with a token, received: Is a directory"
        ):
            read_token(tmp_path)

    def test_the_environment_is_looked_at_without_a_file(self, tmp_path):
        environment = {"MERGESEARCH_DASHBOARD_TOKEN": f"{TOKEN}\n"}
        assert find_token(None, environment) == TOKEN
        assert find_token(tmp_path / "token", environment) != TOKEN
        assert find_token(None, {}) is None
        with pytest.raises(InputError, match="MERGESEARCH_DASHBOARD_TOKEN: expected a token"):
            find_token(None, {"MERGESEARCH_DASHBOARD_TOKEN": "short"})


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("Localhost", True),
        ("0.0.0.0", False),
        ("::", False),
    ],
)
def test_loopback_is_known(host, loopback):
    assert is_loopback(host) is loopback
