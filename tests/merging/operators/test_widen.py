"""WIDEN against its definition, column by column with numpy in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergesearch.merging import merge

State = dict[str, torch.Tensor]
Array = npt.NDArray[np.float64]

LINEAR = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"
CONVOLUTION = "stem.0.weight"
SHAPES = {LINEAR: (6, 9), EMBEDDING: (13, 4), NORM: (8,), CONVOLUTION: (5, 3, 2, 2)}


def family(experts: int = 3, seed: int = 0) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(seed)
    base = {
        n: torch.randn(shape, generator=generator, dtype=torch.float64)
        for n, shape in SHAPES.items()
    }

    def tuned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    return base, [{name: tuned(tensor) for name, tensor in base.items()} for _ in range(experts)]


def widen(base: State, experts: list[State], **options: Any) -> State:
    return merge(base, experts, operator="widen", **options)


def scores(significance: Array, t: float, s: float) -> Array:
    softmax = np.exp(significance) / np.exp(significance).sum(axis=0)
    # Rounded: the middle rank of an odd number is the mean, and not above it.
    return np.where(
        (significance - t * significance.mean(axis=1, keepdims=True)).round(12) > 0, s, softmax
    )


def merged_matrix(base: Array, experts: list[Array], t: float, s: float) -> Array:
    """``(m, n)`` weights, scored per column."""
    count = base.shape[1]
    norms = np.zeros((len(experts), count))
    angles = np.zeros((len(experts), count))
    for k, expert in enumerate(experts):
        for j in range(count):
            a = np.linalg.norm(base[:, j])
            b = np.linalg.norm(expert[:, j])
            norms[k, j] = abs(a - b)
            angles[k, j] = 1 - (base[:, j] / a) @ (expert[:, j] / b)
    ranks = [np.argsort(np.argsort(changes, axis=1), axis=1) / count for changes in (norms, angles)]
    weights = (scores(ranks[0], t, s) + scores(ranks[1], t, s)) / 2
    return base + sum(
        weight * (expert - base) for weight, expert in zip(weights, experts, strict=True)
    )


@pytest.mark.parametrize(("t", "s"), [(1.0, 1.0), (1.4, 0.7), (0.0, 1.0)])
def test_weighs_columns_by_rank(t: float, s: float) -> None:
    base, experts = family()
    merged = widen(base, experts, t=t, s=s)
    expected = merged_matrix(base[LINEAR].numpy(), [e[LINEAR].numpy() for e in experts], t, s)
    assert np.allclose(merged[LINEAR].numpy(), expected, rtol=0, atol=1e-12)


def test_columns_of_an_embedding_are_tokens_and_of_a_convolution_its_taps() -> None:
    base, experts = family()
    merged = widen(base, experts)
    tokens = merged_matrix(
        base[EMBEDDING].numpy().T, [e[EMBEDDING].numpy().T for e in experts], 1.0, 1.0
    )
    assert np.allclose(merged[EMBEDDING].numpy(), tokens.T, rtol=0, atol=1e-12)
    flat = [state[CONVOLUTION].numpy().reshape(5, 12) for state in (base, *experts)]
    taps = merged_matrix(flat[0], flat[1:], 1.0, 1.0)
    assert np.allclose(merged[CONVOLUTION].numpy().reshape(5, 12), taps, rtol=0, atol=1e-12)


def test_vectors_are_scored_by_their_change_itself() -> None:
    base, experts = family()
    tau = np.stack([(e[NORM] - base[NORM]).numpy() for e in experts])
    expected = base[NORM].numpy() + (scores(np.abs(tau), 0.8, 0.6) * tau).sum(axis=0)
    assert np.allclose(
        widen(base, experts, t=0.8, s=0.6)[NORM].numpy(), expected, rtol=0, atol=1e-12
    )


def test_scores_of_a_column_add_up_to_between_one_and_the_number_of_experts() -> None:
    base, [expert] = family(1)
    merged = widen(base, [expert] * 4)
    ratio = (merged[LINEAR] - base[LINEAR]) / (expert[LINEAR] - base[LINEAR])
    assert torch.allclose(ratio, ratio[0].expand_as(ratio))  # whole columns
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= 4 + 1e-9
    assert ratio.max() - ratio.min() > 1


def test_tiny_changes_of_direction_are_ranked_and_not_their_rounding() -> None:
    # 1 − cos is near 1e-9 here, fifty times below what fp32 resolves at 1.
    generator = torch.Generator().manual_seed(2)
    base = {"w": torch.randn(64, 12, generator=generator)}
    steps = [
        torch.randn(64, 12, generator=generator) * torch.rand(12, generator=generator) * 1e-4
        for _ in range(3)
    ]
    experts = [{"w": base["w"] + step} for step in steps]
    exact = [state["w"].double().numpy() for state in (base, *experts)]
    expected = merged_matrix(exact[0], exact[1:], 1.0, 1.0)
    change = widen(base, experts)["w"].double().numpy() - exact[0]
    assert np.allclose(change, expected - exact[0], rtol=0, atol=3e-7)


def test_columns_of_zeros_are_no_division_by_zero() -> None:
    base = {"w": torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])}
    experts = [{"w": torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])}, {"w": torch.zeros(2, 3)}]
    merged = widen(base, experts)["w"]
    assert bool(torch.isfinite(merged).all())
    assert torch.equal(merged[:, 1], base["w"][:, 1])
