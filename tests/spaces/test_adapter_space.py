"""The space of adapters: what to keep of each, and how far to add it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from mergesearch.merging import Field, InputError, Layout, Recipe, RecipeError, Source
from mergesearch.merging.in_memory import MappingSource, merge_stream
from mergesearch.merging.operators import get_operator
from mergesearch.spaces import AdapterSpace, adapter_space
from tests.merging.operators.adapted import Adapted

SHAPES = {"h.0.fc.weight": (30, 20), "h.0.norm.weight": (8,)}
LAYOUT = Layout.build({name: (shape, "float32") for name, shape in SHAPES.items()})


def template(adapters: int = 3, operator: str = "lora_sparse", **options: object) -> Recipe:
    sources = tuple(Source(f"a{index}", f"a{index}") for index in range(adapters))
    field = Field.constant(LAYOUT.size, np.zeros(adapters))
    return Recipe(Source("base", "base"), sources, operator, field, tuple(sorted(options.items())))


@pytest.fixture
def space() -> AdapterSpace:
    return adapter_space(template(), LAYOUT)


def test_keeps_come_first_then_scales(space: AdapterSpace) -> None:
    assert space.names == ("a0/keep", "a1/keep", "a2/keep", "a0/scale", "a1/scale", "a2/scale")
    assert space.lower.tolist() == [0.0] * 3 + [-1.5] * 3
    assert space.upper.tolist() == [1.0] * 3 + [1.5] * 3
    assert space.start.tolist() == [1.0] * 3 + [1 / 3] * 3
    assert sum(row.coefficients for row in space.table()) == 6
    assert sum(row.parameters for row in space.table()) == LAYOUT.parameters


def test_decodes_to_sparsities_and_a_constant_field(space: AdapterSpace) -> None:
    recipe = space.decode(np.array([1.0, 0.25, 0.6, 0.5, -1.2, 0.0]))
    assert recipe.options == {"sparsity": [0.0, 0.75, 0.4]}
    assert recipe.field == Field.constant(LAYOUT.size, [0.5, -1.2, 0.0])
    assert recipe.experts == template().experts


def test_what_the_operator_cannot_prune_is_clipped(space: AdapterSpace) -> None:
    recipe = space.decode(np.array([0.0, 0.049, 0.05, 0.1, 0.1, 0.1]))
    assert recipe.options == {"sparsity": [0.95] * 3}
    assert space.decode(np.array([1.1, 1, 1, 0, 0, 0])).options == {"sparsity": [0.0] * 3}


def test_every_coordinate_matters(space: AdapterSpace) -> None:
    point = np.array([0.5, 0.5, 0.5, 0.1, 0.1, 0.1])
    for index in range(6):
        moved = point.copy()
        moved[index] += 0.01
        assert space.decode(moved).digest != space.decode(point).digest


def test_the_merge_is_the_sum_of_pruned_products(space: AdapterSpace) -> None:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    model = {name: draw(shape) for name, shape in SHAPES.items()}
    base = MappingSource("base", model, tuple(model))
    pairs = [(draw((30, 4)), draw((4, 20))) for _ in range(3)]
    experts = [Adapted(base, {"h.0.fc.weight": pair}) for pair in pairs]
    recipe = space.decode(np.array([1.0, 0.3, 0.6, 0.5, -1.2, 0.25]))
    merged = dict(
        merge_stream(base, experts, recipe.operator, recipe.options, recipe.field, LAYOUT)
    )
    expected = model["h.0.fc.weight"].double()
    for (b, a), keep, scale in zip(pairs, (1.0, 0.3, 0.6), (0.5, -1.2, 0.25), strict=True):
        least = a.abs().flatten().sort(descending=True).values[round(keep * a.numel()) - 1]
        expected = expected + scale * b.double() @ (a * (a.abs() >= least)).double()
    torch.testing.assert_close(merged["h.0.fc.weight"].double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(merged["h.0.norm.weight"], model["h.0.norm.weight"])


def test_encode_keeps_what_the_template_keeps() -> None:
    space = adapter_space(template(sparsity=[0.1, 0.2, 0.7]), LAYOUT)
    recipe = template(sparsity=[0.1, 0.2, 0.7]).with_field(
        Field.constant(LAYOUT.size, [0.3, -0.4, 2.0])
    )
    point = space.encode(recipe.field)
    assert point.tolist() == [0.9, 0.8, 0.3, 0.3, -0.4, 2.0]
    assert space.field(point) == recipe.field
    np.testing.assert_allclose(
        space.decode(point).options["sparsity"], [0.1, 0.2, 0.7], rtol=0, atol=1e-15
    )


def test_encode_reads_constant_fields_only(space: AdapterSpace) -> None:
    varying = Field(np.array([0, 64, LAYOUT.size]), np.array([[0.1, 0.2]] * 3))
    assert space.encode(varying) is None
    assert space.encode(Field.constant(LAYOUT.size, [0.1, 0.2])) is None


def test_refine_and_summaries(space: AdapterSpace) -> None:
    point = np.array([0.5, 0.5, 0.5, 0.1, 0.1, 0.1])
    assert np.array_equal(space.refine(point, adapter_space(template(), LAYOUT)), point)
    with pytest.raises(RecipeError, match="cannot hold a point"):
        space.refine(point, adapter_space(template(2), LAYOUT))
    assert space.summary(point) == dict(zip(space.names, point, strict=True))
    assert tuple(space.summary_of(space.field(point))) == tuple(space.summary(point))
    large = adapter_space(template(20), LAYOUT)
    assert len(large.summary(large.start)) == 16
    assert large.summary(large.start)["keep"] == 1.0
    assert large.summary_of(large.field(large.start))["keep"] == 0.5


def test_refuses_other_operators() -> None:
    with pytest.raises(InputError, match="expects 'lora_sparse', received 'ties'"):
        adapter_space(template(operator="ties"), LAYOUT)


def test_recipes_of_the_space_are_valid() -> None:
    rng = np.random.default_rng(0)
    space = adapter_space(template(), LAYOUT)
    operator = get_operator("lora_sparse")
    for _ in range(20):
        recipe = space.decode(rng.uniform(space.lower, space.upper))
        operator.check(LAYOUT, 3, recipe.options)
        assert Recipe.from_dict(recipe.to_dict()).digest == recipe.digest
