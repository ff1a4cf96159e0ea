"""Whole answers of a WSGI application, and their compression."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

#: Shorter answers are not worth compressing.
COMPRESSED_BYTES = 1024
COMPRESSED_KINDS = ("application/json", "text/html", "text/csv", "text/plain")
GZIP_ACCEPTED = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", re.IGNORECASE)
#: JSON has no infinities, and a browser refuses an answer that holds one. Constraints have some.
LARGEST = sys.float_info.max
FINITE = {"Infinity": LARGEST, "-Infinity": -LARGEST, "NaN": LARGEST}


def finite_json(body: bytes) -> Any:
    """An answer's JSON, with numbers in place of what browsers refuse."""
    return json.loads(body, parse_constant=FINITE.__getitem__)


@dataclass(frozen=True)
class Answer:
    """The whole answer of an application to one request."""

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

    def with_body(self, body: bytes, *more: tuple[str, str]) -> Answer:
        """The answer with another body, its length in the headers, and more headers."""
        kept = [(name, value) for name, value in self.headers if name.lower() != "content-length"]
        return Answer(self.status, [*kept, ("Content-Length", str(len(body))), *more], body)

    def send(self, start_response: StartResponse) -> list[bytes]:
        """Send it to the client."""
        start_response(self.status, self.headers)
        return [self.body]


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
    return whole.with_body(body, ("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding"))
