"""Serves optuna-dashboard over a run, or over a team's database with many studies.

optuna-dashboard has no authentication, would delete studies on request, shows trials that miss
their bounds as the best ones, and reads and serialises everything anew for each viewer. So it is
served here behind layers: :mod:`mergesearch.search.dashboard.access` decides who may see and change
what, ``/report`` serves the runs' own pages, and :class:`SharedAnswers` corrects and shares what is
polled.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import html
import json
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from mergesearch.evaluators import Objective
from mergesearch.merging import InputError
from mergesearch.search.dashboard.access import Access, answer, guarded, is_loopback
from mergesearch.search.front import nondominated
from mergesearch.search.record.storage import read_storage

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from mergesearch.search.record.storage import Storage

#: Front members that the note lists at most.
LISTED = 20
#: What is polled is made anew after so many seconds, or after so many times as long as it took to
#: make.
KEPT_SECONDS = 2.0
KEPT_TIMES = 10.0
#: Shorter answers are not worth compressing.
COMPRESSED_BYTES = 1024
COMPRESSED_KINDS = ("application/json", "text/html", "text/csv", "text/plain")
GZIP_ACCEPTED = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", re.IGNORECASE)
#: JSON has no such numbers, and a browser refuses all of an answer that holds one. They occur in
#: constraints.
LARGEST = sys.float_info.max
FINITE = {"Infinity": LARGEST, "-Infinity": -LARGEST, "NaN": LARGEST}
#: A client that says nothing for so many seconds is dropped.
SILENT_SECONDS = 60


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
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until Ctrl-C.

    Args:
        storage: Journal file, or any Optuna storage URL; all its studies are shown.
        report: The run's ``report.html``, read anew for each request; it may not exist yet.
        reports: Those of several runs by name, the same, at ``/report/NAME``.
        host: Address to bind.
        port: Port to bind; 0 picks a free one.
        token: Secret that every request must bring (see
            :func:`mergesearch.search.dashboard.access.find_token`).
        proxy_header: Header that a reverse proxy sets for users it knows; requests without it are
            refused.
        allow_writes: Let the notes be edited; needs a token and a database.
        insecure: Bind beyond loopback without token and proxy.
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
            f"{host}; "
            "give `--token-file FILE`, or stay on 127.0.0.1 behind a proxy"
        )
    if allow_writes and isinstance(location, Path):
        raise InputError(
            f"writes: expected a database's URL, received the journal {location}, which only the "
            "run may write"
        )
    access = Access(token, proxy_header, allow_writes, any_host=closed or insecure)
    application = build_application(read_storage(location), access, report, reports or {})
    with _bind(host, port, application) as server:
        if ready is not None:
            ready(f"http://{_quoted(host)}:{server.server_port}/")
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            server.serve_forever(poll_interval=0.2)


def build_application(
    storage: Storage, access: Access, report: Path | None, reports: Mapping[str, Path]
) -> WSGIApplication:
    """The dashboard over an open storage with all its layers, for any WSGI server."""
    import optuna_dashboard

    # The storage is opened by us: the dashboard's own opening of a URL re-reads every trial every
    # few seconds.
    shared = SharedAnswers(optuna_dashboard.wsgi(storage))
    return guarded(compressed(with_reports(shared, report, reports)), access)


@dataclass(frozen=True)
class Answer:
    """What an application has answered, as a whole."""

    status: str
    headers: list[tuple[str, str]]
    body: bytes

    @classmethod
    def of(cls, application: WSGIApplication, environ: WSGIEnvironment) -> Answer:
        """The application's answer to ``environ``."""
        started: list[Any] = []
        early: list[bytes] = []

        def start_response(
            status: str, headers: Any, exc_info: Any = None
        ) -> Callable[[bytes], object]:
            started[:] = [status, list(headers)]
            return early.append

        chunks = application(environ, start_response)
        try:
            body = b"".join(chunks)
        finally:
            getattr(chunks, "close", lambda: None)()
        return cls(started[0], started[1], b"".join(early) + body)

    def send(self, start_response: StartResponse) -> list[bytes]:
        """Hand it on."""
        start_response(self.status, self.headers)
        return [self.body]


