"""The Ray actor that holds a worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from mergesearch.merging.resident.sharing.kinds import turn_off_expandable_segments
from mergesearch.merging.resident.sharing.protocol import ArenaHandle
from mergesearch.merging.tensors.device_errors import device_error
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends.arena_copy import copy_if_missing
from mergesearch.search.workers.backends.cards import whereabouts
from mergesearch.search.workers.backends.loading_watch import send_loading
from mergesearch.search.workers.card_copy import COPY_LOST, CardCopy
from mergesearch.search.workers.loading import LoadingReporter
from mergesearch.search.workers.messages import Failure, Outcome, Task, WorkerSpec
from mergesearch.search.workers.worker import Worker, failure_of


def actor_factory(
    ray: Any, section: WorkersSection, spec: WorkerSpec
) -> Callable[[dict[str, Any]], Any]:
    """What creates an actor for a worker of the spec, with more of Ray's options."""

    class RemoteWorker:
        """A worker in a process of its own. It answers before it loads, and then no more."""

        def __init__(self, spec: WorkerSpec) -> None:
            self._spec = spec
            self._worker: Worker | None = None
            self._copy: CardCopy | None = None

        def whereabouts(self) -> tuple[str, tuple[str, ...]]:
            """The node's id, and the GPUs that Ray has given to this process."""
            return whereabouts(ray)

        def load(self, key: str, server: Any, handle: ArenaHandle | None) -> Failure | None:
            """Build the worker, from weights that another node has prepared if there is one.

            Args:
                key: Where to leave word of the loading.
                server: Of the other node.
                handle: Of base and rows that another process holds on the card.

            Returns:
                The failure of a device that broke meanwhile, or that the handle is no longer good.
            """
            loading = LoadingReporter(partial(send_loading, key))
            copy_if_missing(ray, server, self._spec, loading)
            if handle is not None:
                turn_off_expandable_segments(os.environ)  # before the card is used
                self._copy = CardCopy(handle)
            failure: Failure | None = None
            try:
                self._worker = Worker(self._spec, loading, self._copy)
            except Exception as error:
                failure = failure_of(error)
                if not self._copy_is_lost() and device_error(error) != "broken":
                    raise
            return COPY_LOST if self._copy_is_lost() else failure

        def run(self, task: Task) -> Outcome:
            """Run a task."""
            assert self._worker is not None
            outcome = self._worker.run(task)
            return outcome if self._copy is None else self._copy.checked(outcome)

        def _copy_is_lost(self) -> bool:
            return self._copy is not None and self._copy.is_lost

        def pid(self) -> int:
            """Id of this process."""
            return os.getpid()

    options = {
        "num_cpus": section.cpus,
        "scheduling_strategy": "SPREAD",
        # Ray retries and restarts nothing: the driver decides (see ray_pool.py).
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    remote = ray.remote(**options)(RemoteWorker)
    reference = ray.put(spec)
    return lambda more: remote.options(**more).remote(reference)
