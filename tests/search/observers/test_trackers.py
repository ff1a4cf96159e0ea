"""Trackers: real stores, one run over a resume, and studies that no tracker slows or stops."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mergesearch.evaluators import Objective
from mergesearch.merging import InputError, StudyFailedError
from mergesearch.search.observers.trackers.background import QUEUE_LENGTH, in_background
from mergesearch.search.observers.trackers.base import Status, Tracker
from mergesearch.search.observers.trackers.opening import (
    TrackerSpec,
    check_installed,
    new_run_id,
    open_tracker,
)
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import Run
from mergesearch.search.study.events import Event
from tests.search.studies import analytic, fingerprint, run_in, spec_of
from tests.waiting import PATIENT, wait_for

OBJECTIVE = Objective("sphere", "minimize")
TOKEN = "hf_" + "aB3" * 11


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def follow(
    place: Path,
    name: str,
    data: dict[str, Any] | None = None,
    run_id: str | None = None,
    **options: Any,
) -> Run:
    """Run a study in ``place`` with one tracker, in the background as a driver does."""
    data = data or analytic(trials=12)
    study = spec_of(data, place)
    spec = TrackerSpec.model_validate({"name": name, **options} if options else name)
    warnings: list[str] = []
    tracker = in_background(
        lambda: open_tracker(
            spec,
            study=study.name,
            folder=place,
            objectives=[OBJECTIVE],
            resolved={**study.to_dict(), "secret": TOKEN},
            run_id=run_id,
        ),
        lambda event: warnings.append(event.text),
        name=name,
    )
    status: Status = "failed"
    try:
        run = run_study(study, place / "run", tracker.observe)
        status = "finished"
    finally:
        tracker.close(status, timeout=60)
    assert warnings == []
    assert tracker.dropped == 0
    return run


def best_of(run: Run) -> list[float]:
    """Best so far after each trial."""
    values = [record.values[OBJECTIVE.name] for record in run.log.records]
    return [min(values[: place + 1]) for place in range(len(values))]


FAILING = analytic(
    trials=40,
    anchors="none",
    evaluators=[{"kind": "synthetic", "problem": "sphere", "faults": {"error": 1.0}}],
    max_consecutive_failures=4,
)


# --- TensorBoard
# ----------------------------------------------------------------------------


def accumulated(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


@needs("tensorboard")
def test_tensorboard_holds_every_trial(tmp_path: Path) -> None:
    run = follow(tmp_path, "tensorboard", run_id="sphere-1")
    events = accumulated(tmp_path / "trackers" / "tensorboard" / "sphere-1")
    values = events.Scalars(f"value/{OBJECTIVE.name}")
    assert {event.step: event.value for event in values} == {
        record.number: pytest.approx(record.values[OBJECTIVE.name]) for record in run.log.records
    }
    assert [event.value for event in events.Scalars(f"best/{OBJECTIVE.name}")] == pytest.approx(
        best_of(run)
    )
    assert {"seconds/merge", "seconds/evaluate", "seconds/overhead"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Scalars("trials/complete")[-1].value == len(run.log.records)
    text = events.Tensors("study/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"trials": 12' in text
    assert TOKEN not in text


@needs("tensorboard")
def test_tensorboard_goes_on_in_the_same_folder_and_tells_the_study_once(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(StudyFailedError):
            follow(tmp_path, "tensorboard", FAILING, run_id="sphere-1")
    events = accumulated(tmp_path / "trackers" / "tensorboard" / "sphere-1")
    assert len(events.Tensors("study/text_summary")) == 1
    assert [event.step for event in events.Scalars("trials/failed")] == list(range(8))


# --- MLflow
# ----------------------------------------------------------------------------


def mlflow_runs(folder: Path, experiment: str = "mergesearch") -> tuple[Any, list[Any]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'trackers' / 'mlflow.db'}")
    return client, list(
        client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    )


@needs("mlflow")
def test_mlflow_holds_every_trial_and_the_study(tmp_path: Path) -> None:
    run = follow(tmp_path, "mlflow", project="merges", run="first", tags={"team": "a"})
    client, (found,) = mlflow_runs(tmp_path, "merges")
    history = client.get_metric_history(found.info.run_id, f"value/{OBJECTIVE.name}")
    assert {metric.step: metric.value for metric in history} == {
        record.number: record.values[OBJECTIVE.name] for record in run.log.records
    }
    assert found.data.metrics[f"best/{OBJECTIVE.name}"] == best_of(run)[-1]
    assert (found.info.run_name, found.info.status, found.data.tags["team"]) == (
        "first",
        "FINISHED",
        "a",
    )
    assert found.data.params["budget.trials"] == "12"
    assert found.data.params["evaluators.0.problem"] == "sphere"
    assert found.data.params["secret"] == "***"


@needs("mlflow")
def test_mlflow_goes_on_in_the_same_run(tmp_path: Path) -> None:
    run_id = new_run_id("sphere")
    for _ in range(2):
        with pytest.raises(StudyFailedError):
            follow(tmp_path, "mlflow", FAILING, run_id=run_id)
    client, (found,) = mlflow_runs(tmp_path)
    history = client.get_metric_history(found.info.run_id, "trials/failed")
    assert sorted(metric.step for metric in history) == list(range(8))
    assert found.info.status == "FAILED"
    follow(tmp_path / "other", "mlflow", folder=str(tmp_path / "trackers"))
    assert len(mlflow_runs(tmp_path)[1]) == 2  # another study is another run


# --- Weights & Biases
# ----------------------------------------------------------------------------


@needs("wandb")
def test_wandb_offline_holds_every_trial_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        with pytest.raises(StudyFailedError):
            follow(tmp_path, "wandb", FAILING, run_id="sphere-1", tags={"team": "a"})
        time.sleep(1.1)  # wandb names a session's folder by the second
    folders = sorted((tmp_path / "trackers" / "wandb").glob("offline-run-*-sphere-1*"))
    files = [file for folder in folders for file in folder.glob("run-sphere-1.wandb")]
    assert len(files) == 2
    history = [row for file in files for row in wandb_history(file)]
    assert [row["trial"] for row in history] == list(range(8))
    assert all("trials/failed" in row and "seconds/overhead" in row for row in history)
    assert not any(TOKEN.encode() in file.read_bytes() for file in files)


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's file: protocol buffers in LevelDB's log format after 7 bytes."""
    rows = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }
            )
    return rows