@dataclass(frozen=True)
class _Polled:
    """An answer that is polled: the trials one by one, because each viewer asks for those it has
    not seen.
    """

    answer: Answer
    trials: tuple[bytes, ...] | None
    until: float

    def after(self, count: int) -> Answer:
        """The answer with the trials after the first ``count``."""
        if self.trials is None:
            return self.answer
        body = b'%s, "trials": [%s]}' % (self.answer.body[:-1], b", ".join(self.trials[count:]))
        return Answer(self.answer.status, _resized(self.answer.headers, body), body)


class SharedAnswers:
    """``application`` with what browsers poll made once for all viewers, and the best trials among
    the feasible.

    Args:
        application: The dashboard.
    """

    def __init__(self, application: WSGIApplication) -> None:
        self._application = application
        self._kept: dict[str, _Polled] = {}
        self._locks = [threading.Lock() for _ in range(16)]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        environ.setdefault("HTTP_ACCEPT_ENCODING", "")  # the dashboard fails without
        path = environ.get("PATH_INFO", "").rstrip("/")
        method = environ["REQUEST_METHOD"]
        if method == "GET" and re.fullmatch(r"/api/studies(/\d+)?", path):
            after = _after(environ)
            if after is None:
                return answer(
                    environ,
                    start_response,
                    "400 Bad Request",
                    "after: expected a number of trials\n",
                )
            return self._polled(path, environ).after(after).send(start_response)
        if method in ("GET", "HEAD"):
            return self._application(environ, start_response)
        written = Answer.of(self._application, environ)
        self._kept.clear()
        return written.send(start_response)

    def _polled(self, path: str, environ: WSGIEnvironment) -> _Polled:
        with self._locks[hash(path) % len(self._locks)]:
            kept = self._kept.get(path)
            if kept is None or kept.until < time.monotonic():
                self._kept[path] = kept = self._made(environ)
                self._drop_old()
        return kept

    def _made(self, environ: WSGIEnvironment) -> _Polled:
        started = time.monotonic()
        made = Answer.of(self._application, environ | {"QUERY_STRING": ""})
        trials = None
        if made.status.startswith("200"):
            detail = json.loads(made.body, parse_constant=FINITE.__getitem__)
            if "trials" in detail:
                detail["best_trials"] = best_trials(detail)
                trials = tuple(json.dumps(trial).encode() for trial in detail.pop("trials"))
            body = json.dumps(detail).encode()
            made = Answer(made.status, _resized(made.headers, body), body)
        now = time.monotonic()
        return _Polled(made, trials, now + max(KEPT_SECONDS, KEPT_TIMES * (now - started)))

    def _drop_old(self) -> None:
        now = time.monotonic()
        for path, kept in list(self._kept.items()):
            if kept.until < now:
                self._kept.pop(path, None)


