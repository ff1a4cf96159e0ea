"""The problems on which the contract of strategies is checked, in every kind of space.

A strategy that searches a space of its own (``StrategyInfo.space``) has a maker here, so that it
meets the contract in that space; the makers' ``dim`` is a wish, the space has the nearest dimension
that it can have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergesearch.evaluators import Batch
from mergesearch.merging import Field, Layout, Recipe, Source
from mergesearch.merging.resident.segment_gram import SegmentGram
from mergesearch.search.strategies.base import Point, Problem, Suggestion, TrialResult
from mergesearch.search.strategies.table import STRATEGIES
from mergesearch.search.testing import strategies
from mergesearch.search.workers.gradient_steps import GradientResult, take_gradient_steps
from mergesearch.spaces import mixed_space, segment_space

#: Strategies that are more than one algorithm: name, options.
CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in sorted(STRATEGIES)]
CASES += [
    ("m2n2", {"alpha": 0.0, "attraction": False, "split": False}),
    ("m2n2", {"archive": 5, "mutation": 0.05}),
]

#: Rungs of 2, 7 and 20 items.
CASES += [("medsamix", {"min_items": 2, "trees": 5})]
#: The second stage within the trials of a test.
CASES += [("evo_merging", {"denoise": 0.05})]

#: The predicted front, and the search after the last pair, within the trials of a test.
CASES += [("map", {"design": 0.1, "batch": 3}), ("nested_map", {"points": 6})]

CASES += [
    ("nevergrad", {"optimizer": name})
    for name in ("CMA", "TBPSA", "DE", "TwoPointsDE", "OnePlusOne", "PSO")
]
CASES += [("optuna", {"sampler": name}) for name in ("nsga2", "nsga3", "cma_es", "qmc")]
#: The model takes over in the last trials of a test: its fits are slow.
CASES += [("optuna", {"sampler": "gp", "startup": 20})]
CASES += [
    ("adamerging", {"coordinates": "logit", "shares": 3}),
    ("gradient_warm_cma", {"warm": 3, "population": 5}),
]
CASES += [("frank_wolfe", {"variant": "soft", "steps": 3}), ("frank_wolfe", {"oracle": "cosine"})]
#: The same for pytest: defaults of every strategy, and variants in the long suite.
MARKED_CASES = [pytest.param(*case, marks=pytest.mark.slow) if case[1] else case for case in CASES]


def box(dim: int, objectives: int = 1) -> Problem:
    """A plain box whose sides have different lengths, and all of whose losses have gradients."""
    plain = strategies.box(dim, objectives)
    return replace(plain, differentiable=plain.names)


def segments(dim: int, objectives: int = 1) -> Problem:
    """Fields of one or two directions with random weights.

    The anchors of :func:`make_problem` are constant fields.
    """
    directions = min(dim, 2)
    most = max((dim + 1) // (directions + 1), 1)
    size = max(1024, 64 * most)
    rng = np.random.default_rng(0)
    index = SegmentGram.of_arrays(np.zeros(size), rng.standard_normal((directions, size)))
    layout = Layout.build({"a": ((size,), "float32")})
    sources = tuple(Source(name, name) for name in "ab"[:directions])
    template = Recipe(
        Source("base", "base"),
        sources,
        "task_arithmetic",
        Field.constant(size, np.zeros(directions)),
    )
    space = segment_space(
        template, layout, segments=most, low=0.0, high=2.0, start=0.5, gram=index.gram
    )
    return replace(
        box(dim, objectives), lower=space.lower, upper=space.upper, start=space.start, space=space
    )


def mixed(dim: int, objectives: int = 1) -> Problem:
    """Methods for groups of blocks of two experts at random angles.

    A group has 22 dimensions, or 8 with one part.
    """
    parts = ("self_attn.q_proj", "mlp.up_proj", "norm") if dim > 8 else ("mlp.up_proj",)
    names = [
        f"layers.{block}.{part}.weight"
        for block in range(max(round(dim / 22), 1))
        for part in parts
    ]
    layout = Layout.build(dict.fromkeys(names, ((8, 8), "float32")))
    vectors = np.random.default_rng(0).standard_normal((len(names), 3, 20)) * np.array(
        [[1.0], [0.5], [0.5]]
    )
    template = Recipe(
        Source("base", "base"),
        tuple(Source(n, n) for n in "ab"),
        "stack",
        Field.constant(64, [0.0]),
    )
    space = mixed_space(
        template, layout, layers=1, gram=lambda _: vectors @ vectors.transpose(0, 2, 1)
    )
    return replace(
        box(dim, objectives), lower=space.lower, upper=space.upper, start=space.start, space=space
    )


def product(dim: int, objectives: int = 1) -> Problem:
    """A plain box of even dimension: two numbers for each of some adapters."""
    return box(dim + dim % 2, objectives)


#: Kind of space -> problem of about ``dim`` dimensions and so many objectives.
MAKERS: dict[str, Callable[[int, int], Problem]] = {
    "coefficients": box,
    "segments": segments,
    "mixed": mixed,
    "product": product,
}


def make_problem(name: str, dim: int, objectives: int = 1) -> Problem:
    """The problem for a strategy, with three anchors: the start, and two others in the box."""
    problem = MAKERS[STRATEGIES[name].space](dim, objectives)
    others = [problem.start + share * (problem.upper - problem.start) for share in (0.0, 0.4, 0.8)]
    anchors = tuple(result_at(point, problem) for point in others)
    return replace(problem, anchors=anchors)


def losses(point: Point, objectives: int = 1) -> np.ndarray:
    """A smooth bowl for each objective."""
    return np.array(
        [float(np.mean((point - 0.2 - 0.1 * index) ** 2)) for index in range(objectives)]
    )


def result_at(
    point: Point, problem: Problem, id: int | None = None, *, failed: bool = False
) -> TrialResult:
    """The result at a point, with a loss for each item."""
    if failed:
        return TrialResult(id, point, None)
    values = losses(point, problem.objectives)
    spread = np.linspace(0.5, 1.5, problem.items)
    return TrialResult(
        id, point, values, {name: v * spread for name, v in zip(problem.names, values, strict=True)}
    )


def gradient_result(suggestion: Suggestion, problem: Problem) -> GradientResult | None:
    """What a worker returns for a suggestion's gradient steps.

    Gradients are exact, with noise that depends on the batch.
    """
    gradient_steps = suggestion.gradient_steps
    if gradient_steps is None:
        return None

    def loss_and_gradient_at(point: Point, batch: Batch) -> tuple[float, np.ndarray]:
        weights = np.array([gradient_steps.config.weights.get(name, 0.0) for name in problem.names])
        centres = np.array([0.2 + 0.1 * index for index in range(problem.objectives)])
        exact = weights @ (2 * (point - centres[:, None]) / max(point.size, 1))
        noise = np.random.default_rng([batch.seed, batch.number]).standard_normal(point.size)
        return float(weights @ losses(point, problem.objectives)), exact + 0.3 * noise / max(
            point.size, 1
        )

    return take_gradient_steps(gradient_steps, suggestion.point, loss_and_gradient_at)
