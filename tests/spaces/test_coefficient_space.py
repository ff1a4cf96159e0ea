"""Decode, encode, refine, summaries and tables of spaces over real layouts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.merging import Field, Layout, Recipe, RecipeError, Source
from mergesearch.spaces import CoefficientSpace, classify
from mergesearch.spaces.spec import SpaceSpec, build_space

EXPERTS = ("rotated", "mirrored")


def make_space(
    layout: Layout, experts: tuple[str, ...] = EXPERTS, **section: Any
) -> CoefficientSpace:
    recipe = Recipe(
        base=Source("base", "zoo/base"),
        experts=tuple(Source(name, f"zoo/{name}") for name in experts),
        operator="task_arithmetic",
        field=Field.constant(layout.size, [0.3] * len(experts)),
        layout=layout.digest,
    )
    space = build_space(
        SpaceSpec(**section), recipe, layout, default_bounds=(0.0, 1.0), default_start=0.3
    )
    assert isinstance(space, CoefficientSpace)
    return space


def deep_layout(blocks: int = 6, *, width: int = 5) -> Layout:
    inside = (
        "attention.q_proj.weight",
        "layernorm_before.weight",
        "mlp.fc1.weight",
        "layernorm_after.bias",
    )
    names = [f"vit.layers.{block}.{name}" for block in range(blocks) for name in inside]
    outside = ["vit.embeddings.cls_token", "vit.layernorm.weight", "classifier.weight"]
    return Layout.build(
        {name: ((width, 1 + index % 17), "float32") for index, name in enumerate(names + outside)}
    )


def random_point(space: CoefficientSpace, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(space.lower, space.upper)


def assert_same_function(one: Field, other: Field, tolerance: float = 0.0) -> None:
    left = one.refine(other.boundaries)
    right = other.refine(one.boundaries)
    np.testing.assert_array_equal(left.boundaries, right.boundaries)
    np.testing.assert_allclose(left.values, right.values, rtol=0, atol=tolerance)


def coefficients(field: Field, layout: Layout) -> dict[str, list[float]]:
    return {spec.name: field.at([spec.start])[:, 0].tolist() for spec in layout.tensors}


GROUP_SPACES = ["global", "task", "module", "block", "block_module", "tensor"]
CURVES = [
    {"basis": basis, "modules": modules, "ends": ends}
    for basis in ("linear", "dct", "bspline")
    for modules in (False, True)
    for ends in ("own", "curve")
]


def test_dimensions_and_names() -> None:
    layout = deep_layout()
    sizes = {
        granularity: make_space(layout, granularity=granularity).dim for granularity in GROUP_SPACES
    }
    expected = {
        "global": 1,
        "task": 2,
        "module": 10,
        "block": 18,
        "block_module": 30,
        "tensor": 2 * 27,
    }
    assert sizes == expected
    assert make_space(layout, granularity="global").names == ("global",)
    assert make_space(layout, granularity="task").names == EXPERTS
    assert "rotated/block 3/attention" in make_space(layout, granularity="block_module").names
    curve = make_space(layout, depth={"basis": "dct", "size": 3, "modules": True})
    assert curve.names[:7] == (
        *(f"rotated/{part}/dct {j}" for part in ("attention", "mlp") for j in range(3)),
        "rotated/embedding",
    )
    assert make_space(
        layout, granularity="global", depth={"basis": "linear", "ends": "curve"}
    ).names == (
        "first",
        "last",
    )


@pytest.mark.parametrize("granularity", GROUP_SPACES)
def test_decode_gathers_exactly(granularity: str) -> None:
    layout = deep_layout()
    space = make_space(layout, granularity=granularity)
    point = random_point(space)
    recipe = space.decode(point)
    values = dict(zip(space.names, point.tolist(), strict=True))
    labels = {name: group.name for group in space.groups for name in group.tensors}
    for name, pair in coefficients(recipe.field, layout).items():
        keys = {
            "global": ["global", "global"],
            "task": list(EXPERTS),
        }.get(granularity, [f"{expert}/{labels[name]}" for expert in EXPERTS])
        assert pair == [values[key] for key in keys]
    assert recipe == space.template.with_field(recipe.field)


def test_boundaries_are_starts_of_tensors() -> None:
    layout = deep_layout()
    for granularity in GROUP_SPACES:
        field = make_space(layout, granularity=granularity).field(
            np.zeros(make_space(layout, granularity=granularity).dim)
        )
        assert field.boundaries[0] == 0
        assert field.boundaries[-1] == layout.size
        assert set(field.boundaries[:-1].tolist()) <= set(layout.segment_starts())


@settings(max_examples=60, deadline=None)
@given(
    granularity=st.sampled_from(GROUP_SPACES),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-300, 1.0, 1e9]),
)
def test_group_spaces_encode_what_they_decode(granularity: str, seed: int, scale: float) -> None:
    space = make_space(deep_layout(), granularity=granularity)
    point = random_point(space, seed) * scale
    encoded = space.encode(space.field(point))
    assert encoded is not None
    np.testing.assert_array_equal(encoded, point)


@pytest.mark.parametrize("depth", CURVES)
def test_curves_encode_constants_and_lines(depth: dict[str, Any]) -> None:
    space = make_space(deep_layout(), depth=depth)
    constant = Field.constant(space.layout.size, [0.1, 1.7])
    point = space.encode(constant)
    assert point is not None
    assert_same_function(space.field(point), constant)
    if depth["basis"] == "linear":
        given_point = random_point(space)
        np.testing.assert_array_equal(space.encode(space.field(given_point)), given_point)
    else:
        np.testing.assert_allclose(
            space.project(space.field(random_point(space))), random_point(space), atol=1e-13
        )


def test_encode_refuses_what_the_space_does_not_hold() -> None:
    layout = deep_layout()
    blocks = make_space(layout, granularity="block")
    tensors = make_space(layout, granularity="tensor")
    assert blocks.encode(tensors.field(random_point(tensors))) is None
    assert blocks.encode(Field.constant(layout.size, [0.3])) is None
    assert blocks.encode(Field.constant(layout.size + 64, [0.3, 0.3])) is None
    inside = Field(np.r_[0, 1, layout.size], np.array([[0.3, np.nextafter(0.3, 1)], [0.3, 0.3]]))
    assert make_space(layout, granularity="task").encode(inside) is None
    assert (
        make_space(layout, granularity="global").encode(Field.constant(layout.size, [0.3, 0.4]))
        is None
    )


def test_encoded_points_may_lie_outside_the_bounds() -> None:
    space = make_space(deep_layout(), granularity="task")
    np.testing.assert_array_equal(
        space.encode(Field.constant(space.layout.size, [2.5, -1.0])), [2.5, -1.0]
    )


@pytest.mark.parametrize(
    "section", [*({"granularity": g} for g in GROUP_SPACES), *({"depth": d} for d in CURVES)]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_numbers_pass_through(section: dict[str, Any], bad: float) -> None:
    space = make_space(deep_layout(), **section)
    for index in range(space.dim):
        point = space.start.copy()
        point[index] = bad
        values = space.field(point).values
        assert not np.all(np.isfinite(values))
        assert len(space.summary(point)) <= 16
    if space.shared or "depth" in section:
        return
    changed = coefficients(
        space.field(np.where(np.arange(space.dim) == 0, bad, space.start)), space.layout
    )
    assert all(np.isfinite(pair[1]) for pair in changed.values())  # the other expert is untouched


def test_a_point_of_the_wrong_length_is_refused() -> None:
    space = make_space(deep_layout(), granularity="task")
    with pytest.raises(RecipeError, match=r"expected 2 coordinates, received shape \(3,\)"):
        space.decode(np.zeros(3))


LADDERS: list[list[dict[str, Any]]] = [
    [{"granularity": g} for g in ("global", "task", "module", "tensor")],
    [{"granularity": g} for g in ("global", "task", "block", "block_module", "tensor")],
    *(
        [
            {"granularity": "task"},
            {"depth": {"basis": basis, "ends": ends}},
            {"depth": {"basis": basis, "modules": True, "ends": ends}},
            {"granularity": "block_module"},
            {"granularity": "tensor"},
        ]
        for basis in ("linear", "dct", "bspline")
        for ends in ("own", "curve")
    ),
    *(
        [{"depth": {"basis": basis}}, {"granularity": "block"}]
        for basis in ("linear", "dct", "bspline")
    ),
    *(
        [{"depth": {"basis": basis}}, {"granularity": "tensor"}]
        for basis in ("linear", "dct", "bspline")
    ),
    [{"depth": {"basis": "dct", "size": size}} for size in (1, 2, 5, 6)],
    [
        {"depth": {"basis": "dct", "size": 2, "ends": "curve"}},
        {"depth": {"basis": "dct", "size": 6, "modules": True}},
    ],
    [{"granularity": "global", "depth": {"basis": "dct"}}, {"depth": {"basis": "dct"}}],
    [{"depth": {"basis": "dct", "clip": True}}, {"granularity": "block"}],
]


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_refine_is_exact(ladder: list[dict[str, Any]], seed: int) -> None:
    layout = deep_layout()
    spaces = [make_space(layout, **section) for section in ladder]
    for coarse, fine in pairwise(spaces):
        point = random_point(coarse, seed)
        refined = coarse.refine(point, fine)
        assert_same_function(fine.field(refined), coarse.field(point))


def test_refining_to_more_cosines_adds_zeros() -> None:
    layout = deep_layout()
    coarse = make_space(layout, depth={"basis": "dct", "size": 2})
    fine = make_space(layout, depth={"basis": "dct", "size": 4})
    point = random_point(coarse)
    x = point.reshape(2, -1)
    y = coarse.refine(point, fine).reshape(2, -1)
    np.testing.assert_array_equal(y[:, :2], x[:, :2])
    np.testing.assert_array_equal(y[:, 2:4], 0.0)
    np.testing.assert_array_equal(y[:, 4:], x[:, 2:])


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        ({"basis": "linear"}, {"basis": "bspline", "size": 4}),
        ({"basis": "linear"}, {"basis": "bspline", "size": 6, "modules": True}),
        ({"basis": "bspline", "size": 5}, {"basis": "bspline", "size": 7}),
        ({"basis": "bspline", "size": 4}, {"basis": "dct", "size": 12}),
    ],
)
def test_a_curve_is_fitted_to_rounding(coarse: dict[str, Any], fine: dict[str, Any]) -> None:
    layout = deep_layout(12)
    one = make_space(layout, depth=coarse)
    two = make_space(layout, depth=fine)
    point = random_point(one)
    assert_same_function(two.field(one.refine(point, two)), one.field(point), tolerance=1e-12)


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        ({"granularity": "task"}, {"granularity": "global"}),
        ({"granularity": "tensor"}, {"granularity": "block"}),
        ({"granularity": "module"}, {"granularity": "block_module"}),
        ({"granularity": "block"}, {"depth": {"basis": "dct", "size": 3}}),
        ({"depth": {"basis": "dct", "size": 4}}, {"depth": {"basis": "dct", "size": 3}}),
        ({"depth": {"basis": "dct", "size": 4}}, {"depth": {"basis": "bspline", "size": 4}}),
    ],
)
def test_refine_refuses_what_the_target_cannot_hold(
    coarse: dict[str, Any], fine: dict[str, Any]
) -> None:
    layout = deep_layout()
    one = make_space(layout, **coarse)
    two = make_space(layout, **fine)
    with pytest.raises(
        RecipeError, match=f"a {two.title} space cannot hold this point of a {one.title} space"
    ):
        one.refine(random_point(one), two)


def test_ends_of_the_curve_cover_what_lies_outside_the_blocks() -> None:
    layout = deep_layout()
    space = make_space(layout, experts=("rotated",), depth={"basis": "linear", "ends": "curve"})
    decoded = coefficients(space.field(np.array([0.2, 0.8])), layout)
    assert decoded["vit.embeddings.cls_token"] == [0.2]
    assert decoded["vit.layernorm.weight"] == decoded["classifier.weight"] == [0.8]
    assert decoded["vit.layers.5.mlp.fc1.weight"] == [0.8]
    apart = make_space(
        layout, experts=("rotated",), depth={"basis": "linear", "ends": "curve", "modules": True}
    )
    decoded = coefficients(apart.field(np.array([0.2, 0.8, 0.5, 0.6])), layout)
    assert decoded["vit.embeddings.cls_token"] == [0.2]
    assert decoded["classifier.weight"] == [0.6]
    assert decoded["vit.layers.0.layernorm_before.weight"] == [0.2]
    assert decoded["vit.layers.0.layernorm_after.bias"] == [0.5]


def test_curves_run_over_each_tower(layout_of: Callable) -> None:
    layout = layout_of("clip")
    space = make_space(layout, experts=("rotated",), depth={"basis": "linear", "ends": "curve"})
    assert space.names == (
        *(
            "rotated/text/first",
            "rotated/text/last",
            "rotated/vision/first",
            "rotated/vision/last",
            "rotated/head",
        ),
    )
    decoded = coefficients(space.field(np.array([0.0, 1.0, 0.2, 0.4, 0.7])), layout)
    assert decoded["text_model.encoder.layers.1.mlp.fc1.bias"] == [1.0]
    assert decoded["vision_model.encoder.layers.1.mlp.fc1.bias"] == pytest.approx([0.3])
    assert decoded["vision_model.post_layernorm.bias"] == [0.4]
    assert decoded["logit_scale"] == [0.7]


def test_clip_keeps_curves_in_the_bounds() -> None:
    layout = deep_layout()
    depth = {"basis": "dct", "size": 4}
    free = make_space(layout, depth=depth)
    clipped = make_space(layout, depth=depth | {"clip": True})
    loose = free.field(free.upper).values
    tight = clipped.field(free.upper).values
    assert loose.max() > 1.0
    np.testing.assert_array_equal(tight, np.clip(loose, 0.0, 1.0))
    broken = np.where(np.arange(clipped.dim) == 0, np.inf, clipped.start)
    assert np.isinf(clipped.field(broken).values).any()  # an infeasible trial, not a clipped one


@pytest.mark.parametrize("basis", ["linear", "bspline"])
def test_bounds_on_lines_and_splines_bound_the_coefficients(basis: str) -> None:
    space = make_space(deep_layout(), depth={"basis": basis}, bounds=[-0.5, 1.5])
    for seed in range(20):
        values = space.field(random_point(space, seed)).values
        assert values.min() >= -0.5 - 1e-12
        assert values.max() <= 1.5 + 1e-12


def test_excluded_tensors_stay_at_the_base() -> None:
    layout = deep_layout()
    space = make_space(layout, granularity="block", exclude=["classifier", r"layers\.[01]\."])
    decoded = coefficients(space.field(np.ones(space.dim)), layout)
    for name, values in decoded.items():
        kept = name.startswith("classifier") or classify(name).block in (0, 1)
        assert values == ([0.0, 0.0] if kept else [1.0, 1.0])
    assert space.encode(space.field(np.ones(space.dim))) is not None
    assert space.encode(Field.constant(layout.size, [1.0, 1.0])) is None
    row = space.table()[-1]
    assert (row.group, row.coefficients) == ("kept at the base", 0)
    assert sum(row.parameters for row in space.table()) == layout.parameters


def test_a_curve_runs_over_the_blocks_that_are_searched() -> None:
    layout = deep_layout()
    space = make_space(
        layout, experts=("rotated",), depth={"basis": "linear"}, exclude=[r"layers\.[01]\."]
    )
    decoded = coefficients(space.field(np.array([0.2, 0.8, 0.0, 0.0, 0.0])), layout)
    assert decoded["vit.layers.2.mlp.fc1.weight"] == [0.2]
    assert decoded["vit.layers.5.mlp.fc1.weight"] == [0.8]


def test_fused_experts_have_named_directions() -> None:
    layout = deep_layout()
    recipe = make_space(layout, granularity="task").template.with_field(
        Field.constant(layout.size, [1.0])
    )
    space = build_space(
        SpaceSpec(granularity="task"), recipe, layout, default_bounds=(0, 2), default_start=1
    )
    assert space.names == ("direction 0",)


def test_small_spaces_show_their_coordinates() -> None:
    space = make_space(deep_layout(), granularity="module")
    point = random_point(space)
    assert space.summary(point) == dict(zip(space.names, point.tolist(), strict=True))
    assert space.summary_of(space.field(point)) == space.summary(point)


def test_small_spaces_read_fields_that_they_do_not_hold() -> None:
    layout = deep_layout()
    space = make_space(layout, granularity="task")
    fine = make_space(layout, granularity="tensor")
    field = fine.field(random_point(fine))
    sizes = np.array([spec.size for spec in layout.tensors], np.float64)
    table = np.array(list(coefficients(field, layout).values()))
    expected = dict(zip(EXPERTS, (sizes @ table / sizes.sum()).tolist(), strict=True))
    assert space.summary_of(field) == pytest.approx(expected, abs=1e-12)


def test_large_spaces_show_mean_coefficients() -> None:
    layout = deep_layout()
    space = make_space(layout, granularity="tensor")
    point = random_point(space)
    summary = space.summary(point)
    assert list(summary) == [
        *("expert rotated", "expert mirrored", "depth early", "depth middle", "depth late"),
        *("module attention", "module mlp"),
    ]
    assert space.summary_of(space.field(point)) == summary
    table = coefficients(space.field(point), layout)
    size = {spec.name: spec.size for spec in layout.tensors}
    attention = [name for name in layout.names if ".attention." in name]
    late = [name for name in layout.names if ".layers.4." in name or ".layers.5." in name]
    for key, names in (("module attention", attention), ("depth late", late)):
        expected = sum(size[n] * np.mean(table[n]) for n in names) / sum(size[n] for n in names)
        assert summary[key] == pytest.approx(expected, abs=1e-12)
    expected = sum(size[n] * table[n][1] for n in table) / layout.parameters
    assert summary["expert mirrored"] == pytest.approx(expected, abs=1e-12)


def test_summary_of_many_experts_stays_small() -> None:
    space = make_space(
        deep_layout(), experts=tuple(f"expert{k}" for k in range(20)), granularity="block"
    )
    assert len(space.summary(space.start)) == 13
    assert list(space.summary(space.start).values()) == pytest.approx([0.3] * 13, abs=1e-15)


def test_table_names_every_tensor_once(family: str, layout_of: Callable) -> None:
    layout = layout_of(family)
    for section in (
        {"granularity": "block_module"},
        {"depth": {"basis": "dct", "size": 2, "modules": True}},
    ):
        space = make_space(layout, **section)
        rows = space.table()
        assert sorted(name for row in rows for name in row.tensors) == sorted(layout.names)
        assert sum(row.parameters for row in rows) == layout.parameters
        assert sum(row.coefficients for row in rows) == space.dim


def test_refined_merges_are_identical_on_a_real_layout(family: str, layout_of: Callable) -> None:
    """The digest of a recipe is that of the merge: refining does not change it."""
    layout = layout_of(family)
    ladder = [
        make_space(layout, granularity=g) for g in ("task", "block", "block_module", "tensor")
    ]
    for coarse, fine in pairwise(ladder):
        point = random_point(coarse)
        assert fine.decode(coarse.refine(point, fine)).digest == coarse.decode(point).digest


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.sampled_from([0, 1, 63, 64, 65, 130]), min_size=5, max_size=9).filter(any),
    granularity=st.sampled_from(["global", "task", "module", "tensor"]),
)
def test_any_sizes_of_tensors(widths: list[int], granularity: str) -> None:
    names = [
        *list(coefficients(Field.constant(deep_layout().size, [0.0]), deep_layout()))[: len(widths)]
    ]
    layout = Layout.build(
        {name: ((width,), "float32") for name, width in zip(names, widths, strict=True)}
    )
    space = make_space(layout, granularity=granularity)
    point = random_point(space)
    field = space.field(point)
    assert field.size == layout.size
    np.testing.assert_array_equal(space.encode(field), point)
    assert sum(row.parameters for row in space.table()) == layout.parameters
