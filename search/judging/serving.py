"""Serves the judge's page on this machine, to whoever knows its address.

The address holds a token that is drawn anew in every session; all that is below it is open, all
else is not found. It answers:

* ``GET view?since=VERSION``: what to show, once there is another version, as JSON.
* ``POST choice``: ``{"pair": ..., "choice": "left" | "right" | "tie"}``.
* ``POST undo``.
* ``GET picture/NAME``.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from mergesearch.search.dashboard.access import answer
from mergesearch.search.dashboard.serving import bind
from mergesearch.search.judging.bench import Bench, View
from mergesearch.search.judging.page import PAGE, SCRIPT, STYLE
from mergesearch.search.retry import reason

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

HOST = "127.0.0.1"
#: A page that asks for what is new is answered after so many seconds, if nothing is.
LONGEST_WAIT = 20.0
#: Bytes of a request's body at most.
LARGEST_BODY = 4096
#: Path -> type and content of what never changes.
FILES: Mapping[str, tuple[str, str]] = {
    "": ("text/html", PAGE),
    "judge.css": ("text/css", STYLE),
    "judge.js": ("text/javascript", SCRIPT),
}
HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@contextmanager
def served(bench: Bench, port: int, ring: Callable[[], None], option: str) -> Iterator[str]:
    """Serve the page while inside; yields its address.

    Args:
        bench: What is judged.
        port: Port of this machine; 0 picks a free one.
        ring: Called after each choice.
        option: Where the user gave the port, for messages.

    Raises:
        InputError: If the port is not free.
    """
    token = secrets.token_urlsafe(24)
    with bind(HOST, port, application(bench, token, ring), option) as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
        )
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}/{token}/"
        finally:
            bench.close()
            server.shutdown()
            thread.join()


def application(bench: Bench, token: str, ring: Callable[[], None]) -> WSGIApplication:
    """The page and what it asks for, below ``/TOKEN/``."""

    def respond(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        _, given, path = [*environ.get("PATH_INFO", "").split("/", 2), "", ""][:3]
        if not hmac.compare_digest(given.encode("latin-1"), token.encode()):
            return _refuse(environ, start_response, "404 Not Found", "There is nothing here.\n")
        if environ["REQUEST_METHOD"] == "POST":
            return _post(environ, start_response, bench, path, ring)
        if path in FILES:
            kind, content = FILES[path]
            return answer(environ, start_response, "200 OK", content, HEADERS, kind)
        if path == "view":
            return _send(environ, start_response, bench.view(_since(environ), LONGEST_WAIT))
        return _picture(environ, start_response, bench, path)

    return respond


def _since(environ: WSGIEnvironment) -> int | None:
    """The version that the page has; None for a new page, which is answered at once."""
    given = parse_qs(environ.get("QUERY_STRING", "")).get("since", [""])[0]
    return int(given) if given.isascii() and given.isdigit() and len(given) < 18 else None


def _post(
    environ: WSGIEnvironment,
    start_response: StartResponse,
    bench: Bench,
    path: str,
    ring: Callable[[], None],
) -> Iterable[bytes]:
    """Record what the judge says; the answer is what to show next, also to a late choice."""
    body = _body(environ)
    if body is None or path not in ("choice", "undo"):
        text = "Expected a small JSON object for choice or undo.\n"
        return _refuse(environ, start_response, "400 Bad Request", text)
    try:
        if path == "undo":
            bench.undo()
        else:
            bench.choose(str(body.get("pair")), body.get("choice"))  # type: ignore[arg-type]
    except OSError as error:
        text = f"The choice could not be recorded: {reason(error)}; make room and choose again.\n"
        return _refuse(environ, start_response, "507 Insufficient Storage", text)
    ring()
    return _send(environ, start_response, bench.view())


def _body(environ: WSGIEnvironment) -> dict[str, Any] | None:
    """The JSON object of a request; None where it is none, too large, or of another kind.

    A page of another site cannot send JSON without asking first.
    """
    kind = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    length = environ.get("CONTENT_LENGTH") or "0"
    if kind != "application/json" or not length.isdigit() or int(length) > LARGEST_BODY:
        return None
    try:
        body = json.loads(environ["wsgi.input"].read(int(length)))
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _picture(
    environ: WSGIEnvironment, start_response: StartResponse, bench: Bench, path: str
) -> Iterable[bytes]:
    name = path.removeprefix("picture/")
    try:
        content = bench.picture(name) if name != path else None
    except OSError:
        content = None
    if content is None:
        return _refuse(environ, start_response, "404 Not Found", "There is nothing here.\n")
    kind = f"image/{name.rpartition('.')[2]}"
    return answer(environ, start_response, "200 OK", content, HEADERS, kind)


def _send(environ: WSGIEnvironment, start_response: StartResponse, view: View) -> Iterable[bytes]:
    text = json.dumps(asdict(view))
    return answer(environ, start_response, "200 OK", text, HEADERS, "application/json")


def _refuse(
    environ: WSGIEnvironment, start_response: StartResponse, status: str, text: str
) -> Iterable[bytes]:
    return answer(environ, start_response, status, text, HEADERS)
