"""The Ray actor that holds a worker."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from mergesearch.merging import InputError
from mergesearch.search.spec.sections import WorkersSection
from mergesearch.search.workers.backends.arena_copy import arena_folder, copy_arenas
from mergesearch.search.workers.backends.loading_watch import send_loading
from mergesearch.search.workers.device_errors import device_error
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

        def whereabouts(self) -> tuple[str, tuple[str, ...]]:
            """The node's id, and the GPUs that Ray has given to this process."""
            gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
            return str(ray.get_runtime_context().get_node_id()), gpus

        def load(self, key: str, server: Any) -> Failure | None:
            """Build the worker, from weights that another node has prepared if there is one.

            Returns:
                The failure of a device that broke meanwhile.
            """
            loading = LoadingReporter(partial(send_loading, key))
            if server is not None:
                self._copy(server, loading)
            try:
                self._worker = Worker(self._spec, loading)
            except Exception as error:
                if device_error(error) != "broken":
                    raise
                return failure_of(error)
            return None

        def _copy(self, server: Any, loading: LoadingReporter) -> None:
            # What cannot be copied is prepared here.
            with contextlib.suppress(OSError, InputError, ray.exceptions.RayError):
                loading.begin("copying weights from another node")
                folder = arena_folder(self._spec.arenas)
                copy_arenas(ray, server, self._spec.template.basis_key, folder, loading)

        def run(self, task: Task) -> Outcome:
            """Run a task."""
            assert self._worker is not None
            return self._worker.run(task)

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
