"""Workers as Ray actors, on this machine or a cluster.

* Two tasks are in flight per worker, so that a round trip to the driver never leaves it idle; no
  barrier.
* A worker is given tasks once it has loaded; the study begins with the first one. Workers come and
  go with the nodes of the cluster: where no count is asked for, a node that joins gets workers
  while the study runs.
* A worker that dies (out of memory, SIGKILL) is replaced by a new actor built from the same spec.
  The task it was running is run again, once; a recipe that kills its worker twice becomes a failed
  trial. The loss of a node is no fault of the recipe. What merely waited behind it is run again
  without a mark.
* Ray itself retries nothing: the driver decides, so a task can never be told twice.
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
from mergesearch.search.workers.backends.cluster import connect, nodes_of
from mergesearch.search.workers.backends.placement import place, report
from mergesearch.search.workers.messages import Failure, Outcome, Task, WorkerSpec
from mergesearch.search.workers.worker import Worker

IN_FLIGHT = 2
KILLS_TO_FAIL = 2
#: Seconds between two looks at the cluster's nodes.
LOOK_SECONDS = 5.0
#: Workers that could not be built, in a row, after which none is tried any more.
BROKEN_TO_STOP = 8


@dataclass(eq=False)
class _Slot:
    """A worker and what it has been sent, oldest first; ``hello`` is pending until it has
    loaded.
    """

    actor: Any
    hello: Any
    node: str = ""
    sent: deque[tuple[Any, Task]] = field(default_factory=deque)  # (object reference, task)


class RayPool:
    """A pool of workers.

    Args:
        section: How many, and what each takes.
        spec: What they are built from.
        notify: TrialResult where workers are placed, and of nodes that come and go.
        patience: Seconds to wait for a first worker, and for another one once all are lost.

    Raises:
        InputError: If Ray cannot be reached or lacks the CPUs or GPUs asked for.
        StudyFailedError: If no worker can be built; carries the worker's own message.
    """

    def __init__(
        self,
        section: WorkersSection,
        spec: WorkerSpec,
        notify: Callable[[str], None] = lambda text: None,
        patience: float = 300.0,
    ) -> None:
        self._section = section
        self._notify = notify
        self._patience = patience
        self._starting: list[_Slot] = []
        self._ready: list[_Slot] = []
        self._queue: deque[Task] = deque()
        self._kills: dict[str, int] = {}
        self._broken = 0
        self._ray = connect(section)
        try:
            self._nodes = {node.name for node in nodes_of(self._ray)}
            self._announce()
            self._factory = self._actor_factory(spec)
            self._grow()
            self._await_first()
        except BaseException:
            self.close()
            raise

    @property
    def slots(self) -> int:
        """How many tasks to keep submitted: changes as workers come and go."""
        return IN_FLIGHT * len(self._ready)

    def submit(self, task: Task) -> None:
        """Send the task to the least busy worker, or queue it until one has room."""
        self._queue.append(task)
        self._dispatch()

    def wait(self) -> list[Outcome]:
        """Wait for results, or for a worker that is new; dead ones are replaced on the way."""
        while True:
            before = len(self._ready)
            outcomes = self._round(LOOK_SECONDS)
            self._dispatch()
            if outcomes or len(self._ready) > before:
                return outcomes

    def close(self) -> None:
        """Kill the workers; stop Ray if it was started here."""
        for slot in (*self._starting, *self._ready):
            self._ray.kill(slot.actor, no_restart=True)
        self._starting = []
        self._ready = []
        self._ray.shutdown()

    def pids(self) -> list[int]:
        """Process ids of the workers, once all have loaded."""
        while self._starting:
            self._round(LOOK_SECONDS)
        pids: list[int] = self._ray.get([slot.actor.pid.remote() for slot in self._ready])
        return pids

    # --- results
    # ------------------------------------------------------------------------

    def _round(self, timeout: float) -> list[Outcome]:
        """Take what is there, or becomes so within ``timeout`` seconds; look at the nodes
        otherwise.
        """
        owners: dict[Any, _Slot] = {slot.hello: slot for slot in self._starting}
        for slot in self._ready:
            owners.update((ref, slot) for ref, _ in slot.sent)
        if not owners:
            time.sleep(min(timeout, 0.5))
            self._look()
            return []
        done, rest = self._ray.wait(list(owners), num_returns=1, timeout=timeout)
        if done and rest:
            done += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        outcomes = [
            outcome for ref in done if (outcome := self._take(owners[ref], ref)) is not None
        ]
        self._look()
        return outcomes

    def _take(self, slot: _Slot, ref: Any) -> Outcome | None:
        if ref == slot.hello:
            self._welcome(slot)
            return None
        if slot not in self._ready:
            return None  # buried in this very round
        try:
            outcome: Outcome = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return self._bury(slot, error)
        slot.sent = deque((sent, task) for sent, task in slot.sent if sent != ref)
        self._kills.pop(outcome.task, None)
        return outcome

    def _dispatch(self) -> None:
        while self._queue and self._ready:
            slot = min(self._ready, key=lambda s: len(s.sent))
            if len(slot.sent) >= IN_FLIGHT:
                return
            task = self._queue.popleft()
            slot.sent.append((slot.actor.run.remote(task), task))

    def _bury(self, slot: _Slot, error: Exception) -> Outcome | None:
        """Forget a dead worker. Its oldest task was the one running; the rest only waited."""
        (_, running), *waiting = slot.sent
        self._ready.remove(slot)
        self._queue.extendleft(task for _, task in reversed(waiting))
        # Ray may report the loss of an actor before that of its node, and says so in words only.
        alive = slot.node in {node.id for node in nodes_of(self._ray)}
        node_lost = (
            not alive or getattr(error, "preempted", False) or "its node has died" in str(error)
        )
        kills = self._kills.get(running.id, 0) + (not node_lost)
        self._grow()
        if kills < KILLS_TO_FAIL:
            self._kills[running.id] = kills
            self._queue.appendleft(running)
            return None
        self._kills.pop(running.id, None)
        message = f"the worker died {kills} times while running this recipe: {_last_line(error)}"
        return Outcome(running.id, None, Failure("lost", message, str(error)))

    # --- workers
    # ------------------------------------------------------------------------

    def _announce(self) -> None:
        """Say where workers will be; refuse what fits nowhere."""
        section = self._section
        nodes = nodes_of(self._ray)
        placements = place(nodes, section, section.count)
        placed = sum(p.workers for p in placements)
        wanted = section.count or 1
        if placed < wanted:
            cpus = sum(node.cpus for node in nodes)
            gpus = sum(node.gpus for node in nodes)
            lacking, have = ("GPU", gpus) if section.gpus * wanted > gpus else ("CPU", cpus)
            each = section.gpus if lacking == "GPU" else section.cpus
            raise InputError(
                f"workers: expected {each * wanted:g} {lacking}s for {wanted} workers, received "
                f"{have:g} "
                f"on {len(nodes)} nodes, where {placed} fit; lower workers.count or "
                f"workers.{lacking.lower()}s"
            )
        for line in report(placements, section):
            self._notify(line)

    def _target(self) -> int:
        """How many workers there should be now."""
        if self._section.count is not None:
            return self._section.count
        return sum(node.holds(self._section) for node in nodes_of(self._ray))

    def _grow(self) -> None:
        """Start workers that are missing."""
        missing = self._target() - len(self._starting) - len(self._ready)
        for _ in range(max(missing, 0)):
            actor = self._factory()
            self._starting.append(_Slot(actor, actor.hello.remote()))
        self._looked = time.monotonic()

    def _look(self) -> None:
        """From time to time, see which nodes there are, and start the workers that are missing."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        names = {node.name for node in nodes_of(self._ray)}
        for change, changed in (("joined", names - self._nodes), ("left", self._nodes - names)):
            for name in sorted(changed):
                self._notify(f"node {name} {change} the cluster")
        self._nodes = names
        self._drop_unplaceable()
        if self._broken < BROKEN_TO_STOP:
            self._grow()
        self._looked = time.monotonic()
        self._give_up_if_alone()

    def _drop_unplaceable(self) -> None:
        """Take back workers that were started for nodes which have left; without this they would
        wait for ever.
        """
        surplus = len(self._starting) + len(self._ready) - self._target()
        for slot in self._starting[:]:
            if surplus <= 0 or self._section.count is not None:
                return
            self._starting.remove(slot)
            self._ray.kill(slot.actor, no_restart=True)
            surplus -= 1

    def _welcome(self, slot: _Slot) -> None:
        """A worker has loaded, or could not be built."""
        self._starting.remove(slot)
        try:
            slot.node = self._ray.get(slot.hello)
        except self._ray.exceptions.RayError as error:
            self._broken += 1
            cause = getattr(error, "cause", None) or error
            text = f"a worker could not be built: {_last_line(cause)}"
            # A worker that died while loading may have been killed; one that raised would raise
            # again.
            final = getattr(error, "actor_init_failed", False)
            if not self._ready and (final or self._broken >= BROKEN_TO_STOP):
                raise StudyFailedError(text) from error
            self._notify(text)
            return
        self._broken = 0
        self._ready.append(slot)

    def _await_first(self) -> None:
        """Fail early, with the worker's own message, if workers cannot be built."""
        self._alone_since = time.monotonic()
        while not self._ready:
            self._round(LOOK_SECONDS)

    def _give_up_if_alone(self) -> None:
        if self._ready:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > self._patience:
            raise StudyFailedError(
                f"workers: expected one within {self._patience:g} s, found none on "
                f"{len(self._nodes)} nodes of "
                "the cluster; nothing told is lost, the same command goes on once there are nodes"
            )

    def _actor_factory(self, spec: WorkerSpec) -> Callable[[], Any]:
        ray = self._ray

        class RemoteWorker:
            """A worker in a process of its own."""

            def __init__(self, spec: WorkerSpec) -> None:
                self._worker = Worker(spec)

            def run(self, task: Task) -> Outcome:
                return self._worker.run(task)

            def hello(self) -> str:
                return str(ray.get_runtime_context().get_node_id())

            def pid(self) -> int:
                return os.getpid()

        options = {
            "num_cpus": self._section.cpus,
            "num_gpus": self._section.gpus,
            "scheduling_strategy": "SPREAD",
            # Ray retries and restarts nothing: the driver decides (see the module's docstring).
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        remote = ray.remote(**options)(RemoteWorker)
        reference = ray.put(spec)
        return lambda: remote.remote(reference)


def _last_line(error: BaseException) -> str:
    """Ray wraps messages in many lines; the last one says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
