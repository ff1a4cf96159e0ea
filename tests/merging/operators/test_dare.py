"""DARE: masks by name, right on average, and the two ways to merge what survives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import CheckpointError, Field, Layout, RecipeError, merge
from mergesearch.merging.in_memory import (
    MappingSource,
    merge_tensor,
    merge_wide,
    prepared_merge,
)
from mergesearch.merging.operators import get_operator
from mergesearch.merging.operators.parts.masks import keep_mask

State = dict[str, torch.Tensor]


def task_vectors(experts: int = 3) -> dict[str, State]:
    generator = torch.Generator().manual_seed(0)
    shapes: Mapping[str, tuple[int, ...]] = {
        "w": (20, 15),
        "conv": (3, 2, 2, 2),
        "norm": (8,),
        "scale": (),
    }
    return {
        f"expert {k}": {
            name: torch.randn(shape, generator=generator) for name, shape in shapes.items()
        }
        for k in range(experts)
    }


def merged(
    vectors: Mapping[str, State], coefficients: Any = 1.0, operator: str = "dare", /, **options: Any
) -> State:
    base = {name: torch.zeros_like(tensor) for name, tensor in next(iter(vectors.values())).items()}
    return merge(base, dict(vectors), operator=operator, coefficients=coefficients, **options)


def masked(vectors: Mapping[str, State], name: str, drop: float, seed: int = 0) -> np.ndarray:
    """``(K, ...)``: survivors divided by their probability, in fp64."""
    masks = [
        keep_mask(seed, expert, name, vector[name].shape, 1 - drop)
        for expert, vector in vectors.items()
    ]
    return np.stack(
        [m.numpy() * v[name].double().numpy() for m, v in zip(masks, vectors.values(), strict=True)]
    ) / (1 - drop)


@pytest.mark.parametrize("drop", [0.3, 0.5, 0.9])
def test_adds_up_survivors_over_their_probability(drop: float) -> None:
    vectors = task_vectors()
    result = merged(vectors, [0.3, -0.2, 1.0], drop=drop, seed=4)
    for name in ("w", "conv"):
        expected = np.tensordot([0.3, -0.2, 1.0], masked(vectors, name, drop, 4), axes=1)
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_is_right_on_average() -> None:
    vectors = {"e": {"w": torch.linspace(-2, 2, 40).reshape(8, 5)}}
    runs = torch.stack([merged(vectors, drop=0.5, seed=seed)["w"] for seed in range(200)])
    # Each survivor is ± |τ| around τ: the mean of 200 has standard deviation |τ| / 14.
    assert bool(
        ((runs.mean(0) - vectors["e"]["w"]).abs() <= 5 * vectors["e"]["w"].abs() / 14 + 1e-6).all()
    )


@pytest.mark.parametrize(("rescale", "order"), [("l1", 1), ("l2", 2)])
def test_restores_the_norm_of_every_tensor(rescale: str, order: int) -> None:
    vectors = task_vectors(1)
    kept, raw = (merged(vectors, drop=0.8, rescale=rule) for rule in (rescale, "none"))
    for name in ("w", "conv"):
        before = vectors["expert 0"][name].double()
        after = kept[name].double()
        bare = raw[name].double()
        torch.testing.assert_close(
            torch.linalg.vector_norm(after, order),
            torch.linalg.vector_norm(before, order),
            rtol=1e-6,
            atol=0,
        )
        assert torch.equal(after != 0, bare != 0)
        assert torch.equal(bare[bare != 0], before[bare != 0])


def test_no_drop_is_task_arithmetic_bit_for_bit() -> None:
    vectors = task_vectors()
    plain = merged(vectors, [0.3, 0.5, 0.1], "task_arithmetic")
    assert all(
        torch.equal(merged(vectors, [0.3, 0.5, 0.1], drop=0.0)[name], plain[name]) for name in plain
    )


def test_masks_go_by_names_alone() -> None:
    vectors = task_vectors()
    alone = merged({"expert 2": {"w": vectors["expert 2"]["w"]}}, seed=1)["w"]
    among = merged(vectors, [0.0, 0.0, 1.0], seed=1)["w"]
    assert torch.equal(alone, among)
    assert not torch.equal(alone, merged({"renamed": {"w": vectors["expert 2"]["w"]}}, seed=1)["w"])
    assert not torch.equal(
        alone, merged({"expert 2": {"w": vectors["expert 2"]["w"]}}, seed=2)["w"]
    )


def test_wider_dtypes_get_the_same_masks() -> None:
    vectors = task_vectors()
    wide = {
        expert: {name: t.double() for name, t in vector.items()}
        for expert, vector in vectors.items()
    }
    one = merged(vectors)
    other = merged(wide)
    assert all(
        torch.allclose(one[name].double(), other[name], rtol=1e-6, atol=1e-6) for name in one
    )
    assert other["w"].dtype == torch.float64


def test_norms_pass_unless_asked_and_scalars_always() -> None:
    vectors = task_vectors(1)
    passed, thinned = (merged(vectors, drop=0.5, vectors=choice) for choice in ("pass", "drop"))
    assert torch.equal(passed["norm"], vectors["expert 0"]["norm"])
    np.testing.assert_allclose(thinned["norm"].numpy(), masked(vectors, "norm", 0.5)[0], rtol=1e-6)
    assert 0 < int((thinned["norm"] == 0).sum()) < 8
    assert torch.equal(passed["scale"], thinned["scale"])


@pytest.mark.parametrize("rule", ["mean", "sum"])
def test_elects_among_survivors(rule: str) -> None:
    vectors = task_vectors(4)
    result = merged(vectors, 1.0, "dare_ties", drop=0.4, merge=rule)
    for name in ("w", "conv"):
        thin = masked(vectors, name, 0.4)
        agreeing = np.where(np.sign(thin) == np.sign(thin.sum(axis=0)), thin, 0)
        count = np.maximum((agreeing != 0).sum(axis=0), 1)
        expected = agreeing.sum(axis=0) / (count if rule == "mean" else 1)
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_election_without_drop_is_ties_without_trim() -> None:
    vectors = task_vectors()
    for options in ({}, {"merge": "sum"}, {"mode": "live", "merge": "weighted_mean"}):
        one = merged(vectors, [1.0, 0.5, 0.2], "dare_ties", drop=0.0, **options)
        other = merged(vectors, [1.0, 0.5, 0.2], "ties", density=1.0, **options)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_survives_in_a_tensor() -> None:
    vectors = {"e": {"w": torch.full((1, 1), 3.0)}}
    results = [
        merged(vectors, drop=0.5, seed=seed, rescale=rule)
        for seed in range(8)
        for rule in ("l1", "l2")
    ]
    assert {float(result["w"]) for result in results} == {0.0, 3.0}
    assert float(merged({"e": {"w": torch.zeros(2, 2)}}, rescale="l1")["w"].abs().sum()) == 0


@pytest.mark.parametrize(
    ("operator", "options", "message"),
    [
        ("dare", {"drop": 1.0}, "'drop': .*less than 1, received 1.0"),
        ("dare", {"drop": -0.1}, "'drop': .*greater than or equal to 0"),
        ("dare", {"seed": -1}, "'seed': .*received -1"),
        ("dare", {"rescale": "true"}, "'rescale': .*received 'true'"),
        (
            "dare_ties",
            {"merge": "weighted_mean"},
            "operator dare_ties: merge 'weighted_mean' expects mode 'live'",
        ),
    ],
)
def test_refuses(operator: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        merged(task_vectors(), 1.0, operator, **options)


def test_does_not_hide_what_is_not_finite() -> None:
    vectors = task_vectors()
    vectors["expert 1"]["w"][3, 4] = float("inf")
    with pytest.raises(
        CheckpointError, match="expert 'expert 1': tensor 'w': expected finite numbers"
    ):
        merged(vectors, drop=0.9)


def trimmed_after_dropping(
    vectors: Mapping[str, State], drop: float, density: float
) -> dict[str, np.ndarray]:
    """``(K, ...)`` by name: survivors of DARE, of which the largest of the model are kept."""
    kept = {name: masked(vectors, name, drop) for name in ("w", "conv")}
    for k in range(len(vectors)):
        flat = np.sort(np.abs(np.concatenate([array[k].ravel() for array in kept.values()])))[::-1]
        limit = flat[int(np.ceil(density * flat.size)) - 1]
        for array in kept.values():
            array[k][np.abs(array[k]) < limit] = 0
    return kept


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_trims_what_dropping_leaves_over_the_whole_model(density: float) -> None:
    vectors = task_vectors()
    result = merged(vectors, drop=0.5, density=density)
    for name, kept in trimmed_after_dropping(vectors, 0.5, density).items():
        np.testing.assert_allclose(result[name].numpy(), kept.sum(0), rtol=1e-5, atol=1e-6)
    for name in ("norm", "scale"):
        expected = torch.stack([vector[name] for vector in vectors.values()]).sum(0)
        torch.testing.assert_close(result[name], expected)


def test_ties_elects_among_what_trimming_after_dropping_leaves() -> None:
    vectors = task_vectors()
    result = merged(vectors, 1.0, "dare_ties", drop=0.5, density=0.2)
    for name, kept in trimmed_after_dropping(vectors, 0.5, 0.2).items():
        agreeing = (np.sign(kept) == np.sign(kept.sum(0))) & (kept != 0)
        expected = (kept * agreeing).sum(0) / agreeing.sum(0).clip(1)
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operator", ["dare", "dare_ties"])
@pytest.mark.parametrize("density", [1.0, 0.6])
def test_trimming_what_is_dropped_already_changes_nothing(operator: str, density: float) -> None:
    vectors = task_vectors()
    plain = merged(vectors, 1.0, operator, drop=0.5)
    trimmed = merged(vectors, 1.0, operator, drop=0.5, density=density)
    assert all(torch.equal(plain[name], trimmed[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", ["dare", "dare_ties"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vectors": "drop", "drop": 0.5},
        {"density": 0.2, "drop": 0.3},
        {"drop": 0.0},
        {"drop": 0.5, "rescale": "l1"},
        {"drop": 0.5, "rescale": "l2", "density": 0.3},
    ],
)
def test_merging_what_is_stored_gives_the_bits_of_the_rows(
    dtype: torch.dtype, operator: str, options: dict[str, Any]
) -> None:
    vectors = task_vectors()
    base = {name: torch.full_like(tensor, 0.5) for name, tensor in vectors["expert 0"].items()}
    base = {name: tensor.to(dtype) for name, tensor in base.items()}
    experts = {
        name: {n: (base[n].float() + t.mul(8).round() / 8).to(dtype) for n, t in vector.items()}
        for name, vector in vectors.items()
    }
    layout = Layout.build(
        {n: (tuple(t.shape), str(dtype).removeprefix("torch.")) for n, t in base.items()}
    )
    field = Field.constant(layout.size, [0.3, -0.2, 1.0])
    sources = [
        MappingSource(name, state, layout.names)
        for name, state in {"base": base, **experts}.items()
    ]
    full = get_operator(operator).complete(options)
    merge = prepared_merge(sources[0], sources[1:], operator, full, field, layout)
    assert merge.basis.direct is not None
    for spec in layout.tensors:
        merged, _ = merge_tensor(merge, spec, spec.dtype)
        assert torch.equal(merged, merge_wide(merge, spec).to(dtype)), spec.name