def best_trials(detail: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The best trials of a study, as the dashboard's API describes it, that keep all bounds.

    The API's own list ignores bounds; it is kept for studies in which no trial misses one, and for
    preferential ones.
    """
    missed = any(not _is_feasible(trial) for trial in detail["trials"])
    if not missed or detail.get("is_preferential"):
        return list(detail["best_trials"])
    done = [
        trial for trial in detail["trials"] if trial["state"] == "Complete" and _is_feasible(trial)
    ]
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in detail["directions"]]
    # Infinities come as words, which `float` knows.
    losses = [
        [sign * float(value) for sign, value in zip(signs, trial["values"], strict=True)]
        for trial in done
    ]
    if len(signs) == 1:
        return [done[losses.index(min(losses))]] if done else []
    return [
        trial
        for trial, kept in zip(done, nondominated(losses) if done else (), strict=True)
        if kept
    ]


def _is_feasible(trial: Mapping[str, Any]) -> bool:
    return all(violation <= 0 for violation in trial["constraints"])


def _after(environ: WSGIEnvironment) -> int | None:
    """How many trials the viewer has; None if that is no number."""
    values = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True).get("after", ["0"])
    return int(values[-1]) if re.fullmatch(r"[0-9]{1,9}", values[-1]) else None


def _resized(
    headers: Iterable[tuple[str, str]], body: bytes, *more: tuple[str, str]
) -> list[tuple[str, str]]:
    kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
    return [*kept, ("Content-Length", str(len(body))), *more]


def compressed(application: WSGIApplication) -> WSGIApplication:
    """``application`` with long texts compressed for clients that accept it."""

    def smaller(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET" or not GZIP_ACCEPTED.search(
            environ.get("HTTP_ACCEPT_ENCODING", "")
        ):
            return application(environ, start_response)
        return _compress(Answer.of(application, environ)).send(start_response)

    return smaller


def _compress(whole: Answer) -> Answer:
    names = {name.lower(): value for name, value in whole.headers}
    if "content-encoding" in names or not names.get("content-type", "").startswith(
        COMPRESSED_KINDS
    ):
        return whole
    if len(whole.body) < COMPRESSED_BYTES:
        return whole
    body = gzip.compress(whole.body, compresslevel=4, mtime=0)
    return Answer(
        whole.status,
        _resized(whole.headers, body, ("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding")),
        body,
    )


def with_reports(
    application: WSGIApplication, report: Path | None, reports: Mapping[str, Path]
) -> WSGIApplication:
    """``application`` with ``/report`` and ``/report/NAME`` added."""

    def reporting(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        # The server hands on bytes as latin-1.
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
    """One thread per request; a slow one does not hold up the end of the server."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that left or fell silent."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _ServerIPv6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    """No line per request on the terminal: the dashboard polls, and a first request holds the
    token.
    """

    timeout = SILENT_SECONDS

    def get_environ(self) -> dict[str, Any]:
        """Without headers that WSGI would take for others: ``X_Forwarded_User`` is not the
        proxy's.
        """
        for name in {name for name in self.headers if "_" in name}:
            del self.headers[name]
        return super().get_environ()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _bind(host: str, port: int, application: WSGIApplication) -> WSGIServer:
    server_class = _ServerIPv6 if ":" in host else _Server
    try:
        return make_server(
            host, port, application, server_class=server_class, handler_class=_QuietHandler
        )
    except OverflowError:
        raise InputError(f"--port: expected 0 to 65535, received {port}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"--port: expected a free port, received {port}, which is in use on {host}; "
                "try another, or `--port 0` for any free one"
            ) from None
        reason = error.strerror or error
        raise InputError(
            f"--host: expected an address to listen on, received {host}:{port}: {reason}"
        ) from None


def _quoted(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def note_markdown(
    name: str,
    run: str,
    objectives: Sequence[Objective],
    *,
    winner: int | None = None,
    front: Sequence[int] = (),
    lines: Sequence[str] = (),
) -> str:
    """The study's note in the dashboard: what came out, where the report is, how to export.

    Args:
        name: Name of the study.
        run: Run folder as the user would type it.
        objectives: In the study's order.
        winner: Number of the winning trial, or None while there is none.
        front: Numbers of the front members, best first.
        lines: Sentences about the result.
    """
    trial = "N" if winner is None else str(winner)
    target = f"{name}-trial-{trial}"
    command = f"mergesearch export {shlex.quote(run)} --trial {trial} --out {shlex.quote(target)}"
    aims = ", ".join(f"{objective.name} ({objective.direction})" for objective in objectives)
    several = len(objectives) > 1 and front
    shown = ", ".join(map(str, front[:LISTED])) + (", …" if len(front) > LISTED else "")
    parts = [
        f"## {_escaped(name)}",
        *(_escaped(line) for line in lines),
        f"Objectives: {_escaped(aims)}. Front: trials {shown}."
        if several
        else f"Objectives: {_escaped(aims)}.",
        f"[Report](/report), also `{_in_code(run)}/report.html`.",
        f"Export {'the winner' if winner is not None else 'a trial'} as a model folder:",
        f"```sh\n{command}\n```",
        "Parameters are summaries of each merge's coefficients; the exact ones are in its recipe.",
    ]
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """``text`` with markdown's special characters taken literally."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~" else c for c in text)


def _in_code(text: str) -> str:
    return text.replace("`", "'")
