"""A Ray worker that loads is waited for, whatever the patience, and says how far it is."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging import StudyFailedError
from mergesearch.merging.resident.arena_files import locked
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.runs.wiring import worker_spec
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends import ray_actors
from mergesearch.search.workers.backends.arena_copy import PreparedOnce
from mergesearch.search.workers.backends.cluster import connect, nodes_of
from mergesearch.search.workers.backends.ray_actors import RayActors
from mergesearch.search.workers.messages import NODE_CACHE, Notice, WorkerSpec
from tests.cluster import Cluster
from tests.contracts.test_backends import TEMPLATE
from tests.search.conftest import model_study
from tests.search.studies import spec_of
from tests.waiting import wait_for

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture
def section(cluster: Cluster) -> WorkersSection:
    return WorkersSection(backend="ray", count=1, address=cluster.address)


@pytest.fixture
def ray(section: WorkersSection) -> Iterator[Any]:
    connected = connect(section)
    yield connected
    connected.shutdown()


@pytest.fixture
def spec(tmp_path: Path, pico_models: Path, pico_items: Path) -> WorkerSpec:
    plan = plan_study(spec_of(model_study(pico_models, pico_items), tmp_path))
    arenas = tmp_path / "arenas"
    arenas.mkdir()
    return replace(worker_spec(plan, RunFolder(tmp_path)), arenas=str(arenas))


@pytest.mark.slow
def test_a_worker_that_loads_is_waited_for_and_one_that_is_gone_is_not(
    ray: Any, section: WorkersSection, spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_actors, "NODE_CHECK_SECONDS", 0.0)
    heard: list[Notice] = []
    with locked(Path(spec.arenas)):  # as while another process prepares, for hours
        actors = RayActors(ray, section, spec, heard.append, wait_seconds=1e9)
        actors.start_missing()
        (actor,) = actors.starting
        ray.wait([actor.arrived])
        actors.arrive(actor)
        actors._wait_seconds = 0.0

        def said_so() -> bool:
            actors.check_nodes()
            return any("preparing weights" in notice.text for notice in heard)

        wait_for(said_so)
        actors.check_nodes()
        assert {notice.kind for notice in heard} == {"loading"}
        assert actor.loaded is not None
        assert ray.wait([actor.loaded], timeout=0)[0] == []
        (process,) = [int(pid) for pid in _pids_with_lock_open(Path(spec.arenas))]
        monkeypatch.setattr(ray_actors, "MAX_FAILED_STARTS", 0)
        os.kill(process, signal.SIGKILL)
        ray.wait([actor.loaded])
        with pytest.raises(StudyFailedError, match="a worker could not be built"):
            actors.admit(actor)
        with pytest.raises(StudyFailedError, match="expected one within 0 s"):
            actors.check_nodes()
        actors.kill_all()


@pytest.fixture
def second_node(cluster: Cluster, ray: Any) -> Iterator[Path]:
    """Another node, with a folder for temporary files of its own."""
    own = cluster.folder / "tmp2"
    own.mkdir()
    before = cluster.environment["TMPDIR"]
    cluster.environment["TMPDIR"] = str(own)
    try:
        cluster.start("second", 2)
    finally:
        cluster.environment["TMPDIR"] = before
    wait_for(lambda: len(nodes_of(ray)) == 2, cluster.nodes["second"])
    yield own
    cluster.kill("second")
    wait_for(lambda: len(nodes_of(ray)) == 1)


@pytest.mark.slow
def test_a_cluster_prepares_once_and_other_nodes_copy(
    cluster: Cluster, ray: Any, second_node: Path, spec: WorkerSpec
) -> None:
    section = WorkersSection(backend="ray", count=2, cpus=2, address=cluster.address)
    heard: list[Notice] = []
    actors = RayActors(ray, section, replace(spec, arenas=NODE_CACHE), heard.append, 600.0)
    actors.start_missing()
    while actors.starting:
        for actor in actors.starting[:]:
            ref = actor.loaded if actor.node else actor.arrived
            if ref is not None and ray.wait([ref], timeout=0.1)[0]:
                (actors.admit if actor.node else actors.arrive)(actor)
    assert len({actor.node for actor in actors.ready}) == 2
    actors.kill_all()
    files = [prepared(folder, spec) for folder in (cluster.folder, second_node)]
    assert any(name.endswith(".json") for name in files[0])
    assert max(size for size, _ in files[0].values()) > 10_000
    # Whoever prepares writes files of their own time; copies keep it.
    assert files[0] == files[1]


def prepared(folder: Path, spec: WorkerSpec) -> dict[str, tuple[int, int]]:
    """Files of the arena on a node: size and time of change."""
    cache = folder / f"mergesearch-{os.getuid()}" / "arenas"
    return {
        file.name: (file.stat().st_size, file.stat().st_mtime_ns)
        for file in cache.rglob(f"{spec.template.basis_key}.*")
        if file.is_file() and not file.name.endswith(".stamp")
    }


def test_the_next_node_prepares_where_the_first_is_lost(spec: WorkerSpec) -> None:
    once = PreparedOnce(None, spec)
    assert once.permit("a", []) == (True, None)
    assert once.permit("b", ["a"]) == (False, None)
    assert once.permit("a", ["a"]) == (True, None), "all workers of that node wait for its lock"
    assert once.permit("b", []) == (True, None), "the first node is lost"
    assert once.permit("a", ["b"]) == (False, None)
    once.note_loaded("b")
    assert once.permit("b", []) == (True, None)


def test_workers_without_weights_may_all_load(spec: WorkerSpec) -> None:
    once = PreparedOnce(None, replace(spec, template=TEMPLATE))
    assert [once.permit(node, ["a"]) for node in "abc"] == [(True, None)] * 3


def _pids_with_lock_open(folder: Path) -> list[str]:
    """Other processes that hold the folder's lock file open."""
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target == str(folder / "lock") and descriptor.parts[2] != str(os.getpid()):
            found.append(descriptor.parts[2])
    return found
