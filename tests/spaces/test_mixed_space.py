"""The mixed space: what each method decodes to, conditions, groups, and fields read back."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from mergesearch.merging import Field, InputError, Layout, Recipe, RecipeError, Source, merge
from mergesearch.merging.operators.stack import DENSITIES, StackRows
from mergesearch.spaces import MixedSpace, mixed_space
from mergesearch.spaces.parts.mixed_dimensions import METHODS

EXPERTS = ("first", "second", "third")
NAMES = (
    *(
        f"model.layers.{block}.{name}.weight"
        for block in range(5)
        for name in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    ),
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
)
SHAPES = dict.fromkeys(NAMES, (9, 8))
LAYOUT = Layout.build({name: (shape, "float32") for name, shape in SHAPES.items()})
ROWS = StackRows(len(EXPERTS), len(DENSITIES))


def states(spread: float = 0.7) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[str, torch.Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    base = draw()
    return base, [
        {name: base[name] + spread * tensor for name, tensor in draw().items()} for _ in EXPERTS
    ]


BASE, TUNED = states()


class Gram:
    """Inner products of base, task vectors and one row too many; counts the calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, boundaries: np.ndarray) -> np.ndarray:
        self.calls += 1
        sources = [BASE, *TUNED]
        flat = np.zeros((len(sources) + 1, LAYOUT.size))
        for spec in LAYOUT.tensors:
            for row, source in enumerate(sources):
                vector = source[spec.name].double() - (BASE[spec.name].double() if row else 0.0)
                flat[row, spec.start : spec.stop] = vector.reshape(-1).numpy()
        flat[-1] = 1e3
        pieces = [flat[:, a:b] @ flat[:, a:b].T for a, b in itertools.pairwise(boundaries)]
        return np.array(pieces)


def template(operator: str = "stack", **options: object) -> Recipe:
    sources = tuple(Source(name, name) for name in EXPERTS)
    field = Field.constant(LAYOUT.size, np.zeros(ROWS.count))
    return Recipe(Source("base", "base"), sources, operator, field, tuple(sorted(options.items())))


def make(**options: object) -> MixedSpace:
    return mixed_space(template(), LAYOUT, **{"gram": Gram(), **options})


@pytest.fixture
def space() -> MixedSpace:
    return make()


def coordinate(space: MixedSpace, name: str) -> int:
    return space.names.index(name)


def choose(space: MixedSpace, group: str, method: str, **parameters: list[float]) -> np.ndarray:
    """The start with a method in one group, and its parameters in every part that has them."""
    point = space.start.copy()
    point[coordinate(space, f"{group}/method")] = METHODS.index(method) + 0.5
    for part, values in parameters.items():
        cell = next(cell for cell in space.cells if cell.name == f"{group}/{part}")
        point[cell.slices[method]] = values
    return point


def column(space: MixedSpace, point: np.ndarray, name: str) -> np.ndarray:
    return space.field(point).at(LAYOUT.by_name[name].start)


