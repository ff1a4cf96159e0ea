"""Gradient steps: as torch takes them, the same however they are split, inside the box."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mergesearch.evaluators import Batch
from mergesearch.merging import NonFiniteError
from mergesearch.search.workers.gradient_steps import (
    GradientSteps,
    OptimizerConfig,
    init_state,
    mean_gradient,
    optimizer_step,
    point_of,
    rate,
    take_gradient_steps,
)

DIM = 6


def config(**options: object) -> OptimizerConfig:
    lower = np.full(DIM, -2.0)
    upper = np.full(DIM, 2.0)
    return OptimizerConfig(
        **{"lower": lower, "upper": upper, "origin": np.zeros(DIM), "weights": {"loss": 1.0}}
        | options
    )


def bowl(point: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
    """A quadratic whose centre moves with the batch."""
    generator = np.random.default_rng([batch.seed, batch.number])
    noise = generator.standard_normal((4, DIM))[batch.share :: batch.shares]
    offset = point - 0.4 - 0.1 * noise.mean(axis=0)
    return float(np.sum(offset**2)), 2 * offset * np.arange(1, DIM + 1)


def walk(
    made: OptimizerConfig, start: np.ndarray, steps: list[int]
) -> tuple[np.ndarray, list[float]]:
    """The end and the losses of gradient steps in several calls."""
    point = start
    state = init_state(made, start)
    losses = []
    for count in steps:
        result = take_gradient_steps(GradientSteps(made, state, count), point, bowl)
        assert result.state is not None
        state = result.state
        losses = losses + list(result.losses)
        point = point_of(made, state)
    return point, losses


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, torch.optim.Adam),
        ({"weight_decay": 0.01}, torch.optim.Adam),
        ({"optimizer": "adamw", "weight_decay": 0.1}, torch.optim.AdamW),
    ],
)
def test_steps_are_those_of_torch(options: dict, kind: type) -> None:
    made = config(**{"learning_rate": 0.05} | options)
    start = np.linspace(-1, 1, DIM)
    parameter = torch.tensor(start, requires_grad=True)
    optimiser = kind([parameter], lr=made.learning_rate, weight_decay=made.weight_decay)
    for number in range(20):
        parameter.grad = torch.from_numpy(bowl(parameter.detach().numpy(), Batch(number))[1])
        optimiser.step()
    np.testing.assert_array_equal(walk(made, start, [20])[0], parameter.detach().numpy())


def test_clip_and_warm_restarts_are_those_of_torch() -> None:
    made = config(optimizer="adamw", learning_rate=0.5, clip=0.3, period=3)
    start = np.zeros(DIM)
    parameter = torch.tensor(start, requires_grad=True)
    optimiser = torch.optim.AdamW([parameter], lr=0.5, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimiser, T_0=3, T_mult=2, eta_min=0.05
    )
    for number in range(12):
        assert rate(made, number) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12)
        parameter.grad = torch.from_numpy(bowl(parameter.detach().numpy(), Batch(number))[1])
        torch.nn.utils.clip_grad_norm_([parameter], 0.3)
        optimiser.step()
        scheduler.step()
    inside = np.clip(parameter.detach().numpy(), -2, 2)
    np.testing.assert_allclose(walk(made, start, [12])[0], inside, rtol=0, atol=1e-6)


@pytest.mark.parametrize("coordinates", ["box", "logit"])
def test_many_steps_are_the_same_bits_however_they_are_cut(coordinates: str) -> None:
    made = config(coordinates=coordinates, learning_rate=0.1, l1_to_start=0.1)
    start = np.full(DIM, 0.25)
    whole, losses = walk(made, start, [12])
    for cut in ([1] * 12, [5, 7], [11, 1]):
        again, same = walk(made, start, cut)
        np.testing.assert_array_equal(again, whole)
        assert same == losses
    assert not np.array_equal(
        whole, walk(config(coordinates=coordinates, learning_rate=0.1), start, [12])[0]
    )


def test_the_mean_over_shares_takes_the_step_of_the_whole_batch() -> None:
    made = config(learning_rate=0.1)
    start = np.zeros(DIM)
    state = init_state(made, start)
    parts = []
    for share in range(2):
        own = replace(made, batch=Batch(share=share, shares=2))
        result = take_gradient_steps(GradientSteps(own, state, 0), start, bowl)
        assert result.state is None
        assert result.gradient is not None
        parts.append(result.gradient)
    assert not np.array_equal(parts[0], parts[1])
    split = optimizer_step(made, state, mean_gradient(parts), start)
    np.testing.assert_allclose(point_of(made, split), walk(made, start, [1])[0], rtol=0, atol=1e-15)


def test_it_converges_inside_the_box_and_stops_at_its_faces() -> None:
    made = config(learning_rate=0.05, upper=np.array([2.0, 2.0, 2.0, 0.1, 0.1, 0.1]))
    point, losses = walk(made, np.zeros(DIM), [400])
    np.testing.assert_allclose(point[:3], 0.4, atol=0.05)
    np.testing.assert_array_equal(point[3:], 0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_logits_never_reach_the_bounds_and_begin_where_they_should() -> None:
    made = config(
        coordinates="logit", learning_rate=0.5, lower=np.zeros(DIM), upper=np.full(DIM, 0.3)
    )
    start = np.linspace(0.0, 0.3, DIM)
    np.testing.assert_allclose(point_of(made, init_state(made, start)), start, atol=1e-6)
    point = walk(made, start, [50])[0]
    assert np.all((point > 0.0) & (point < 0.3))


@pytest.mark.parametrize("coordinates", ["box", "logit"])
def test_nothing_moves_without_a_gradient_nor_is_it_pulled_from_its_origin(
    coordinates: str,
) -> None:
    start = np.linspace(-1, 1, DIM)
    made = config(
        coordinates=coordinates, l1_to_start=5.0, origin=start, learning_rate=0.5, optimizer="adamw"
    )
    state = init_state(made, start)
    point = start
    for _ in range(5):
        state = optimizer_step(made, state, np.zeros(DIM), point)
        point = point_of(made, state)
    np.testing.assert_allclose(point, start, rtol=0, atol=1e-15)


def test_pull_leads_back_to_the_origin() -> None:
    made = config(l1_to_start=1.0, learning_rate=0.01, origin=np.full(DIM, 0.5))
    start = np.zeros(DIM)
    state = init_state(made, start)
    point = start
    for _ in range(200):
        state = optimizer_step(made, state, np.zeros(DIM), point)
        point = point_of(made, state)
    np.testing.assert_allclose(point, 0.5, atol=0.05)


def test_only_free_coordinates_move_and_tied_ones_move_as_one() -> None:
    trainable = np.array([True, True, True, False, True, True])
    made = config(learning_rate=0.1, trainable=trainable, tied=np.array([0, 0, 1, 1, 2, 2]))
    start = np.full(DIM, 0.1)
    state = optimizer_step(
        made, init_state(made, start), np.array([3.0, -1.0, 2.0, 2.0, 0.0, -1.0]), start
    )
    point = point_of(made, state)
    assert point[3] == start[3]
    assert point[0] == point[1] < start[0]
    assert point[4] == point[5] > start[4]


def test_a_gradient_that_is_not_finite_stops_the_trial() -> None:
    made = config()
    gradient_steps = GradientSteps(made, init_state(made, np.zeros(DIM)), 3)
    with pytest.raises(NonFiniteError):
        take_gradient_steps(
            gradient_steps, np.zeros(DIM), lambda point, batch: (0.0, np.full(DIM, np.nan))
        )
