"""Shares among viewers what their browsers poll, and ranks only what the search found."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from mergesearch.search.dashboard.access import answer
from mergesearch.search.dashboard.answers import Answer, finite_json
from mergesearch.search.dashboard.best_trials import best_trials

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from mergesearch.search.dashboard.study_detail import Detail

#: A polled answer is made anew after so many seconds, or after so many times as long as it took.
KEPT_SECONDS = 2.0
KEPT_TIMES = 10.0
#: The request of nobody, for an answer that is made beforehand.
NOBODY = {
    "REQUEST_METHOD": "GET",
    "QUERY_STRING": "",
    "HTTP_ACCEPT_ENCODING": "",
    "HTTP_HOST": "localhost",
    "SERVER_NAME": "localhost",
    "SERVER_PORT": "80",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "wsgi.url_scheme": "http",
}


@dataclass(frozen=True)
class _Polled:
    """A kept answer to what browsers poll.

    Attributes:
        answer: The answer, without the trials if it lists any.
        trials: The trials as JSON, one by one, as each viewer asks for those it has not seen.
        until: When it is made anew, on the monotonic clock.
    """

    answer: Answer
    trials: tuple[bytes, ...] | None
    until: float

    def after(self, count: int) -> Answer:
        """The answer with the trials after the first ``count``."""
        if self.trials is None:
            return self.answer
        body = b'%s, "trials": [%s]}' % (self.answer.body[:-1], b", ".join(self.trials[count:]))
        return self.answer.with_body(body)


class SharedAnswers:
    """The dashboard with polled answers shared by all viewers, and feasible best trials.

    Args:
        application: The dashboard.
        detail: Answers a request for a study in less time, or None where the dashboard has to.
    """

    def __init__(
        self,
        application: WSGIApplication,
        detail: Callable[[int, WSGIEnvironment], Detail | None] = lambda study, environ: None,
    ) -> None:
        self._application = application
        self._detail = detail
        self._kept: dict[str, _Polled] = {}
        self._locks = [threading.Lock() for _ in range(16)]

    def prepare(self, paths: Sequence[str]) -> None:
        """Make the answers to some requests before anybody asks."""
        for path in paths:
            self._polled(path, {"PATH_INFO": path, **NOBODY})

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
                self._kept[path] = kept = self._made(path, environ)
                self._drop_old()
        return kept

    def _made(self, path: str, environ: WSGIEnvironment) -> _Polled:
        started = time.monotonic()
        whole = environ | {"QUERY_STRING": ""}
        study = path.rpartition("/")[2]
        detail = self._detail(int(study), dict(whole)) if study.isdecimal() else None
        made, trials = (
            (detail.answer, detail.trials) if detail is not None else self._by_dashboard(whole)
        )
        now = time.monotonic()
        return _Polled(made, trials, now + max(KEPT_SECONDS, KEPT_TIMES * (now - started)))

    def _by_dashboard(self, environ: WSGIEnvironment) -> tuple[Answer, tuple[bytes, ...] | None]:
        """The dashboard's own answer, without its trials if it lists any, and these."""
        made = Answer.of(self._application, environ)
        if not made.status.startswith("200"):
            return made, None
        detail = finite_json(made.body)
        trials = None
        if "trials" in detail:
            detail["best_trials"] = best_trials(detail)
            trials = tuple(json.dumps(trial).encode() for trial in detail.pop("trials"))
        return made.with_body(json.dumps(detail).encode()), trials

    def _drop_old(self) -> None:
        now = time.monotonic()
        for path, kept in list(self._kept.items()):
            if kept.until < now:
                self._kept.pop(path, None)


def _after(environ: WSGIEnvironment) -> int | None:
    """How many trials the viewer has; None if the query does not say a number."""
    values = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True).get("after", ["0"])
    return int(values[-1]) if re.fullmatch(r"[0-9]{1,9}", values[-1]) else None
