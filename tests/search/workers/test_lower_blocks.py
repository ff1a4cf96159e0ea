"""Workers that keep what lower blocks gave: the scores of workers that keep nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.wiring import worker_spec
from mergesearch.search.workers.lower_blocks import LowerBlocks
from mergesearch.search.workers.messages import Task, WorkerSpec
from mergesearch.search.workers.worker import Worker
from tests.search.conftest import model_study
from tests.search.studies import fingerprint, spec_of

Kept = tuple[Plan, Worker, Worker, LowerBlocks]


@pytest.fixture
def kept(pico_models: Path, pico_items: Path, tmp_path: Path) -> Kept:
    """A plan, a worker that keeps nothing, and one that keeps hidden states, with these."""
    plan = plan_study(spec_of(model_study(pico_models, pico_items), tmp_path))
    evaluators = tuple(one.model_dump(mode="json") for one in plan.spec.evaluators)
    spec = WorkerSpec(plan.template, evaluators, str(tmp_path / "arenas"))
    plain = Worker(spec)
    keeping = Worker(replace(spec, hidden_states=10**8))
    assert plain._lower is None
    assert keeping._lower is not None
    return plan, plain, keeping, keeping._lower


def task(plan: Plan, lower: float, upper: float, number: int = 0, **more: object) -> Task:
    """A merge with one coefficient for what lies in and below the first block, and one above."""
    names = plan.space.names
    point = np.array([lower if "block 0" in name else upper for name in names])
    point[[n for n, name in enumerate(names) if "embedding" in name]] = lower
    return Task(f"{number}", plan.space.decode(point), "search", **more)  # type: ignore[arg-type]


def same(one: Worker, other: Worker, what: Task) -> None:
    expected = one.run(what)
    received = other.run(what)
    assert received.failure is None
    assert received.measurement is not None
    assert expected.measurement is not None
    assert received.measurement.values == expected.measurement.values
    for name, items in expected.measurement.items.items():
        assert np.array_equal(received.measurement.items[name], items)


def test_scores_are_those_of_whole_passes_while_upper_blocks_move(kept: Kept) -> None:
    plan, plain, keeping, lower = kept
    found = []
    for number, (below, above) in enumerate(
        [(0.3, 0.1), (0.3, 0.2), (0.3, 0.3), (0.3, 0.9), (0.4, 0.9), (0.4, 0.1), (0.4, 0.2)]
    ):
        same(plain, keeping, task(plan, below, above, number))
        found.append(lower.store.found)
    passes = found[2]
    assert passes > 0
    assert found == [0, 0, passes, 2 * passes, 2 * passes, 2 * passes, 3 * passes]


def test_embeddings_that_move_are_seen(kept: Kept) -> None:
    """The weights of the blocks are the same, what enters them is not."""
    plan, plain, keeping, lower = kept
    inside = ["embedding" in name for name in plan.space.names]
    for number in range(3):
        point = np.where(inside, 0.1 * number, 0.3)
        same(plain, keeping, Task(str(number), plan.space.decode(point), "search"))
    assert lower.store.found == 0


def test_rounded_bits_count_as_other_weights(kept: Kept) -> None:
    plan, plain, keeping, lower = kept
    layout = keeping._merged.layout if keeping._merged is not None else None
    assert layout is not None
    name = next(n for n in layout.names if ".0." in n and n.endswith("query.weight"))
    whole = task(plan, 0.3, 0.5)
    rounded = replace(whole, recipe=replace(whole.recipe, bits=((name, 4),)))
    for each in (whole, rounded) * 3:
        same(plain, keeping, each)
    assert lower.store.found > 0
    assert plain.run(whole).measurement.values != plain.run(rounded).measurement.values  # type: ignore[union-attr]


def test_other_tasks_let_go_of_what_is_kept(kept: Kept) -> None:
    plan, plain, keeping, lower = kept
    for other in (
        replace(task(plan, 0.3, 0.5), split="validation"),
        replace(task(plan, 0.3, 0.5), recipe=replace(plan.template, operator="ties")),
    ):
        for above in (0.1, 0.2):
            same(plain, keeping, task(plan, 0.3, above))
        assert lower.store.size > 0
        same(plain, keeping, other)
        assert lower.store.size == 0


def test_weights_that_an_evaluator_changes_are_noticed(kept: Kept) -> None:
    plan, _, keeping, lower = kept
    point = np.full(plan.space.lower.size, 0.3)
    what = Task("0", plan.space.decode(point), "search")
    for _ in range(2):
        keeping.run(what)
    other = np.where(["block 0" in name for name in plan.space.names], 0.9, point)
    assert keeping._merged is not None
    weights = next(iter(keeping._merged.model.vit.layers[0].parameters()))  # type: ignore[union-attr]
    for change, found in (
        (lambda: keeping._merged.write(plan.space.field(other)), False),  # type: ignore[union-attr]
        (lambda: weights.copy_(weights.clone()), False),
        (lambda: None, True),
    ):
        before = lower.store.found
        model = keeping._combine(what.recipe, {"merge": 0.0})
        with lower.used(what):
            with torch.no_grad():
                change()
            keeping._evaluator.evaluate(keeping._candidate(what.recipe, model), "search", None)
        assert (lower.store.found > before) == found


@pytest.mark.parametrize(
    ("strategy", "workers", "expected"),
    [
        ("cma_es", {}, 0),
        ("cma_es", {"hidden_states_gb": 0.5}, 500_000_000),
        ("block_coordinate", {}, 1_000_000_000),
        ("block_coordinate", {"hidden_states_gb": 0}, 0),
    ],
)
def test_memory_is_asked_for_or_comes_with_the_strategy(
    pico_models: Path,
    pico_items: Path,
    tmp_path: Path,
    strategy: str,
    workers: dict[str, float],
    expected: int,
) -> None:
    data = model_study(pico_models, pico_items, strategy=strategy, workers=workers)
    spec = spec_of(data, tmp_path)
    assert worker_spec(plan_study(spec), RunFolder(tmp_path / "run")).hidden_states == expected
    assert ("hidden_states_gb" in spec.to_dict()["workers"]) == bool(workers)


@pytest.mark.slow
def test_a_study_has_the_same_trials_with_and_without(
    pico_models: Path, pico_items: Path, tmp_path: Path
) -> None:
    data = model_study(
        pico_models,
        pico_items,
        strategy={"name": "block_coordinate", "windows": 2, "first": 0.3},
        budget={"trials": 24},
    )
    runs = [
        run_study(
            spec_of(data | {"workers": {"hidden_states_gb": size}}, tmp_path), tmp_path / name
        )
        for name, size in (("with", 1), ("without", 0))
    ]
    assert fingerprint(runs[0]) == fingerprint(runs[1])
    assert runs[0].verdict == runs[1].verdict
