"""Workers as Ray actors, on this machine or a cluster. The only file that imports ray.

* Two tasks are in flight per worker, so that a round trip to the driver never leaves it idle; no barrier.
* A worker that dies (out of memory, SIGKILL, lost node) is replaced by a new actor built from the same spec. The task
  it was running is run again, once; a recipe that kills its worker twice becomes a failed trial. What merely waited
  behind it is run again without a mark.
* Ray itself retries nothing: the driver decides, so a task can never be told twice.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from merging import InputError, StudyFailedError
from search.study_file import WorkersSection
from search.worker import Failure, Outcome, Task, Worker, WorkerSpec

IN_FLIGHT = 2
#: No weights travel through Ray's object store; tasks and outcomes are a few kB.
OBJECT_STORE_BYTES = 200_000_000
KILLS_TO_FAIL = 2


@dataclass(eq=False)
class _Slot:
    """A worker and what it has been sent, oldest first."""

    actor: Any
    sent: deque[tuple[Any, Task]] = field(default_factory=deque)  # (object reference, task)


class RayPool:
    """A pool of workers.

    Raises:
        InputError: If Ray cannot be reached or lacks the CPUs or GPUs asked for.
        StudyFailedError: If a worker cannot be built; carries the worker's own message.
    """

    def __init__(self, section: WorkersSection, spec: WorkerSpec) -> None:
        self._ray = _import_ray()
        self._owned = section.address is None
        self._connect(section)
        try:
            count = section.count or self._fitting(section)
            self._check_resources(section, count)
            self._factory = self._actor_factory(section, spec)
            self._slots = [_Slot(self._factory()) for _ in range(count)]
            self._await_workers()
        except BaseException:
            self.close()
            raise
        self.slots = IN_FLIGHT * count
        self._queue: deque[Task] = deque()
        self._kills: dict[str, int] = {}

    def submit(self, task: Task) -> None:
        """Send the task to the least busy worker, or queue it until one has room."""
        self._queue.append(task)
        self._dispatch()

    def wait(self) -> list[Outcome]:
        """Wait for the first result; workers found dead are replaced on the way."""
        while True:
            owner = {ref: slot for slot in self._slots for ref, _ in slot.sent}
            ready, _ = self._ray.wait(list(owner), num_returns=1)
            outcome = self._collect(owner[ready[0]], ready[0])
            self._dispatch()
            if outcome is not None:
                return [outcome]

    def close(self) -> None:
        """Kill the workers; stop Ray if it was started here."""
        for slot in getattr(self, "_slots", []):
            self._ray.kill(slot.actor, no_restart=True)
        self._slots = []
        self._ray.shutdown()

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        pids: list[int] = self._ray.get([slot.actor.pid.remote() for slot in self._slots])
        return pids

    def _connect(self, section: WorkersSection) -> None:
        # Settings that Ray reads from the environment at import or start, not from arguments.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if self._owned:
            needed = None if section.count is None or section.gpus else int(-(-section.count * section.cpus // 1))
            options |= {"num_cpus": needed, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        try:
            self._ray.init(address="local" if self._owned else section.address, **options)
        except (ConnectionError, RuntimeError, OSError) as error:
            where = section.address or "a local Ray"
            raise InputError(f"workers.address: expected {where} to answer, received: {error}") from None

    def _fitting(self, section: WorkersSection) -> int:
        """As many workers as the cluster holds."""
        have = self._ray.cluster_resources()
        by_cpu = int(have.get("CPU", 0) // section.cpus)
        return min(by_cpu, int(have.get("GPU", 0) // section.gpus)) if section.gpus else by_cpu

    def _check_resources(self, section: WorkersSection, count: int) -> None:
        have = self._ray.cluster_resources()
        for key, each in (("CPU", section.cpus), ("GPU", section.gpus)):
            if each * max(count, 1) > have.get(key, 0):
                raise InputError(
                    f"workers: expected {each * max(count, 1):g} {key}s for {max(count, 1)} workers, received "
                    f"{have.get(key, 0):g}; lower workers.count or workers.{key.lower()}s"
                )

    def _actor_factory(self, section: WorkersSection, spec: WorkerSpec) -> Any:
        ray = self._ray

        class RemoteWorker:
            """A worker in a process of its own."""

            def __init__(self, spec: WorkerSpec) -> None:
                self._worker = Worker(spec)

            def run(self, task: Task) -> Outcome:
                return self._worker.run(task)

            def pid(self) -> int:
                return os.getpid()

        # Ray retries and restarts nothing: the driver decides (see the module's docstring).
        options = {"num_cpus": section.cpus, "num_gpus": section.gpus, "max_restarts": 0, "max_task_retries": 0}
        remote = ray.remote(**options)(RemoteWorker)
        reference = ray.put(spec)
        return lambda: remote.remote(reference)

    def _await_workers(self) -> None:
        """Fail early, with the worker's own message, if workers cannot be built."""
        try:
            self._ray.get([slot.actor.pid.remote() for slot in self._slots])
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise StudyFailedError(f"a worker could not be built: {_last_line(cause)}") from error

    def _dispatch(self) -> None:
        while self._queue:
            slot = min(self._slots, key=lambda s: len(s.sent))
            if len(slot.sent) >= IN_FLIGHT:
                return
            task = self._queue.popleft()
            slot.sent.append((slot.actor.run.remote(task), task))

    def _collect(self, slot: _Slot, ref: Any) -> Outcome | None:
        try:
            outcome: Outcome = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return self._bury(slot, error)
        slot.sent = deque((sent, task) for sent, task in slot.sent if sent != ref)
        self._kills.pop(outcome.task, None)
        return outcome

    def _bury(self, slot: _Slot, error: Exception) -> Outcome | None:
        """Replace a dead worker. Its oldest task was the one running; the rest only waited."""
        (_, running), *waiting = slot.sent
        self._slots.remove(slot)
        self._slots.append(_Slot(self._factory()))
        self._queue.extendleft(task for _, task in reversed(waiting))
        kills = self._kills.get(running.id, 0) + 1
        if kills < KILLS_TO_FAIL:
            self._kills[running.id] = kills
            self._queue.appendleft(running)
            return None
        self._kills.pop(running.id, None)
        message = f"the worker died {kills} times while running this recipe: {_last_line(error)}"
        return Outcome(running.id, None, Failure("lost", message, str(error)))


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("workers.backend: ray is not installed; `pip install ray` or set it to inline") from None
    return ray


def _last_line(error: BaseException) -> str:
    """Ray wraps messages in many lines; the last one says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
