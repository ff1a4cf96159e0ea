"""The study file's ``space`` section: what is accepted, and one clear line for what is not."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mergesearch import spaces
from mergesearch.merging import Field, InputError, Layout, Recipe, RecipeError, Source
from mergesearch.spaces import BoxSpace, SegmentSpace, Space, arc_bounds
from mergesearch.spaces.spec import SpaceSpec, build_space, check_keys

NAMES = [
    *(
        f"model.layers.{block}.{name}.weight"
        for block in range(3)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    ),
    "model.embed_tokens.weight",
    "lm_head.weight",
]
LAYOUT = Layout.build(dict.fromkeys(NAMES, ((4, 5), "float32")))


def template(size: int, experts: int = 2) -> Recipe:
    sources = tuple(Source(f"e{index}", f"e{index}") for index in range(experts))
    return Recipe(
        Source("base", "base"), sources, "task_arithmetic", Field.constant(size, [0.3] * experts)
    )


def build(section: dict[str, Any], layout: Layout | None = LAYOUT, start: float = 0.3) -> Space:
    recipe = template(LAYOUT.size) if layout is not None else template(1, 1)
    return build_space(
        SpaceSpec(**section), recipe, layout, default_bounds=(0.0, 1.0), default_start=start
    )


def test_defaults() -> None:
    space = build({})
    assert space.title == "block"
    assert set(space.lower) == {0.0}
    assert set(space.upper) == {1.0}
    assert set(space.start) == {0.3}
    assert build({"depth": {"basis": "dct"}}).title == "dct curve"
    assert len(build({"depth": {"basis": "dct"}}).names) == 2 * (
        3 + 2
    )  # as many terms as blocks, when fewer than 4


def test_own_bounds_and_start() -> None:
    space = build({"granularity": "task", "bounds": [-1, 2], "start": [0.5, 1]})
    np.testing.assert_array_equal(space.lower, [-1.0, -1.0])
    np.testing.assert_array_equal(space.upper, [2.0, 2.0])
    np.testing.assert_array_equal(space.start, [0.5, 1.0])


def test_a_start_per_expert_is_constant_over_the_model() -> None:
    for section in (
        {"granularity": "tensor"},
        {"depth": {"basis": "bspline"}},
        {"depth": {"basis": "dct", "modules": True}},
    ):
        space = build(section | {"start": [0.25, 0.75]})
        assert space.field(space.start).compact() == Field.constant(LAYOUT.size, [0.25, 0.75])


def test_a_start_per_coordinate() -> None:
    start = np.linspace(0.1, 0.9, 10).tolist()
    np.testing.assert_array_equal(build({"granularity": "block", "start": start}).start, start)


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"bounds": [1.0, 0.0]},
        r"space.bounds: expected \[low, high\] with low < high, received \[1, 0\]",
    ),
    ({"bounds": [0.5, 0.5]}, r"space.bounds: .* received \[0.5, 0.5\]"),
    ({"start": 1.5}, r"space.start: expected e0/embedding in \[0, 1\], received 1.5"),
    (
        {"bounds": [0.5, 1.0]},
        r"space.start: .*received 0.3 \(the operator's default; set space.start\)",
    ),
    (
        {"start": [0.1, 0.2, 0.3]},
        r"space.start: .*a list of 2 \(one per expert\) or 10 .*received a list of 3",
    ),
    ({"start": [0.1, 1.2]}, r"space.start: expected e1/embedding in \[0, 1\], received 1.2"),
    ({"exclude": ["lm_haed"]}, r"space.exclude: 'lm_haed' matches none of the 8 tensors"),
    ({"exclude": ["("]}, r"space.exclude: expected a regular expression, received '\('"),
    ({"exclude": ["."]}, r"space.exclude: expected at least one tensor to stay"),
    ({"exclude": ["layers"]}, r"space.granularity: 'block' needs numbered blocks"),
    ({"depth": {"basis": "dct", "size": 0}}, r"space.depth.size: expected 1 to 3 .*received 0"),
    ({"depth": {"basis": "bspline", "size": 4}}, r"space.depth.size: expected 1 to 3 .*received 4"),
    ({"depth": {"basis": "linear", "size": 3}}, r"space.depth.size: expected 2 .*received 3"),
    (
        {"granularity": "tensor", "depth": {"basis": "dct"}},
        r"space.granularity: 'tensor' cannot be combined",
    ),
    ({"dim": 3}, r"space.dim: 3: only allowed for analytic problems"),
]


@pytest.mark.parametrize(("section", "message"), BAD)
def test_bad_values_get_one_clear_line(section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build(section)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "section",
    [
        {"granularitty": "task"},
        {"granularity": "layer"},
        {"depth": {"basis": "fourier"}},
        {"depth": {"basis": "dct", "sise": 3}},
        {"depth": {}},
        {"bounds": [0.0]},
        {"bounds": [0.0, float("inf")]},
        {"bounds": ["0", "1"]},
        {"start": True},
        {"start": "0.3"},
        {"start": float("nan")},
        {"dim": "3"},
        {"exclude": "lm_head"},
    ],
)
def test_unknown_keys_and_types_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SpaceSpec(**section)


def test_every_key_has_a_description() -> None:
    for model in (SpaceSpec, spaces.DepthSpec):
        assert all(field.description for field in model.model_fields.values())


def test_no_blocks_for_a_curve() -> None:
    layout = Layout.build({"weight": ((4,), "float32")})
    with pytest.raises(InputError, match="needs numbered blocks"):
        build_space(
            SpaceSpec(depth={"basis": "dct"}),
            template(layout.size),
            layout,
            default_bounds=(0, 1),
            default_start=0,
        )


def test_box() -> None:
    box = build({"dim": 3, "bounds": [-5, 5], "start": [1, 2, 3]}, None)
    assert isinstance(box, BoxSpace)
    assert box.names == ("x0", "x1", "x2")
    recipe = box.decode(np.array([0.5, -0.5, np.nan]))
    assert recipe.field == Field(np.arange(4), np.array([[0.5, -0.5, np.nan]]))
    np.testing.assert_array_equal(box.encode(recipe.field.compact()), [0.5, -0.5, np.nan])
    np.testing.assert_array_equal(box.start, [1.0, 2.0, 3.0])
    assert box.encode(Field.constant(4, [0.0])) is None
    assert box.encode(Field.constant(3, [0.5])).tolist() == [0.5] * 3
    np.testing.assert_array_equal(box.refine(box.start, box), box.start)
    with pytest.raises(
        RecipeError, match="a box of 2 space cannot hold a point of a box of 3 space"
    ):
        box.refine(box.start, build({"dim": 2, "bounds": [-5, 5]}, None))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "space.dim: expected a whole number of at least 1, received None"),
        ({"dim": 0}, "space.dim: .*received 0"),
        ({"dim": 2, "granularity": "task"}, "space.granularity: only allowed with models"),
        (
            {"dim": 2, "start": [0.0]},
            "space.start: expected a number or a list of 2, received a list of 1",
        ),
        ({"dim": 2, "start": 7.0}, r"space.start: expected x0 in \[0, 1\], received 7"),
        ({"dim": 2, "bounds": [3, 2]}, "space.bounds: .*low < high"),
    ],
)
def test_bad_boxes_get_one_clear_line(section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(section, None)


@pytest.mark.parametrize(
    ("section", "searched", "message"),
    [
        (
            {"layers": 2},
            "coefficients",
            (
                "space.layers: means nothing to strategy x; keys of its space: "
                "bits, bounds, chunks, depth, dim, exclude, granularity, groups, start"
            ),
        ),
        (
            {"granularity": "task"},
            "segments",
            (
                "space.granularity: means nothing to strategy x; keys of its space: "
                "bounds, segments, start"
            ),
        ),
        ({"bounds": [0, 1]}, "mixed", "space.bounds: .* keys of its space: layers"),
        ({"layers": 2}, "product", "space.layers: .* keys of its space: none"),
    ],
)
def test_keys_that_mean_nothing_are_refused(
    section: dict[str, Any], searched: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_keys(SpaceSpec(**section), searched, "strategy x")
    check_keys(SpaceSpec(exclude=[], depth=None), searched, "strategy x")


def test_segments_are_64_within_the_bounds_of_arcs_by_default() -> None:
    space = build_space(
        SpaceSpec(),
        template(LAYOUT.size),
        LAYOUT,
        default_bounds=(0.0, 1.0),
        default_start=0.3,
        searched="segments",
    )
    assert isinstance(space, SegmentSpace)
    assert space.segments == 64
    assert (space.lower[-1], space.upper[-1]) == arc_bounds(0.0, 1.0)
    assert space.start[-1] == 0.3


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of coefficients, mixed, product, segments"):
        build_space(
            SpaceSpec(),
            template(LAYOUT.size),
            LAYOUT,
            default_bounds=(0.0, 1.0),
            default_start=0.3,
            searched="graphs",
        )


def test_exports_are_sorted_and_exist() -> None:
    constants = [name for name in spaces.__all__ if name.isupper()]
    classes = [name for name in spaces.__all__ if name[0].isupper() and not name.isupper()]
    functions = [name for name in spaces.__all__ if name[0].islower()]
    assert spaces.__all__ == sorted(constants) + sorted(classes) + sorted(functions)
    assert all(hasattr(spaces, name) for name in spaces.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spaces.nothing


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "ray", "optuna", "datasets", "numba", "scipy", "pydantic")
    code = f"import sys, mergesearch.spaces; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"
