"""Devices of workers, recorded as their first results come in."""

from __future__ import annotations

from contextlib import suppress

from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.workers.backends import Backend
from mergesearch.search.workers.devices import Device
from mergesearch.search.workers.messages import Outcome, Task


class DeviceRecorder:
    """A backend whose workers' devices go to the run's environment.

    Args:
        backend: Where tasks run.
        folder: The run's folder, held by this driver.
    """

    def __init__(self, backend: Backend, folder: RunFolder) -> None:
        self._backend = backend
        self._folder = folder
        self._known = folder.devices()

    @property
    def slots(self) -> int:
        """How many tasks to keep submitted at a time."""
        return self._backend.slots

    def submit(self, task: Task) -> None:
        """Hand the task on."""
        self._backend.submit(task)

    def wait(self) -> list[Outcome]:
        """Wait for outcomes, and record the devices that they name for the first time."""
        outcomes = self._backend.wait()
        for outcome in outcomes:
            device = outcome.device
            if device is not None and self._known.get(outcome.worker) != device:
                self._record(outcome.worker, device)
        return outcomes

    def close(self) -> None:
        """Stop all workers."""
        self._backend.close()

    def _record(self, worker: str, device: Device) -> None:
        """Record a device now or, where the disk is full, with the worker's next outcome."""
        with suppress(OSError):
            self._folder.add_device(worker, device)
            self._known[worker] = device
