"""Shares among viewers what their browsers poll, and ranks only what the search found.

Trials that miss a bound are not among the best, nor are anchors. Anchors are no infeasible trials
in the record, which would keep them out too: every plot would call them so, and whoever reads the
study with Optuna would rank without what the search must beat.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from mergesearch.search.dashboard.access import answer
from mergesearch.search.dashboard.answers import Answer
from mergesearch.search.front import nondominated

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

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
#: JSON has no infinities, and a browser refuses an answer that holds one. Constraints have some.
LARGEST = sys.float_info.max
FINITE = {"Infinity": LARGEST, "-Infinity": -LARGEST, "NaN": LARGEST}


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
    """

    def __init__(self, application: WSGIApplication) -> None:
        self._application = application
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
            made = made.with_body(body)
        now = time.monotonic()
        return _Polled(made, trials, now + max(KEPT_SECONDS, KEPT_TIMES * (now - started)))

    def _drop_old(self) -> None:
        now = time.monotonic()
        for path, kept in list(self._kept.items()):
            if kept.until < now:
                self._kept.pop(path, None)


def best_trials(detail: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The best trials, among those that keep all bounds, of a study as the API describes it.

    Anchors are known beforehand, so that they are among the best only while no other trial is
    there. The API's own list knows of neither; it is kept for studies without bounds and anchors,
    and for preferential ones.
    """
    trials = detail["trials"]
    known = [_is_anchor(trial) for trial in trials]
    if detail.get("is_preferential") or not (any(known) or any(map(_misses_a_bound, trials))):
        return list(detail["best_trials"])
    done = [
        (trial, anchor)
        for trial, anchor in zip(trials, known, strict=True)
        if trial["state"] == "Complete" and not _misses_a_bound(trial)
    ]
    found = [trial for trial, anchor in done if not anchor] or [trial for trial, _ in done]
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in detail["directions"]]
    # Infinities are words in JSON, which `float` reads.
    losses = [
        [sign * float(value) for sign, value in zip(signs, trial["values"], strict=True)]
        for trial in found
    ]
    if len(signs) == 1:
        return [found[losses.index(min(losses))]] if found else []
    return [
        trial
        for trial, kept in zip(found, nondominated(losses) if found else (), strict=True)
        if kept
    ]


def _is_anchor(trial: Mapping[str, Any]) -> bool:
    """Whether a trial is a known merge, as its attributes for people say."""
    return {"key": "kind", "value": "anchor"} in trial["user_attrs"]


def _misses_a_bound(trial: Mapping[str, Any]) -> bool:
    return any(violation > 0 for violation in trial["constraints"])


def _after(environ: WSGIEnvironment) -> int | None:
    """How many trials the viewer has; None if the query does not say a number."""
    values = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True).get("after", ["0"])
    return int(values[-1]) if re.fullmatch(r"[0-9]{1,9}", values[-1]) else None
