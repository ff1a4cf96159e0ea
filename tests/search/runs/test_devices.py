"""A run records the devices of its workers, and an export is judged by them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging.export.folder import export_model
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.runs import exported
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.runs.recording import DeviceRecorder
from mergesearch.search.workers.devices import Device
from mergesearch.search.workers.messages import Outcome
from tests.search.cli.test_cli import mergesearch
from tests.search.conftest import model_study
from tests.search.studies import write_study

#: The study of this file is made once, by one worker.
pytestmark = pytest.mark.xdist_group("devices")

CARD = Device("NVIDIA H200", 1, "9.0", "570.86.15", "12.8", False, False, "sdpa", "float32")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pico_models: Path, pico_items: Path) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    study = write_study(model_study(pico_models, pico_items, budget={"trials": 8}), folder)
    code, _, err = mergesearch("run", study, "--run", folder / "run", "--progress", "quiet")
    assert code == 0, err
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def with_devices(run: Path, entries: Any) -> None:
    """Change the recorded environment: the run was made elsewhere, or by an old version."""
    path = run / "environment.json"
    environment = json.loads(path.read_text())
    environment.pop("devices")
    path.write_text(json.dumps(environment | ({} if entries is None else {"devices": entries})))


def card_of(run: Path) -> list[Mapping[str, Any]]:
    workers = list(RunFolder(run).devices())
    return [{"device": CARD.to_dict(), "workers": workers}]


def moved(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Let every value of a second score differ from the record."""
    measure = exported.measure_in_stages

    def elsewhere(*arguments: Any) -> Any:
        staged = measure(*arguments)
        values = {name: value + by for name, value in staged.measurement.values.items()}
        return replace(staged, measurement=replace(staged.measurement, values=values))

    monkeypatch.setattr(exported, "measure_in_stages", elsewhere)


def scored_again(run: Path, out: Path) -> tuple[Run, exported.Rescored]:
    opened = open_run(run)
    record = opened.trial(None)
    export_model(record.recipe, out)
    return opened, exported.rescore(opened, record, out)


def test_every_worker_and_its_settings_are_recorded(run: Path) -> None:
    opened = open_run(run)
    devices = opened.folder.devices()
    assert {*devices} == {record.worker for record in opened.log.records}
    (device,) = devices.values()
    assert (device.name, device.driver, device.tf32) == (None, None, None)
    assert device.dtype == "float32"
    assert opened.report_data().fingerprint["devices"][0]["device"] == device.to_dict()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_equal_bits_are_identical_wherever_they_were_recorded(
    run: Path, tmp_path: Path, elsewhere: bool
) -> None:
    if elsewhere:
        with_devices(run, card_of(run))
    agreement = scored_again(run, tmp_path / "out")[1].agreement
    assert (agreement.identical, agreement.agrees, agreement.reason) == (True, True, "")


@pytest.mark.parametrize(
    ("recorded", "by", "code"),
    [("here", 1e-7, 1), ("card", 1e-7, 0), ("card", 0.2, 1), ("old run", 1e-7, 1)],
)
def test_a_record_of_another_device_is_met_within_the_tolerance(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: str,
    by: float,
    code: int,
) -> None:
    if recorded != "here":
        with_devices(run, card_of(run) if recorded == "card" else None)
    moved(monkeypatch, by)
    said = mergesearch("export", run, "--out", tmp_path / "out")
    assert said[0] == code, said
    assert ("DIFFERENT from the record" in said[1]) is (code == 1)
    assert ("does not score as recorded" in said[2]) is (code == 1)
    assert ("recorded on NVIDIA H200 (driver 570.86.15" in said[1]) is (recorded == "card")


class Backend:
    """Hands out outcomes that were prepared."""

    slots = 1

    def __init__(self, *outcomes: Outcome) -> None:
        self._outcomes = list(outcomes)

    def submit(self, task: Any) -> None:
        raise AssertionError("nothing is submitted here")

    def wait(self) -> list[Outcome]:
        return [self._outcomes.pop(0)]

    def close(self) -> None:
        self._outcomes.clear()


def test_workers_of_equal_devices_share_an_entry(tmp_path: Path) -> None:
    def outcome(worker: str, device: Device | None) -> Outcome:
        return Outcome("0", None, None, worker=worker, device=device)

    other = replace(CARD, name="NVIDIA L4")
    cases = [("a:1", CARD), ("b:1", other), ("c:1", CARD), ("lost", None), ("a:1", CARD)]
    folder = RunFolder(tmp_path)
    backend = DeviceRecorder(Backend(*(outcome(*case) for case in cases)), folder)
    for worker, _ in cases:
        assert [each.worker for each in backend.wait()] == [worker]
    entries = folder.environment()["devices"]
    assert [entry["workers"] for entry in entries] == [["a:1", "c:1"], ["b:1"]]
    assert folder.devices() == {"a:1": CARD, "b:1": other, "c:1": CARD}


def test_a_full_disk_delays_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome("0", None, None, worker="a:1", device=CARD)
    folder = RunFolder(tmp_path)
    backend = DeviceRecorder(Backend(outcome, outcome), folder)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mergesearch.search.record.run_folder.write_atomically", full)
        backend.wait()
    assert folder.devices() == {}
    backend.wait()
    assert folder.devices() == {"a:1": CARD}
