"""The Ray actor that holds base and rows of a study on a card."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from mergesearch.merging.resident.sharing.copies import HeldCopy
from mergesearch.merging.resident.sharing.kinds import turn_off_expandable_segments
from mergesearch.merging.resident.sharing.protocol import ArenaHandle
from mergesearch.merging.tensors.device_errors import device_error
from mergesearch.search.workers.backends.arena_copy import copy_if_missing
from mergesearch.search.workers.backends.cards import whereabouts
from mergesearch.search.workers.backends.loading_watch import send_loading
from mergesearch.search.workers.card_holder import hold_copy
from mergesearch.search.workers.loading import LoadingReporter
from mergesearch.search.workers.messages import Failure, WorkerSpec
from mergesearch.search.workers.worker import failure_of


def holder_factory(ray: Any, spec: WorkerSpec) -> Callable[[dict[str, Any]], Any]:
    """What creates a holder for workers of the spec, with more of Ray's options."""

    class RemoteHolder:
        """A process that uploads once and then does nothing: what cannot run cannot fail."""

        def __init__(self, spec: WorkerSpec) -> None:
            turn_off_expandable_segments(os.environ)
            self._spec = spec
            self._held: HeldCopy | None = None

        def whereabouts(self) -> tuple[str, tuple[str, ...]]:
            """The node's id, and the GPUs that Ray has given to this process."""
            return whereabouts(ray)

        def load(self, key: str, server: Any) -> ArenaHandle | Failure:
            """Upload, from files that another node has prepared if there is one.

            Returns:
                What workers attach to, or the failure of a device that broke meanwhile.
            """
            loading = LoadingReporter(partial(send_loading, key))
            copy_if_missing(ray, server, self._spec, loading)
            try:
                self._held = hold_copy(self._spec, loading)
                return self._held.offer()
            except Exception as error:
                if device_error(error) != "broken":
                    raise
                return failure_of(error)

        def hold(self) -> None:
            """Never return: the end of the call tells the driver of the end of this process."""
            threading.Event().wait()

        def pid(self) -> int:
            """Id of this process."""
            return os.getpid()

    options = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
    remote = ray.remote(**options)(RemoteHolder)
    reference = ray.put(spec)
    return lambda more: remote.options(**more).remote(reference)
