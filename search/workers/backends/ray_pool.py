"""Workers as Ray actors, on this machine or a cluster.

* Two tasks are in flight per worker, so that a round trip to the driver never leaves it idle; no
  barrier.
* A worker is given tasks once it has loaded; the study begins with the first one.
* A worker that dies (out of memory, SIGKILL) is replaced by a new actor built from the same spec.
  The task it was running is run again, once; a recipe that kills its worker twice becomes a failed
  trial. The loss of a node is no fault of the recipe. Tasks that only waited behind it are run
  again without a mark.
* Ray itself retries nothing: the driver decides, so no task can have two results.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends.cluster import connect
from mergesearch.search.workers.backends.ray_actors import (
    NODE_CHECK_SECONDS,
    RayActors,
    WorkerActor,
    announce_placement,
    last_line,
)
from mergesearch.search.workers.messages import Failure, Outcome, Task, WorkerSpec

#: Number of tasks that a worker has at a time.
IN_FLIGHT = 2
#: Number of workers that a recipe may kill before it becomes a failed trial.
KILLS_TO_FAIL = 2


class RayPool:
    """A pool of workers.

    Args:
        section: How many, and what each takes.
        spec: What they are built from.
        notify: Called with messages on where workers are, and on nodes that come and go.
        wait_seconds: How long to wait for a first worker, and for another one once all are lost.

    Raises:
        InputError: If Ray cannot be reached or lacks the CPUs or GPUs asked for.
        StudyFailedError: If no worker can be built; carries the worker's own message.
    """

    def __init__(
        self,
        section: WorkersSection,
        spec: WorkerSpec,
        notify: Callable[[str], None] = lambda text: None,
        wait_seconds: float = 300.0,
    ) -> None:
        self._queue: deque[Task] = deque()
        self._kills: dict[str, int] = {}  # task -> workers that died while running it
        self._ray = connect(section)
        with ExitStack() as stack:
            stack.callback(self._ray.shutdown)
            announce_placement(self._ray, section, notify)
            self._actors = RayActors(self._ray, section, spec, notify, wait_seconds)
            stack.callback(self._actors.kill_all)
            self._actors.start_missing()
            while not self._actors.ready:  # fails early, with the worker's own message
                self._poll(NODE_CHECK_SECONDS)
            self._open = stack.pop_all()

    @property
    def slots(self) -> int:
        """How many tasks to keep submitted: changes as workers come and go."""
        return IN_FLIGHT * len(self._actors.ready)

    def submit(self, task: Task) -> None:
        """Send the task to the least busy worker, or queue it until one has room."""
        self._queue.append(task)
        self._dispatch()

    def wait(self) -> list[Outcome]:
        """Wait for results, or for a worker that is new; dead ones are replaced on the way."""
        while True:
            before = len(self._actors.ready)
            outcomes = self._poll(NODE_CHECK_SECONDS)
            self._dispatch()
            if outcomes or len(self._actors.ready) > before:
                return outcomes

    def close(self) -> None:
        """Kill the workers; stop Ray if it was started here."""
        self._open.close()

    def pids(self) -> list[int]:
        """Process ids of the workers, once all have loaded."""
        while self._actors.starting:
            self._poll(NODE_CHECK_SECONDS)
        pids: list[int] = self._ray.get([actor.handle.pid.remote() for actor in self._actors.ready])
        return pids

    def _poll(self, timeout: float) -> list[Outcome]:
        """Take the results that come within ``timeout`` seconds, and check the nodes."""
        owners: dict[Any, WorkerActor] = {actor.loaded: actor for actor in self._actors.starting}
        for actor in self._actors.ready:
            owners.update((ref, actor) for ref, _ in actor.sent)
        if not owners:
            time.sleep(min(timeout, 0.5))
            self._actors.check_nodes()
            return []
        done, pending = self._ray.wait(list(owners), num_returns=1, timeout=timeout)
        if done and pending:
            done += self._ray.wait(pending, num_returns=len(pending), timeout=0)[0]
        outcomes = [
            outcome for ref in done if (outcome := self._take(owners[ref], ref)) is not None
        ]
        self._actors.check_nodes()
        return outcomes

    def _take(self, actor: WorkerActor, ref: Any) -> Outcome | None:
        """The outcome behind an object reference; None if it is none, or its task runs again."""
        if ref == actor.loaded:
            self._actors.admit(actor)
            return None
        if actor not in self._actors.ready:
            return None  # its death was handled in this very round
        try:
            outcome: Outcome = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return self._handle_death(actor, error)
        actor.sent = deque((sent, task) for sent, task in actor.sent if sent != ref)
        self._kills.pop(outcome.task, None)
        return outcome

    def _dispatch(self) -> None:
        """Send queued tasks to the least busy workers, as long as they have room."""
        while self._queue and self._actors.ready:
            actor = min(self._actors.ready, key=lambda ready: len(ready.sent))
            if len(actor.sent) >= IN_FLIGHT:
                return
            task = self._queue.popleft()
            actor.sent.append((actor.handle.run.remote(task), task))

    def _handle_death(self, actor: WorkerActor, error: Exception) -> Outcome | None:
        """Replace a dead worker; its oldest task was running, the others only waited.

        Returns:
            The failure of the running task, if it has killed too many workers.
        """
        (_, running), *waiting = actor.sent
        self._actors.ready.remove(actor)
        self._queue.extendleft(task for _, task in reversed(waiting))
        node_lost = self._actors.on_lost_node(actor, error)
        kills = self._kills.get(running.id, 0) + (not node_lost)
        self._actors.start_missing()
        if kills < KILLS_TO_FAIL:
            self._kills[running.id] = kills
            self._queue.appendleft(running)
            return None
        self._kills.pop(running.id, None)
        message = f"the worker died {kills} times while running this recipe: {last_line(error)}"
        return Outcome(running.id, None, Failure("lost", message, str(error)))
