"""OptMerge against the optimisers that it stands for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergesearch.merging import RecipeError, merge

Array = npt.NDArray[np.float64]
NAME = "layers.0.mlp.weight"


def task_vectors(
    shape: tuple[int, int], count: int = 3, rank: int | None = None, seed: int = 0
) -> list[Array]:
    generator = np.random.default_rng(seed)
    if rank is None:
        return [scale * generator.standard_normal(shape) for scale in np.linspace(0.1, 0.3, count)]
    return [
        generator.standard_normal((shape[0], rank)) @ generator.standard_normal((rank, shape[1]))
        for _ in range(count)
    ]


def optmerge(deltas: list[Array], **hyperparameters: float | str) -> Array:
    base = {NAME: torch.zeros(deltas[0].shape, dtype=torch.float64)}
    experts = [{NAME: torch.from_numpy(delta)} for delta in deltas]
    return merge(base, experts, operator="optmerge", **hyperparameters)[NAME].numpy()


def largest(matrix: Array, rank: int) -> tuple[Array, Array]:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values[:rank, None] * right[:rank]


def loss(x: torch.Tensor, deltas: list[Array], targets: list[Array], rank: int) -> torch.Tensor:
    terms = [
        ((x - torch.from_numpy(target)) @ torch.from_numpy(largest(tau, rank)[1].T)).square().sum()
        / np.sum(tau**2)
        for tau, target in zip(deltas, targets, strict=True)
    ]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("shape", [(6, 5), (4, 15)], ids=["tall", "wide"])
def test_low_rank_form_is_gradient_descent_with_momentum(shape: tuple[int, int]) -> None:
    deltas = task_vectors(shape, rank=2)
    rank = min(shape) // 3
    targets = [np.matmul(*largest(tau, rank)) for tau in deltas]
    start = np.mean(deltas, axis=0)
    x = torch.tensor(start, requires_grad=True)
    optimiser = torch.optim.SGD([x], lr=1e-4, momentum=0.9)
    for _ in range(300):
        optimiser.zero_grad()
        loss(x, deltas, targets, rank).backward()
        optimiser.step()
    result = optmerge(deltas, form="lora")
    np.testing.assert_allclose(result, x.detach().numpy(), atol=1e-9)
    assert np.abs(result - start).max() > 1e-2


@pytest.mark.parametrize("shape", [(6, 5), (4, 15)], ids=["tall", "wide"])
@pytest.mark.parametrize("time", [1.0, 100.0])
def test_full_form_is_gradient_flow_to_the_demeaned_targets(
    shape: tuple[int, int], time: float
) -> None:
    deltas = task_vectors(shape)
    rank = min(shape) // 3
    mean = np.mean(deltas, axis=0)
    targets = [mean + np.matmul(*largest(tau - mean, rank)) for tau in deltas]
    x = sum(deltas)
    steps = 2000
    for _ in range(steps):
        for tau, target in zip(deltas, targets, strict=True):
            seen = largest(tau, rank)[1]
            x = x - time / steps * (x - target) @ seen.T @ seen / np.sum(tau**2)
    result = optmerge(deltas, time=time)
    np.testing.assert_allclose(result, x, atol=1e-3)
    assert np.abs(result - sum(deltas)).max() > 0.02


@pytest.mark.parametrize("form", ["full", "lora"])
def test_one_expert_is_left_alone(form: str) -> None:
    (delta,) = task_vectors((6, 5), 1)
    np.testing.assert_allclose(optmerge([delta], form=form), delta, atol=1e-12)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_scales_with_the_task_vectors_and_lowers_the_loss(form: str) -> None:
    deltas = task_vectors((6, 7))
    result = optmerge(deltas, form=form)
    np.testing.assert_allclose(
        optmerge([100 * tau for tau in deltas], form=form), 100 * result, atol=1e-9
    )
    mean = np.mean(deltas, axis=0)
    start = mean if form == "lora" else sum(deltas)
    origin = 0 if form == "lora" else mean
    targets = [origin + np.matmul(*largest(tau - origin, 2)) for tau in deltas]
    assert loss(torch.from_numpy(result), deltas, targets, 2) < loss(
        torch.from_numpy(start), deltas, targets, 2
    )


@pytest.mark.parametrize("form", ["full", "lora"])
def test_more_experts_than_singular_values_keep_one_each(form: str) -> None:
    deltas = task_vectors((2, 6), 4)
    result = optmerge(deltas, form=form, time=1e6, steps=1)
    assert np.isfinite(result).all()
    assert np.abs(result).max() > 0


def test_leaves_everything_but_matrices_of_blocks_at_the_base() -> None:
    names = (NAME, "layers.0.mlp.bias", "embed_tokens.weight")
    shapes = {NAME: (4, 3), "layers.0.mlp.bias": (4,), "embed_tokens.weight": (9, 3)}
    base = {name: torch.zeros(shapes[name]) for name in names}
    experts = [{name: torch.full(shapes[name], float(k)) for name in names} for k in (1, 2)]
    result = merge(base, experts, operator="optmerge")
    assert [name for name in names if result[name].any()] == [NAME]


def test_refuses_what_it_cannot_use() -> None:
    with pytest.raises(
        RecipeError, match=r"operator optmerge: hyperparameter 'form': .*'full' or 'lora'"
    ):
        optmerge(task_vectors((6, 5)), form="qlora")
    with pytest.raises(
        RecipeError,
        match=r"operator optmerge: hyperparameter 'steps': .*greater than or equal to 1",
    ):
        optmerge(task_vectors((6, 5)), steps=0)
