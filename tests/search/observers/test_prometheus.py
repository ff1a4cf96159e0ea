"""Metrics: what a scrape of a running study holds, over a real connection."""

from __future__ import annotations

import http.client
import math
import socket
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mergesearch.evaluators import Objective
from mergesearch.merging import InputError
from mergesearch.search.observers.prometheus import Metrics, Window, parse_address, serve
from mergesearch.search.record.best_so_far import BestSoFar
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.runs.driver import run_study
from mergesearch.search.study.events import Event
from tests.search.studies import analytic, run_in, spec_of

pytest.importorskip("prometheus_client")
LOSS = Objective("loss", "minimize")
ACCURACY = Objective("accuracy", "maximize")


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> TrialRecord:
    run = run_in(analytic(trials=3), tmp_path_factory.mktemp("metrics") / "run")
    return run.log.records[0]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("sphere", [LOSS])


@pytest.fixture
def url(metrics: Metrics) -> Iterator[str]:
    url, close = serve(metrics, "0")
    yield url
    close()


def scrape(url: str) -> dict[str, float]:
    """``name{labels}`` -> value, as Prometheus reads it."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_a_scrape_agrees_with_the_trial_log(tmp_path: Path) -> None:
    faulty = {"kind": "synthetic", "problem": "sphere", "faults": {"nan": 0.3}}
    space = {"dim": 5, "bounds": [0.0, 1.0], "start": 0.25}  # an anchor that does not fail
    spec = spec_of(analytic(trials=30, evaluators=[faulty], space=space), tmp_path)
    name = run_in(analytic(trials=3), tmp_path / "other").plan.objectives
    metrics = Metrics("sphere", name)
    url, close = serve(metrics, "127.0.0.1:0")
    during: list[dict[str, float]] = []

    def observe(event: Event) -> None:
        metrics.observe(event)
        if event.kind == "trial" and event.done == 10:
            during.append(scrape(url))

    run = run_study(spec, tmp_path / "run", observe)
    found = scrape(url)
    close()
    records = run.log.records
    for (state, kind), count in Counter((record.state, record.kind) for record in records).items():
        assert found[f"mergesearch_trials_total{{kind={kind},state={state}}}"] == count
    objective = name[0].name
    best = min(record.values[objective] for record in records if record.state == "complete")
    assert found[f"mergesearch_best{{objective={objective},split=search}}"] == best
    assert found["mergesearch_trial_seconds_count{phase=evaluate}"] == len(records)
    spent = sum(record.seconds["evaluate"] for record in records)
    assert found["mergesearch_trial_seconds_sum{phase=evaluate}"] == pytest.approx(spent, abs=1e-4)
    assert found["mergesearch_study_info{study=sphere}"] == 1
    assert [key for key in found if key.startswith("mergesearch_phase_info")] == [
        "mergesearch_phase_info{phase=test}"
    ]
    assert found["mergesearch_workers"] == 1
    assert 0 < found["mergesearch_worker_busy_share"] <= 1
    assert found["process_resident_memory_bytes"] > 1e6
    assert (
        during[0]["mergesearch_budget_done"],
        during[0]["mergesearch_phase_info{phase=search}"],
    ) == (10, 1)
    assert found["mergesearch_budget_done"] == found["mergesearch_budget_total"] > 10


def test_two_studies_in_one_process_do_not_mix(tmp_path: Path) -> None:
    first = Metrics("a", [LOSS])
    second = Metrics("b", [LOSS])
    first.observe(Event("warning", "x"))
    one, close_one = serve(first, "0")
    two, close_two = serve(second, "0")
    assert scrape(one)["mergesearch_warnings_total"] == 1
    assert scrape(two)["mergesearch_warnings_total"] == 0
    close_one()
    close_two()


def test_a_resumed_study_starts_from_the_best_of_its_log(record: TrialRecord) -> None:
    name = next(iter(record.values))
    metrics = Metrics("sphere", [Objective(name, "minimize")], [record])
    url, close = serve(metrics, "0")
    found = scrape(url)
    close()
    assert found[f"mergesearch_best{{objective={name},split=search}}"] == record.values[name]
    assert not [key for key in found if key.startswith("mergesearch_trials_total")]


def test_the_best_is_by_direction_and_only_of_complete_feasible_trials(record: TrialRecord) -> None:
    best = BestSoFar([LOSS, ACCURACY])
    best.add(replace(record, values={"loss": 0.5, "accuracy": 0.5}))
    best.add(replace(record, values={"loss": 0.7, "accuracy": 0.9}))
    best.add(replace(record, values={"loss": 0.1, "accuracy": 0.99}, state="partial"))
    best.add(replace(record, values={"loss": 0.1, "accuracy": 0.99}, violations={"tokens": 0.2}))
    best.add(replace(record, values={}, state="failed"))
    assert best.values == {"loss": 0.5, "accuracy": 0.9}


def test_the_window_forgets_and_never_counts_more_than_it_holds(record: TrialRecord) -> None:
    clock = Clock()
    window = Window(clock, 300)

    def ended(worker: str, seconds: float) -> None:
        window.add(
            replace(
                record, worker=worker, seconds={"merge": seconds / 4, "evaluate": seconds * 3 / 4}
            )
        )

    assert (window.workers(), window.busy_share()) == (0, 0.0)
    clock.now += 100
    ended("a", 50)
    ended("b", 100)
    assert (window.workers(), window.busy_share()) == (2, pytest.approx(150 / 200))
    clock.now += 250
    ended("a", 250)
    # 300 s back from 1350: the 50 s of a and the 100 s of b, both ended at 1100, lie there with 50
    # s each.
    assert window.busy_share() == pytest.approx((50 + 50 + 250) / 600)
    clock.now += 51
    assert (window.workers(), window.busy_share()) == (1, pytest.approx(249 / 300))
    clock.now += 300
    assert (window.workers(), window.busy_share()) == (0, 0.0)


def test_the_cpu_share_is_weighted_and_unknown_without_any(record: TrialRecord) -> None:
    class Measured(TrialRecord):
        cpu_share: float

    window = Window(Clock())
    window.add(replace(record, seconds={"evaluate": 5.0}))
    names = {each.name for each in fields(record)} - {"seconds", "cpu_share"}
    known = {name: getattr(record, name) for name in names}
    if not hasattr(record, "cpu_share"):
        assert math.isnan(window.cpu_share())
    window = Window(Clock())
    for seconds, share in ((1.0, 0.1), (3.0, 0.9)):
        measured = Measured(**known, seconds={"evaluate": seconds})
        object.__setattr__(measured, "cpu_share", share)
        window.add(measured)
    assert window.cpu_share() == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses(address: str, expected: tuple[str, int]) -> None:
    assert parse_address(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        ":9464",
        "host:",
        "host:-1",
        "host:70000",
        "a b:1",
        "::1:80",
        "http://x:1",
        "1.5",
        "٣",
    ],
)
def test_bad_addresses_are_refused_in_one_line(address: str, metrics: Metrics) -> None:
    with pytest.raises(InputError, match=r"--metrics .*expected") as caught:
        serve(metrics, address)
    assert "\n" not in str(caught.value)


def test_a_used_port_is_refused(url: str, metrics: Metrics) -> None:
    with pytest.raises(
        InputError, match="expected a free port of this host, received: Address already in use"
    ):
        serve(metrics, str(urlsplit(url).port))


def test_a_foreign_address_is_refused(metrics: Metrics) -> None:
    with pytest.raises(InputError, match="expected a free port of this host"):
        serve(metrics, "192.0.2.1:9464")


def test_only_the_loopback_interface_listens_unless_a_host_is_given(url: str) -> None:
    port = urlsplit(url).port
    assert url.startswith("http://127.0.0.1:")
    with pytest.raises(ConnectionRefusedError):  # another address of the same machine
        socket.create_connection(("127.0.0.2", port or 0), timeout=5)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_only_get_is_answered(url: str, method: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request(method, "/metrics")
    assert connection.getresponse().status == 501
    connection.close()


def test_other_paths_are_not_found_and_the_server_ends(metrics: Metrics) -> None:
    url, close = serve(metrics, "0")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url + "/../../etc/passwd", timeout=10)
    idle = socket.create_connection(
        (urlsplit(url).hostname or "", urlsplit(url).port or 0)
    )  # says nothing
    close()
    idle.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=10)


def test_a_port_is_free_again_after_closing(metrics: Metrics) -> None:
    url, close = serve(metrics, "0")
    scrape(url)
    close()
    again, close_again = serve(metrics, str(urlsplit(url).port))
    assert again == url
    close_again()
