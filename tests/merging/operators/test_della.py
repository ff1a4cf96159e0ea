"""DELLA: chances that rise with the rank, right on average, DARE when they are all equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import RecipeError, merge
from mergesearch.merging.operators import della
from mergesearch.merging.operators.della import keep_probabilities
from mergesearch.merging.operators.parts.masks import keep_mask, mask_key

State = dict[str, torch.Tensor]


def task_vectors(experts: int = 3) -> dict[str, State]:
    generator = torch.Generator().manual_seed(0)
    shapes: Mapping[str, tuple[int, ...]] = {
        "w": (7, 15),
        "conv": (3, 2, 2, 2),
        "column": (9, 1),
        "norm": (8,),
    }
    return {
        f"expert {k}": {
            name: torch.randn(shape, generator=generator) for name, shape in shapes.items()
        }
        for k in range(experts)
    }


def merged(
    vectors: Mapping[str, State],
    coefficients: Any = 1.0,
    operator: str = "della",
    /,
    **options: Any,
) -> State:
    base = {name: torch.zeros_like(tensor) for name, tensor in next(iter(vectors.values())).items()}
    return merge(base, dict(vectors), operator=operator, coefficients=coefficients, **options)


def chances(vector: torch.Tensor, density: float, epsilon: float) -> np.ndarray:
    """The formula, row by row, in plain loops."""
    rows = np.abs(vector.double().numpy().reshape(len(vector) if vector.ndim > 1 else 1, -1))
    probabilities = np.empty_like(rows)
    for row, own in zip(rows, probabilities, strict=True):
        n = len(row)
        for rank, i in enumerate(sorted(range(n), key=lambda i: (row[i], i))):
            own[i] = (density - epsilon) + (rank / (n - 1) * 2 * epsilon if n > 1 else epsilon)
    return probabilities.reshape(vector.shape)


@pytest.mark.parametrize("shape", [(7, 15), (1, 9), (9, 1), (11,), (3, 2, 2, 2), (1,)])
def test_chances_follow_the_rank_in_the_row(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = torch.randint(
        -4, 5, shape, generator=torch.Generator().manual_seed(1)
    ).float()  # with ties
    keep = keep_probabilities(vector, 0.6, 0.25)
    np.testing.assert_allclose(keep.numpy(), chances(vector, 0.6, 0.25), rtol=1e-12)
    rows = keep.reshape(shape[0] if len(shape) > 1 else 1, -1)
    assert torch.allclose(rows.mean(dim=1), torch.tensor(0.6, dtype=torch.float64))
    monkeypatch.setattr(della, "BLOCK", 20)
    assert torch.equal(keep_probabilities(vector, 0.6, 0.25), keep)


def test_larger_changes_are_never_less_likely_kept() -> None:
    vector = torch.randn(1, 200, generator=torch.Generator().manual_seed(2))
    order = vector.abs().argsort()
    assert bool((keep_probabilities(vector, 0.5, 0.4)[0][order[0]].diff() > 0).all())


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7, 0.9, 1.0, 1 / 3])
@pytest.mark.parametrize("rescale", ["inverse_prob", "l1"])
def test_without_a_window_it_is_dare_bit_for_bit(density: float, rescale: str) -> None:
    vectors = task_vectors()
    options = {"rescale": rescale, "seed": 5, "vectors": "drop"}
    for name, operator in (("dare", "della_linear"), ("dare_ties", "della")):
        one = merged(vectors, [0.3, 0.5, 0.2], operator, density=density, epsilon=0.0, **options)
        other = merged(vectors, [0.3, 0.5, 0.2], name, drop=1 - density, **options)
        assert all(one[key].numpy().tobytes() == other[key].numpy().tobytes() for key in one)


def test_equal_chances_for_each_element_are_one_chance_for_all() -> None:
    from mergesearch.merging.operators.dare import survivors

    vector = torch.randn(40, 50, generator=torch.Generator().manual_seed(3))
    each = torch.full((40, 50), 0.3, dtype=torch.float64)
    results = [survivors(vector.clone(), 0, "e", "w", keep, "inverse_prob") for keep in (0.3, each)]
    assert torch.equal(*results)


@pytest.mark.parametrize("rescale", ["inverse_prob", "l1", "l2", "none"])
@pytest.mark.parametrize("shape", [(7, 15), (40, 1), (9,), (3, 2, 2, 2), (1, 1), (5, 300)])
def test_ranked_rows_have_the_bits_of_chances_for_each_element(
    shape: tuple[int, ...], rescale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergesearch.merging.kernels.chunks import ranking
    from mergesearch.merging.operators.dare import survivors

    monkeypatch.setattr(ranking, "BLOCK", 60)
    generator = torch.Generator().manual_seed(4)
    vector = torch.randint(-5, 6, shape, generator=generator).float()  # with ties, and −0
    vector[vector == 1] = -0.0
    keep = keep_probabilities(vector, 0.6, 0.3)
    expected = survivors(vector.clone(), 0, "e", "w", keep, rescale)
    length = vector.numel() // (len(vector) if vector.ndim > 1 else 1)
    by_rank = della.keep_by_rank(length, 0.6, 0.3)
    ranked = della.ranked_survivors(vector.clone(), mask_key(0, "e", "w"), by_rank, rescale)
    assert ranked.numpy().tobytes() == expected.numpy().tobytes()


def survivors_of(vector: torch.Tensor, expert: str, name: str) -> np.ndarray:
    keep = chances(vector, 0.5, 0.3)
    mask = keep_mask(2, expert, name, vector.shape, torch.from_numpy(keep)).numpy()
    return mask * vector.double().numpy() / keep


def test_divides_every_survivor_by_its_own_chance_then_elects() -> None:
    vectors = task_vectors(4)
    added = merged(vectors, 1.0, "della_linear", density=0.5, epsilon=0.3, seed=2)
    elected = merged(vectors, density=0.5, epsilon=0.3, seed=2)
    for name in ("w", "conv", "column"):
        thin = np.stack(
            [survivors_of(vector[name], expert, name) for expert, vector in vectors.items()]
        )
        np.testing.assert_allclose(added[name].numpy(), thin.sum(axis=0), rtol=1e-5, atol=1e-5)
        agreeing = np.where(np.sign(thin) == np.sign(thin.sum(axis=0)), thin, 0)
        mean = agreeing.sum(axis=0) / np.maximum((agreeing != 0).sum(axis=0), 1)
        np.testing.assert_allclose(elected[name].numpy(), mean, rtol=1e-5, atol=1e-5)
    norms = torch.stack([vector["norm"] for vector in vectors.values()])
    assert torch.allclose(added["norm"], norms.sum(dim=0))


def test_is_right_on_average() -> None:
    vectors = {"e": {"w": torch.linspace(-2, 2, 40).reshape(8, 5)}}
    runs = [
        merged(vectors, 1.0, "della_linear", density=0.5, epsilon=0.3, seed=seed)["w"]
        for seed in range(200)
    ]
    keep = keep_probabilities(vectors["e"]["w"], 0.5, 0.3)
    spread = vectors["e"]["w"].abs() * ((1 - keep) / keep / 200).sqrt()
    assert bool(((torch.stack(runs).mean(0) - vectors["e"]["w"]).abs() <= 5 * spread + 1e-6).all())


@pytest.mark.parametrize(
    ("operator", "options", "message"),
    [
        (
            "della",
            {"density": 0.1, "epsilon": 0.15},
            "0 < density - epsilon .*; take an epsilon of at most 0.1$",
        ),
        (
            "della",
            {"density": 0.5, "epsilon": 0.499, "merge": "weighted_mean"},
            "merge 'weighted_mean' expects",
        ),
        (
            "della_linear",
            {"density": 0.95},
            "operator della_linear: .*<= 1, received density 0.95 and epsilon 0.07",
        ),
        ("della_linear", {"density": 70}, r"a fraction in \(0, 1\]"),
        ("della_linear", {"density": 0.2, "epsilon": 0.2}, "0 < density - epsilon"),
    ],
)
def test_refuses(operator: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        merged(task_vectors(), 1.0, operator, **options)


def test_the_widest_window_is_allowed() -> None:
    result = merged(task_vectors(1), density=0.9, epsilon=0.1)
    largest = task_vectors(1)["expert 0"]["w"].abs().argmax(dim=1, keepdim=True)
    assert bool((result["w"].gather(1, largest) != 0).all())  # chance 1