def wandb_records(path: Path) -> list[Any]:
    """All records; wandb's own process may write the last one after the end of the run."""
    from wandb.proto import wandb_internal_pb2

    def records() -> list[Any]:
        written = leveldb_records(path.read_bytes())
        return [wandb_internal_pb2.Record.FromString(data) for data in written]

    wait_for(lambda: [r.WhichOneof("record_type") for r in records()][-1:] == ["exit"])
    return records()


def leveldb_records(content: bytes, block: int = 32768, start: int = 7) -> Iterator[bytes]:
    place = start
    pending = b""
    while place + 7 <= len(content):
        if block - place % block < 7:  # too little for a header: padding
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        pending += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield pending
            pending = b""


ASK = """
import sys, time
from pathlib import Path
from mergesearch.search.observers.trackers.opening import TrackerSpec, open_tracker
from mergesearch.search.observers.trackers.background import in_background
spec = TrackerSpec(name="wandb", uri="http://127.0.0.1:9")
tracker = in_background(
    lambda: open_tracker(
        spec, study="s", folder=Path(sys.argv[1]), objectives=[], resolved={}, run_id=None
    ),
    lambda event: print(event.text, flush=True),
    name="wandb",
)
tracker.close("finished", 60)
"""


@needs("wandb")
def test_wandb_without_a_login_never_asks_on_the_terminal(tmp_path: Path) -> None:
    controller, terminal = os.openpty()
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("WANDB") and key != "NETRC"
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path)],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
        env=kept | {"HOME": str(tmp_path)},
    )
    os.set_blocking(controller, False)
    try:
        shown = os.read(controller, 65536)
    except BlockingIOError:
        shown = b""
    os.close(terminal)
    os.close(controller)
    assert (done.returncode, shown) == (0, b"")
    assert done.stdout.startswith("tracker wandb could not be opened: ")
    assert "API key" in done.stdout


# --- whatever a tracker does
# ----------------------------------------------------------------------------


