"""The peak of a trial on the card, as planned and as torch counts it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.gpu_check.check import Figure, Machine, Skipped
from experiments.gpu_check.models import models, planned_study, worker_spec
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.tensors.accelerator import device_module, empty_cache
from mergesearch.search.plan.card_check import plan_for
from mergesearch.search.plan.cards import PlannedCard
from mergesearch.search.workers.messages import Task
from mergesearch.search.workers.worker import Worker

OPERATORS = ("task_arithmetic", "ties")
BATCH = 2

#: Difference, as a share of the measured peak.
BAR = 0.05


def run(machine: Machine) -> Sequence[Figure]:
    """Two figures for each operator: what stays, and the peak."""
    if not machine.is_card:
        raise Skipped("main memory is not counted by torch; a card's is")
    models(machine)
    return [figure for operator in OPERATORS for figure in _one(machine, operator)]


def _one(machine: Machine, operator: str) -> Iterator[Figure]:
    plan = planned_study(machine, operator, BATCH)
    memory = machine.memory()
    assert memory is not None
    # Torch does not count the context, which is no tensor.
    expected = plan_for(plan, PlannedCard("this card", memory[1], context=0), 1)
    assert expected is not None
    spec = worker_spec(machine, plan)
    open_arenas(plan.template, Path(spec.arenas), rows=spec.rows, threads=spec.threads)
    card = device_module(machine.device)
    gc.collect()
    empty_cache()
    before = card.memory_allocated(0)
    card.reset_peak_memory_stats(0)
    worker = Worker(spec)
    loaded = card.memory_allocated(0) - before
    outcome = worker.run(Task("0", plan.space.decode(plan.space.start), "search"))
    peak = card.max_memory_allocated(0) - before
    if outcome.failure is not None:
        raise RuntimeError(outcome.failure.message)
    fullest = expected.fullest
    yield _figure(f"{operator}: what stays", fullest.base + fullest.rows + fullest.merged, loaded)
    yield _figure(f"{operator}: peak of a trial", expected.peak, peak)


def _figure(what: str, planned: int, measured: int) -> Figure:
    error = abs(planned - measured) / measured
    return Figure(
        what,
        f"{measured / 1e9:.4g} GB, planned {planned / 1e9:.4g} GB ({error:.1%} off)",
        f"{BAR:.0%}",
        error <= BAR,
    )
