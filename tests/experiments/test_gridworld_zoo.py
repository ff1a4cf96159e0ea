"""The gridworld zoo: its rules, and merges of policies from pixels to success rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from experiments import e0021_gridworld as experiment
from experiments.zoo.gridworld import Settings, Training, build_gridworld
from experiments.zoo.gridworld_data import (
    CELL,
    MOVES,
    NEAREST,
    PATIENCE,
    SKILLS,
    Board,
    Floats,
    Skill,
    act,
    best_action,
    best_steps,
    demonstrations,
    distances,
    goal,
    new_boards,
    pixels,
    successes,
)


def seen(skill: Skill, image: Floats) -> Board:
    """The board of an image."""
    cells = image[:, ::CELL, ::CELL]
    white = (cells == 1).all(axis=0)
    [agent] = [(int(row), int(column)) for row, column in np.argwhere(white)]
    targets = np.argwhere((cells[skill.colour] == 1) & ~white).tolist()
    walls = np.argwhere(np.isclose(cells, 0.3).all(axis=0)).tolist()
    return Board(agent, frozenset(map(tuple, targets)), frozenset(map(tuple, walls)))


@pytest.mark.parametrize("name", SKILLS)
def test_the_best_action_reaches_the_targets_on_the_shortest_way(name: str) -> None:
    skill = SKILLS[name]
    for board in new_boards(skill, 60, (0,)):
        far = distances(board)[board.agent]
        assert far >= NEAREST
        nearer = act(skill, board, best_action(skill, board))
        assert distances(nearer)[nearer.agent] == far - 1
        if skill.targets == 1:
            assert best_steps(skill, board) == far
        assert bool(board.walls) == skill.wall


@pytest.mark.parametrize("name", SKILLS)
def test_a_perfect_policy_succeeds_always_and_chance_hardly_ever(name: str) -> None:
    skill = SKILLS[name]
    boards = new_boards(skill, 60, (1,))
    rng = np.random.default_rng(0)

    def perfect(images: Floats, _: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        return np.array([best_action(skill, seen(skill, image)) for image in images])

    def chance(images: Floats, _: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        return rng.integers(len(MOVES), size=len(images))

    assert successes(skill, perfect, boards).tolist() == [1.0] * 60
    assert successes(skill, chance, boards).mean() < 0.2


@pytest.mark.parametrize("name", SKILLS)
def test_the_goal_is_on_the_way(name: str) -> None:
    boards, _ = demonstrations(SKILLS[name], 200, (6,))
    for board in boards:
        far = distances(board)
        here = distances(replace(board, targets=frozenset({goal(board)})))[board.agent]
        straight = sum(abs(a - b) for a, b in zip(board.agent, goal(board), strict=True))
        assert here == straight > 0, "no wall is between"
        assert far[board.agent] == here + far[goal(board)]


def test_an_episode_fails_once_its_steps_are_spent() -> None:
    skill = SKILLS["reach"]
    [board] = new_boards(skill, 1, (2,))
    steps = best_steps(skill, board)

    def late(wait: int) -> float:
        taken: list[int] = []

        def policy(images: Floats, _: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
            taken.append(0)
            now = seen(skill, images[0])
            best = best_action(skill, now)
            if len(taken) > 2 * wait:
                return np.array([best])
            # There and back again.
            back = {"up": "down", "down": "up", "left": "right", "right": "left"}
            ways = [k for k in range(4) if act(skill, now, k).agent != now.agent]
            if len(taken) % 2:
                waits.append(skill.actions[ways[-1]])
                return np.array([ways[-1]])
            return np.array([skill.actions.index(back[waits[-1]])])

        waits: list[str] = []
        return float(successes(skill, policy, [board])[0])

    spare = (PATIENCE - 1) * steps
    assert late(spare // 2) == 1.0
    assert late(spare // 2 + 1) == 0.0


def test_skills_number_the_same_moves_differently() -> None:
    orders = {skill.actions for skill in SKILLS.values()}
    assert len(orders) == len(SKILLS)
    assert all(set(order) == set(MOVES) for order in orders)


def test_boards_and_demonstrations_repeat_themselves() -> None:
    skill = SKILLS["pass"]
    assert new_boards(skill, 5, (3,)) == new_boards(skill, 5, (3,))
    assert new_boards(skill, 5, (3,)) != new_boards(skill, 5, (4,))
    one, two = (demonstrations(skill, 40, (5,)) for _ in range(2))
    assert one[0] == two[0]
    np.testing.assert_array_equal(one[1], two[1])
    assert [best_action(skill, board) for board in one[0]] == one[1].tolist()
    images = pixels(skill, one[0])
    assert [seen(skill, image) for image in images] == one[0]


@pytest.mark.slow
def test_masks_bring_merged_policies_near_their_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Settings(
        base=Training(300, 3e-3, 3e-3, 500, 48), expert=Training(250, 2e-3, 1e-2, 1500, 48)
    )
    zoo = build_gridworld(tmp_path / "zoo", small)
    manifest = (zoo / "manifest.json").stat().st_mtime_ns
    assert (build_gridworld(zoo, small) / "manifest.json").stat().st_mtime_ns == manifest
    monkeypatch.setattr(experiment, "EPISODES", 40)
    bench = experiment.Bench(experiment.study(zoo, experiment.masks("learned")))
    found = {
        way: float(np.mean(rates)) for way, rates in experiment.rows(zoo, bench.start()).items()
    }
    experts = found["experts, each at its own skill"]
    masked = found["masks at 1.0, own heads, skill told"]
    assert masked > 0.5 * experts
    assert masked > found["sum of changes, own heads"]
    for way in ("average, average of heads", "sum of changes, average of heads"):
        assert found[way] < 0.3 * experts
    routed = found["masks at 0.6, own heads, router `learned`"]
    assert routed > 0.8 * found["masks at 0.6, own heads, skill told"]
    assert min(experiment.routed_rates(zoo, "learned")) > 0.9
