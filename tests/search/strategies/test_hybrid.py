"""`hybrid`: walks along proxies, their weights, coarse boxes, and what it recommends."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mergesearch.evaluators import Batch
from mergesearch.merging import InputError
from mergesearch.search.plan import planning
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs import driver
from mergesearch.search.runs.driver import run_study
from mergesearch.search.strategies.auto import choose, choose_unrecorded
from mergesearch.search.strategies.base import Problem, Strategy, Suggestion, TrialResult
from mergesearch.search.strategies.hybrid import Hybrid
from mergesearch.search.strategies.parts.coarse_box import (
    CoarseBox,
    coarse_levels,
    coordinate_labels,
    group_columns,
    independent,
    path_directions,
)
from mergesearch.search.strategies.parts.proxy_walks import items_of, prediction, stalled
from mergesearch.search.strategies.quadratic import Quadratic
from mergesearch.search.workers.gradient_steps import GRADIENT_COST, take_gradient_steps
from tests.search.conftest import model_study
from tests.search.strategies.test_gradient_strategies import problem as merges
from tests.search.studies import analytic, fingerprint, run_in, spec_of

DIM = 24
ITEMS = 100
CENTRES = np.random.default_rng(0).uniform(0.2, 0.8, DIM)
CURVATURES = np.logspace(0, -2, DIM)


def box(budget: int, proxies: tuple[str, ...] = ("smooth",)) -> Problem:
    """A box whose loss is measured with noise, beside proxies."""
    return Problem(
        np.zeros(DIM),
        np.ones(DIM),
        np.full(DIM, 0.5),
        objectives=1,
        budget=budget,
        scale=np.array([[0.0, 1.0]]),
        weights=np.ones(1),
        names=("measured",),
        items=ITEMS,
        proxies=proxies,
        batch_items=lambda batch: ITEMS if batch.size is None else min(batch.size, ITEMS),
    )


def loss(point: np.ndarray) -> float:
    return float(np.sum(CURVATURES * (point - CENTRES) ** 2))


def slope_of(name: str, point: np.ndarray) -> np.ndarray:
    """Of a proxy with the optimum of the measured loss, or with an opposite one."""
    centre = CENTRES if name == "smooth" else 1.0 - CENTRES
    return 2 * CURVATURES * (point - centre)


def result_of(suggestion: Suggestion, rng: np.random.Generator) -> TrialResult:
    point = suggestion.point
    steps = suggestion.gradient_steps
    walked = None
    if steps is not None:
        weights = steps.config.weights

        def along(at: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
            slope = sum(weight * slope_of(name, at) for name, weight in weights.items())
            value = sum(
                weight * np.sum(slope_of(name, at) ** 2) for name, weight in weights.items()
            )
            return float(value), np.asarray(slope)

        walked = take_gradient_steps(steps, point, along)
    measured = np.array([loss(point) + 0.01 * rng.standard_normal()])
    return TrialResult(
        suggestion.id, point, measured, gradient_result=walked, errors=np.array([0.01])
    )


def cost(suggestion: Suggestion) -> float:
    steps = suggestion.gradient_steps
    if steps is None:
        return 1.0
    size = steps.config.batch.size
    items = ITEMS if size is None else min(size, ITEMS)
    return 1.0 + GRADIENT_COST * steps.batches * items / ITEMS


def played(strategy: Strategy, budget: int, seed: int = 0) -> list[Suggestion]:
    """Ask and tell until so many whole evaluations are spent."""
    rng = np.random.default_rng(seed)
    asked: list[Suggestion] = []
    spent = 0.0
    while spent < budget:
        asked += strategy.ask(1)
        spent += cost(asked[-1])
        strategy.tell([result_of(asked[-1], rng)])
    return asked


def test_gradients_lead_nearer_than_the_surrogate_alone_at_equal_cost() -> None:
    ratios = []
    for seed in range(2):
        problem = box(60)
        both = Hybrid(problem, seed), Quadratic(problem, seed)
        for strategy in both:
            played(strategy, 60, seed)
        ratios.append(loss(both[0].best()[0]) / loss(both[1].best()[0]))
    assert np.mean(ratios) < 0.3


def test_a_proxy_that_predicts_nothing_loses_its_weight() -> None:
    strategy = Hybrid(box(200, ("smooth", "opposite")), 0)
    walked = [s for s in played(strategy, 200) if s.gradient_steps is not None]
    followed = [tuple(s.gradient_steps.config.weights) for s in walked if s.gradient_steps]
    assert followed[:8] == [("smooth",)] * 4 + [("opposite",)] * 4
    assert set(followed[8:]) == {("smooth",)}
    assert walked[0].notes == {"follows smooth": 1.0}


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_walks_cost_no_more_than_their_share(share: float) -> None:
    asked = played(Hybrid(box(120), 0, share=share), 120)
    walked = [cost(s) for s in asked if s.gradient_steps is not None]
    assert 0.5 * share * 120 < sum(walked) <= share * 120
    assert asked[-1].gradient_steps is None


def test_it_recommends_the_end_of_the_walks_unless_trials_are_better_by_an_error() -> None:
    strategy = Hybrid(box(60), 0)
    rng = np.random.default_rng(0)
    while (asked := strategy.ask(1)[0]).gradient_steps is not None:
        strategy.tell([result_of(asked, rng)])
    end = asked.point
    strategy.tell([replace(result_of(asked, rng), losses=np.array([0.05]))])
    for gain, stays in ((0.009, True), (0.05, False)):
        for suggestion in strategy.ask(32):
            result = TrialResult(suggestion.id, suggestion.point, np.array([0.05 - gain]))
            strategy.tell([replace(result, errors=np.array([0.01]))])
        assert np.array_equal(strategy.best()[0], end) == stays


def test_without_gradients_it_is_refused() -> None:
    with pytest.raises(InputError, match=r"strategy\.proxies.*choose quadratic"):
        Hybrid(box(60, ()), 0)
    with pytest.raises(InputError, match=r"strategy\.proxies: expected names among \['smooth'\]"):
        Hybrid(box(60), 0, proxies=["alignment"])


def test_predictions_and_stalls() -> None:
    assert prediction([3.0, 2.0, 1.0], [0.3, 0.2, 0.1]) == pytest.approx(1.0)
    assert prediction([1.0, 2.0, 3.0], [0.3, 0.2, 0.1]) == 0.0
    assert prediction([1.0, np.nan], [0.3, 0.2]) == 0.0
    falling = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert not stalled(falling, 0.01)
    assert stalled(falling, 2.0)
    assert not stalled(falling[:5], 2.0)
    assert items_of(replace(box(1), batch_items=None), Batch(size=7)) == 7


def tasks_and_blocks(problem: Problem) -> np.ndarray:
    return independent(group_columns(problem, coordinate_labels(problem)[0]))


def test_levels_go_from_tasks_over_tensors_to_chunks() -> None:
    fine = merges("chunk", chunks={"total": 4.0})
    kinds = [len(set(labels)) for level in coordinate_labels(fine) for labels in level]
    assert kinds == [3, 2, 6, 6]
    levels = coarse_levels(fine, [])
    sizes = [fine.dim if columns is None else columns.shape[1] for columns in levels]
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 4
    assert sizes[-1] == fine.dim > 6
    assert coarse_levels(merges("task"), []) == [None]


def test_a_coarse_box_holds_tasks_blocks_and_the_path_exactly() -> None:
    fine = merges("tensor")
    rng = np.random.default_rng(0)
    path = list(fine.start + 0.1 * rng.standard_normal((5, fine.dim)))
    columns = tasks_and_blocks(fine)
    # Three experts and two blocks, which leave one direction less; the path has 2 of 6 left.
    assert columns.shape == (6, 4)
    assert independent([*columns.T, *path_directions(fine, path)]).shape == (6, 6)
    held = CoarseBox(fine, fine.start, columns, 0.25)
    coarse = rng.uniform(-0.1, 0.1, 4)
    again = held.to_coarse(held.to_fine(coarse))
    assert again is not None
    np.testing.assert_allclose(again, coarse, rtol=0, atol=1e-12)
    assert held.to_coarse(fine.start + 0.1 * rng.standard_normal(fine.dim)) is None


def test_tasks_of_the_coarse_box_are_those_of_a_coarser_space() -> None:
    fine = merges("tensor")
    tasks = merges("task")
    assert fine.space is not None
    assert tasks.space is not None
    held = CoarseBox(fine, np.full(fine.dim, 0.5), tasks_and_blocks(fine), 0.5)
    moved = np.array([0.1, -0.2, 0.3])
    refined = tasks.space.refine(0.5 + moved, fine.space)
    np.testing.assert_allclose(held.to_fine(np.append(moved, 0.0)), refined, rtol=0, atol=1e-15)


def accuracy_study(models: Path, items: Path, **sections: object) -> dict:
    labelled = {
        "kind": "classification",
        "data": str(items),
        "domain": "domain",
        "id": "id",
        "objectives": [{"metric": "accuracy"}],
    }
    return model_study(models, items, evaluators=[labelled], **sections)


def test_auto_takes_it_where_a_model_is_scored_by_accuracy_alone(
    tmp_path: Path, pico_models: Path, pico_items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(data: dict) -> str:
        return plan_study(spec_of(data | {"strategy": "auto"}, tmp_path)).strategy.name

    assert choose(8, 1, 100, gradients=True) == "hybrid"
    assert choose(8, 2, 100, gradients=True) == choose(8, 2, 100)
    assert chosen(accuracy_study(pico_models, pico_items)) == "hybrid"
    live = {"name": "ties", "mode": "live"}
    assert chosen(accuracy_study(pico_models, pico_items, operator=live)) != "hybrid"
    assert chosen(analytic()) != "hybrid"
    monkeypatch.setattr(planning, "LARGEST_FOLLOWED", 100)
    assert chosen(accuracy_study(pico_models, pico_items)) != "hybrid"


def test_a_study_of_accuracy_follows_cross_entropy_and_counts_gradients_thrice(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    budget = 24 * 18
    data = accuracy_study(
        pico_models, pico_items, strategy="hybrid", budget={"evaluations": budget}
    )
    spec = spec_of(data, tmp_path)
    run = run_study(spec, tmp_path / "run")
    searched = [record for record in run.log.records if record.kind == "search"]
    assert searched[0].gradient_result is not None
    assert searched[0].gradient_result.losses[-1] < searched[0].gradient_result.losses[0] + 0.5
    assert set(searched[0].values) == {"accuracy"}
    measured = [record for record in run.log.records if record.same_as is None]
    spent = sum(24 + GRADIENT_COST * record.gradient_items for record in measured)
    # What is kept back for the recommendation is left where the record answers that.
    assert budget - 24 <= spent <= budget
    journal = (tmp_path / "run" / "journal.log").read_bytes().splitlines(keepends=True)
    # Cut while a trial with gradient steps runs.
    cut = next(i for i, line in enumerate(journal) if b"gradient_items" in line) + 1
    folder = tmp_path / "cut"
    shutil.copytree(tmp_path / "run", folder)
    (folder / "journal.log").write_bytes(b"".join(journal[:cut]))
    assert fingerprint(run_study(spec, folder)) == fingerprint(run)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_keeps_what_auto_chose_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    data = analytic(trials=20) | {"strategy": "auto"}
    monkeypatch.setattr(planning, "choose", lambda *a, **_: choose_unrecorded(*a))
    if not recorded:  # as versions did that recorded nothing
        with monkeypatch.context() as patch:
            patch.setattr(driver, "with_recorded_strategy", lambda plan, _: plan)
            whole = run_in(data, tmp_path / "whole")
    else:
        whole = run_in(data, tmp_path / "whole")
    assert whole.log.get_attr("strategy") == ("quadratic" if recorded else None)
    folder = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", folder)
    lines = (folder / "journal.log").read_bytes().splitlines(keepends=True)
    (folder / "journal.log").write_bytes(b"".join(lines[: int(0.6 * len(lines))]))
    monkeypatch.setattr(planning, "choose", lambda *_, **__: "sobol")
    assert fingerprint(run_in(data, folder)) == fingerprint(whole)
