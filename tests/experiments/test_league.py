"""The league: true losses are true, matches repeat, results survive a kill, ranks are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from experiments.league import network_merges, networks, perceptron, reference
from experiments.league.cells import SIZES
from experiments.league.contestants import LEFT_OUT, Contestant, contestants
from experiments.league.families import FAMILIES
from experiments.league.landscape import Items, Task
from experiments.league.libraries.generations import Generations
from experiments.league.play import build, estimated_rows, play
from experiments.league.problems import Arena, Setup, make_arena
from experiments.league.ranking import critical_difference, ranks, ratios, rivalry, standings
from experiments.league.results import Result, append_result, read_results
from experiments.league.tables import finished, tables
from mergesearch.evaluators import Batch
from mergesearch.search.front import nondominated
from mergesearch.search.strategies.table import STRATEGIES


def tiny(family: str, noise: str = "items", objectives: int = 1) -> Setup:
    assert noise in ("items", "binomial")
    return Setup(family, 8, 20, objectives, "items" if noise == "items" else "binomial", 80, 3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("noise", ["items", "binomial"])
def test_the_gap_is_1_at_the_start_and_0_at_the_optimum(family: str, noise: str) -> None:
    arena = make_arena(tiny(family, noise))
    assert arena.gap(arena.problem.start) == 1.0
    assert arena.gap(arena.optimum) == 0.0
    inside = np.random.default_rng(0).uniform(arena.problem.lower, arena.problem.upper, (50, 8))
    near = arena.optimum + 0.02 * np.random.default_rng(1).standard_normal((50, 8))
    near = np.clip(near, arena.problem.lower, arena.problem.upper)
    assert min(arena.gap(point) for point in [*inside, *near]) >= 0.0


def same(first: Arena, second: Arena, number: int) -> bool:
    point = first.problem.anchors[1].point
    return np.array_equal(
        first.measure(point, number).items["accuracy 0"],
        second.measure(point, number).items["accuracy 0"],
    )


@pytest.mark.parametrize("noise", ["items", "binomial"])
def test_measurements_repeat_and_only_fresh_items_differ(noise: str) -> None:
    arena = make_arena(tiny("merge", noise))
    again = make_arena(tiny("merge", noise))
    point = arena.problem.start
    assert same(arena, again, 5)
    assert not same(arena, make_arena(replace(tiny("merge", noise), seed=4)), 5)
    scores = [arena.measure(point, number).items["accuracy 0"] for number in (5, 6)]
    assert np.array_equal(*scores) == (noise == "items")


def test_the_true_accuracy_is_that_of_very_many_items() -> None:
    rng = np.random.default_rng(0)
    for steps in (0, 5):
        task = Task(0.4 * rng.standard_normal((6, 4)), rng.uniform(size=4), 1.5, 2.0, steps)
        point = rng.uniform(size=4)
        right = Items.draw(task, 100_000, rng).margins(task, point) > 0
        assert task.accuracy(point) == pytest.approx(right.mean(), abs=0.005)


def test_errors_are_those_of_fresh_draws() -> None:
    arena = make_arena(tiny("merge", "binomial"))
    told = [arena.measure(arena.problem.start, number) for number in range(300)]
    spread = np.std([result.losses for result in told])
    assert np.mean([result.errors for result in told]) == pytest.approx(spread, rel=0.15)


def test_the_first_items_are_balanced_over_tasks() -> None:
    arena = make_arena(tiny("merge", "items", 2))
    whole = arena.measure(arena.problem.start, 0)
    part = arena.measure(arena.problem.start, 0, 16)
    assert part.evaluated == 16
    for name in ("accuracy 0", "accuracy 1"):
        assert np.array_equal(part.items[name], whole.items[name][:8])


@pytest.mark.parametrize("noise", ["items", "binomial"])
def test_gradients_are_those_of_the_loss(noise: str) -> None:
    arena = make_arena(tiny("merge", noise))
    point = np.random.default_rng(2).uniform(size=8)
    batch = Batch(number=2, size=7)
    _, slope = arena.loss_and_gradient(point, batch, {"accuracy 0": 1.0})
    near = approx_fprime(
        point, lambda at: arena.loss_and_gradient(at, batch, {"accuracy 0": 1.0})[0], 1e-6
    )
    assert slope == pytest.approx(near, abs=1e-4)


def test_perceptrons_are_real_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "FOLDER", tmp_path)
    monkeypatch.setattr(perceptron, "FOLDER", tmp_path)
    monkeypatch.setattr(networks, "EXPERT_STEPS", 5)
    monkeypatch.setattr(networks, "BASE_STEPS", {4: 20})
    monkeypatch.setattr(reference, "STEPS", 5)
    networks.load_zoo.cache_clear()
    arena = make_arena(tiny("perceptron"))
    merges = network_merges.NetworkMerges(networks.load_zoo(4, 3), 2)
    zoo = merges.zoo
    assert arena.gap(arena.problem.start) == 1.0
    assert arena.gap(arena.optimum) == 0.0
    # An expert whole, in all blocks, is that expert.
    expert = arena.problem.anchors[3]
    assert merges.merged(expert.point) == pytest.approx(zoo.base + zoo.vectors[1], abs=1e-6)
    again = make_arena(tiny("perceptron"))
    assert same(arena, again, 0)
    assert again.ideal == arena.ideal
    point = np.random.default_rng(2).uniform(size=8)
    batch = Batch(number=2, size=7)

    def loss(at: np.ndarray) -> float:
        return float(arena.loss_and_gradient(at, batch, {"accuracy 0": 1.0})[0])

    _, slope = arena.loss_and_gradient(point, batch, {"accuracy 0": 1.0})
    assert slope == pytest.approx(approx_fprime(point, loss, 1e-2), abs=0.05)
    networks.load_zoo.cache_clear()


@pytest.mark.parametrize("workers", [1, 8])
def test_matches_repeat_and_spend_their_budget(workers: int) -> None:
    arena = make_arena(tiny("merge"))
    gaps = [play(arena, build("cma_es", {}, arena.problem, 0), workers) for _ in range(2)]
    assert gaps[0].gap == gaps[1].gap
    assert gaps[0].asked == 20


def test_gradient_steps_cost_three_evaluations_of_their_batch() -> None:
    arena = make_arena(tiny("merge"))
    player = build("adamerging", {}, arena.problem, 0)
    (asked,) = player.ask(1)
    assert asked.gradient_steps is not None
    steps = asked.gradient_steps
    cost = 80 + 3 * steps.batches * arena.batch_items(steps.config.batch)
    outcome = play(arena, build("adamerging", {}, arena.problem, 0))
    assert outcome.asked == -(-20 * 80 // cost)


def test_a_cpu_limit_ends_a_match_and_is_told() -> None:
    arena = make_arena(tiny("merge"))
    outcome = play(arena, build("cma_es", {}, arena.problem, 0), cpu_limit=-1.0)
    assert (outcome.asked, outcome.stopped) == (0, "CPU limit")


def test_a_generation_waits_for_all_its_results() -> None:
    told: list[list[float]] = []
    made = iter(range(10))

    def ask() -> list[np.ndarray]:
        return [np.array([float(next(made))]) for _ in range(2)]

    players = Generations(ask, lambda _, losses: told.append([float(loss[0]) for loss in losses]))
    first = players.ask()
    second = players.ask()
    assert first is not None
    assert second is not None
    players.tell(second[0], np.array([20.0]))
    assert players.ask() is None
    players.tell(first[0], np.array([10.0]))
    assert players.ask() == (2, np.array([2.0]))
    assert told == [[10.0, 20.0]]


def result(contestant: str, cell: str, seed: int, gap: float = 0.5) -> Result:
    return Result(contestant, cell, seed, gap, gap, 1.0, 20, 0.0, 0.0, "", "abc")


def test_a_cut_line_is_played_again_and_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for seed in range(3):
        append_result(result("a", "cell", seed), path)
    path.write_bytes(path.read_bytes()[:-25])
    assert set(read_results(path)) == {("a", "cell", 0), ("a", "cell", 1)}
    append_result(result("a", "cell", 2), path)
    append_result(result("a", "cell", 0, gap=0.25), path)
    found = read_results(path)
    assert set(found) == {("a", "cell", seed) for seed in range(3)}
    assert found["a", "cell", 0].gap == 0.25


#: Three contestants in three cells; the third did not play in the last one.
MEANS = np.array([[0.1, 0.4, 0.2], [0.2, 0.2, 0.4], [0.4, 0.4, np.nan]])


def test_ratios_and_ranks_are_those_made_by_hand() -> None:
    assert ratios(MEANS)[:2] == pytest.approx(np.array([[1, 2, 1], [2, 1, 2]]))
    assert ranks(MEANS)[:, :2] == pytest.approx(np.array([[1, 2.5], [2, 1], [3, 2.5]]))
    scores = {
        (name, cell): np.array([value, value])
        for name, row in zip("abc", MEANS, strict=True)
        for cell, value in zip("xyz", row, strict=True)
        if np.isfinite(value)
    }
    rows = {row.name: row for row in standings(scores, np.random.default_rng(0))}
    assert rows["a"].rank == pytest.approx(1.5)
    assert rows["a"].ratio == pytest.approx(2 ** (1 / 3))
    assert rows["a"].near == pytest.approx(2 / 3)
    assert rows["b"].worst == pytest.approx(2.0)
    assert rows["c"].cells == 2
    # All seeds are alike: so are all resamples.
    assert rows["a"].low == pytest.approx(rows["a"].high)


def test_a_twin_is_no_rival() -> None:
    codes = np.array([["b", "b", "b"], ["b", "b", "b"], ["c", "c", "c"]])
    places, to_rivals = rivalry(MEANS, codes)
    assert places == pytest.approx(
        np.array([[1, 1.5, 1], [1, 1, 1], [3, 2.5, np.nan]]), nan_ok=True
    )
    # The twins are compared with the third alone, and it with the better of them.
    expected = np.array([[0.25, 1, 0], [0.5, 0.5, 0], [4, 2, np.nan]])
    assert to_rivals[:, :2] == pytest.approx(expected[:, :2])
    alone, _ = rivalry(MEANS, np.repeat([["a"], ["b"], ["c"]], 3, axis=1))
    assert alone == pytest.approx(ranks(MEANS), nan_ok=True)


def test_auto_has_the_code_of_what_it_stands_for() -> None:
    automatic = [player for player in contestants() if player.strategy == "auto"]
    codes = {player.name: player.code(Setup("merge", 48, 300)) for player in automatic}
    assert codes == {"auto": "quadratic", "auto, gradients": "hybrid"}
    assert automatic[0].code(Setup("merge", 48, 300, 2)) == "map"
    assert Contestant("pycma", True).code(Setup("merge", 48, 300)) == "pycma"


def test_the_estimated_front_is_that_of_a_study() -> None:
    arena = make_arena(Setup("merge", 8, 40, 2, "items", 80, 3))
    outcome = play(arena, build("sobol", {}, arena.problem, 0))
    points = [*(anchor.point for anchor in arena.problem.anchors)]
    told = [arena.measure(point, number) for number, point in enumerate(points)]
    front = np.flatnonzero(nondominated(np.array([each.losses for each in told])))
    # Too few trials for an estimate: the observed front is what is left.
    assert np.array_equal(estimated_rows(told, front), front)
    assert 0.0 < outcome.estimated != outcome.volume


def several(contestant: str, volume: float, estimated: float) -> Result:
    return replace(result(contestant, "x", 0), volume=volume, claimed=0.6, estimated=estimated)


def test_libraries_recommend_what_they_observed() -> None:
    rows = [several("ours", 0.4, 0.5), several("theirs", 0.4, 0.8)]
    players = {name: Contestant(name, name == "theirs", "any") for name in ("ours", "theirs")}
    text = tables(rows, players, "small")
    assert "| ours | 1 | 1.0 | 1.0 | 1.00 (1.00 to 1.00) | 1.00 | 100% | 100% | 1.0 |" in text
    assert "| theirs | 1 | 2.0 | 2.0 | 1.25 (1.25 to 1.25) |" in text
    # Alike: equal by observed fronts, and theirs is better by estimated ones.
    assert "| 1.00 | 1.60 |" in text


def test_the_critical_difference_is_that_of_the_paper() -> None:
    """Demšar 2006: q = 2.569 for four classifiers, 14 data sets: CD = 1.25."""
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)


def test_tables_hold_finished_cells_and_mark_gradients() -> None:
    rows = [
        result(name, cell, seed, gap)
        for name, gap in (("a", 0.1), ("b", 0.2), ("g", 0.05))
        for cell in ("x", "y")
        for seed in range(2)
    ]
    kept = finished([*rows, result("c", "x", 0)], {"x", "y"}, 2)
    assert {row.contestant for row in kept} == {"a", "b", "g"}
    players = {name: Contestant(name, False, gradients=name == "g") for name in "abg"}
    text = tables(kept, players, "small")
    assert "| a | 2 | 1.0 | 1.0 | 1.00 (1.00 to 1.00) | 1.00 | 100% | 100% | 1.0 |" in text
    assert "| b | 2 | 2.0 | 2.0 | 2.00 (2.00 to 2.00) | 2.00 | 0% | 0% | 1.0 |" in text
    assert "commit `abc`" in text


def test_every_strategy_plays_or_says_why_not() -> None:
    ours = {player.strategy for player in contestants()}
    assert set(STRATEGIES) == (ours & set(STRATEGIES)) | set(LEFT_OUT)
    for size in SIZES.values():
        assert len({cell.name for cell in size.cells}) == len(size.cells)
