"""SVC against Algorithm 1 written out with one loop over subspaces and experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergesearch.merging import merge

Array = npt.NDArray[np.float64]
NAME = "layers.0.w.weight"


def written_out(merged: Array, tau: Array, alpha: float) -> Array:
    left, values, right = np.linalg.svd(merged, full_matrices=False)
    result = np.zeros_like(merged)
    for r, value in enumerate(values):
        response = left[:, r] @ merged
        own = [left[:, r] @ vector for vector in tau]
        exaggeration = [response @ one / (one @ one) for one in own]
        gamma = len(tau) / sum(max(alpha, s) for s in exaggeration)
        result += gamma * value * np.outer(left[:, r], right[r])
    return result


def experts(count: int, seed: int = 0, shared: float = 1.0) -> Array:
    generator = np.random.default_rng(seed)
    common = shared * generator.standard_normal((6, 8))
    return np.asarray(common + generator.standard_normal((count, 6, 8)))


def merged(tau: Array, **options: Any) -> Array:
    base = {NAME: torch.zeros(tau.shape[1:], dtype=torch.float64)}
    states = [{NAME: torch.from_numpy(vector)} for vector in tau]
    return merge(base, states, **options)[NAME].numpy()


@pytest.mark.parametrize("alpha", [None, 0.1, 1.0])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv"])
def test_is_the_calibration_of_the_method(method: str, alpha: float | None) -> None:
    tau = experts(3)
    plain = merged(tau, operator=method)
    expected = written_out(plain, tau, 1 / 3 if alpha is None else alpha)
    result = merged(tau, operator="svc", method=method, alpha=alpha)
    np.testing.assert_allclose(result, expected, atol=1e-11)


def test_the_calibration_is_that_of_the_given_scale() -> None:
    tau = experts(4)
    result = merged(tau, operator="svc", scale=1.0, alpha=0.5)
    np.testing.assert_allclose(result, written_out(tau.sum(0), tau, 0.5), atol=1e-11)


def test_an_alpha_of_one_takes_away_alone() -> None:
    tau = experts(4, shared=3.0)
    before = np.linalg.svd(tau.sum(0), compute_uv=False)
    after = np.linalg.svd(merged(tau, operator="svc", scale=1.0, alpha=1.0), compute_uv=False)
    assert np.all(np.sort(after)[::-1] <= before + 1e-12)
    # what all experts share is counted about once instead of four times
    assert after[0] < 0.4 * before[0]


def test_copies_of_an_expert_summed_become_that_expert() -> None:
    (tau,) = experts(1)
    result = merged(np.stack([tau] * 5), operator="svc", scale=1.0, alpha=1.0)
    np.testing.assert_allclose(result, tau, atol=1e-12)


def test_experts_that_changed_nothing_are_not_counted() -> None:
    tau = experts(2)
    padded = np.concatenate([tau, np.zeros((1, 6, 8))])
    np.testing.assert_allclose(
        merged(padded, operator="svc"), merged(tau, operator="svc"), atol=1e-12
    )


def test_other_tensors_stay_as_the_method_merged_them() -> None:
    base = {"norm.weight": torch.zeros(5), NAME: torch.zeros(3, 4)}
    generator = torch.Generator().manual_seed(0)
    states = [
        {name: torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        for _ in range(3)
    ]
    plain = merge(base, states, operator="task_arithmetic")
    result = merge(base, states, operator="svc")
    assert torch.equal(result["norm.weight"], plain["norm.weight"])
    assert not torch.allclose(result[NAME], plain[NAME])
