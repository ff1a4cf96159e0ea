"""SCE in both readings of Select, and VaRM, against their formulas in numpy in fp64."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergesearch.merging import RecipeError, merge

State = dict[str, torch.Tensor]
Target = Literal["deltas", "weights"]
SHAPES = {"block.0.weight": (6, 5), "norm.bias": (11,), "column": (9, 1), "scale": ()}


def family(experts: int = 3, seed: int = 0) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    scales = [0.05 * (k + 1) for k in range(experts)]
    tuned = [
        {n: t + s * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for s in scales
    ]
    return base, tuned


def sce(base: State, experts: list[State], **options: Any) -> State:
    return merge(base, experts, operator="sce", **options)


def reference(tau: npt.NDArray[np.float64], topk: float, target: Target) -> npt.NDArray[np.float64]:
    """The merged task vector of ``(K, n)`` task vectors."""
    mask = np.ones(tau.shape[1], dtype=bool)
    if topk < 1:
        variance = tau.var(axis=0)
        count = math.ceil(topk * np.count_nonzero(variance))
        mask[:] = False
        mask[np.argsort(-variance)[:count]] = True
    energies = ((tau * mask) ** 2).mean(axis=1)
    weights = energies / energies.sum()
    if target == "deltas":
        tau = tau * mask
    merged = np.zeros(tau.shape[1])
    for i, entries in enumerate(tau.T):
        agreeing = [(w, x) for w, x in zip(weights, entries, strict=True) if x * entries.sum() > 0]
        if agreeing:
            merged[i] = sum(w * x for w, x in agreeing) / sum(w for w, _ in agreeing)
    return merged


def changes(merged: State, base: State, name: str) -> npt.NDArray[np.float64]:
    return (merged[name].double() - base[name].double()).reshape(-1).numpy()


@pytest.mark.parametrize("target", ["deltas", "weights"])
@pytest.mark.parametrize("topk", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("experts", [2, 3, 5])
def test_agrees_with_the_formula(experts: int, topk: float, target: Target) -> None:
    base, tuned = family(experts)
    merged = sce(base, tuned, topk=topk, select_applies_to=target)
    for name in SHAPES:
        tau = np.stack([changes(expert, base, name) for expert in tuned])
        assert np.allclose(
            changes(merged, base, name), reference(tau, topk, target), rtol=0, atol=1e-6
        )


def test_one_expert_is_kept_by_the_authors_code_and_lost_by_the_papers_text() -> None:
    base, [expert] = family(1)
    kept, lost = (
        sce(base, [expert], topk=0.5, select_applies_to=target) for target in ("weights", "deltas")
    )
    assert all(torch.allclose(kept[name], expert[name], rtol=0, atol=1e-6) for name in base)
    assert all(torch.equal(lost[name], base[name]) for name in base)
    whole = sce(base, [expert], topk=1.0, select_applies_to="deltas")
    assert all(torch.allclose(whole[name], expert[name], rtol=0, atol=1e-6) for name in base)


def test_selected_deltas_change_no_more_positions_than_selected() -> None:
    base, tuned = family(4)
    merged = sce(base, tuned, topk=0.2, select_applies_to="deltas")
    assert 0 < np.count_nonzero(changes(merged, base, "block.0.weight")) <= math.ceil(0.2 * 30)
    assert np.count_nonzero(changes(sce(base, tuned, topk=0.2), base, "block.0.weight")) == 30


def test_the_result_lies_between_the_agreeing_experts() -> None:
    base, tuned = family(4, seed=3)
    merged = changes(sce(base, tuned, topk=0.3), base, "block.0.weight")
    tau = np.stack([changes(expert, base, "block.0.weight") for expert in tuned])
    agreeing = np.where(tau * tau.sum(axis=0) > 0, np.abs(tau), np.nan)
    assert np.all(np.abs(merged) <= np.nanmax(agreeing, axis=0) + 1e-6)
    assert np.all(np.abs(merged) >= np.nanmin(agreeing, axis=0) - 1e-6)


def test_negated_task_vectors_give_the_negated_merge_even_where_they_cancel() -> None:
    base = {"w": torch.zeros(3)}
    one = torch.tensor([1.0, 2.0, -1.0])
    other = torch.tensor([-1.0, 1.0, -3.0])
    forward = sce(base, [{"w": one}, {"w": other}], topk=1.0)["w"]
    backward = sce(base, [{"w": -one}, {"w": -other}], topk=1.0)["w"]
    assert torch.equal(forward, -backward)
    assert forward[0] == 0


def test_an_expert_of_vanishing_energy_still_counts_where_it_is_alone() -> None:
    # Its weight does not fit fp32 beside the other's: nothing is merged there, and nothing is
    # divided by 0.
    base = {"w": torch.zeros(2)}
    merged = sce(
        base, [{"w": torch.tensor([1e20, 0.0])}, {"w": torch.tensor([0.0, 1e-15])}], topk=1.0
    )["w"]
    assert merged.tolist() == [np.float32(1e20), 0.0]


@pytest.mark.parametrize("topk", [0.0, 1.5, 20])
def test_refuses_fractions_outside_the_unit_interval(topk: float) -> None:
    base, tuned = family()
    with pytest.raises(RecipeError, match="operator sce: hyperparameter 'topk'"):
        sce(base, tuned, topk=topk)


def test_varm_weighs_each_matrix_by_its_mean_squared_change() -> None:
    base, tuned = family(4)
    merged = merge(base, tuned, operator="varm")
    for name in SHAPES:
        tau = np.stack([changes(expert, base, name) for expert in tuned])
        energies = (tau**2).mean(axis=1)
        expected = (energies / energies.sum()) @ tau
        assert np.allclose(changes(merged, base, name), expected, rtol=0, atol=1e-6)


def test_varm_gives_an_idle_expert_no_say() -> None:
    base, tuned = family(2)
    alone = merge(base, tuned, operator="varm")
    beside = merge(base, [tuned[0], dict(base), tuned[1]], operator="varm")
    assert all(torch.equal(alone[name], beside[name]) for name in base)
