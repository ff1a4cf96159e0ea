"""A worker that runs out of memory halves its batch, repeats the trial, and records the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.evaluators import Measurement, Objective
from mergesearch.evaluators.spec.evaluators import build_evaluator, parse_evaluators
from mergesearch.merging import Field, Recipe, Source
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.record.trial_text import RESULT, read_result, result_attributes
from mergesearch.search.report.caveats import caveats
from mergesearch.search.report.data import ReportData
from mergesearch.search.runs.wiring import worker_spec
from mergesearch.search.workers.loading import Loading, LoadingReporter
from mergesearch.search.workers.messages import Outcome, Task
from mergesearch.search.workers.worker import Worker
from tests.search.conftest import model_study
from tests.search.studies import spec_of

#: Items of each split of the pico data.
ITEMS = 24


class Memory:
    """A limit to the items of a forward pass of a worker's model, as that of a card would be."""

    def __init__(self, worker: Worker, items: int, error: Exception) -> None:
        self.items = items
        self.batches: list[int] = []
        self._error = error
        assert worker._merged is not None
        worker._merged.model.register_forward_pre_hook(self._check, with_kwargs=True)

    def _check(self, module: Any, arguments: Any, named: dict[str, torch.Tensor]) -> None:
        size = next(iter(named.values()), *arguments[:1]).shape[0]
        if size > self.items:
            raise self._error
        self.batches.append(size)


def too_much() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def plan_of(folder: Path, models: Path, items: Path) -> Plan:
    """A study whose batches hold eight items."""
    data = model_study(models, items)
    data["evaluators"][0]["batch_size"] = 8
    return plan_study(spec_of(data, folder))


@pytest.fixture
def worker(tmp_path: Path, pico_models: Path, pico_items: Path) -> Worker:
    plan = plan_of(tmp_path, pico_models, pico_items)
    return Worker(replace(worker_spec(plan, RunFolder(tmp_path)), arenas=str(tmp_path / "arenas")))


@pytest.fixture
def task(tmp_path: Path, pico_models: Path, pico_items: Path) -> Task:
    plan = plan_of(tmp_path, pico_models, pico_items)
    return Task("0", plan.space.decode(plan.space.start), "search")


def test_the_trial_is_repeated_with_half_the_batch_which_stays_halved(
    worker: Worker, task: Task
) -> None:
    plain = worker.run(task)
    assert plain.batch_size is None
    memory = Memory(worker, 5, too_much())
    outcome = worker.run(task)
    assert outcome.failure is None
    assert outcome.batch_size == 4, "half of 8, and at most 5"
    assert memory.batches == [4] * (ITEMS // 4)
    assert outcome.measurement is not None
    assert plain.measurement is not None
    assert outcome.measurement.values == pytest.approx(dict(plain.measurement.values), rel=1e-5)
    memory.items = ITEMS
    memory.batches.clear()
    assert worker.run(task).batch_size == 4
    assert memory.batches == [4] * (ITEMS // 4)


def test_where_one_item_is_too_much_the_trial_fails_with_advice(worker: Worker, task: Task) -> None:
    memory = Memory(worker, 0, RuntimeError("CUDA error: out of memory"))
    outcome = worker.run(task)
    assert outcome.batch_size == 1
    assert outcome.failure is not None
    assert outcome.failure.kind == "error"
    assert "CUDA error: out of memory; not even one item fits" in outcome.failure.message
    assert "workers.gpus" in outcome.failure.message
    assert not outcome.device_broken
    memory.items = ITEMS
    assert worker.run(task).failure is None


def test_a_worker_with_a_broken_device_tries_no_further_task(worker: Worker, task: Task) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    memory = Memory(worker, 0, error)
    assert worker.run(task).device_broken
    memory.items = ITEMS
    assert worker.run(task).failure is None, "there is no device, so it was a program's"
    worker._spec = replace(worker._spec, device="accelerator")
    memory.items = 0
    memory.batches.clear()
    assert worker.run(task).device_broken
    memory.items = ITEMS
    again = worker.run(task)
    assert again.device_broken
    assert again.measurement is None
    assert memory.batches == []


def test_any_other_error_leaves_the_batch_alone(worker: Worker, task: Task) -> None:
    memory = Memory(worker, 0, RuntimeError("the shapes do not match"))
    outcome = worker.run(task)
    assert (outcome.batch_size, outcome.device_broken) == (None, False)
    assert outcome.failure is not None
    assert "not even one item" not in outcome.failure.message
    memory.items = ITEMS
    assert worker.run(task).failure is None


def test_several_evaluators_halve_their_batches_together(pico_items: Path) -> None:
    data = [
        {"kind": "classification", "data": str(pico_items), "batch_size": size, "domain": "domain",
         "objectives": [{"name": f"of {size}", "metric": "accuracy"}]} for size in (4, 1)
    ]  # fmt: skip
    evaluator = build_evaluator(parse_evaluators(data), Path())
    assert [evaluator.halve_batch() for _ in range(3)] == [2, 1, None]


@pytest.mark.parametrize("size", [None, 8])
def test_the_batch_is_in_the_record_and_in_the_report(size: int | None) -> None:
    field = Field(np.arange(3), np.zeros((1, 2)))
    recipe = Recipe(Source("", ""), (), "task_arithmetic", field)
    asked = TrialRecord(
        number=0,
        kind="search",
        name="",
        suggestion=0,
        point=np.zeros(2),
        merge=recipe,
        tells_at_ask=0,
        tell_index=None,
        state="running",
    )
    outcome = Outcome("0", Measurement({"f": 1.0}), None, batch_size=size)
    attributes = result_attributes(outcome, 0, None, 0.0, {})
    assert ("batch_size" in str(attributes[RESULT])) == (size is not None)
    record = read_result(asked, attributes, ["f"], [1.0])
    assert record.batch_size == size
    data = ReportData("small", "runs/small", (Objective("f", "minimize"),), [1.0], [record])
    line = "Memory ran out: 1 trial ran with smaller batches than the study says (8)."
    assert caveats(data) == ([] if size is None else [line])


def test_a_card_that_was_set_aside_is_in_the_report() -> None:
    card = "GPU 0 of 10.0.0.1: CUDA error: unspecified launch failure"
    objectives = (Objective("f", "minimize"),)
    data = ReportData("small", "runs/small", objectives, [1.0], [], set_aside=(card,))
    assert caveats(data) == [f"Set aside after device errors; its trials ran elsewhere: {card}."]


def test_loading_reports_what_is_done_and_what_is_left(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    plan = plan_of(tmp_path, pico_models, pico_items)
    heard: list[Loading] = []
    reporter = LoadingReporter(heard.append, every=0.0)
    spec = replace(worker_spec(plan, RunFolder(tmp_path)), arenas=str(tmp_path / "arenas"))
    Worker(spec, reporter)
    assert plan.layout is not None
    phases = list(dict.fromkeys(word.phase for word in heard))
    assert phases == ["reading the items", "preparing weights", "loading the model"]
    prepared = [word for word in heard if word.phase == "preparing weights" and word.total]
    assert max(word.done for word in prepared) == len(plan.layout.tensors)
