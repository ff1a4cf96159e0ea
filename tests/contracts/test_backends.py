"""The backend contract, run for both members, and what only workers in other processes can do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mergesearch.merging import Field, InputError, Recipe, Source, StudyFailedError
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends import Backend, open_backend
from mergesearch.search.workers.messages import Outcome, Task, WorkerSpec
from tests.cluster import Cluster

pytestmark = pytest.mark.xdist_group("ray")

DIM = 4
TEMPLATE = Recipe(
    Source("", ""), (), "task_arithmetic", Field(np.arange(DIM + 1), np.zeros((1, DIM)))
)


def task(number: int, split: str = "search") -> Task:
    point = np.random.default_rng(number).random(DIM)
    return Task(str(number), TEMPLATE.with_field(Field(np.arange(DIM + 1), point[None])), split)  # type: ignore[arg-type]


def spec(tmp_path: Path, **options: object) -> WorkerSpec:
    evaluator = {"kind": "synthetic", "problem": "sphere"} | options
    return WorkerSpec(TEMPLATE, (evaluator,), str(tmp_path))


@pytest.fixture(params=["inline", "ray"])
def section(request: pytest.FixtureRequest) -> WorkersSection:
    if request.param == "inline":
        return WorkersSection(backend="inline")
    return request.getfixturevalue("two_workers")


@pytest.fixture(scope="module")
def two_workers(cluster: Cluster) -> WorkersSection:
    """Two workers on the session's cluster."""
    return WorkersSection(backend="ray", count=2, address=cluster.address)


@pytest.fixture
def backend(section: WorkersSection, tmp_path: Path) -> Iterator[Callable[..., Backend]]:
    opened: list[Backend] = []

    def start(**options: object) -> Backend:
        opened.append(open_backend(section, spec(tmp_path, **options)))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def drain(backend: Backend, count: int) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    while len(outcomes) < count:
        for outcome in backend.wait():
            assert outcome.task not in outcomes, "an outcome was handed out twice"
            outcomes[outcome.task] = outcome
    return outcomes


class TestBackendContract:
    def test_every_task_comes_back_once_with_its_own_result(
        self, backend: Callable[..., Backend]
    ) -> None:
        options = {"faults": {"nan": 0.2, "error": 0.2}, "noise": 0.5}
        pool = backend(**options)
        assert pool.slots >= 1
        for number in range(24):
            pool.submit(task(number))
        outcomes = drain(pool, 24)
        from mergesearch.search.workers.worker import Worker

        reference = Worker(spec(Path(), **options))
        kinds = set()
        for number in range(24):
            expected = reference.run(task(number))
            outcome = outcomes[str(number)]
            if expected.measurement is not None:
                assert outcome.measurement is not None
                assert outcome.measurement.values == expected.measurement.values
            else:
                assert outcome.failure is not None
                assert expected.failure is not None
                assert (outcome.failure.kind, outcome.failure.message) == (
                    expected.failure.kind,
                    expected.failure.message,
                )
                kinds.add(outcome.failure.kind)
            assert set(outcome.seconds) == {"merge", "evaluate", "overhead"}
        assert kinds == {"infeasible", "error"}
        for place, split in enumerate(("search", "validation", "test")):  # these reach it too
            pool.submit(Task(str(place), task(1).recipe, split))  # type: ignore[arg-type]
        values = [
            next(iter(o.measurement.values.values()))
            for o in drain(pool, 3).values()
            if o.measurement
        ]
        assert len(set(values)) == 3

    def test_closing_with_tasks_outstanding_returns(self, backend: Callable[..., Backend]) -> None:
        pool = backend(seconds=5)
        for number in range(3):
            pool.submit(task(number))
        started = time.monotonic()
        pool.close()
        assert time.monotonic() - started < 30

    def test_a_worker_that_cannot_be_built_says_why(
        self, section: WorkersSection, tmp_path: Path
    ) -> None:
        data = str(tmp_path / "nothing")
        broken = WorkerSpec(TEMPLATE, ({"kind": "classification", "data": data},), str(tmp_path))
        section = section if section.count is None else section.model_copy(update={"count": 1})
        # Inline raises the original exception, Ray a worker's message.
        with pytest.raises((StudyFailedError, InputError, FileNotFoundError), match="nothing"):
            open_backend(section, broken)


class TestRayPool:
    @pytest.fixture
    def pool(self, tmp_path: Path, two_workers: WorkersSection) -> Iterator[Callable[..., Backend]]:
        opened: list[Backend] = []

        def start(**options: object) -> Backend:
            opened.append(open_backend(two_workers, spec(tmp_path, **options)))
            return opened[-1]

        yield start
        for each in opened:
            each.close()

    def test_a_killed_worker_costs_at_most_the_trial_in_flight_which_runs_again(
        self, pool: Callable[..., Backend]
    ) -> None:
        workers = pool(seconds=0.5)
        before = workers.pids()  # type: ignore[attr-defined]
        for number in range(8):
            workers.submit(task(number))
        time.sleep(0.25)  # in the middle of its first task
        os.kill(before[0], signal.SIGKILL)
        outcomes = drain(workers, 8)
        assert all(outcome.measurement is not None for outcome in outcomes.values())
        after = workers.pids()  # type: ignore[attr-defined]
        assert len(after) == 2
        assert len(set(after) - set(before)) == 1

    def test_a_recipe_that_kills_its_worker_twice_becomes_a_failed_trial(
        self, pool: Callable[..., Backend]
    ) -> None:
        workers = pool(faults={"kill": 0.25})
        for number in range(5):  # one of them kills
            workers.submit(task(number))
        outcomes = drain(workers, 5)
        lost = [outcome for outcome in outcomes.values() if outcome.failure is not None]
        assert len(lost) == 1
        assert all(outcome.failure.kind == "lost" for outcome in lost if outcome.failure)
        assert all("died 2 times" in outcome.failure.message for outcome in lost if outcome.failure)

    def test_more_workers_than_the_machine_has_gpus_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            InputError, match=r"expected 2000 GPUs for 2 workers, received .*workers\.gpus"
        ):
            open_backend(WorkersSection(backend="ray", count=2, gpus=1000), spec(tmp_path))
