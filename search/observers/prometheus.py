"""Metrics of a running study for Prometheus: counts, times, best values, load of workers."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mergesearch.evaluators import Objective
from mergesearch.merging import InputError
from mergesearch.search.record.best_so_far import BestSoFar
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.study.events import Event

#: Length of the sliding window behind shares and the count of workers.
WINDOW_SECONDS = 300.0
#: Bounds of the histogram of seconds, from a merge of a small model to an evaluation of an hour.
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600)
#: A client that is silent for so long is disconnected.
CLIENT_SECONDS = 10
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class _Work:
    """A trial in the window.

    Attributes:
        ended: When it ended, on the window's clock.
        worker: Who ran it.
        seconds: How long it ran.
        cpu_share: Its share of the CPU, None where unknown.
    """

    ended: float
    worker: str
    seconds: float
    cpu_share: float | None


class Window:
    """The trials that ended lately.

    Args:
        clock: Seconds, never going back.
        length: Seconds to look back.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, length: float = WINDOW_SECONDS
    ) -> None:
        self._clock = clock
        self._length = length
        self._opened = clock()
        self._work: deque[_Work] = deque()
        self._lock = threading.Lock()

    def add(self, record: TrialRecord) -> None:
        """Add a trial that has just ended."""
        work = _Work(self._clock(), record.worker, sum(record.seconds.values()), record.cpu_share)
        with self._lock:
            self._work.append(work)

    def workers(self) -> int:
        """Number of distinct workers that ended a trial."""
        return len({work.worker for work in self._recent()[1] if work.worker})

    def busy_share(self) -> float:
        """Seconds on trials over wall seconds of these workers, 0 to 1.

        Running trials are not counted.
        """
        now, recent = self._recent()
        wall = min(self._length, now - self._opened)
        workers = len({work.worker for work in recent})
        if not workers or wall <= 0:
            return 0.0
        return min(
            1.0,
            sum(min(work.seconds, work.ended - (now - wall)) for work in recent) / (wall * workers),
        )

    def cpu_share(self) -> float:
        """Mean CPU share of the trials that have one, weighted by seconds; NaN without any."""
        known = [
            (work.seconds, work.cpu_share)
            for work in self._recent()[1]
            if work.cpu_share is not None
        ]
        total = sum(seconds for seconds, _ in known)
        return sum(seconds * share for seconds, share in known) / total if total else float("nan")

    def _recent(self) -> tuple[float, list[_Work]]:
        now = self._clock()
        with self._lock:
            while self._work and self._work[0].ended <= now - self._length:
                self._work.popleft()
            return now, list(self._work)


