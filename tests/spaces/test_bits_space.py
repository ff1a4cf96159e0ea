"""Bits of layers: the budget holds everywhere, scores order layers, and sections are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergesearch.merging import Field, InputError, Layout, Recipe, RecipeError, Source
from mergesearch.merging.models.layer_bits import bit_layers, mean_bits
from mergesearch.spaces.bits_space import BitsSpace
from mergesearch.spaces.parts.bit_allocation import allocate_bits, ranked_scores
from mergesearch.spaces.spec import SpaceSpec, build_space

BLOCKS = 4
SHAPES: dict[str, tuple[int, ...]] = {
    **{
        f"model.layers.{block}.{name}": shape
        for block in range(BLOCKS)
        for name, shape in {
            "self_attn.q_proj.weight": (4, 4),
            "mlp.up_proj.weight": (8 * (1 + block % 2), 4),
            "input_layernorm.weight": (4,),
        }.items()
    },
    "model.embed_tokens.weight": (9, 4),
    "lm_head.weight": (9, 4),
}
LAYOUT = Layout.build({name: (shape, "float32") for name, shape in SHAPES.items()})


def make(importance: Any = None, **bits: Any) -> BitsSpace:
    template = Recipe(
        Source("base", "base"),
        (Source("one", "one"), Source("two", "two")),
        "task_arithmetic",
        Field.constant(LAYOUT.size, [0.0, 0.0]),
    )
    space = build_space(
        SpaceSpec(granularity="task", bits={"mean": 4.0, **bits}),
        template,
        LAYOUT,
        default_bounds=(0.0, 1.0),
        default_start=0.4,
        importance=importance,
    )
    assert isinstance(space, BitsSpace)
    return space


def by_offset(scores: Any, sizes: Any, choices: Any, mean: float) -> list[int]:
    """The most bits that one common offset gives within the budget, by trying all offsets."""
    best = [choices[0]] * len(sizes)
    for offset in np.arange(-30, 30, 0.005):
        distance = np.abs(np.asarray(choices)[:, None] - (scores + offset)[None, :])
        bits = np.asarray(choices)[distance.argmin(axis=0)].tolist()
        if np.dot(bits, sizes) <= mean * sum(sizes) and sum(bits) > sum(best):
            best = bits
    return best


def test_one_offset_decides_where_all_layers_are_of_one_size() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        scores = rng.uniform(-6, 6, 5)
        # All rises cost the same where choices are evenly spaced, so none is passed over.
        received = allocate_bits(scores, [7] * 5, (2, 4, 6), 3.7).tolist()
        assert received == by_offset(scores, [7] * 5, (2, 4, 6), 3.7)


def test_the_budget_holds_and_is_spent_as_far_as_it_goes() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        count = int(rng.integers(1, 9))
        sizes = rng.integers(1, 50, count).tolist()
        mean = float(rng.uniform(2, 8))
        bits = allocate_bits(rng.normal(size=count) * 4, sizes, (2, 3, 8), mean)
        left = mean * sum(sizes) - float(np.dot(bits, sizes))
        assert left >= -1e-6
        steps = {2: 1, 3: 5}
        assert all(
            steps[width] * size > left - 1e-6
            for width, size in zip(bits.tolist(), sizes, strict=True)
            if width < 8
        )


def test_only_differences_of_scores_count_and_order_decides() -> None:
    scores = np.array([0.3, -1.2, 2.5, 0.9])
    bits = allocate_bits(scores, [3] * 4, (2, 4, 8), 4.0)
    np.testing.assert_array_equal(bits, allocate_bits(scores + 5.5, [3] * 4, (2, 4, 8), 4.0))
    assert np.all(np.diff(bits[np.argsort(scores)]) >= 0)
    assert allocate_bits(np.zeros(4), [3] * 4, (2, 4, 8), 4.0).tolist() == [4] * 4


def test_ranks_are_spread_over_the_choices() -> None:
    scores = ranked_scores(np.array([10.0, -3.0, 0.0]), (2, 8))
    np.testing.assert_allclose(scores, [3.0, -3.0, 0.0])
    np.testing.assert_allclose(ranked_scores(np.array([1.0, 1.0]), (2, 8)), [0.0, 0.0])


def test_layers_are_blocks_with_their_matrices() -> None:
    layers = bit_layers(LAYOUT)
    assert [layer.name for layer in layers] == [f"block {index}" for index in range(BLOCKS)]
    assert [layer.size for layer in layers] == [48, 80, 48, 80]
    assert not {name for layer in layers for name in layer.tensors if "norm" in name}
    with pytest.raises(InputError, match="expected numbered blocks"):
        bit_layers(Layout.build({"weight": ((3, 3), "float32")}))


def test_every_point_keeps_the_budget_and_a_recipe_says_its_bits() -> None:
    space = make(mean=3.5, choices=[8, 2, 3])
    assert space.names[:2] == ("one", "two")
    assert space.names[2:] == tuple(f"bits/block {index}" for index in range(BLOCKS))
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(30):
        recipe = space.decode(rng.uniform(space.lower, space.upper))
        assert mean_bits(space.layers, dict(recipe.bits)) <= 3.5
        assert set(dict(recipe.bits)) == {name for layer in space.layers for name in layer.tensors}
        seen.add(recipe.bits)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert len(seen) > 5
    one, *_ = seen
    start = space.decode(space.start)
    assert replace(start, bits=one).digest != replace(start, bits=()).digest
    assert replace(start, bits=one).basis_key == start.basis_key


def test_a_prior_is_where_the_search_begins() -> None:
    importance = [0.1, 0.4, 0.2, 0.3]
    listed = make(prior=importance, choices=[2, 8], mean=5.75)
    assert listed.bits(listed.start).tolist() == [2, 8, 2, 8]
    plain = make(choices=[2, 8], mean=5.75)
    assert plain.bits(plain.start).tolist() == [8, 8, 2, 2]
    measured = make(lambda bits: np.array(importance), prior="zd", choices=[2, 8], mean=5.75)
    np.testing.assert_array_equal(measured.prior, listed.prior)


def test_bits_alone_leave_the_coefficients_at_their_start() -> None:
    space = make(only=True)
    assert len(space.names) == BLOCKS
    point = np.array([6.0, -6.0, 0.0, 1.0])
    assert set(space.decode(point).field.values.ravel().tolist()) == {0.4}
    assert space.encode(space.field(point)) is not None
    assert space.encode(Field.constant(LAYOUT.size, [0.4, 0.5])) is None
    assert sum(row.coefficients for row in space.table()) == BLOCKS


def test_bits_cannot_be_refined_into_another_budget() -> None:
    space = make()
    point = np.linspace(-0.5, 0.5, len(space.names))
    np.testing.assert_allclose(space.refine(point, make()), point)
    with pytest.raises(RecipeError, match="cannot hold"):
        space.refine(point, make(mean=3.0))


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"choices": [4]}, "choices: expected two or more different ones"),
        ({"choices": [2, 2, 4]}, "choices: expected two or more different ones"),
        ({"choices": [2, 7]}, r"choices: .* received \[2, 7\]"),
        ({"mean": 9.0}, "mean: expected a number from 2 to 8"),
        ({"prior": [1.0, 2.0]}, "a list of 4 numbers, one for each layer"),
        ({"prior": "lim"}, "calibration: required key is missing"),
        (
            {"calibration": {"data": "x", "model_class": "AutoModel", "inputs": {"a": "b"}}},
            "calibration: only allowed with prior lim",
        ),
    ],
)
def test_what_a_section_cannot_say(bits: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**bits)
