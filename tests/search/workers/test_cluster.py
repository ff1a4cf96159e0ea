"""The command line on a real cluster of two nodes: jobs, joining nodes, caches of nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mergesearch.search.runs.opened import open_run
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends.cards import gpu_shares, gpus_for_ray
from mergesearch.search.workers.backends.placement import (
    Node,
    Placement,
    place,
    report,
    workers_by_card,
)
from tests.cluster import ROOT, Cluster, mergesearch
from tests.commands import run_command
from tests.search.cli.test_cli import mergesearch as in_process
from tests.search.cli.test_cli import refused
from tests.search.conftest import model_study
from tests.search.studies import analytic, write_study
from tests.waiting import PATIENT, wait_for

pytestmark = pytest.mark.xdist_group("ray")


def slow_study(name: str, trials: int = 60, seconds: float = 0.1) -> dict:
    evaluator = {"kind": "synthetic", "problem": "sphere", "items": 10, "seconds": seconds}
    return analytic(name, trials=trials, evaluators=[evaluator], driver={"drain_seconds": 10})


@pytest.mark.slow
def test_a_job_is_submitted_shown_stopped_and_submitted_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    study = write_study(slow_study("jobby", 200), tmp_path)
    folder = tmp_path / "run"
    submit = ["submit", str(study), "--address", cluster.server, "--run", str(folder)]
    submitted = mergesearch(cluster, *submit, "--json")
    assert submitted.returncode == 0, submitted.stderr
    job = json.loads(submitted.stdout)["job"]
    shown: dict[str, Any] = {}

    def status() -> bool:
        asked = mergesearch(cluster, "status", job, "--address", cluster.server, "--json")
        shown.update(json.loads(asked.stdout)[0])
        return shown.get("done", 0) >= 5 or shown["state"] not in ("pending", "running")

    wait_for(status, pause=0.5)
    assert (shown["study"], shown["state"], shown["phase"]) == ("jobby", "running", "search")
    stopped = mergesearch(cluster, "stop", job, "--address", cluster.server)
    assert "stopped" in stopped.stdout, stopped.stderr
    before = [record for record in open_run(folder).log.records if record.tell_index is not None]
    assert 5 <= len(before) < 198
    assert all(record.state == "complete" for record in open_run(folder).log.records), "it drained"
    again = mergesearch(cluster, *submit, "--set", "driver.drain_seconds=9", "--follow")
    assert again.returncode == 0, again.stderr
    assert '"event": "score"' in again.stdout
    records = open_run(folder).log.records
    assert len(records) == 200
    assert [r.tell_index for r in records if r.number in {t.number for t in before}] == [
        t.tell_index for t in before
    ]
    listed = mergesearch(cluster, "status", "--address", cluster.server)
    assert "stopped" in listed.stdout
    assert "succeeded" in listed.stdout


def test_what_travels_is_code_and_study(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"0" * 100)
    (tmp_path / "my_scorer.py").write_text("def score(row, text):\n    return 1.0\n")
    study = write_study(slow_study("travel", 9, 0.0), tmp_path)
    to = ["--address", cluster.server, "--run", str(tmp_path / "run")]
    said = refused("submit", study, *to, "--include", tmp_path / "weights.safetensors")
    assert "--include: expected code, received" in said
    done = mergesearch(
        cluster, "submit", str(study), *to, "--include", str(tmp_path / "my_scorer.py"), "--follow"
    )
    assert done.returncode == 0
    assert len(open_run(tmp_path / "run").log.records) == 9


def test_wrong_addresses_jobs_and_tokens_are_one_line(cluster: Cluster, tmp_path: Path) -> None:
    study = str(write_study(slow_study("wrong", 9), tmp_path))
    cases = [
        (
            ["status", "--address", "http://127.0.0.1:9"],
            "expected the job server of a cluster at http://127.0.0.1:9",
        ),
        (
            ["status", "--address", "head:6379"],
            "expected the cluster's job server, http://HOST:8265",
        ),
        (
            ["stop", "nothing", "--address", cluster.server],
            "expected the id of a job, received 'nothing'",
        ),
        (
            ["run", study, "--run", str(tmp_path / "r"), "--address", "127.0.0.1:9"],
            "workers.address: expected 127.0.0.1:9",
        ),
    ]
    for arguments, message in cases:  # in this process, which has the cluster's token
        code, _, errors = in_process(*arguments)
        assert code == 2, errors
        assert message in errors
        assert "Traceback" not in errors
    stranger = {
        key: value for key, value in cluster.environment.items() if not key.startswith("RAY_AUTH")
    }
    denied = mergesearch(
        cluster,
        "submit",
        study,
        "--address",
        cluster.server,
        env=stranger | {"HOME": str(tmp_path)},
    )
    assert denied.returncode == 2
    assert "token" in denied.stderr
    assert "Traceback" not in denied.stderr


@pytest.mark.slow
def test_nodes_join_and_leave_during_a_sweep(cluster: Cluster, tmp_path: Path) -> None:
    study = write_study(slow_study("elastic", 5000, 0.15), tmp_path)
    folder = tmp_path / "run"
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            run_command(study, folder, "--address", cluster.address),
            cwd=ROOT,
            env=cluster.environment,
            stderr=said,
            stdout=said,
        )
    try:
        wait_for(lambda: "search" in _said(tmp_path), process, lambda: _said(tmp_path))
        cluster.start("second", 2)
        wait_for(lambda: "joined the cluster" in _said(tmp_path), process, lambda: _said(tmp_path))
        wait_for(lambda: len(_workers(folder)) == 4, process, lambda: _said(tmp_path))
        cluster.kill("second")
        wait_for(lambda: "left the cluster" in _said(tmp_path), process, lambda: _said(tmp_path))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENT) == 130
    finally:
        process.kill()
    said_all = _said(tmp_path)
    assert "2 workers of 1 CPU on 1 of 1 nodes" in said_all
    records = open_run(folder).log.records
    assert len(records) < 5000
    assert all(record.state == "complete" for record in records), said_all


@pytest.mark.slow
def test_weights_are_prepared_once_for_all_workers_of_a_node(
    cluster: Cluster, tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    data = model_study(
        pico_models, pico_items, name="cached", budget={"trials": 24}, strategy="sobol"
    )
    study = write_study(data, tmp_path)
    done = subprocess.run(
        run_command(study, tmp_path / "run", "--address", cluster.address),
        capture_output=True, text=True, timeout=PATIENT, cwd=ROOT, env=cluster.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(_workers(tmp_path / "run")) == 2
    cache = cluster.folder / f"mergesearch-{os.getuid()}"
    assert cache.stat().st_mode & 0o077 == 0
    arenas = [
        file
        for file in (cache / "arenas").rglob("*")
        if file.is_file() and file.stat().st_size > 10_000
    ]
    assert arenas
    maps = {file.name for file in arenas}
    assert len(maps) == len(arenas), "one file for each role, whoever reads it"
    exported = mergesearch(
        cluster, "export", str(tmp_path / "run"), "--out", str(tmp_path / "best")
    )
    assert "identical to the record" in exported.stdout, exported.stderr


@pytest.mark.slow
def test_the_doctor_looks_at_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    study = write_study(slow_study("ill"), tmp_path)
    done = mergesearch(cluster, "doctor", str(study), "--address", cluster.address, "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert checks["cluster"]["text"].startswith("2 workers of 1 CPU on 1 of")
    too_many = mergesearch(
        cluster, "doctor", str(study), "--address", cluster.address, "--set", "workers.count=99"
    )
    assert too_many.returncode == 1
    assert "fail  cluster" in too_many.stdout


def test_workers_are_spread_and_what_fits_nowhere_is_seen() -> None:
    nodes = [Node("a", 4, 2), Node("b", 8, 0), Node("c", 2, 4)]
    on_gpu = WorkersSection(gpus=1, cpus=1)
    assert [p.workers for p in place(nodes, on_gpu, None)] == [2, 0, 2]
    assert [p.workers for p in place(nodes, on_gpu, 3)] == [2, 0, 1]
    assert [p.workers for p in place(nodes, WorkersSection(gpus=2), None)] == [1, 0, 2]
    assert [p.workers for p in place(nodes, WorkersSection(gpus=0.3, cpus=0.5), None)] == [6, 0, 4]
    assert [p.workers for p in place(nodes, WorkersSection(cpus=3), 9)] == [1, 2, 0]
    lines = report(place(nodes, on_gpu, 3), on_gpu)
    assert lines[0] == "3 workers of 1 CPU and 1 GPU on 2 of 3 nodes"
    assert lines[1] == "  a: 2 workers, 2 of 4 CPUs, 2 of 2 GPUs"


@pytest.mark.parametrize(("section", "workers", "by_card"), [
    ({"gpus": 0.25}, 4, [1, 1, 1, 1]), ({"gpus": 0.25}, 6, [2, 2, 1, 1]),
    ({"gpus": 0.25}, 2, [1, 1]), ({"gpus": 0.25}, 16, [4, 4, 4, 4]), ({"gpus": 1}, 3, [1, 1, 1]),
    ({"gpus": 2}, 2, [1, 1]), ({"per_gpu": 2}, 8, [2, 2, 2, 2]), ({"per_gpu": 3}, 0, []),
])  # fmt: skip
def test_cards_of_a_node_fill_evenly(
    section: dict[str, float], workers: int, by_card: list[int]
) -> None:
    placement = Placement(Node("a", 64, 4), workers)
    assert workers_by_card(placement, WorkersSection(**section)) == by_card


def test_workers_per_gpu_are_whole_numbers_and_replace_gpus() -> None:
    section = WorkersSection(per_gpu=3)
    assert section.distributed
    assert WorkersSection(**section.model_dump()) == section
    assert Node("a", 64, 4).holds(section) == 12
    with pytest.raises(ValueError, match="expected gpus or per_gpu, received both"):
        WorkersSection(per_gpu=2, gpus=1)
    with pytest.raises(ValueError, match="per_gpu"):
        WorkersSection(per_gpu=1.5)


@pytest.mark.parametrize("count", range(1, 12))
def test_shares_of_a_card_fit_as_often_as_they_should(count: int) -> None:
    steps = gpus_for_ray(WorkersSection(per_gpu=count).gpus_each) * 10_000
    assert steps == pytest.approx(round(steps)), "Ray rounds nothing"
    assert round(steps) * count <= 10_000 < round(steps + 1) * count + count


@pytest.mark.parametrize("count", range(1, 12))
def test_the_holder_of_weights_has_room_beside_the_workers_of_a_card(count: int) -> None:
    worker, holder = gpu_shares(WorkersSection(per_gpu=count).gpus_each, count)
    assert (holder > 0) == (count > 1)
    assert worker > 0
    assert round((holder + count * worker) * 10_000) <= 10_000
    steps = worker * 10_000
    assert steps == pytest.approx(round(steps)), "Ray rounds nothing"


def _said(folder: Path) -> str:
    return (folder / "said").read_text()


def _workers(folder: Path) -> set[str]:
    """Workers that have finished a trial."""
    try:
        return {record.worker for record in open_run(folder).log.records if record.worker}
    except Exception:
        return set()