class Faulty:
    """A writer that misbehaves on purpose."""

    def __init__(
        self, write: Callable[[], None] = lambda: None, close: Callable[[], None] = lambda: None
    ) -> None:
        self.trials: list[int] = []
        self.status: Status | None = None
        self._write = write
        self._close = close

    def write(self, scalars: Mapping[str, float], trial: int) -> None:
        self._write()
        self.trials.append(trial)

    def close(self, status: Status) -> None:
        self._close()
        self.status = status


def raising() -> None:
    raise RuntimeError(f"cannot reach https://me:password@host with {TOKEN}\nsecond line")


def run_with(
    folder: Path,
    factory: Callable[[], Tracker],
    timeout: float = 10.0,
    searched: threading.Event | None = None,
) -> tuple[Run, list[str], Any]:
    """A study with a tracker, its warnings, its background; ``searched`` is set when it ends."""
    warnings: list[str] = []
    tracker = in_background(factory, lambda event: warnings.append(event.text), name="x")
    run = run_study(spec_of(analytic(trials=30), folder), folder / "run", tracker.observe)
    if searched is not None:
        searched.set()
    tracker.close("finished", timeout)
    return run, warnings, tracker


def of(writer: Faulty) -> Callable[[], Tracker]:
    return lambda: Tracker("id", writer, [OBJECTIVE])


def test_a_tracker_that_raises_is_switched_off_and_the_study_is_the_same(tmp_path: Path) -> None:
    plain = run_in(analytic(trials=30), tmp_path / "plain")
    writer = Faulty(write=raising)
    run, warnings, tracker = run_with(tmp_path, of(writer))
    assert fingerprint(run) == fingerprint(plain)
    error = "RuntimeError: cannot reach https://me:***@host with ***"
    assert warnings == [
        f"tracker x failed: {error}",
        f"tracker x is switched off after 3 failures in a row, the last: {error}",
    ]
    assert writer.status is not None  # closed all the same
    assert tracker.dropped > 0


def test_failures_with_successes_between_do_not_switch_it_off(tmp_path: Path) -> None:
    calls = iter(range(1000))

    def sometimes() -> None:
        if next(calls) % 3 != 2:
            raise RuntimeError("busy")

    writer = Faulty(write=sometimes)
    run, warnings, tracker = run_with(tmp_path, of(writer))
    assert warnings == ["tracker x failed: RuntimeError: busy"]
    assert writer.trials == [record.number for record in run.log.records][2::3]
    assert (writer.status, tracker.dropped) == ("finished", 0)


@pytest.mark.parametrize("error", [RuntimeError("no server"), SystemExit(1)])
def test_a_tracker_that_cannot_be_opened_is_warned_of_once(
    tmp_path: Path, error: BaseException
) -> None:
    def factory() -> Tracker:
        raise error

    run, warnings, _ = run_with(tmp_path, factory)
    assert run.verdict is not None
    assert warnings == [
        (
            f"tracker x could not be opened: {type(error).__name__}: {error}; the study goes on "
            "without it"
        )
    ]


@pytest.mark.parametrize("place", ["open", "write", "close"])
def test_a_tracker_that_hangs_holds_up_neither_the_study_nor_its_end(
    tmp_path: Path, place: str
) -> None:
    released = threading.Event()
    hang: Callable[[], Any] = released.wait
    writer = Faulty(**({place: hang} if place in ("write", "close") else {}))  # type: ignore[arg-type]

    def factory() -> Tracker:
        if place == "open":
            hang()
        return Tracker("id", writer, [OBJECTIVE])

    run, warnings, tracker = run_with(tmp_path, factory, timeout=0.5)
    assert not released.is_set()
    assert run.verdict is not None
    assert len(warnings) == 1
    assert warnings[0].startswith("tracker x did not finish within 0.5 s; ")
    released.set()
    tracker._thread.join(10)
    assert writer.status == "finished"


def test_a_slow_tracker_does_not_slow_the_study_and_still_gets_everything(tmp_path: Path) -> None:
    searched = threading.Event()
    writer = Faulty(write=searched.wait)  # it writes nothing until the study has ended
    run, warnings, tracker = run_with(tmp_path, of(writer), timeout=600, searched=searched)
    assert writer.trials == [record.number for record in run.log.records]
    assert (warnings, tracker.dropped) == ([], 0)


