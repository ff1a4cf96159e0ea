"""A small world seen as pixels: boards, moves, and episodes that succeed or do not.

A board of 6 by 6 cells shows an agent in white, targets in the colour of the skill, and grey walls.
An episode succeeds if the agent visits all targets within twice the steps of the best policy. Each
skill numbers the four moves in an order of its own, as robots of different makes do, so that the
same action means different moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Cells along an edge.
SIDE = 6
#: Pixels along an edge of a cell.
CELL = 2
#: Name of a move -> rows and columns that it goes.
MOVES: Mapping[str, tuple[int, int]] = {
    "up": (-1, 0),
    "down": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
}
#: Steps from a start to the nearest target at least, so that chance leads nowhere.
NEAREST = 3
#: Steps that a policy may take for each that the best one takes.
PATIENCE = 2
#: Share of random steps in demonstrations, so that they also show the way back.
WRONG = 0.2

Cell = tuple[int, int]
Floats = npt.NDArray[np.float32]
#: Observations ``(n, 3, SIDE * CELL, SIDE * CELL)`` and numbers of their episodes ``(n,)`` ->
#: actions ``(n,)``.
Policy = Callable[[Floats, npt.NDArray[np.intp]], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Skill:
    """What targets and walls look like, and how moves are numbered.

    Attributes:
        colour: Channel in which targets are shown.
        targets: How many targets there are.
        wall: Whether a wall with one gap divides the board.
        actions: Number of an action -> name of its move.
    """

    colour: int
    targets: int
    wall: bool
    actions: tuple[str, str, str, str]


SKILLS: Mapping[str, Skill] = {
    "reach": Skill(0, 1, False, ("up", "down", "left", "right")),
    "collect": Skill(1, 2, False, ("right", "up", "down", "left")),
    "pass": Skill(2, 1, True, ("left", "right", "up", "down")),
}


@dataclass(frozen=True)
class Board:
    """A state of the world."""

    agent: Cell
    targets: frozenset[Cell]
    walls: frozenset[Cell]


def new_board(skill: Skill, rng: np.random.Generator) -> Board:
    """A random start of a skill, at least :data:`NEAREST` steps from all targets."""
    while True:
        board = _any_board(skill, rng)
        if distances(board)[board.agent] >= NEAREST:
            return board


def _any_board(skill: Skill, rng: np.random.Generator) -> Board:
    walls: frozenset[Cell] = frozenset()
    if skill.wall:
        column = int(rng.integers(1, SIDE - 1))
        gap = int(rng.integers(SIDE))
        walls = frozenset((row, column) for row in range(SIDE) if row != gap)
    free = [(r, c) for r in range(SIDE) for c in range(SIDE) if (r, c) not in walls]
    chosen = [free[i] for i in rng.choice(len(free), 1 + skill.targets, replace=False)]
    return Board(chosen[0], frozenset(chosen[1:]), walls)


def goal(board: Board) -> Cell:
    """The cell to go to next: the nearest target, or on the way to it the gap of a wall.

    In the gap it is the cell beyond. Of two targets at one distance it is the first.
    """
    row, column = board.agent
    target = min(board.targets, key=lambda t: (abs(t[0] - row) + abs(t[1] - column), t))
    if not board.walls:
        return target
    wall = next(iter(board.walls))[1]
    beyond = int(np.sign(target[1] - wall))
    if column == wall:
        return (row, wall + beyond)
    if np.sign(column - wall) * beyond >= 0:
        return target
    return next((r, wall) for r in range(SIDE) if (r, wall) not in board.walls)


def new_boards(skill: Skill, count: int, seed: Sequence[int]) -> list[Board]:
    """Random starts of a skill, always the same for a seed."""
    rng = np.random.default_rng(seed)
    return [new_board(skill, rng) for _ in range(count)]


def pixels(skill: Skill, boards: Sequence[Board]) -> Floats:
    """Boards as images ``(n, 3, SIDE * CELL, SIDE * CELL)``."""
    images = np.zeros((len(boards), 3, SIDE, SIDE), np.float32)
    for image, board in zip(images, boards, strict=True):
        for row, column in board.walls:
            image[:, row, column] = 0.3
        for row, column in board.targets:
            image[skill.colour, row, column] = 1.0
        image[:, board.agent[0], board.agent[1]] = 1.0
    return images.repeat(CELL, axis=2).repeat(CELL, axis=3)


def distances(board: Board) -> dict[Cell, int]:
    """Steps from every cell to the nearest target."""
    found = dict.fromkeys(board.targets, 0)
    waiting = deque(found)
    while waiting:
        cell = waiting.popleft()
        for move in MOVES.values():
            after = step(cell, move, board.walls)
            if after not in found:
                found[after] = found[cell] + 1
                waiting.append(after)
    return found


def step(cell: Cell, move: Cell, walls: frozenset[Cell]) -> Cell:
    """Where a move leads; walls and edges stop it."""
    row = cell[0] + move[0]
    column = cell[1] + move[1]
    inside = 0 <= row < SIDE and 0 <= column < SIDE
    return (row, column) if inside and (row, column) not in walls else cell


def best_action(skill: Skill, board: Board) -> int:
    """An action that comes nearer to a target: the first in the order of the moves.

    The order is that of :data:`MOVES` for all skills, so that they differ in how actions are
    numbered, not in which of two good moves they prefer.
    """
    far = distances(board)
    after = {name: far[step(board.agent, move, board.walls)] for name, move in MOVES.items()}
    return skill.actions.index(min(after, key=lambda name: after[name]))


def act(skill: Skill, board: Board, action: int) -> Board:
    """The board after an action; targets vanish when they are visited."""
    agent = step(board.agent, MOVES[skill.actions[action]], board.walls)
    return Board(agent, board.targets - {agent}, board.walls)


def best_steps(skill: Skill, board: Board) -> int:
    """Steps that the best policy takes to visit all targets."""
    steps = 0
    while board.targets:
        board = act(skill, board, best_action(skill, board))
        steps += 1
    return steps


def demonstrations(
    skill: Skill, count: int, seed: Sequence[int]
) -> tuple[list[Board], npt.NDArray[np.int64]]:
    """States along ways to the targets, with some wrong steps, and the best action in each."""
    rng = np.random.default_rng(seed)
    boards: list[Board] = []
    actions: list[int] = []
    while len(boards) < count:
        board = new_board(skill, rng)
        while board.targets and len(boards) < count:
            boards.append(board)
            actions.append(best_action(skill, board))
            wrong = rng.random() < WRONG
            board = act(skill, board, int(rng.integers(4)) if wrong else actions[-1])
    return boards, np.array(actions)


def successes(skill: Skill, policy: Policy, boards: Sequence[Board]) -> npt.NDArray[np.float64]:
    """1 for each episode in which all targets are visited in time, else 0 ``(n,)``.

    Args:
        skill: What is asked.
        policy: What acts.
        boards: The starts of the episodes.
    """
    now = list(boards)
    limits = [PATIENCE * best_steps(skill, board) for board in boards]
    for taken in range(max(limits, default=0)):
        left = np.array([k for k, b in enumerate(now) if b.targets and taken < limits[k]], np.intp)
        if not left.size:
            break
        actions = policy(pixels(skill, [now[k] for k in left]), left)
        for k, action in zip(left.tolist(), actions.tolist(), strict=True):
            now[k] = act(skill, now[k], action)
    return np.array([float(not board.targets) for board in now])
