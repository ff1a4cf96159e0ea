"""LoraHub and PCB-merging with evolution: NGOpt under another name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mergesearch.merging import InputError
from mergesearch.search.runs.driver import run_study
from mergesearch.search.runs.opened import open_run
from mergesearch.search.strategies.base import Problem, Strategy, TrialResult
from mergesearch.search.strategies.lorahub import LoraHub
from mergesearch.search.strategies.nevergrad import Nevergrad
from mergesearch.search.strategies.pcb_es import PcbEs
from mergesearch.search.strategies.table import STRATEGIES, check_options
from tests.search.conftest import model_study
from tests.search.studies import fingerprint, spec_of


def adapters(dim: int, budget: int = 40, objectives: int = 1) -> Problem:
    """The box of LoraHub; losses from 2 to 4 are the range of the anchors."""
    return Problem(
        np.full(dim, -1.5),
        np.full(dim, 1.5),
        np.zeros(dim),
        objectives,
        budget,
        np.tile([2.0, 4.0], (objectives, 1)),
        np.full(objectives, 1 / objectives),
    )


def models(dim: int, budget: int = 100) -> Problem:
    """The box of PCB-merging."""
    return replace(
        adapters(dim, budget), lower=np.full(dim, 0.8), upper=np.full(dim, 1.3), start=np.ones(dim)
    )


def run(strategy: Strategy, function, budget: int, in_flight: int = 3) -> list[np.ndarray]:
    asked = []
    outstanding = []
    for _ in range(budget):
        outstanding += strategy.ask(1)
        asked.append(outstanding[-1].point)
        if len(outstanding) >= in_flight:
            done = outstanding.pop(0)
            strategy.tell([TrialResult(done.id, done.point, np.array([function(done.point)]))])
    return asked


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 10, 20])
def test_the_whole_budget_runs_and_improves_on_the_start(dim: int) -> None:
    """Where NGOpt itself raises TypeError, in few dimensions, among them."""
    hub = LoraHub(adapters(dim), 0)
    optimum = np.resize([0.6, -0.4], dim)
    asked = run(hub, lambda x: 3 + float(np.mean((x - optimum) ** 2)), 40)
    assert np.array_equal(asked[0], np.zeros(dim))
    assert np.mean((hub.best()[0] - optimum) ** 2) < 0.97 * np.mean(optimum**2)
    pcb = PcbEs(models(dim), 0)
    optimum = np.resize([0.9, 1.2], dim)
    asked = run(pcb, lambda x: 3 + float(np.mean((x - optimum) ** 2)), 100)
    assert np.array_equal(asked[0], np.ones(dim))
    assert np.mean((pcb.best()[0] - optimum) ** 2) < 0.9 * np.mean((1 - optimum) ** 2)


def test_without_penalty_both_are_ngopt() -> None:
    problem = adapters(5)
    expected = run(Nevergrad(problem, 3, optimizer="NGOpt"), lambda x: float(np.sum(x**4 - x)), 40)
    for strategy in (LoraHub(problem, 3, penalty=0.0), PcbEs(problem, 3)):
        assert np.array_equal(run(strategy, lambda x: float(np.sum(x**4 - x)), 40), expected)


def test_the_penalty_is_the_mean_absolute_coefficient() -> None:
    """Huang 2023, sec. 3.3; the weighted loss counts in units of the anchors' range."""
    strategy = LoraHub(replace(adapters(4, objectives=2), weights=np.array([0.25, 0.75])), 0)
    told = []
    strategy._ngopt.tell = told.extend
    point = np.array([1.0, -0.5, 0.0, 0.3])
    strategy.tell([TrialResult(None, point, np.array([3.0, 2.5])), TrialResult(None, point, None)])
    np.testing.assert_allclose(told[0].losses, [0.25 * 0.5 + 0.75 * 0.25 + 0.05 * 0.45], rtol=1e-15)
    assert told[1].losses is None


def test_a_strong_penalty_keeps_the_coefficients_small() -> None:
    sizes = []
    for penalty in (0.0, 5.0):
        strategy = LoraHub(adapters(3, budget=100), 0, penalty=penalty)
        run(strategy, lambda x: float(np.mean((x - 0.8) ** 2)), 100)
        sizes.append(np.mean(np.abs(strategy.best()[0])))
    assert sizes[0] > 0.5
    assert sizes[1] < 0.1


def test_presets_of_the_space() -> None:
    assert STRATEGIES["lorahub"].preset == {
        "granularity": "task",
        "bounds": (-1.5, 1.5),
        "start": 0.0,
    }
    assert STRATEGIES["pcb_es"].preset == {
        "granularity": "task",
        "bounds": (0.8, 1.3),
        "start": 1.0,
    }


@pytest.mark.parametrize(("kind", "name"), [(LoraHub, "lorahub"), (PcbEs, "pcb_es")])
def test_too_many_coefficients_are_refused(kind, name: str) -> None:
    with pytest.raises(
        InputError,
        match=f"^strategy.name: expected at most 299 dimensions for {name}, received 300",
    ):
        kind(adapters(300), 0)
    kind(adapters(299), 0)


def test_options() -> None:
    assert check_options("lorahub", {}) == {"penalty": 0.05}
    assert check_options("pcb_es", {}) == {}
    with pytest.raises(
        InputError, match=r"strategy\.penalty: Input should be greater than or equal to 0"
    ):
        check_options("lorahub", {"penalty": -1})


def test_a_study_searches_the_presets_space_also_when_it_is_read_again(
    tmp_path: Path, pico_models: Path, pico_items: Path
) -> None:
    data = model_study(
        pico_models,
        pico_items,
        space={"bounds": [-1.0, 1.0]},
        strategy="lorahub",
        budget={"trials": 14},
    )
    run = run_study(spec_of(data, tmp_path), tmp_path / "run")
    again = open_run(tmp_path / "run")
    for space in (run.plan.space, again.plan.space):
        assert space.names == ("left", "right")
        assert (space.lower.min(), space.upper.max()) == (-1.0, 1.0), (
            "what the study says goes first"
        )
        assert not space.start.any()
    assert fingerprint(again) == fingerprint(run)