def test_events_beyond_the_queue_are_dropped_counted_and_told_once() -> None:
    released = threading.Event()
    entered = threading.Event()
    warnings: list[str] = []

    def factory() -> Tracker:
        entered.set()
        released.wait()
        return Tracker("id", Faulty(), [OBJECTIVE])

    tracker = in_background(factory, lambda event: warnings.append(event.text), name="x")
    entered.wait()
    for _ in range(QUEUE_LENGTH + 5):
        tracker.observe(Event("phase", "search"))  # returns, though nobody takes anything out
    assert tracker.dropped == 5
    released.set()
    tracker.close("finished")
    assert warnings == [
        f"tracker x is {QUEUE_LENGTH} events behind; events are dropped",
        "tracker x was too slow; 5 events are missing from it",
    ]


def test_a_notify_that_raises_or_comes_back_does_no_harm(tmp_path: Path) -> None:
    holder: list[Any] = []

    def notify(event: Event) -> None:
        holder[0].observe(event)  # as in a driver that passes every event to every observer
        raise ValueError("a broken terminal")

    holder.append(in_background(of(Faulty(write=raising)), notify, name="x"))
    run = run_study(spec_of(analytic(trials=10), tmp_path), tmp_path / "run", holder[0].observe)
    holder[0].close()
    assert run.verdict is not None


HANGING_SERVER = """
import socket, sys
from pathlib import Path
from mergesearch.search.runs.driver import run_study
from mergesearch.search.observers.trackers.opening import TrackerSpec, open_tracker
from mergesearch.search.observers.trackers.background import in_background
from tests.search.studies import analytic, spec_of

folder = Path(sys.argv[2])
silent = socket.create_server(("127.0.0.1", 0), backlog=50)  # the kernel accepts, nobody answers
spec = TrackerSpec(name=sys.argv[1], uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
tracker = in_background(
    lambda: open_tracker(spec, study="s", folder=folder, objectives=[], resolved={}, run_id=None),
    lambda event: print(event.text, flush=True),
    name=spec.name,
)
run_study(spec_of(analytic(trials=10), folder), folder / "run", tracker.observe)
tracker.close("finished", 1)
print("closed", flush=True)
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mlflow", marks=[needs("mlflow"), pytest.mark.slow]),
        pytest.param("wandb", marks=[needs("wandb"), pytest.mark.slow]),
    ],
)
def test_a_server_that_never_answers_does_not_keep_the_driver(tmp_path: Path, name: str) -> None:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "MLFLOW"))
    }
    done = subprocess.run(
        [sys.executable, "-c", HANGING_SERVER, name, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENT,
        cwd=Path(__file__).parents[3],
        env=kept | {"WANDB_API_KEY": "0" * 40, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    first, closed = done.stdout.splitlines()[:2]
    assert first.startswith(f"tracker {name} did not finish within 1 s; ")
    assert closed == "closed"


# --- what the study file may say
# ----------------------------------------------------------------------------


def test_a_bare_name_is_enough() -> None:
    assert TrackerSpec.model_validate("mlflow") == TrackerSpec(name="mlflow")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("comet", "tensorboard"),
        ({"name": "mlflow", "projcet": "x"}, "Extra inputs"),
        ({"name": "tensorboard", "uri": "http://host"}, "expected options of tensorboard"),
    ],
)
def test_what_a_spec_refuses(data: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrackerSpec.model_validate(data)


def test_a_password_in_plain_text_is_refused_and_not_shown() -> None:
    with pytest.raises(InputError, match="expected the password as") as caught:
        TrackerSpec.model_validate({"name": "mlflow", "uri": "https://me:plain-text@host"})
    assert "plain-text" not in str(caught.value)
    TrackerSpec.model_validate({"name": "mlflow", "uri": "https://me:${PASSWORD}@host"})


def test_a_missing_package_is_said_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder that wandb left in the current one is no package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match=r"pip install 'mergesearch\[wandb\]'"):
        check_installed(TrackerSpec(name="wandb"))


def test_ids_differ_and_fit_every_service() -> None:
    ids = {new_run_id("s" * 200) for _ in range(50)}
    assert len(ids) == 50
    assert all(len(name) <= 128 for name in ids)
