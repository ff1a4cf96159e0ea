"""Serves optuna-dashboard over a run, or over a team's database with many studies.

optuna-dashboard has no authentication, would delete studies on request, shows trials that miss
their bounds as the best ones, and reads and serialises everything anew for each viewer. So it is
served here behind layers: :mod:`mergesearch.search.dashboard.access` decides who may see and change
what, ``/report`` serves the runs' own pages, and
:mod:`mergesearch.search.dashboard.shared_answers` corrects and shares what browsers poll.
"""

from __future__ import annotations

import contextlib
import errno
import html
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from mergesearch.merging import InputError
from mergesearch.search.dashboard.access import Access, answer, guarded, is_loopback
from mergesearch.search.dashboard.answers import compressed
from mergesearch.search.dashboard.shared_answers import SharedAnswers
from mergesearch.search.record.shown import attached_files

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from mergesearch.search.record.storage import Storage

#: A client that says nothing for so many seconds is dropped.
SILENT_SECONDS = 60
#: Pages of so many studies, the latest ones, are made before anybody asks.
LATEST = 3


def serve(
    storage: str | Path,
    report: Path | None,
    *,
    reports: Mapping[str, Path] | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    proxy_header: str | None = None,
    allow_writes: bool = False,
    insecure: bool = False,
    artifacts: Path | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until Ctrl-C.

    Args:
        storage: Journal file, or any Optuna storage URL; all its studies are shown.
        report: The run's ``report.html``, read anew for each request; it may not exist yet.
        reports: Name -> report of a run, for ``/report/NAME``.
        host: Address to bind.
        port: Port to bind; 0 picks a free one.
        token: Secret that every request must bring (see
            :func:`mergesearch.search.dashboard.access.find_token`).
        proxy_header: Header that a reverse proxy sets for users it knows; requests without it are
            refused.
        allow_writes: Allow users to edit notes; needs a token and a database.
        insecure: Bind beyond loopback without token and proxy.
        artifacts: Folder of the files that a run's study offers; it may not exist yet.
        ready: Called with the server's URL once it answers.

    Raises:
        RunFolderError: If there is no journal.
        InputError: If the storage cannot be opened, the address cannot be bound, or the options
            would let in anyone.
    """
    location = storage if isinstance(storage, Path) or "://" in storage else Path(storage)
    closed = token is not None or proxy_header is not None
    if not (closed or insecure or is_loopback(host)):
        raise InputError(
            "--host: expected a loopback address for a dashboard without a token, received "
            f"{host}; give `--token-file FILE`, or stay on 127.0.0.1 behind a proxy"
        )
    if allow_writes and isinstance(location, Path):
        raise InputError(
            f"writes: expected a database's URL, received the journal {location}, which only the "
            "run may write"
        )
    access = Access(token, proxy_header, allow_writes, any_host=closed or insecure)
    from mergesearch.search.dashboard.shown_storage import shown_storage

    opened = shown_storage(location)
    shared = shared_dashboard(opened, artifacts)
    application = guarded(compressed(with_reports(shared, report, reports or {})), access)

    def prepare() -> None:
        # Whoever asks for what could not be prepared is told why.
        with contextlib.suppress(Exception):
            shared.prepare(likely_paths(opened))

    with bind(host, port, application) as server:
        threading.Thread(target=prepare, name="prepare", daemon=True).start()
        if ready is not None:
            ready(f"http://{_quoted(host)}:{server.server_port}/")
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            server.serve_forever(poll_interval=0.2)


def build_application(
    storage: Storage,
    access: Access,
    report: Path | None,
    reports: Mapping[str, Path],
    artifacts: Path | None = None,
) -> WSGIApplication:
    """The dashboard over an open storage with all its layers, for any WSGI server."""
    shared = shared_dashboard(storage, artifacts)
    return guarded(compressed(with_reports(shared, report, reports)), access)


def shared_dashboard(storage: Storage, artifacts: Path | None) -> SharedAnswers:
    """The dashboard over an open storage, whose answers all viewers share."""
    import optuna_dashboard

    from mergesearch.search.dashboard.study_detail import StudyDetails

    # An open storage is passed: given a URL, the dashboard re-reads every trial every few seconds.
    store = None if artifacts is None else attached_files(artifacts)
    dashboard = optuna_dashboard.wsgi(storage, artifact_store=store)
    return SharedAnswers(dashboard, StudyDetails(storage).of)


def likely_paths(storage: Storage) -> list[str]:
    """What a viewer asks for first: the list of studies, and the latest of them."""
    ids = sorted(study._study_id for study in storage.get_all_studies())  # no public way to it
    return ["/api/studies", *(f"/api/studies/{study}" for study in reversed(ids[-LATEST:]))]


def with_reports(
    application: WSGIApplication, report: Path | None, reports: Mapping[str, Path]
) -> WSGIApplication:
    """``application`` with ``/report`` and ``/report/NAME`` added."""

    def reporting(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        # The server passes bytes as latin-1.
        path = environ.get("PATH_INFO", "").encode("latin-1").decode(errors="replace").rstrip("/")
        if path == "/report" and report is None and reports:
            return answer(environ, start_response, "200 OK", _index(reports), kind="text/html")
        if path == "/report":
            return _report(environ, start_response, report)
        if path.startswith("/report/"):
            return _report(environ, start_response, reports.get(path.removeprefix("/report/")))
        return application(environ, start_response)

    return reporting


def _index(reports: Mapping[str, Path]) -> str:
    links = (
        f'<li><a href="/report/{quote(name, safe="")}">{html.escape(name)}</a>'
        for name in sorted(reports)
    )
    return f"<!doctype html><title>Reports</title><h1>Reports</h1><ul>{''.join(links)}</ul>\n"


def _report(
    environ: WSGIEnvironment, start_response: StartResponse, report: Path | None
) -> Iterable[bytes]:
    try:
        page = report.read_bytes() if report is not None else None
    except OSError:
        page = None
    if page is None:
        text = "There is no report yet: `mergesearch run` writes one when it ends.\n"
        return answer(environ, start_response, "404 Not Found", text)
    return answer(environ, start_response, "200 OK", page, kind="text/html")


class _Server(ThreadingMixIn, WSGIServer):
    """A server with one thread per request; a slow request does not delay its end."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about clients that left or fell silent."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _ServerIPv6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    """Prints no line per request: the dashboard polls, and a first request holds the token."""

    timeout = SILENT_SECONDS

    def get_environ(self) -> dict[str, Any]:
        """The environment without headers that WSGI mistakes for others.

        ``X_Forwarded_User`` is not the header of the proxy.
        """
        for name in {name for name in self.headers if "_" in name}:
            del self.headers[name]
        return super().get_environ()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


def bind(host: str, port: int, application: WSGIApplication, option: str = "--port") -> WSGIServer:
    """A server of an application, with a thread for each request; it does not serve yet.

    Args:
        host: Address to bind.
        port: Port to bind; 0 picks a free one.
        application: What answers.
        option: Where the user gave the port, for messages.

    Raises:
        InputError: If the address cannot be bound.
    """
    server_class = _ServerIPv6 if ":" in host else _Server
    try:
        return make_server(
            host, port, application, server_class=server_class, handler_class=_QuietHandler
        )
    except OverflowError:
        raise InputError(f"{option}: expected 0 to 65535, received {port}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"{option}: expected a free port, received {port}, which is in use on {host}; "
                f"try another, or `{option} 0` for any free one"
            ) from None
        reason = error.strerror or error
        raise InputError(
            f"--host: expected an address to listen on, received {host}:{port}: {reason}"
        ) from None


def _quoted(host: str) -> str:
    return f"[{host}]" if ":" in host else host
