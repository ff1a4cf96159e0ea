"""Workers as Ray actors, on this machine or a cluster.

* Two tasks are in flight per worker, so that a round trip to the driver never leaves it idle; no
  barrier.
* A worker is given tasks once it has loaded; the study begins with the first one.
* A worker that dies (out of memory, SIGKILL) is replaced by a new actor built from the same spec.
  The task it was running is run again, once; a recipe that kills its worker twice becomes a failed
  trial. The loss of a node is no fault of the recipe. Tasks that only waited behind it are run
  again without a mark.
* A worker whose device has broken is replaced too, and its task runs again, on another card where
  there is one. A card on which that happens twice is set aside (see blame.py).
* Where several workers share a card, one more process holds base and rows for them. When it dies,
  they are replaced together with it, and their tasks run again without a mark.
* Ray itself retries nothing: the driver decides, so no task can have two results.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends.cluster import announce_placement, connect
from mergesearch.search.workers.backends.ray_actors import NODE_CHECK_SECONDS, RayActors
from mergesearch.search.workers.backends.worker_actor import WorkerActor, is_node_lost, last_line
from mergesearch.search.workers.messages import Failure, Notice, Outcome, Task, WorkerSpec

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
        wait_seconds: How long to wait for a first worker to exist, and for another one once all are
            lost. One that loads is waited for.

    Raises:
        InputError: If Ray cannot be reached or lacks the CPUs or GPUs asked for.
        StudyFailedError: If no worker can be built; carries the worker's own message.
    """

    def __init__(
        self,
        section: WorkersSection,
        spec: WorkerSpec,
        notify: Callable[[Notice], None] = lambda notice: None,
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
        owners: dict[Any, WorkerActor] = {
            actor.loaded: actor for actor in self._actors.holders.holding
        }
        for actor in self._actors.starting:
            ref = actor.loaded if actor.node else actor.arrived
            if ref is not None:
                owners[ref] = actor
        for actor in self._actors.ready:
            owners.update((ref, actor) for ref, _ in actor.sent)
        if not owners:
            time.sleep(min(timeout, 0.5))
            self._actors.check_nodes()
            return []
        done, pending = self._ray.wait(list(owners), num_returns=1, timeout=timeout)
        if done and pending:
            done += self._ray.wait(pending, num_returns=len(pending), timeout=0)[0]
        # A worker's results in the order of its tasks: the oldest that has none was running.
        ended = [(actor, ref) for ref, actor in owners.items() if ref in set(done)]
        outcomes = [
            outcome for actor, ref in ended if (outcome := self._take(actor, ref)) is not None
        ]
        self._actors.check_nodes()
        return outcomes

    def _take(self, actor: WorkerActor, ref: Any) -> Outcome | None:
        """The outcome behind an object reference; None if it is none, or its task runs again."""
        if actor in self._actors.holders.holding:  # it would answer only by its death
            return self._handle_lost_copy(actor)
        if actor in self._actors.starting:
            if ref != actor.loaded:
                self._actors.arrive(actor)
            elif not self._actors.admit(actor):
                return self._handle_lost_copy(actor)
            return None
        if actor not in self._actors.ready:
            return None  # its death was handled in this very round
        try:
            outcome: Outcome = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return self._handle_death(actor, error)
        if outcome.copy_lost:
            return self._handle_lost_copy(actor)
        if outcome.device_broken and outcome.failure is not None:
            return self._handle_broken_device(actor, outcome.failure)
        actor.sent = deque((sent, task) for sent, task in actor.sent if sent != ref)
        self._kills.pop(outcome.task, None)
        self._actors.succeed(actor, outcome.task)
        return outcome

    def _dispatch(self) -> None:
        """Send queued tasks to the least busy workers, as long as they have room."""
        waiting: deque[Task] = deque()
        while self._queue:
            task = self._queue.popleft()
            room = [a for a in self._actors.allowed(task.id) if len(a.sent) < IN_FLIGHT]
            if room:
                actor = min(room, key=lambda ready: len(ready.sent))
                actor.sent.append((actor.handle.run.remote(task), task))
            else:
                waiting.append(task)
        self._queue = waiting

    def _handle_death(self, actor: WorkerActor, error: Exception) -> Outcome | None:
        """Replace a dead worker; its oldest task was running, the others only waited.

        Returns:
            The failure of the running task, if it has killed too many workers.
        """
        if self._actors.holders.is_lost(actor.card_id):
            return self._handle_lost_copy(actor)
        (_, running), *waiting = actor.sent
        self._actors.ready.remove(actor)
        self._queue.extendleft(task for _, task in reversed(waiting))
        node_lost = is_node_lost(self._ray, actor, error)
        kills = self._kills.get(running.id, 0) + (not node_lost)
        self._actors.start_missing()
        if kills < KILLS_TO_FAIL:
            self._kills[running.id] = kills
            self._queue.appendleft(running)
            return None
        self._kills.pop(running.id, None)
        message = f"the worker died {kills} times while running this recipe: {last_line(error)}"
        return Outcome(running.id, None, Failure("lost", message, str(error)))

    def _handle_lost_copy(self, actor: WorkerActor) -> Outcome | None:
        """Replace the workers of a card whose weights are lost; their tasks carry no mark.

        Returns:
            None: there is no outcome.
        """
        self._queue.extendleft(reversed(self._actors.lose_copy(actor)))
        return None

    def _handle_broken_device(self, actor: WorkerActor, failure: Failure) -> Outcome | None:
        """Replace a worker whose device has broken; its oldest task was running.

        Returns:
            The failure of that task, if it is at fault itself.
        """
        (_, running), *waiting = actor.sent
        actor.sent.clear()
        self._queue.extendleft(task for _, task in reversed(waiting))
        if not self._actors.blame(actor, running.id, failure):
            self._queue.append(running)
            return None
        message = f"the device of every worker that ran this recipe broke: {failure.message}"
        return Outcome(running.id, None, Failure("error", message, failure.detail))
