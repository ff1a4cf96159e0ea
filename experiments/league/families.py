"""The league's made families: boxes with tasks in them, and merges that are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.sparse import csr_array

from experiments.league.landscape import Array, Matrix, Task
from mergesearch.merging import InputError

#: How far single items differ in what is good for them, where items are a fixed set.
PULL = 2.0


@dataclass(frozen=True, eq=False)
class Landscape:
    """A box and the tasks in it.

    Attributes:
        lower, upper, start: The box and where searches begin ``(dim,)``.
        anchors: Points that are known beforehand, the start first.
        tasks: What is measured.
        owners: Which objective each task belongs to.
        experts: Number of experts, whose coefficients take turns within a block; 0: points are no
            merges.
    """

    lower: Array
    upper: Array
    start: Array
    anchors: tuple[Array, ...]
    tasks: tuple[Task, ...]
    owners: tuple[int, ...]
    experts: int = 0


def quadratic(
    dim: int, objectives: int, rng: np.random.Generator, condition: float, steps: int = 0
) -> Landscape:
    """Rotated quadratics, one for each objective, with curvatures spread over ``condition``."""
    start = rng.uniform(0.15, 0.85, dim)
    anchors = (start, *(rng.uniform(0.0, 1.0, dim) for _ in range(2)))
    curvatures = np.logspace(0.0, -np.log10(condition), dim) if dim > 1 else np.ones(1)
    tasks = []
    for _ in range(objectives):
        turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
        matrix = np.sqrt(curvatures)[:, None] * turn
        task = Task(matrix, rng.uniform(0.15, 0.85, dim), 2.2, PULL, steps)
        tasks.append(_scaled(task, start, 2.2))
    return Landscape(
        np.zeros(dim), np.ones(dim), start, anchors, tuple(tasks), tuple(range(objectives))
    )


def merge(dim: int, objectives: int, rng: np.random.Generator, upper: float) -> Landscape:
    """Coefficients of experts x blocks, with a task for each expert.

    A task wants its own expert whole and little of the others. What deviates counts by the Gram
    matrix of the task vectors in each block, by the block's importance, and by a few directions
    that couple blocks.
    """
    experts = 8 if dim >= 256 else 4
    if dim % experts or objectives > experts:
        raise InputError(
            f"merge: expected a multiple of {experts} dimensions and at most {experts} objectives, "
            f"received {dim} and {objectives}"
        )
    blocks = dim // experts
    importance = _profile(blocks, rng) * rng.lognormal(0.0, 0.7, blocks)
    roots = [_gram_root(experts, rng) for _ in range(blocks)]
    corners = [np.tile(row, blocks) for row in np.eye(experts)]
    base = np.zeros(dim)
    tasks = []
    for expert in range(experts):
        matrix = _deviation(roots, importance, rng)
        centre = np.clip(_ideal(expert, experts, blocks, rng), 0.0, upper).ravel()
        tasks.append(_scaled(Task(matrix, centre, rng.uniform(3.0, 4.5), PULL), base, 4.0))
    anchors = (np.full(dim, 0.3), base, *corners, np.full(dim, 1.0 / experts))
    owners = tuple(expert % objectives for expert in range(experts))
    top = np.full(dim, upper)
    return Landscape(np.zeros(dim), top, anchors[0], anchors, tuple(tasks), owners, experts)


Build = Callable[[int, int, np.random.Generator], Landscape]
FAMILIES: Mapping[str, Build] = {
    "quadratic_easy": partial(quadratic, condition=10.0),
    "quadratic": partial(quadratic, condition=1e3),
    "quadratic_hard": partial(quadratic, condition=1e5),
    "plateau": partial(quadratic, condition=100.0, steps=12),
    "merge": partial(merge, upper=1.0),
    "merge_wide": partial(merge, upper=2.0),
}


def _scaled(task: Task, point: Array, drop: float) -> Task:
    """The task with its matrix scaled so that its margin at ``point`` is ``drop`` below its top."""
    smooth = replace(task, steps=0)
    length = float(np.linalg.norm(smooth.features(point)))
    return replace(task, matrix=task.matrix * np.sqrt(drop) / length)


def _profile(blocks: int, rng: np.random.Generator) -> Array:
    """A smooth curve over depth ``(blocks,)``, positive."""
    depth = np.linspace(0.0, 1.0, blocks) if blocks > 1 else np.zeros(1)
    waves = [rng.normal() * np.cos(np.pi * order * depth) / order for order in (1, 2, 3)]
    return np.asarray(np.exp(np.sum(waves, axis=0)))


def _gram_root(experts: int, rng: np.random.Generator) -> Array:
    """A root of the Gram matrix of a block's task vectors ``(experts, experts)``.

    Cosines are about 0 to 0.4, and lengths differ by a quarter.
    """
    shared = rng.uniform(0.0, 0.6, experts)
    gram = np.outer(shared, shared) + np.diag(1.0 - shared**2)
    lengths = rng.lognormal(0.0, 0.25, experts)
    return np.asarray(np.linalg.cholesky(gram * np.outer(lengths, lengths)).T)


def _deviation(roots: list[Array], importance: Array, rng: np.random.Generator) -> Matrix:
    """The matrix of a task: blocks beside each other, then directions that couple them."""
    experts = len(roots[0])
    dim = experts * len(roots)
    local = np.zeros((dim, dim))
    for block, root in enumerate(roots):
        own = np.eye(experts) + 0.5 * rng.standard_normal((experts, experts))
        here = slice(block * experts, (block + 1) * experts)
        local[here, here] = np.sqrt(importance[block]) * own @ root
    rank = 3
    coupled = rng.standard_normal((rank, dim)) * np.repeat(np.sqrt(importance), experts)
    coupled *= np.sqrt(0.4 * np.sum(local**2) / np.sum(coupled**2))
    return csr_array(np.concatenate([local, coupled]))


def _ideal(expert: int, experts: int, blocks: int, rng: np.random.Generator) -> Array:
    """What the task of an expert wants ``(blocks, experts)``."""
    wanted = rng.normal(0.05, 0.15, (blocks, experts))
    wanted[:, expert] = 0.5 + 0.4 * _profile(blocks, rng) + rng.normal(0.0, 0.15, blocks)
    return np.asarray(wanted)