class Metrics:
    """Counts events in a registry of its own.

    Args:
        study: Name of the study.
        objectives: Names and directions.
        records: Trials of earlier sessions: they set the best values, and are not counted again.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        study: str,
        objectives: Sequence[Objective] = (),
        records: Iterable[TrialRecord] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Gauge,
            Histogram,
            Info,
            ProcessCollector,
        )

        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("mergesearch_study", "The study.", registry=registry).info({"study": study})
        self._phase = Info("mergesearch_phase", "What the driver does now.", registry=registry)
        self._trials = Counter(
            "mergesearch_trials",
            "Trials that ended in this session.",
            ["state", "kind"],
            registry=registry,
        )
        self._seconds = Histogram(
            "mergesearch_trial_seconds",
            "Seconds of a trial by phase.",
            ["phase"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._best = Gauge(
            "mergesearch_best",
            "Best value so far of each objective.",
            ["objective", "split"],
            registry=registry,
        )
        self._warnings = Counter(
            "mergesearch_warnings", "Warnings in this session.", registry=registry
        )
        self._done = Gauge("mergesearch_phase_done", "Done in this phase.", registry=registry)
        self._total = Gauge(
            "mergesearch_phase_total", "To do in this phase, 0 if not known.", registry=registry
        )
        self._budget_done = Gauge(
            "mergesearch_budget_done", "Search trials done.", registry=registry
        )
        self._budget_total = Gauge(
            "mergesearch_budget_total",
            "Search trials in the budget, 0 if limited otherwise.",
            registry=registry,
        )
        self._in_search = False
        self._window = Window(clock)
        self._watch_window()
        self._best_so_far = BestSoFar(objectives, records)
        self._show_best()

    def observe(self, event: Event) -> None:
        """Count the event."""
        if event.kind == "warning":
            self._warnings.inc()
        elif event.kind in ("phase", "trial", "score"):
            self._show_progress(event)
        if event.kind == "trial" and event.record is not None:
            self._count(event.record)

    def close(self) -> None:
        """Do nothing: no resource is held open."""

    def _watch_window(self) -> None:
        from prometheus_client import Gauge

        gauges = {
            "workers": ("Workers that ended a trial in the last 5 minutes.", self._window.workers),
            "worker_busy_share": (
                "Share of their time that workers spent on trials.",
                self._window.busy_share,
            ),
            "cpu_busy_share": ("Share of the CPU that trials used.", self._window.cpu_share),
        }
        for name, (text, value) in gauges.items():
            Gauge(f"mergesearch_{name}", text, registry=self.registry).set_function(value)

    def _show_progress(self, event: Event) -> None:
        if event.kind == "phase":
            self._phase.info({"phase": event.text})
            self._in_search = event.text == "search"
        self._done.set(event.done)
        self._total.set(event.total)
        if self._in_search:
            self._budget_done.set(event.done)
            self._budget_total.set(event.total)

    def _count(self, record: TrialRecord) -> None:
        self._trials.labels(record.state, record.kind).inc()
        for phase, seconds in record.seconds.items():
            self._seconds.labels(phase).observe(seconds)
        if record.same_as is None:  # else no worker had a part in it
            self._window.add(record)
        self._best_so_far.add(record)
        self._show_best()

    def _show_best(self) -> None:
        for name, value in self._best_so_far.values.items():
            self._best.labels(name, "search").set(value)


def serve(metrics: Metrics, address: str) -> tuple[str, Callable[[], None]]:
    """Answer GET requests for ``/metrics`` from a thread.

    ``prometheus_client.start_http_server`` would be shorter, but answers every path and OPTIONS,
    waits for silent clients for ever, a thread for each, and tells the version of Python.

    Args:
        metrics: The metrics to serve.
        address: ``HOST:PORT``, or ``PORT`` on the loopback interface; port 0 takes a free one.

    Returns:
        The URL, and the function that ends the server.

    Raises:
        InputError: If the address is malformed, not of this host, or taken.
    """
    host, port = parse_address(address)
    try:
        family, *_, endpoint = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = _server(metrics, family, (str(endpoint[0]), int(endpoint[1])))
    except OSError as error:
        raise InputError(
            f"--metrics {address}: expected a free port of this host, received: "
            f"{error.strerror or error}; choose "
            "another, or 0 for any"
        ) from None
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{server.server_address[1]}/metrics", close


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, ``[IPv6]:PORT`` or ``PORT``.

    Raises:
        InputError: If it is none of these.
    """
    host, separator, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    malformed = (
        (separator and not bare) or (":" in bare and bare == host) or any(c.isspace() for c in host)
    )
    if malformed or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise InputError(
            f"--metrics {address}: expected PORT or HOST:PORT, for example 9464 or 0.0.0.0:9464, "
            f"received {address!r}"
        )
    return bare or LOOPBACK, int(port)


def _server(metrics: Metrics, family: int, endpoint: tuple[str, int]) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        address_family = socket.AddressFamily(family)
        daemon_threads = True
        block_on_close = False  # a client that hangs must not keep the driver

    class Handler(BaseHTTPRequestHandler):
        timeout = CLIENT_SECONDS
        server_version = "mergesearch"
        sys_version = ""

        def do_GET(self) -> None:  # the only method; the base class refuses all others
            _answer(self, metrics)

        def log_message(self, format: str, *args: object) -> None:  # the terminal is the study's
            pass

    return Server(endpoint, Handler)


def _answer(handler: BaseHTTPRequestHandler, metrics: Metrics) -> None:
    from prometheus_client.exposition import choose_encoder

    if handler.path.partition("?")[0] not in ("/", "/metrics"):
        handler.send_error(404)
        return
    encode, content_type = choose_encoder(handler.headers.get("Accept", ""))
    body = encode(metrics.registry)
    handler.send_response(200)
    handler.send_header("Content-Type", content_type)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
