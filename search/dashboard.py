"""Serves optuna-dashboard over a run, for reading only.

The dashboard has no authentication and would delete studies on request, so everything but GET and HEAD is
refused and the server binds to loopback unless told otherwise. ``/report`` serves the run's own page.
"""

from __future__ import annotations

import contextlib
import errno
import shlex
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from evaluators import Objective
from merging import InputError
from search.storage import read_storage

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

#: Front members that the note lists at most.
LISTED = 20


def serve(
    storage: str | Path,
    report: Path | None,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until Ctrl-C.

    Args:
        storage: Journal file, or any Optuna storage URL.
        report: The run's ``report.html``, read anew for each request; it may not exist yet.
        host: Address to bind.
        port: Port to bind; 0 picks a free one.
        ready: Called with the server's URL once it answers.

    Raises:
        RunFolderError: If there is no journal.
        InputError: If the storage cannot be opened or the address cannot be bound.
    """
    import optuna_dashboard

    location = storage if isinstance(storage, Path) or "://" in storage else Path(storage)
    # Opened here rather than by the dashboard, whose own opening of a URL re-reads every trial every few seconds.
    application = read_only(optuna_dashboard.wsgi(read_storage(location)), report)
    with _bind(host, port, application) as server:
        if ready is not None:
            ready(f"http://{_quoted(host)}:{server.server_port}/")
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            server.serve_forever(poll_interval=0.2)


def read_only(application: WSGIApplication, report: Path | None) -> WSGIApplication:
    """``application`` with ``/report`` added, and everything but GET and HEAD refused."""

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        if method not in ("GET", "HEAD"):
            headers = {"Allow": "GET, HEAD"}
            return _answer(start_response, method, "405 Method Not Allowed", "This dashboard is read-only.\n", headers)
        if environ.get("PATH_INFO", "").rstrip("/") == "/report":
            return _report(start_response, method, report)
        return application(environ, start_response)

    return guarded


def _report(start_response: StartResponse, method: str, report: Path | None) -> Iterable[bytes]:
    try:
        page = report.read_bytes() if report is not None else None
    except OSError:
        page = None
    if page is None:
        text = "There is no report yet: `mergesearch run` writes one when it ends.\n"
        return _answer(start_response, method, "404 Not Found", text)
    return _answer(start_response, method, "200 OK", page, kind="text/html")


def _answer(
    start_response: StartResponse,
    method: str,
    status: str,
    body: str | bytes,
    headers: dict[str, str] | None = None,
    kind: str = "text/plain",
) -> list[bytes]:
    content = body.encode() if isinstance(body, str) else body
    common = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
    start_response(status, [*common.items(), *(headers or {}).items()])
    return [] if method == "HEAD" else [content]


class _Server(ThreadingMixIn, WSGIServer):
    """One thread per request; a slow one does not hold up the end of the server."""

    daemon_threads = True


class _ServerIPv6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    """No line per request on the terminal: the dashboard polls."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _bind(host: str, port: int, application: WSGIApplication) -> WSGIServer:
    server_class = _ServerIPv6 if ":" in host else _Server
    try:
        return make_server(host, port, application, server_class=server_class, handler_class=_QuietHandler)
    except OverflowError:
        raise InputError(f"--port: expected 0 to 65535, received {port}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"--port: expected a free port, received {port}, which is in use on {host}; "
                "try another, or `--port 0` for any free one"
            ) from None
        reason = error.strerror or error
        raise InputError(f"--host: expected an address to listen on, received {host}:{port}: {reason}") from None


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
        f"Objectives: {_escaped(aims)}. Front: trials {shown}." if several else f"Objectives: {_escaped(aims)}.",
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
