"""A worker whose batch does not fit on the card halves it and finishes the trial."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence

import torch

from experiments.gpu_check.check import Figure, Machine, Skipped
from experiments.gpu_check.models import TEXTS, planned_study, worker_spec
from mergesearch.merging.tensors.accelerator import device_module, empty_cache
from mergesearch.search.workers.messages import Outcome, Task
from mergesearch.search.workers.worker import Worker

#: Of what a full batch takes, so much is left free.
ROOM = 0.6

#: Scores of two batch sizes in bf16 may differ by so much.
TOLERANCE = 0.01


def run(machine: Machine) -> Sequence[Figure]:
    """The trial with room for its batch, and without."""
    if not machine.is_card:
        raise Skipped("a check cannot take main memory away from its own machine")
    plan = planned_study(machine, "task_arithmetic", TEXTS)
    worker = Worker(worker_spec(machine, plan))
    task = Task("0", plan.space.decode(plan.space.start), "search")
    card = device_module(machine.device)
    _free()
    before = card.memory_allocated(0)
    card.reset_peak_memory_stats(0)
    whole = worker.run(task)
    taken = card.max_memory_allocated(0) - before
    if whole.failure is not None or whole.batch_size is not None:
        raise Skipped(f"a batch of {TEXTS} texts does not fit on this card as it is")
    ballast = occupied(machine, int(ROOM * taken))
    halved = worker.run(task)
    del ballast
    return _figures(whole, halved, taken)


def occupied(machine: Machine, room: int) -> torch.Tensor:
    """A tensor that leaves so many bytes of the card free."""
    _free()
    memory = machine.memory()
    assert memory is not None
    return torch.empty(max(memory[0] - room, 0), dtype=torch.uint8, device=machine.device)


def _free() -> None:
    gc.collect()
    empty_cache()


def _figures(whole: Outcome, halved: Outcome, taken: int) -> list[Figure]:
    finished = halved.failure is None and halved.batch_size is not None
    reason = "" if halved.failure is None else f", failed: {halved.failure.message}"
    figures = [
        Figure(
            f"a batch of {TEXTS} texts that takes {taken / 1e9:.3g} GB, with {ROOM:.0%} of it free",
            f"finished with {halved.batch_size} texts{reason}",
            "finished, halved",
            finished,
        )
    ]
    if whole.measurement is not None and halved.measurement is not None:
        first = next(iter(whole.measurement.values.values()))
        second = next(iter(halved.measurement.values.values()))
        close = math.isclose(first, second, rel_tol=TOLERANCE)
        figures.append(
            Figure("its score", f"{second:.6g}, unhalved {first:.6g}", f"{TOLERANCE:.0%}", close)
        )
    return figures
