"""The Ray actors of a pool: which workers are starting, ready or gone, and on which nodes.

Workers come and go with the nodes of the cluster: where no count is asked for, a node that joins
gets workers while the study runs.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mergesearch.merging import InputError, StudyFailedError
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends.cluster import nodes_of
from mergesearch.search.workers.backends.placement import place, report
from mergesearch.search.workers.messages import Outcome, Task, WorkerSpec
from mergesearch.search.workers.worker import Worker

#: Seconds between two checks of the cluster's nodes.
NODE_CHECK_SECONDS = 5.0
#: Number of workers in a row that could not be built, after which none is started any more.
MAX_FAILED_STARTS = 8


@dataclass(eq=False)
class WorkerActor:
    """A worker in a process of its own.

    Attributes:
        handle: The Ray actor.
        loaded: Object reference that is pending until the worker has loaded; then the node's id.
        node: Id of its node, once it has loaded.
        sent: Object references and tasks that it has been sent, oldest first.
    """

    handle: Any
    loaded: Any
    node: str = ""
    sent: deque[tuple[Any, Task]] = field(default_factory=deque)


class RayActors:
    """Starts, replaces and removes the actors of a pool.

    Args:
        ray: Ray, connected.
        section: How many workers, and what each takes.
        spec: What they are built from.
        notify: Called with messages on nodes that come and go, and on workers that cannot be built.
        wait_seconds: How long to wait for a first worker, and for another one once all are lost.

    Attributes:
        starting: Actors that have not loaded yet.
        ready: Actors that have loaded.
    """

    def __init__(
        self,
        ray: Any,
        section: WorkersSection,
        spec: WorkerSpec,
        notify: Callable[[str], None],
        wait_seconds: float,
    ) -> None:
        self.starting: list[WorkerActor] = []
        self.ready: list[WorkerActor] = []
        self._ray = ray
        self._section = section
        self._notify = notify
        self._wait_seconds = wait_seconds
        self._failed_starts = 0
        self._nodes = {node.name for node in nodes_of(ray)}
        self._create = _actor_factory(ray, section, spec)
        self._checked = time.monotonic()
        self._last_ready = time.monotonic()

    def start_missing(self) -> None:
        """Start as many workers as there should be now and are not."""
        missing = self._target() - len(self.starting) - len(self.ready)
        for _ in range(max(missing, 0)):
            handle = self._create()
            self.starting.append(WorkerActor(handle, handle.node_id.remote()))
        self._checked = time.monotonic()

    def admit(self, actor: WorkerActor) -> None:
        """Move an actor that has loaded to the ready ones, or drop it if it could not be built.

        Raises:
            StudyFailedError: If none is ready and another attempt would fail too.
        """
        self.starting.remove(actor)
        try:
            actor.node = self._ray.get(actor.loaded)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            cause = getattr(error, "cause", None) or error
            text = f"a worker could not be built: {last_line(cause)}"
            # A worker that died while loading may have been killed; one that raised would raise
            # again.
            final = getattr(error, "actor_init_failed", False)
            if not self.ready and (final or self._failed_starts >= MAX_FAILED_STARTS):
                raise StudyFailedError(text) from error
            self._notify(text)
            return
        self._failed_starts = 0
        self.ready.append(actor)

    def on_lost_node(self, actor: WorkerActor, error: Exception) -> bool:
        """Whether a dead actor's node is gone too."""
        # Ray may report the loss of an actor before that of its node, and says so in words only.
        alive = actor.node in {node.id for node in nodes_of(self._ray)}
        return not alive or getattr(error, "preempted", False) or "its node has died" in str(error)

    def check_nodes(self) -> None:
        """From time to time, see which nodes there are, and start the workers that are missing.

        Raises:
            StudyFailedError: If there has been no worker for too long.
        """
        if time.monotonic() - self._checked < NODE_CHECK_SECONDS:
            return
        names = {node.name for node in nodes_of(self._ray)}
        for change, changed in (("joined", names - self._nodes), ("left", self._nodes - names)):
            for name in sorted(changed):
                self._notify(f"node {name} {change} the cluster")
        self._nodes = names
        self._drop_unplaceable()
        if self._failed_starts < MAX_FAILED_STARTS:
            self.start_missing()
        self._checked = time.monotonic()
        self._give_up_without_workers()

    def kill_all(self) -> None:
        """Kill every actor."""
        for actor in (*self.starting, *self.ready):
            self._ray.kill(actor.handle, no_restart=True)
        self.starting = []
        self.ready = []

    def _target(self) -> int:
        """How many workers there should be now."""
        if self._section.count is not None:
            return self._section.count
        return sum(node.holds(self._section) for node in nodes_of(self._ray))

    def _drop_unplaceable(self) -> None:
        """Kill workers that were started for nodes which have left; they would wait for ever."""
        surplus = len(self.starting) + len(self.ready) - self._target()
        for actor in self.starting[:]:
            if surplus <= 0 or self._section.count is not None:
                return
            self.starting.remove(actor)
            self._ray.kill(actor.handle, no_restart=True)
            surplus -= 1

    def _give_up_without_workers(self) -> None:
        if self.ready:
            self._last_ready = time.monotonic()
        elif time.monotonic() - self._last_ready > self._wait_seconds:
            raise StudyFailedError(
                f"workers: expected one within {self._wait_seconds:g} s, found none on "
                f"{len(self._nodes)} nodes of the cluster; no recorded result is lost, the same "
                "command goes on once there are nodes"
            )


def announce_placement(ray: Any, section: WorkersSection, notify: Callable[[str], None]) -> None:
    """Say where workers will be.

    Raises:
        InputError: If they do not fit on the cluster.
    """
    nodes = nodes_of(ray)
    placements = place(nodes, section, section.count)
    placed = sum(placement.workers for placement in placements)
    wanted = section.count or 1
    if placed < wanted:
        cpus = sum(node.cpus for node in nodes)
        gpus = sum(node.gpus for node in nodes)
        lacking, have = ("GPU", gpus) if section.gpus * wanted > gpus else ("CPU", cpus)
        each = section.gpus if lacking == "GPU" else section.cpus
        raise InputError(
            f"workers: expected {each * wanted:g} {lacking}s for {wanted} workers, received "
            f"{have:g} on {len(nodes)} nodes, where {placed} fit; lower workers.count or "
            f"workers.{lacking.lower()}s"
        )
    for line in report(placements, section):
        notify(line)


def last_line(error: BaseException) -> str:
    """The last line of an error: Ray wraps messages in many lines, the last one says the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _actor_factory(ray: Any, section: WorkersSection, spec: WorkerSpec) -> Callable[[], Any]:
    """What creates an actor with a worker of the spec."""

    class RemoteWorker:
        """A worker in a process of its own."""

        def __init__(self, spec: WorkerSpec) -> None:
            self._worker = Worker(spec)

        def run(self, task: Task) -> Outcome:
            return self._worker.run(task)

        def node_id(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

        def pid(self) -> int:
            return os.getpid()

    options = {
        "num_cpus": section.cpus,
        "num_gpus": section.gpus,
        "scheduling_strategy": "SPREAD",
        # Ray retries and restarts nothing: the driver decides (see ray_pool.py).
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    remote = ray.remote(**options)(RemoteWorker)
    reference = ray.put(spec)
    return lambda: remote.remote(reference)
