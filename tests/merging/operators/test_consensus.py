"""Consensus masks against their definition, written out entry by entry."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import RecipeError, merge

SHAPES = {"block.0.weight": (6, 5), "block.1.weight": (4, 7), "norm.bias": (9,), "scale": ()}
State = dict[str, torch.Tensor]


def family(experts: int = 3, seed: int = 0) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tuned = [
        {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for _ in range(experts)
    ]
    return base, tuned


def consensus(base: State, experts: list[State], coefficients: Any = None, **options: Any) -> State:
    return merge(base, experts, operator="consensus", coefficients=coefficients, **options)


def expected(
    base: State, experts: list[State], agreement: int, thresholds: list[float], scale: float
) -> State:
    merged = {}
    for name, origin in base.items():
        start = origin.double().numpy().reshape(-1)
        tau = np.stack([e[name].double().numpy().reshape(-1) for e in experts]) - start
        result = start.copy()
        for i in range(len(start)):
            together = sum(tau[:, i])
            users = sum(
                abs(t) > lam * abs(together - t)
                for t, lam in zip(tau[:, i], thresholds, strict=True)
            )
            if users >= agreement:
                result[i] += scale * together
        merged[name] = torch.tensor(result).reshape(origin.shape)
    return merged


def assert_close(one: State, other: State) -> None:
    assert all(
        torch.allclose(one[name].double(), other[name].double(), rtol=0, atol=1e-6) for name in one
    )


def assert_same_bits(one: State, other: State) -> None:
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("agreement", "threshold"), [(1, 1.5), (2, 0.4), (3, 0.2), (2, [0.2, 0.6, 1.0])]
)
def test_keeps_what_enough_tasks_use(agreement: int, threshold: float | list[float]) -> None:
    base, experts = family()
    thresholds = threshold if isinstance(threshold, list) else [threshold] * 3
    result = consensus(base, experts, 0.7, agreement=agreement, threshold=threshold)
    assert_close(result, expected(base, experts, agreement, thresholds, 0.7))
    changed = sum(int((result[n] != base[n]).sum()) for n in base)
    assert 0 < changed < sum(t.numel() for t in base.values())


def test_without_agreement_it_is_task_arithmetic_to_the_bit() -> None:
    base, experts = family()
    plain = merge(base, experts, operator="task_arithmetic", coefficients=[0.3, 0.5, -0.2])
    assert_same_bits(consensus(base, experts, [0.3, 0.5, -0.2], agreement=0), plain)


def test_without_agreement_the_ties_form_is_ties_to_the_bit() -> None:
    base, experts = family()
    plain = merge(base, experts, operator="ties", density=0.2, merge="sum", coefficients=0.5)
    assert_same_bits(consensus(base, experts, 0.5, agreement=0, multitask="ties"), plain)


def test_the_ties_form_masks_the_terms_of_ties() -> None:
    base, experts = family()
    ties = merge(base, experts, operator="ties", density=0.2, merge="sum", coefficients=1.0)
    result = consensus(base, experts, 1.0, agreement=2, multitask="ties")
    for name, origin in base.items():
        together = (ties[name] - origin).double()
        taus = [(expert[name] - origin).double() for expert in experts]
        users = sum((tau.abs() > 0.4 * (together - tau).abs()).int() for tau in taus)
        assert torch.allclose(
            (result[name] - origin).double(), together * (users >= 2), rtol=0, atol=1e-6
        )


def test_more_agreement_than_experts_is_the_base() -> None:
    base, experts = family()
    assert_same_bits(consensus(base, experts, 1.0, agreement=4), base)


def test_one_expert_is_restored_only_if_one_task_is_enough() -> None:
    base, [expert] = family(1)
    assert_close(consensus(base, [expert], 1.0, agreement=1), expert)
    assert_same_bits(consensus(base, [expert], 1.0), base)


def test_fewer_entries_survive_the_more_tasks_must_agree() -> None:
    base, experts = family(5)
    results = [
        consensus(base, experts, 1.0, agreement=agreement, threshold=0.6) for agreement in range(7)
    ]
    kept = [
        torch.cat([(result[name] != base[name]).reshape(-1) for name in base]) for result in results
    ]
    assert [bool((fewer & ~more).any()) for more, fewer in itertools.pairwise(kept)] == [False] * 6
    counts = [int(mask.sum()) for mask in kept]
    assert counts[0] > counts[2] > counts[3] > counts[5] > counts[6] == 0


def test_refuses_a_threshold_for_experts_that_are_not_there() -> None:
    base, experts = family()
    with pytest.raises(
        RecipeError, match=r"operator consensus: threshold: expected one number or 3, .* received 2"
    ):
        consensus(base, experts, threshold=[0.2, 0.3])
    with pytest.raises(
        RecipeError, match=r"'threshold': expected number \(≥ 0\) or list of number .*received -0.1"
    ):
        consensus(base, experts, threshold=-0.1)
