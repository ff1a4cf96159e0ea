"""Workers merge only what has changed, but everything after code of others had the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.evaluators.spec.evaluators import hands_weights_out, parse_evaluators
from mergesearch.merging.resident import merged_model
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.runs.wiring import worker_spec
from mergesearch.search.workers.messages import Task
from mergesearch.search.workers.worker import Worker
from tests.search.conftest import model_study
from tests.search.studies import spec_of

#: Sums weights, then writes to them in a way that torch does not count.
SCORER = """
def score(model):
    total = sum(float(parameter.double().abs().sum()) for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return total
"""


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each merge was one of a part alone."""
    seen: list[bool] = []
    combine = merged_model.combine_terms

    def counted(*arguments: Any, only: Any = None, **options: Any) -> None:
        seen.append(only is not None)
        combine(*arguments, only=only, **options)

    monkeypatch.setattr(merged_model, "combine_terms", counted)
    return seen


@pytest.fixture
def workers(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> Callable[..., tuple[list[Task], Callable[[], Worker]]]:
    def make(**sections: Any) -> tuple[list[Task], Callable[[], Worker]]:
        """Tasks that differ in one coefficient, and what makes a worker for them."""
        data = model_study(pico_models, pico_items, **sections)
        plan = plan_study(spec_of(data, tmp_path))
        spec = worker_spec(plan, RunFolder(tmp_path))
        points = [np.array(plan.space.start) for _ in range(3)]
        for number, point in enumerate(points):
            point[0] += 0.1 * number
        tasks = [Task(str(n), plan.space.decode(p), "search") for n, p in enumerate(points)]
        return tasks, lambda: Worker(replace(spec, arenas=str(tmp_path / "arenas")))

    return make


def same_as_alone(tasks: list[Task], make: Callable[[], Worker]) -> None:
    """A worker measures what workers for one task each do."""
    worker = make()
    for task in tasks:
        measured = worker.run(task).measurement
        alone = make().run(task).measurement
        assert measured is not None
        assert alone is not None
        assert measured.values == alone.values


def test_a_function_that_writes_to_the_weights_spoils_no_trial(
    workers: Any, tmp_path: Path, parts: list[bool]
) -> None:
    (tmp_path / "scorer.py").write_text(SCORER)
    section = {
        "kind": "python",
        "function": "scorer.py:score",
        "objectives": [{"name": "size", "direction": "minimize"}],
        "model_class": "AutoModelForImageClassification",
    }
    same_as_alone(*workers(evaluators=[section], allow_code=True))
    assert not any(parts)


def test_evaluators_of_the_product_leave_what_is_there(workers: Any, parts: list[bool]) -> None:
    tasks, make = workers()
    same_as_alone(tasks, make)
    assert parts == [False, False, True, False, True, False]
    worker = make()
    for task in tasks:
        worker.run(task)
    again = make()
    again.run(tasks[-1])
    assert worker._merged is not None
    assert again._merged is not None
    assert torch.equal(worker._merged.merged, again._merged.merged)


@pytest.mark.parametrize(
    ("section", "out"),
    [
        ({"kind": "synthetic", "problem": "sphere"}, False),
        ({"kind": "distance"}, False),
        (
            {
                "kind": "python",
                "function": "a:b",
                "objectives": [{"name": "size", "direction": "minimize"}],
            },
            True,
        ),
    ],
    ids=["synthetic", "distance", "python"],
)
def test_which_evaluators_hand_weights_out(section: dict[str, Any], out: bool) -> None:
    plain = {"kind": "synthetic", "problem": "sphere"}
    assert hands_weights_out(parse_evaluators([plain, section])) == out