def sample(space: MixedSpace, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(space.lower, space.upper)


class TestGroups:
    def test_blocks_go_two_by_two_and_the_rest_is_a_group(self, space: MixedSpace) -> None:
        assert space.groups == ("blocks 0-1", "blocks 2-3", "block 4", "outside")
        parts = [cell.name for cell in space.cells]
        assert parts[:3] == ["blocks 0-1/attention", "blocks 0-1/mlp", "blocks 0-1/other"]
        assert parts[-1] == "outside/other"
        assert len(parts) == 10

    def test_every_tensor_belongs_to_one_cell(self, space: MixedSpace) -> None:
        assert sorted(name for cell in space.cells for name in cell.tensors) == sorted(NAMES)

    def test_dimensions_count_as_in_the_paper(self, space: MixedSpace) -> None:
        # G groups with P parts: 1 + P (2M + 3) each.
        assert space.dim == 3 * (1 + 3 * 9) + (1 + 9)
        assert [d.kind for d in space.dimensions].count("categorical") == 4
        assert [d.kind for d in space.dimensions].count("integer") == 10

    def test_layers_is_the_number_of_blocks_in_a_group(self) -> None:
        assert make(layers=1).groups[:2] == ("block 0", "block 1")
        assert make(layers=5).groups == ("blocks 0-4", "outside")

    def test_towers_have_groups_of_their_own(self) -> None:
        names = [
            f"{tower}.encoder.layers.{b}.mlp.fc1.weight"
            for tower in ("vision_model", "text_model")
            for b in (0, 1)
        ]
        layout = Layout.build(dict.fromkeys(names, ((4, 4), "float32")))
        assert mixed_space(template(), layout).groups == ("text/blocks 0-1", "vision/blocks 0-1")

    def test_the_table_adds_up(self, space: MixedSpace) -> None:
        rows = space.table()
        assert sum(row.coefficients for row in rows) == space.dim
        assert sum(row.parameters for row in rows) == LAYOUT.parameters
        assert sorted(name for row in rows for name in row.tensors) == sorted(NAMES)


class TestBox:
    def test_holds_the_start(self, space: MixedSpace) -> None:
        assert len(set(space.names)) == space.dim
        assert space.lower.dtype == space.upper.dtype == space.start.dtype == np.float64
        assert np.all(
            (space.lower < space.upper)
            & (space.lower <= space.start)
            & (space.start <= space.upper)
        )

    def test_start_is_task_arithmetic_and_needs_no_angles(self, space: MixedSpace) -> None:
        recipe = space.decode(space.start)
        expected = np.zeros(ROWS.count)
        expected[ROWS.tasks] = 0.3
        assert recipe.field == Field.constant(LAYOUT.size, expected)
        assert recipe.with_field(template().field) == template()
        assert space.gram.calls == 0

    def test_seeds_are_the_experts(self, space: MixedSpace) -> None:
        for seed, row in zip(space.seeds, np.eye(ROWS.count), strict=False):
            assert space.field(seed) == Field.constant(LAYOUT.size, row)
            assert np.array_equal(space.canonical(seed), seed)
        assert len(space.seeds) == 3
        assert make(methods=("ties", "slerp")).seeds == ()

    def test_without_task_arithmetic_it_starts_in_the_middle(self) -> None:
        space = make(methods=("linear", "ties"))
        field = space.field(space.start)
        np.testing.assert_allclose(field.values[ROWS.tasks], 1 / 3)

    def test_a_single_method_is_no_dimension(self) -> None:
        space = make(methods=("task_arithmetic",))
        assert space.dim == 10
        assert space.active(space.start).all()
        assert np.array_equal(space.encode(space.field(space.start)), space.start)


class TestConditions:
    def test_inactive_coordinates_do_not_change_the_merge(self, space: MixedSpace) -> None:
        rng = np.random.default_rng(99)
        for seed in range(20):
            point = sample(space, seed)
            other = np.where(space.active(point), point, rng.uniform(space.lower, space.upper))
            assert not np.array_equal(point, other)
            assert space.decode(point).digest == space.decode(other).digest
            assert np.array_equal(space.canonical(point), space.canonical(other))

    def test_every_active_coordinate_matters(self, space: MixedSpace) -> None:
        point = sample(space, 3)
        for group, method in zip(space.groups, METHODS, strict=True):
            point[coordinate(space, f"{group}/method")] = METHODS.index(method) + 0.5
        point = space.canonical(point)
        for index in np.flatnonzero(space.active(point)):
            dimension = space.dimensions[index]
            step = 0.03 if dimension.kind == "real" else 1.0
            changed = []
            for sign in (-1, 1):
                moved = point.copy()
                moved[index] = np.clip(
                    moved[index] + sign * step, space.lower[index], space.upper[index]
                )
                changed.append(space.decode(moved).digest != space.decode(point).digest)
            # The least of three scores of an arc has no say.
            assert any(changed) or "slerp" in dimension.name, dimension

    def test_canonical_is_the_same_merge_in_the_box(self, space: MixedSpace) -> None:
        for seed in range(20):
            point = sample(space, seed)
            canonical = space.canonical(point)
            assert space.decode(canonical).digest == space.decode(point).digest
            assert np.array_equal(space.canonical(canonical), canonical)
            assert np.all((canonical >= space.lower) & (canonical <= space.upper))
            assert not np.array_equal(canonical, point)

    def test_choices_hold_to_the_faces_of_the_box(self, space: MixedSpace) -> None:
        assert {space.method(space.lower, group) for group in range(4)} == {"linear"}
        assert {space.method(space.upper, group) for group in range(4)} == {"slerp"}


class TestMethods:
    def test_linear_weights_sum_to_one(self, space: MixedSpace) -> None:
        point = choose(
            space, "blocks 0-1", "linear", attention=[0.2, 0.6, 0.0], mlp=[0.0, 0.0, 0.0]
        )
        expected = np.zeros(ROWS.count)
        expected[ROWS.tasks] = [0.25, 0.75, 0.0]
        np.testing.assert_allclose(column(space, point, NAMES[0]), expected, atol=1e-15)
        np.testing.assert_allclose(column(space, point, NAMES[1])[ROWS.tasks], 1 / 3)

    def test_ties_takes_a_density_of_the_stack(self, space: MixedSpace) -> None:
        for density in range(4):
            point = choose(space, "block 4", "ties", mlp=[density + 0.2, 0.9])
            expected = np.zeros(ROWS.count)
            expected[ROWS.trimmed(density)] = 0.9
            assert np.array_equal(
                column(space, point, "model.layers.4.mlp.up_proj.weight"), expected
            )

    def test_a_slerp_group_is_shoemakes_formula_on_full_weights(self, space: MixedSpace) -> None:
        scores = {"attention": [0.6, 0.1, 0.2], "mlp": [0.0, 0.5, 0.5], "other": [0.3, 0.9, 0.0]}
        shares = {"self_attn": (0, 2, 0.25), "mlp": (1, 2, 0.5), "layernorm": (1, 0, 0.25)}
        point = choose(space, "blocks 0-1", "slerp", **scores)
        merged = merge(BASE, TUNED, operator="stack", coefficients=space.field(point))
        for name in NAMES[:6]:
            one, other, share = next(value for key, value in shares.items() if key in name)
            a, b = (TUNED[expert][name].double().reshape(-1) for expert in (one, other))
            angle = math.acos(a @ b / a.norm() / b.norm())
            expected = (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(
                angle
            )
            np.testing.assert_allclose(
                merged[name].double().reshape(-1), expected, rtol=0, atol=2e-6
            )
        assert space.gram.calls == 1

    def test_slerp_reaches_both_ends_exactly(self, space: MixedSpace) -> None:
        for expert, scores in enumerate(np.eye(3)):
            point = choose(space, "block 4", "slerp", mlp=(0.4 * scores).tolist())
            weights = column(space, point, "model.layers.4.mlp.up_proj.weight")
            assert np.array_equal(weights, np.eye(ROWS.count)[expert])

    def test_slerp_is_continuous_where_the_order_of_scores_changes(self, space: MixedSpace) -> None:
        before = choose(space, "block 4", "slerp", mlp=[0.5, 0.5 - 1e-9, 0.1])
        after = choose(space, "block 4", "slerp", mlp=[0.5 - 1e-9, 0.5, 0.1])
        name = "model.layers.4.mlp.up_proj.weight"
        np.testing.assert_allclose(
            column(space, before, name), column(space, after, name), rtol=0, atol=1e-8
        )

    def test_angles_are_needed_for_slerp_alone(self) -> None:
        space = make(gram=None)
        for method in METHODS[:3]:
            space.decode(choose(space, "block 4", method))
        with pytest.raises(RecipeError, match="slerp needs the angles between experts"):
            space.decode(choose(space, "block 4", "slerp"))

    def test_weights_are_read_once(self, space: MixedSpace) -> None:
        for seed in range(10):
            space.decode(sample(space, seed))
        assert space.gram.calls == 1

    def test_what_is_not_finite_passes_through(self, space: MixedSpace) -> None:
        for method, values in (
            ("linear", [np.nan, 0.1, 0.1]),
            ("linear", [np.inf, 0.1, 0.1]),
            ("task_arithmetic", [np.nan]),
            ("ties", [0.5, np.inf]),
            ("slerp", [0.5, 0.4, np.nan]),
        ):
            field = space.field(choose(space, "block 4", method, mlp=values))
            assert not np.all(np.isfinite(field.values)), method


class TestEncode:
    def test_reads_what_a_field_says_of_methods(self, space: MixedSpace) -> None:
        point = choose(
            space,
            "blocks 0-1",
            "linear",
            attention=[0, 1, 0],
            mlp=[0.5, 0.25, 0.25],
            other=[0, 0, 1],
        )
        point[coordinate(space, "block 4/method")] = METHODS.index("ties") + 0.5
        point = space.canonical(point)
        assert np.array_equal(space.encode(space.field(point)), point)
        assert np.array_equal(space.encode(space.field(space.start)), space.start)

    def test_reads_anchors(self, space: MixedSpace) -> None:
        for coefficients in (
            np.zeros(16),
            np.r_[np.full(3, 1 / 3), np.zeros(13)],
            np.r_[np.zeros(3), np.ones(3), np.zeros(10)],
        ):
            field = Field.constant(LAYOUT.size, coefficients)
            assert space.field(space.encode(field)) == field

    def test_is_exact_or_none(self, space: MixedSpace) -> None:
        for seed in range(20):
            field = space.field(sample(space, seed))
            encoded = space.encode(field)
            assert encoded is None or space.field(encoded) == field

    def test_what_no_method_gives_is_not_read(self, space: MixedSpace) -> None:
        odd = [np.full(16, 0.1), np.r_[0.1, 0.2, 0.3, np.zeros(13)], np.r_[np.zeros(15), 1.0]]
        assert all(space.encode(Field.constant(LAYOUT.size, values)) is None for values in odd)
        inside = Field(np.array([0, 5, LAYOUT.size]), np.array([[0.1, 0.2]] * 3 + [[0, 0]] * 13))
        assert space.encode(inside) is None
        assert space.encode(Field.constant(LAYOUT.size, np.zeros(3))) is None

    def test_refine(self, space: MixedSpace) -> None:
        point = sample(space, 1)
        assert np.array_equal(space.refine(point, make()), space.canonical(point))
        finer = make(layers=1)
        coarse = choose(
            space, "blocks 0-1", "ties", attention=[2.5, 0.7], mlp=[0.5, 0.1], other=[1.5, 1.0]
        )
        assert finer.field(space.refine(coarse, finer)) == space.field(coarse)
        with pytest.raises(RecipeError, match="cannot hold a point of a mixed"):
            finer.refine(choose(finer, "block 1", "ties"), space)


def test_summaries_are_small_and_named_alike(space: MixedSpace) -> None:
    summaries = [space.summary(sample(space, seed)) for seed in range(3)]
    assert len({tuple(summary) for summary in summaries}) == 1
    assert len(summaries[0]) == 3 + 4 + 1
    assert all(math.isfinite(value) for summary in summaries for value in summary.values())
    assert space.summary(space.start)["expert first"] == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "space.layers: expected at least 1 block"),
        ({"methods": ()}, "space.methods: expected different ones"),
        ({"methods": ("ties", "dare")}, r"received \['ties', 'dare'\]"),
        ({"methods": ("ties", "ties")}, "space.methods: expected different ones"),
    ],
)
def test_refuses_in_words(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)


def test_refuses_other_operators_and_models_without_blocks() -> None:
    with pytest.raises(InputError, match="the mixed space expects 'stack', received 'ties'"):
        mixed_space(template("ties"), LAYOUT)
    with pytest.raises(
        InputError,
        match=r"expected numbered blocks, received 1 tensors without any, such as 'head\.w'",
    ):
        mixed_space(template(), Layout.build({"head.w": ((3, 3), "float32")}))


def test_densities_are_those_of_the_template() -> None:
    space = mixed_space(template(densities=[0.3]), LAYOUT)
    assert {d.choices for d in space.dimensions if d.kind == "integer"} == {(0.3,)}
    assert space.field(space.start).directions == 3 * 2 + 1
