"""Iso-C and Iso-CTS against the published formulas in numpy, with low-rank experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import RecipeError, merge
from mergesearch.merging.operators.iso import directions_of

Array = np.ndarray[Any, np.dtype[np.float64]]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merged_delta(deltas: list[torch.Tensor], operator: str, **options: Any) -> Array:
    base = torch.zeros_like(deltas[0])
    experts = [{"w": base + delta} for delta in deltas]
    return merge({"w": base}, experts, operator=operator, **{"coefficients": 1.0} | options)[
        "w"
    ].numpy()


def spectrum(matrix: Array) -> Array:
    return np.linalg.svd(matrix, compute_uv=False)


def orthogonal(matrix: Array) -> Array:
    p, _, q = np.linalg.svd(matrix, full_matrices=False)
    return p @ q


def published_cts(deltas: list[Array], common: float) -> Array:
    size = min(deltas[0].shape)
    experts = len(deltas)
    specific = round((size - int(size * common)) / experts)
    u, s, v = np.linalg.svd(sum(deltas), full_matrices=False)
    first = size - specific * experts
    left = [u[:, :first]]
    values = [s[:first]]
    right = [v[:first]]
    for delta in deltas:
        p, t, q = np.linalg.svd(delta - left[0] @ left[0].T @ delta, full_matrices=False)
        left.append(p[:, :specific])
        values.append(t[:specific])
        right.append(q[:specific])
    return (
        np.concatenate(values).mean()
        * orthogonal(np.concatenate(left, 1))
        @ orthogonal(np.concatenate(right, 0))
    )


SHAPES = [(12, 7), (7, 12), (10, 10)]


class TestIsoC:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("flatten", ["nonzero", "all"])
    def test_agrees_with_the_published_formula(self, shape: tuple[int, int], flatten: str) -> None:
        deltas = [draw(*shape, seed=k) for k in range(3)]
        total = sum(delta.numpy() for delta in deltas)
        expected = spectrum(total).mean() * orthogonal(total)
        np.testing.assert_allclose(
            merged_delta(deltas, "iso_c", flatten=flatten), expected, atol=1e-10
        )

    def test_keeps_the_nuclear_norm_and_makes_all_singular_values_equal(self) -> None:
        deltas = [draw(8, 6, seed=k) for k in range(2)]
        values = spectrum(merged_delta(deltas, "iso_c"))
        np.testing.assert_allclose(values, spectrum((deltas[0] + deltas[1]).numpy()).sum() / 6)

    def test_low_rank_experts_keep_their_directions(self) -> None:
        deltas = [draw(24, 2, seed=k) @ draw(2, 24, seed=10 + k) for k in range(4)]
        total = sum(delta.numpy() for delta in deltas)
        merged = merged_delta(deltas, "iso_c")
        values = spectrum(merged)
        np.testing.assert_allclose(values[:8], spectrum(total).sum() / 8)
        assert values[8] < 1e-9
        u, _, v = np.linalg.svd(total)
        np.testing.assert_allclose(
            merged, u[:, :8] @ u[:, :8].T @ merged @ v[:8].T @ v[:8], atol=1e-10
        )

    def test_the_published_formula_moves_where_no_low_rank_expert_does(self) -> None:
        deltas = [draw(24, 2, seed=k) @ draw(2, 24, seed=10 + k) for k in range(4)]
        merged = merged_delta(deltas, "iso_c", flatten="all")
        total = sum(delta.numpy() for delta in deltas)
        np.testing.assert_allclose(spectrum(merged), spectrum(total).mean())
        u = np.linalg.svd(total)[0][:, :8]
        outside = np.linalg.norm(merged - u @ u.T @ merged) ** 2
        assert outside / np.linalg.norm(merged) ** 2 == pytest.approx(2 / 3)

    def test_the_floor_leaves_out_what_is_small(self) -> None:
        low = draw(12, 2, seed=1) @ draw(2, 12, seed=2)
        rounded = low + 1e-4 * draw(12, 12, seed=3)
        values = spectrum(merged_delta([rounded], "iso_c", floor=0.01))
        np.testing.assert_allclose(values[:2], spectrum(rounded.numpy())[:2].mean())
        assert values[2] < 1e-9
        assert spectrum(merged_delta([rounded], "iso_c"))[11] > 0.1

    def test_experts_that_cancel_out_merge_to_the_base(self) -> None:
        delta = draw(5, 5, seed=1)
        assert np.array_equal(merged_delta([delta, -delta], "iso_c"), np.zeros((5, 5)))

    def test_every_expert_keeps_a_coefficient(self) -> None:
        deltas = [draw(6, 6, seed=k) for k in range(2)]
        total = (deltas[0] + deltas[1]).numpy()
        u, s, _ = np.linalg.svd(total)
        expected = u @ np.diag(s.mean() / s) @ u.T @ (0.3 * deltas[0] + 2 * deltas[1]).numpy()
        np.testing.assert_allclose(
            merged_delta(deltas, "iso_c", coefficients=[0.3, 2.0]), expected, atol=1e-10
        )

    def test_a_floor_of_one_is_refused(self) -> None:
        with pytest.raises(RecipeError, match="operator iso_c: hyperparameter 'floor'"):
            merged_delta([draw(3, 3, seed=0)], "iso_c", floor=1.0)


class TestIsoCts:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("experts", [2, 3])
    def test_agrees_with_the_published_formula(self, shape: tuple[int, int], experts: int) -> None:
        deltas = [draw(*shape, seed=k) for k in range(experts)]
        expected = published_cts([delta.numpy() for delta in deltas], 0.5)
        np.testing.assert_allclose(
            merged_delta(deltas, "iso_cts", common=0.5), expected, atol=1e-10
        )

    def test_all_singular_values_are_equal(self) -> None:
        deltas = [draw(10, 10, seed=k) for k in range(2)]
        values = spectrum(merged_delta(deltas, "iso_cts"))
        np.testing.assert_allclose(values, values[0])

    @pytest.mark.parametrize(("experts", "options"), [(3, {"common": 1.0}), (1, {})])
    def test_without_specific_directions_it_is_iso_c(
        self, experts: int, options: dict[str, float]
    ) -> None:
        deltas = [draw(8, 6, seed=k) for k in range(experts)]
        expected = merged_delta(deltas, "iso_c")
        np.testing.assert_allclose(merged_delta(deltas, "iso_cts", **options), expected, atol=1e-10)

    def test_low_rank_experts_keep_their_directions(self) -> None:
        deltas = [draw(20, 1, seed=k) @ draw(1, 20, seed=10 + k) for k in range(3)]
        values = spectrum(merged_delta(deltas, "iso_cts"))
        np.testing.assert_allclose(
            values[:3], spectrum(sum(delta.numpy() for delta in deltas)).sum() / 3
        )
        assert values[3] < 1e-9

    @pytest.mark.parametrize(
        ("total", "experts", "common", "expected"),
        [
            (768, 8, 0.8, (616, 19)),  # 768 − 614 = 154 = 19 · 8 + 2
            (10, 4, 0.8, (10, 0)),  # 2 / 4 is rounded to even
            (3, 5, 0.1, (3, 0)),  # 3 / 5 would be rounded to more than there are
            (100, 1, 0.29, (29, 71)),  # not 28, although 0.29 · 100 < 29 in floating point
        ],
    )
    def test_numbers_of_directions(
        self, total: int, experts: int, common: float, expected: tuple[int, int]
    ) -> None:
        assert directions_of(total, experts, common) == expected

    def test_one_coefficient_for_all_experts(self) -> None:
        with pytest.raises(RecipeError, match="expected one number or 1, received 2"):
            merged_delta([draw(4, 4, seed=k) for k in range(2)], "iso_cts", coefficients=[0.5, 0.5])
