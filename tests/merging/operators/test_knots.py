"""KnOTS: the inner method acts on coordinates that all experts share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import RecipeError, merge

Array = np.ndarray[Any, np.dtype[np.float64]]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merged_delta(deltas: list[torch.Tensor], **options: Any) -> Array:
    base = torch.zeros_like(deltas[0])
    experts = {f"expert {k}": {"w": base + delta} for k, delta in enumerate(deltas)}
    return merge({"w": base}, experts, operator="knots", **{"coefficients": 1.0} | options)[
        "w"
    ].numpy()


def low_rank(experts: int, rows: int = 9, columns: int = 6) -> list[torch.Tensor]:
    return [draw(rows, 2, seed=k) @ draw(2, columns, seed=100 + k) for k in range(experts)]


def ties(coordinates: list[Array], density: float) -> Array:
    """TIES in numpy: trim to the largest of each expert, elect a sign, average what agrees."""
    kept = []
    for own in coordinates:
        limit = np.sort(np.abs(own), axis=None)[-int(np.ceil(density * own.size))]
        kept.append(np.where(np.abs(own) >= limit, own, 0.0))
    sign = np.sign(sum(kept))
    agree = [np.where(own * sign > 0, own, 0.0) for own in kept]
    return sum(agree) / np.maximum(sum((own != 0).astype(int) for own in agree), 1)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_agrees_with_ties_in_the_singular_basis(density: float, shape: tuple[int, int]) -> None:
    deltas = low_rank(2, *shape)
    u, s, v = np.linalg.svd(
        np.concatenate([delta.numpy() for delta in deltas], axis=1), full_matrices=False
    )
    rank = 4
    coordinates = [np.diag(s[:rank]) @ part[:rank] for part in np.split(v, 2, axis=1)]
    np.testing.assert_allclose(
        merged_delta(deltas, density=density), u[:, :rank] @ ties(coordinates, density)
    )


def test_with_task_arithmetic_inside_it_is_task_arithmetic() -> None:
    base = {
        "layers.0.attn.qkv.weight": draw(12, 4, seed=1),
        "bias": draw(5, seed=2),
        "conv": draw(4, 3, 2, 2, seed=3),
    }
    experts = [
        {name: t + draw(*t.shape, seed=10 * k) for name, t in base.items()} for k in range(1, 4)
    ]
    coefficients = [0.3, -0.2, 0.7]
    knots = merge(
        base,
        experts,
        operator="knots",
        coefficients=coefficients,
        inner="task_arithmetic",
        others="sum",
    )
    expected = merge(base, experts, operator="task_arithmetic", coefficients=coefficients)
    for name in base:
        torch.testing.assert_close(knots[name], expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("inner", ["ties", "dare_ties"])
def test_a_rotation_of_the_outputs_rotates_the_merge(inner: str) -> None:
    # TIES by itself depends on the basis. Signs of singular vectors are arbitrary, so they cannot
    # matter either.
    deltas = low_rank(3)
    rotation = torch.linalg.qr(draw(9, 9, seed=77)).Q
    expected = rotation.numpy() @ merged_delta(deltas, inner=inner)
    np.testing.assert_allclose(
        merged_delta([rotation @ delta for delta in deltas], inner=inner), expected, atol=1e-10
    )


def test_rounding_errors_do_not_vote() -> None:
    # One expert moves only the first outputs, the other only the last: in shared coordinates each
    # has zeros where the other has not, up to rounding. Nothing disagrees, so nothing may be
    # divided.
    one = torch.zeros(8, 5, dtype=torch.float64)
    other = torch.zeros(8, 5, dtype=torch.float64)
    one[:4] = draw(4, 5, seed=1)
    other[4:] = draw(4, 5, seed=2)
    rotation = torch.linalg.qr(draw(8, 8, seed=3)).Q
    deltas = [rotation @ one, rotation @ other]
    np.testing.assert_allclose(
        merged_delta(deltas, density=1.0), (deltas[0] + deltas[1]).numpy(), atol=1e-12
    )


class TestDareTies:
    def test_without_dropping_it_is_ties_on_everything(self) -> None:
        deltas = low_rank(3)
        dropped = merged_delta(deltas, inner="dare_ties", drop=0.0)
        np.testing.assert_allclose(dropped, merged_delta(deltas, density=1.0), atol=1e-12)

    def test_masks_go_by_seed_and_name_of_the_expert(self) -> None:
        deltas = low_rank(2)
        one, again, other = (
            merged_delta(deltas, inner="dare_ties", drop=0.5, seed=s) for s in (0, 0, 1)
        )
        assert np.array_equal(one, again)
        assert not np.allclose(one, other)

    def test_a_single_expert_is_kept_on_average(self) -> None:
        delta = draw(6, 6, seed=1)
        merges = [
            merged_delta([delta], inner="dare_ties", drop=0.5, seed=seed) for seed in range(100)
        ]
        # Each coordinate is 0 or doubled: its mean over n masks deviates by |c| / √n, four of those
        # are rare.
        deviation = np.linalg.norm(np.mean(merges, axis=0) - delta.numpy())
        assert deviation < 4 * np.linalg.norm(delta.numpy()) / np.sqrt(100)
        assert not np.allclose(merges[0], delta.numpy())


def test_experts_that_equal_the_base_merge_to_it() -> None:
    assert np.array_equal(
        merged_delta([torch.zeros(4, 3, dtype=torch.float64)] * 2), np.zeros((4, 3))
    )


@pytest.mark.parametrize("options", [{"density": 20}, {"inner": "median"}, {"drop": 1.0}])
def test_refuses_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"operator knots: hyperparameter '{next(iter(options))}"):
        merged_delta(low_rank(2), **options)
