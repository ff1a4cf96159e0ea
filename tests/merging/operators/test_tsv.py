"""TSV-Merge against the published formula in numpy, with low-rank and equal experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import RecipeError, merge

Array = np.ndarray[Any, np.dtype[np.float64]]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts_of(
    base: torch.Tensor, deltas: list[torch.Tensor], name: str = "w"
) -> list[dict[str, torch.Tensor]]:
    return [{name: base + delta} for delta in deltas]


def merged_delta(deltas: list[torch.Tensor], **options: Any) -> Array:
    base = torch.zeros_like(deltas[0])
    return merge({"w": base}, experts_of(base, deltas), operator="tsv", **options)["w"].numpy()


def orthogonal(matrix: Array) -> Array:
    p, _, q = np.linalg.svd(matrix, full_matrices=False)
    return p @ q


def published(deltas: list[Array], rank: int) -> Array:
    svds = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = orthogonal(np.concatenate([u[:, :rank] for u, _, _ in svds], axis=1))
    right = orthogonal(np.concatenate([v[:rank] for _, _, v in svds], axis=0))
    return left @ np.diag(np.concatenate([s[:rank] for _, s, _ in svds])) @ right


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize(("rank", "kept"), [("share", lambda s: s // 3), ("full", lambda s: s)])
def test_agrees_with_the_published_formula(shape: tuple[int, int], rank: str, kept: Any) -> None:
    deltas = [draw(*shape, seed=k) for k in range(3)]
    expected = published([delta.numpy() for delta in deltas], kept(min(shape)))
    np.testing.assert_allclose(merged_delta(deltas, rank=rank), expected, atol=1e-12)


def test_spectrum_is_the_union_of_the_kept_spectra() -> None:
    deltas = [draw(10, 8, seed=k) for k in range(3)]
    kept = np.concatenate([np.linalg.svd(delta.numpy())[1][:2] for delta in deltas])
    spectrum = np.linalg.svd(merged_delta(deltas))[1]
    np.testing.assert_allclose(spectrum, np.sort(np.append(kept, [0, 0]))[::-1], atol=1e-12)


def test_experts_orthogonal_to_each_other_are_added_up() -> None:
    one = torch.zeros(8, 8, dtype=torch.float64)
    other = torch.zeros(8, 8, dtype=torch.float64)
    one[:4, :4] = draw(4, 4, seed=1)
    other[4:, 4:] = draw(4, 4, seed=2)
    np.testing.assert_allclose(merged_delta([one, other]), (one + other).numpy(), atol=1e-12)


def test_copies_of_an_expert_merge_to_its_largest_singular_vectors() -> None:
    delta = draw(9, 6, seed=1)
    u, s, v = np.linalg.svd(delta.numpy(), full_matrices=False)
    np.testing.assert_allclose(
        merged_delta([delta] * 3), u[:, :2] @ np.diag(s[:2]) @ v[:2], atol=1e-12
    )


@pytest.mark.parametrize("rank", ["share", "full"])
def test_directions_that_an_expert_does_not_move_displace_nothing(rank: str) -> None:
    # Rank 1 and rank 0 beside a full one: their arbitrary null vectors must not be orthogonalised
    # against.
    low = torch.outer(draw(9, seed=1), draw(9, seed=2))
    unchanged = torch.zeros(9, 9, dtype=torch.float64)
    merged = merged_delta([draw(9, 9, seed=3), low, unchanged], rank=rank)
    full = merged_delta([draw(9, 9, seed=3), low], rank=rank)
    if rank == "full":
        np.testing.assert_allclose(merged, full, atol=1e-12)
    spectrum = np.linalg.svd(merged)[1]
    assert (spectrum > 1e-9).sum() == (4 if rank == "share" else 9)


def test_every_expert_keeps_a_coefficient() -> None:
    deltas = [draw(8, 8, seed=k) for k in range(2)]
    apart = [merged_delta(deltas, coefficients=[float(k == 0), float(k == 1)]) for k in range(2)]
    np.testing.assert_allclose(apart[0] + apart[1], merged_delta(deltas), atol=1e-12)
    assert abs(np.sum(apart[0] * apart[1])) < 1e-10  # what is left of them does not overlap


def test_the_thirds_of_a_fused_projection_are_merged_apart() -> None:
    name = "layers.0.attn.qkv.weight"
    deltas = [draw(12, 4, seed=k) for k in range(2)]
    base = torch.zeros(12, 4, dtype=torch.float64)
    fused = merge({name: base}, experts_of(base, deltas, name), operator="tsv")[name]
    apart = np.concatenate([merged_delta([d[4 * i : 4 * i + 4] for d in deltas]) for i in range(3)])
    np.testing.assert_allclose(fused.numpy(), apart, atol=1e-12)
    whole = merge({name: base}, experts_of(base, deltas, name), operator="tsv", fused="whole")[name]
    np.testing.assert_allclose(whole.numpy(), merged_delta(deltas), atol=1e-12)


class TestTooManyExperts:
    def test_a_matrix_without_a_singular_vector_for_each_is_refused(self) -> None:
        deltas = [draw(2, 6, seed=k) for k in range(3)]
        with pytest.raises(
            RecipeError, match=r"^operator tsv: tensor 'w': .* each of 3 experts, .*\(2, 6\) of 2; "
        ):
            merged_delta(deltas)
        np.testing.assert_allclose(
            merged_delta(deltas[:2]), published([d.numpy() for d in deltas[:2]], 1), atol=1e-12
        )

    def test_the_full_rank_needs_no_share(self) -> None:
        deltas = [draw(2, 6, seed=k) for k in range(3)]
        np.testing.assert_allclose(
            merged_delta(deltas, rank="full"), published([d.numpy() for d in deltas], 2), atol=1e-12
        )

    def test_a_narrow_head_can_be_left_out(self) -> None:
        base = {
            "layers.0.mlp.fc1.weight": draw(6, 6, seed=0),
            "classifier.weight": draw(2, 6, seed=1),
        }
        experts = [
            {name: t + draw(*t.shape, seed=k) for name, t in base.items()} for k in range(2, 5)
        ]
        with pytest.raises(RecipeError, match=r"tensor 'classifier.weight'.*matrices='blocks'"):
            merge(base, experts, operator="tsv")
        merged = merge(base, experts, operator="tsv", matrices="blocks")["classifier.weight"]
        mean = sum(expert["classifier.weight"] for expert in experts) / 3
        torch.testing.assert_close(merged, mean)
