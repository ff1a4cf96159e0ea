"""Studies with approximate rows: the search may use them, what is chosen and exported may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mergesearch.merging import Field, InputError
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.exported import rescore
from mergesearch.search.spec.study_file import validate
from mergesearch.search.workers.messages import Task, WorkerSpec
from mergesearch.search.workers.worker import Worker
from tests.search.conftest import model_study
from tests.search.studies import spec_of


@pytest.mark.parametrize("rows", ["int8", pytest.param("bf16", marks=pytest.mark.slow)])
def test_search_items_see_approximate_rows_and_held_out_items_exact_ones(
    pico_models: Path, pico_items: Path, tmp_path: Path, rows: str
) -> None:
    plan = plan_study(spec_of(model_study(pico_models, pico_items, rows=rows), tmp_path))
    evaluators = tuple(one.model_dump(mode="json") for one in plan.spec.evaluators)
    worker = Worker(WorkerSpec(plan.template, evaluators, str(tmp_path / "arenas"), rows=rows))
    field = Field.constant(plan.template.field.size, [0.4, 0.3])
    task = Task("one", plan.template.with_field(field), "search")
    exact = Worker(WorkerSpec(plan.template, evaluators, str(tmp_path / "arenas")))
    exact.run(task)
    worker.run(task)
    assert worker._merged is not None
    assert exact._merged is not None
    difference = (worker._merged.merged - exact._merged.merged).norm()
    change = (exact._merged.merged - torch.from_numpy(base_of(plan, tmp_path))).norm()
    assert 0 < difference < 0.02 * change
    for split in ("validation", "test"):
        worker.run(replace(task, split=split))
        assert torch.equal(worker._merged.merged, exact._merged.merged)


def base_of(plan: object, folder: Path) -> np.ndarray:
    """The base over the flat index."""
    from tests.merging.arenas import decoded

    return decoded(open_arenas(plan.template, folder / "arenas"))[0]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_winner_of_a_search_on_int8_rows_is_exported_exactly(
    pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    data = model_study(pico_models, pico_items, rows="int8", budget={"trials": 10})
    run = run_study(spec_of(data, tmp_path), tmp_path / "run")
    assert run.verdict is not None
    record = next(r for r in run.log.records if r.number == run.verdict.winner)
    export_model(record.recipe, tmp_path / "out")
    rescored = rescore(run, record, tmp_path / "out")
    assert (rescored.split, rescored.agreement.identical) == ("test", True)


def test_an_unknown_encoding_is_refused(
    pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="rows"):
        validate(model_study(pico_models, pico_items, rows="int4"), tmp_path / "study.yaml")
