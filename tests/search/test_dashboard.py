"""The dashboard over a real journal, served by a real process and ended as a user would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import optuna_dashboard
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from evaluators import Objective
from merging import InputError, RunFolderError
from search.dashboard import note_markdown, serve

OBJECTIVES = (Objective("accuracy", "maximize"), Objective("loss_*x*", "minimize"))
NOTE = note_markdown("digits", "runs/digits", OBJECTIVES, winner=1, front=[1, 0], lines=["Winner: trial 1."])
# The server's own output says nothing, so the first line is the URL.
SERVE = """
import sys
import time
from pathlib import Path
from search.dashboard import serve
serve(sys.argv[1], Path(sys.argv[2]), port=0, ready=lambda url: print(url, flush=True))
print("ended", flush=True)
"""


def make_study(storage: optuna.storages.BaseStorage) -> None:
    study = optuna.create_study(storage=storage, study_name="digits", directions=["maximize", "minimize"])
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


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[str]:
    command = [sys.executable, "-c", SERVE, str(run / "journal.log"), str(run / "report.html")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        try:
            assert url.startswith("http://127.0.0.1:"), process.stderr.read()
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert output == "ended\n"
    assert errors == ""


def fetch(url: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, method=method, data=b"{}" if method in ("POST", "PUT") else None)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_the_study_is_shown_with_names_directions_trials_and_note(server):
    studies = json.loads(fetch(f"{server}api/studies")[2])["study_summaries"]
    assert [study["study_name"] for study in studies] == ["digits"]
    detail = json.loads(fetch(f"{server}api/studies/{studies[0]['study_id']}")[2])
    assert detail["name"] == "digits"
    assert detail["directions"] == ["maximize", "minimize"]
    assert detail["objective_names"] == ["accuracy", "loss_*x*"]
    assert [trial["values"] for trial in detail["trials"]] == [[0.5, 1.0], [0.625, 0.75], [0.75, 0.5]]
    assert detail["note"]["body"] == NOTE


def test_the_page_itself_is_served(server):
    status, headers, page = fetch(server)
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
        status, headers, body = fetch(server + path, method)
        assert status == 405
        assert headers["Allow"] == "GET, HEAD"
        assert body == b"This dashboard is read-only.\n"
    assert (run / "journal.log").read_bytes() == before
    assert len(json.loads(fetch(f"{server}api/studies")[2])["study_summaries"]) == 1


def test_the_report_is_served_as_it_is_now(server, run):
    status, _, text = fetch(f"{server}report")
    assert status == 404
    assert b"mergesearch run" in text
    for content in (b"<!doctype html><p>first", "<!doctype html><p>zweite Fassung – ß".encode()):
        (run / "report.html").write_bytes(content)
        status, headers, page = fetch(f"{server}report")
        assert (status, page) == (200, content)
        assert headers["Content-Type"] == "text/html; charset=utf-8"
    status, headers, page = fetch(f"{server}report/", "HEAD")
    assert (status, page, headers["Content-Length"]) == (200, b"", str(len(content)))


def test_new_trials_appear_while_it_runs(server, run):
    storage = JournalStorage(JournalFileBackend(str(run / "journal.log")))
    before = len(json.loads(fetch(f"{server}api/studies/0")[2])["trials"])
    optuna.load_study(study_name="digits", storage=storage).ask()
    # The dashboard itself looks again after two seconds at the earliest.
    deadline = 40
    for _ in range(deadline):
        if len(json.loads(fetch(f"{server}api/studies/0")[2])["trials"]) == before + 1:
            return
        time.sleep(0.25)
    pytest.fail("the new trial did not appear within ten seconds")


def test_a_database_url_is_served_too(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    make_study(optuna.storages.RDBStorage(url))
    command = [sys.executable, "-c", SERVE, url, str(tmp_path / "report.html")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        try:
            assert json.loads(fetch(f"{address}api/studies")[2])["study_summaries"][0]["study_name"] == "digits"
        finally:
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "ended\n")


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
        ({"port": 0, "host": "192.0.2.1"}, "--host: expected an address to listen on"),
    ],
)
def test_an_address_that_cannot_be_bound_is_refused(run, options, message):
    with pytest.raises(InputError, match=message):
        serve(run / "journal.log", None, **options)


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
    code = "import sys, search.dashboard; print(sorted({'optuna', 'optuna_dashboard'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
