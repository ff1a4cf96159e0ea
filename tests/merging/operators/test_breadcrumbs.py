"""Breadcrumbs: neither outliers nor noise, by row and by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import RecipeError, merge
from mergesearch.merging.operators import breadcrumbs

State = dict[str, torch.Tensor]
SHAPES: dict[str, tuple[int, ...]] = {
    "w": (7, 15),
    "conv": (3, 2, 4, 5),
    "column": (9, 1),
    "norm": (8,),
    "scale": (),
}


def task_vectors(experts: int = 3) -> list[State]:
    """With ties: whole multiples of 1/4."""
    generator = torch.Generator().manual_seed(0)
    return [
        {n: torch.randint(-6, 7, s, generator=generator) / 4 for n, s in SHAPES.items()}
        for _ in range(experts)
    ]


def merged(
    vectors: Sequence[State],
    coefficients: Any = 1.0,
    operator: str = "breadcrumbs",
    /,
    **options: Any,
) -> State:
    base = {name: torch.zeros_like(tensor) for name, tensor in vectors[0].items()}
    return merge(base, vectors, operator=operator, coefficients=coefficients, **options)


def between(vector: torch.Tensor, density: str, gamma: str, scope: str) -> torch.Tensor:
    """Row by row with a plain sort; numbers of elements in exact decimals."""
    rows = (
        vector.double().numpy().reshape(-1, vector.shape[-1] if scope == "row" else vector.numel())
    )
    kept = np.zeros_like(rows)
    n = rows.shape[1]
    first = math.floor(Fraction(gamma) * n)
    for row, kept_row in zip(rows, kept, strict=True):
        chosen = np.argsort(-np.abs(row), kind="stable")[
            first : first + math.ceil(Fraction(density) * n)
        ]
        kept_row[chosen] = row[chosen]
    return torch.from_numpy(kept).reshape(vector.shape)


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize(
    ("density", "gamma"), [("0.2", "0.1"), ("0.4", "0.2"), ("0.9", "0.01"), ("0.07", "0.93")]
)
def test_keeps_what_lies_between(
    density: str, gamma: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = task_vectors()
    options = {"density": float(density), "gamma": float(gamma), "scope": scope, "vectors": "trim"}
    result = merged(vectors, [1.0, 0.5, -2.0], **options)
    for name in SHAPES:
        if name == "scale":
            continue
        one, two, three = (between(vector[name], density, gamma, scope) for vector in vectors)
        assert torch.equal(result[name].double(), one + 0.5 * two - 2 * three)
    monkeypatch.setattr(breadcrumbs, "BLOCK", 20)
    assert all(
        torch.equal(t, result[name])
        for name, t in merged(vectors, [1.0, 0.5, -2.0], **options).items()
    )


@pytest.mark.parametrize("shape", [(7, 15), (40, 1), (9,), (3, 2, 4, 5)])
def test_ranked_rows_have_the_bits_of_sorted_ones(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(4)) / 4
    ranked = breadcrumbs.keep_between(vector.clone(), 0.4, 0.2, "row")
    monkeypatch.setattr(breadcrumbs, "host_fp32", lambda _tensor: None)
    expected = breadcrumbs.keep_between(vector.clone(), 0.4, 0.2, "row")
    assert ranked.numpy().tobytes() == expected.numpy().tobytes()


def test_scopes_differ_but_agree_on_a_single_row() -> None:
    vectors = [{"w": vector["w"][:1]} for vector in task_vectors()]
    assert torch.equal(merged(vectors, scope="row")["w"], merged(vectors, scope="tensor")["w"])
    whole = task_vectors()
    assert not torch.equal(merged(whole, scope="row")["w"], merged(whole, scope="tensor")["w"])


def test_everything_kept_is_task_arithmetic() -> None:
    vectors = task_vectors()
    for scope in ("row", "tensor"):
        result = merged(vectors, [0.3, 0.5, 0.1], density=1.0, gamma=0.0, scope=scope)
        plain = merged(vectors, [0.3, 0.5, 0.1], "task_arithmetic")
        assert all(torch.equal(result[name], plain[name]) for name in plain)


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_tensors_with_too_few_elements_for_an_outlier_are_not_emptied(scope: str) -> None:
    vectors = [
        {
            "w": torch.tensor([[3.0], [-1.0]]),
            "one": torch.tensor([[2.0]]),
            "none": torch.zeros(2, 0),
        }
    ]
    result = merged(vectors, density=0.5, gamma=0.01, scope=scope)
    assert result["one"].tolist() == [[2.0]]
    assert result["w"].tolist() == ([[3.0], [-1.0]] if scope == "row" else [[3.0], [0.0]])


def test_vectors_pass_unless_asked_and_scalars_always() -> None:
    vectors = task_vectors(1)
    passed = merged(vectors)
    trimmed = merged(vectors, vectors="trim")
    assert torch.equal(passed["norm"], vectors[0]["norm"])
    assert int((trimmed["norm"] != 0).sum()) <= 2
    assert torch.equal(trimmed["scale"], vectors[0]["scale"])


def test_electing_is_ties_on_what_was_kept() -> None:
    vectors = task_vectors()
    kept = [
        {n: between(t, "0.4", "0.1", "row").float() if t.ndim > 1 else t for n, t in vector.items()}
        for vector in vectors
    ]
    one = merged(vectors, [1.0, 0.5, 0.3], density=0.4, gamma=0.1, elect=True)
    other = merged(kept, [1.0, 0.5, 0.3], "ties", density=1.0)
    assert all(torch.equal(one[name], other[name]) for name in SHAPES)


def test_works_on_transposed_weights() -> None:
    base = {"w": torch.zeros(5, 8).T}
    expert = {"w": torch.arange(40.0).reshape(5, 8).T}
    result = merge(base, [expert], operator="breadcrumbs", coefficients=1.0, density=0.4, gamma=0.2)
    assert torch.equal(result["w"].double(), between(expert["w"].contiguous(), "0.4", "0.2", "row"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.95}, "density [+] gamma <= 1, received density 0.95 and gamma 0.1"),
        ({"density": 20}, r"a fraction in \(0, 1\]"),
        ({"gamma": 1.0}, "'gamma': .*less than 1"),
        ({"elect": "yes"}, "'elect': .*received 'yes'"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        merged(task_vectors(), **options)


def test_decimals_that_add_up_to_one_are_allowed() -> None:
    merged(task_vectors(1), density=0.9, gamma=0.1)
    merged(task_vectors(1), density=0.7, gamma=0.3)
