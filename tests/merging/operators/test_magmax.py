"""MagMax against the plain rule: at every position the entry of the largest magnitude."""

from __future__ import annotations

import numpy as np
import torch

from mergesearch.merging import merge

State = dict[str, torch.Tensor]


def states(*rows: list[float]) -> list[State]:
    return [{"w": torch.tensor(row)} for row in rows]


def test_takes_the_entry_of_the_largest_magnitude() -> None:
    generator = np.random.default_rng(0)
    tau = generator.normal(size=(5, 200))
    expected = np.take_along_axis(tau, np.abs(tau).argmax(axis=0)[None], axis=0)[0]
    base = {"w": torch.zeros(200, dtype=torch.float64)}
    experts = [{"w": torch.tensor(row)} for row in tau]
    merged = merge(base, experts, operator="magmax", coefficients=1.0)
    assert np.array_equal(merged["w"].numpy(), expected)
    halved = merge(base, experts, operator="magmax")
    assert np.allclose(halved["w"].numpy(), 0.5 * expected, rtol=0, atol=1e-15)


def test_signs_of_the_others_do_not_matter() -> None:
    """Where EMR elects the sign of the sum, MagMax keeps the largest entry."""
    [base, *experts] = states([0.0], [3.0], [-2.0], [-2.0])
    assert merge(base, experts, operator="magmax", coefficients=1.0)["w"].item() == 3.0
    assert merge(base, experts, operator="emr")["w"].item() == -2.0


def test_each_expert_holds_the_positions_of_its_maxima() -> None:
    [base, *experts] = states([0.0, 0.0, 0.0], [3.0, -1.0, 0.0], [1.0, -2.0, 0.5])
    merged = merge(base, experts, operator="magmax", coefficients=[0.1, 0.01])
    assert torch.allclose(merged["w"], torch.tensor([0.3, -0.02, 0.005]))


def test_equal_magnitudes_are_shared() -> None:
    [base, *experts] = states([0.0, 0.0], [2.0, 1.0], [2.0, -1.0], [1.0, 0.0])
    for coefficients in ([0.2, 0.6, 0.0], [0.6, 0.2, 0.0]):
        merged = merge(base, experts, operator="magmax", coefficients=coefficients)
        assert torch.allclose(merged["w"][0], torch.tensor(0.8))
    assert merge(base, experts, operator="magmax")["w"][1].item() == 0.0
