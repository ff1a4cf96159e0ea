"""EMR's unified vector against the plain rule: elect a sign, take the largest entry that has it."""

from __future__ import annotations

import numpy as np
import torch

from mergesearch.merging import merge

State = dict[str, torch.Tensor]


def states(*rows: list[float]) -> list[State]:
    return [{"w": torch.tensor(row)} for row in rows]


def test_takes_the_largest_entry_of_the_elected_sign() -> None:
    generator = np.random.default_rng(0)
    tau = generator.normal(size=(5, 200))
    expected = []
    for entries in tau.T:
        sign = np.sign(entries.sum())
        expected.append(sign * max(abs(x) for x in entries if np.sign(x) == sign))
    base = {"w": torch.zeros(200, dtype=torch.float64)}
    merged = merge(base, [{"w": torch.tensor(row)} for row in tau], operator="emr")
    assert np.allclose(merged["w"].numpy(), expected, rtol=0, atol=1e-12)


def test_each_expert_holds_the_positions_of_its_maxima() -> None:
    [base, *experts] = states([0.0, 0.0, 0.0, 0.0], [3.0, -1.0, 2.0, 0.0], [1.0, -2.0, -5.0, 0.5])
    coefficients = [0.1, 0.01]
    merged = merge(base, experts, operator="emr", coefficients=coefficients)
    assert torch.allclose(merged["w"], torch.tensor([0.3, -0.02, -0.05, 0.005]))


def test_equal_maxima_are_shared_and_cancellations_add_nothing() -> None:
    [base, *experts] = states([0.0, 0.0], [2.0, 1.0], [2.0, -1.0], [1.0, 0.0])
    for coefficients in ([0.2, 0.6, 0.0], [0.6, 0.2, 0.0]):
        merged = merge(base, experts, operator="emr", coefficients=coefficients)
        assert torch.allclose(merged["w"], torch.tensor([0.8, 0.0]))


def test_entries_too_small_to_multiply_are_kept() -> None:
    [base, *experts] = states([0.0], [1e-30], [3e-30])
    assert merge(base, experts, operator="emr")["w"].item() == np.float32(3e-30)


def test_is_no_smaller_than_any_agreeing_expert_and_no_larger_than_the_largest() -> None:
    generator = torch.Generator().manual_seed(1)
    base = {"w": torch.zeros(7, 11)}
    experts = [{"w": torch.randn(7, 11, generator=generator)} for _ in range(4)]
    merged = merge(base, experts, operator="emr")["w"]
    stacked = torch.stack([expert["w"] for expert in experts])
    agreeing = torch.where(stacked.sign() == merged.sign(), stacked.abs(), 0.0)
    assert torch.equal(merged.abs(), agreeing.amax(dim=0))
    assert torch.equal(merged.sign(), stacked.sum(dim=0).sign())
