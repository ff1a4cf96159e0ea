"""DOP against its losses written with full matrices, differentiated by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergesearch.merging import RecipeError, merge

Array = npt.NDArray[np.float64]
NAME = "layers.0.w.weight"
SHAPE = (5, 7)


def task_vectors(count: int, seed: int = 0) -> Array:
    return 0.01 * np.random.default_rng(seed).standard_normal((count, *SHAPE))


def merged(tau: Array, order: Sequence[int], **options: Any) -> Array:
    base = {NAME: torch.zeros(SHAPE, dtype=torch.float64)}
    states = {f"task{k}": {NAME: torch.from_numpy(vector)} for k, vector in enumerate(tau)}
    names = [f"task{k}" for k in order]
    return merge(base, states, operator="dop", order=names, **options)[NAME].numpy()


def loss(merge_: torch.Tensor, target: torch.Tensor, energy: float) -> torch.Tensor:
    left, values, right = torch.linalg.svd(target, full_matrices=True)
    kept = int(torch.searchsorted(values.cumsum(0) / values.sum(), energy))
    scales = torch.diag(values[:kept])
    apart = merge_ - target
    written = scales @ left[:, :kept].T @ apart
    read = apart @ right[:kept].T @ scales
    return (written**2).sum() + (read**2).sum()


def joined(
    so_far: Array, new: Array, stability: float, decay: float, energy: float, steps: int
) -> Array:
    """One join: Adam along the weighted losses, weights by a line search for the least norm."""
    targets = [torch.from_numpy(so_far), torch.from_numpy(new)]
    merge_ = ((targets[0] + targets[1]) / 2).clone().requires_grad_()
    optimiser = torch.optim.Adam([merge_], lr=1e-4)
    weight = stability
    for _ in range(steps):
        losses = [loss(merge_, target, energy) for target in targets]
        one, other = (
            torch.autograd.grad(value, merge_, retain_graph=True)[0] / value.detach()
            for value in losses
        )
        grid = torch.linspace(0.001, 0.999, 9981, dtype=torch.float64)
        norms = (one * one).sum() * grid**2 + (other * other).sum() * (1 - grid) ** 2
        norms += 2 * grid * (1 - grid) * (one * other).sum()
        weight = decay * weight + (1 - decay) * float(grid[norms.argmin()])
        optimiser.zero_grad()
        (weight * losses[0] + (1 - weight) * losses[1]).backward()
        optimiser.step()
    return merge_.detach().numpy()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_is_the_descent_of_every_join(order: tuple[int, ...]) -> None:
    tau = task_vectors(3)
    options = {"stability": 0.8, "decay": 0.9, "energy": 0.95, "steps": 4}
    expected = tau[order[0]]
    for k in order[1:]:
        expected = joined(expected, tau[k], **options)
    np.testing.assert_allclose(merged(tau, order, **options), expected, atol=1e-7)
    # four steps of 1e-4 are seen
    halfway = (tau[order[0]] / 2 + tau[order[1]] / 2) / 2 + tau[order[2]] / 2
    assert np.abs(expected - halfway).max() > 2e-4


def test_a_fixed_weight_ends_at_the_minimum() -> None:
    tau = task_vectors(2)
    result = torch.from_numpy(merged(tau, (0, 1), balance="fixed", stability=0.7, energy=1.0))
    result.requires_grad_()
    total = 0.7 * loss(result, torch.from_numpy(tau[0]), 2.0)
    total = total + 0.3 * loss(result, torch.from_numpy(tau[1]), 2.0)
    (gradient,) = torch.autograd.grad(total, result)
    start = torch.from_numpy(tau.mean(0)).requires_grad_()
    first = 0.7 * loss(start, torch.from_numpy(tau[0]), 2.0)
    first = first + 0.3 * loss(start, torch.from_numpy(tau[1]), 2.0)
    (before,) = torch.autograd.grad(first, start)
    assert float(gradient.norm()) < 1e-9 * float(before.norm())
    assert bool(total < first)


@pytest.mark.parametrize(("stability", "kept"), [(1.0, 0), (0.0, 1)])
def test_all_the_weight_on_one_keeps_it_in_its_spaces(stability: float, kept: int) -> None:
    generator = np.random.default_rng(1)
    low = generator.standard_normal((2, 5, 2)) @ generator.standard_normal((2, 2, 7))
    result = merged(low, (0, 1), balance="fixed", stability=stability, energy=1.0)
    left, _, right = np.linalg.svd(low[kept])
    np.testing.assert_allclose(left[:, :2].T @ result, left[:, :2].T @ low[kept], atol=1e-10)
    np.testing.assert_allclose(result @ right[:2].T, low[kept] @ right[:2].T, atol=1e-10)


def test_tensors_that_are_no_matrices_become_the_mean_again_and_again() -> None:
    base = {"layers.0.norm.weight": torch.zeros(2)}
    states = {
        name: {"layers.0.norm.weight": torch.tensor(values)}
        for name, values in {"a": [4.0, 0.0], "b": [0.0, 4.0], "c": [8.0, 8.0]}.items()
    }
    result = merge(base, states, operator="dop", order=["a", "b", "c"])
    assert result["layers.0.norm.weight"].tolist() == [5.0, 5.0]


def test_an_order_without_an_expert_is_refused() -> None:
    with pytest.raises(RecipeError, match="order: expected"):
        merged(task_vectors(3), (0, 1))
