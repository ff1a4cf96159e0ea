"""Widths of layers: the budget holds everywhere, and coefficients act on layers of their width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergesearch.merging import Field, InputError, Layout, Recipe, RecipeError, Source
from mergesearch.spaces import Space
from mergesearch.spaces.section import WidthsSpec
from mergesearch.spaces.spec import SpaceSpec, build_space
from mergesearch.spaces.widths_space import WidthsSpace, build_widths_space

UNITS = {"hidden": 8, "inner": 32}


class Chosen:
    """A recipe of one matrix, whose rows and columns are the units of two widths."""

    def __init__(self, fractions: dict[str, float]) -> None:
        self.fractions = fractions
        self.units = UNITS

    def at(self, fractions: dict[str, float]) -> tuple[Recipe, Layout]:
        shape = tuple(round(UNITS[name] * (1 + share)) for name, share in fractions.items())
        layout = Layout.build({"a.weight": (shape, "float32"), "b.weight": ((3, 3), "float32")})
        sources = (Source("one", "one"), Source("two", "two"))
        field = Field.constant(layout.size, [0.0, 0.0])
        recipe = Recipe(Source("base", "base"), sources, "task_arithmetic", field)
        special = (("align", tuple(sorted(fractions.items()))),)
        return replace(recipe, layout=layout.digest, special=special), layout


def make(begin: float = 0.25, granularity: str = "tensor", **widths: Any) -> WidthsSpace:
    chosen = Chosen(dict.fromkeys(UNITS, begin))

    def space_at(shares: tuple[float, ...]) -> Space:
        recipe, layout = chosen.at(dict(zip(UNITS, shares, strict=True)))
        section = SpaceSpec(granularity=granularity)
        return build_space(section, recipe, layout, default_bounds=(0.0, 1.0), default_start=0.4)

    return build_widths_space(WidthsSpec(**widths), chosen, space_at)  # type: ignore[arg-type]


def points(space: Space, count: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.uniform(space.lower, space.upper) for _ in range(count)]


def test_the_start_is_the_study_s_own() -> None:
    space = make()
    assert space.fractions(space.start) == dict.fromkeys(UNITS, 0.25)
    assert space.names[-2:] == ("width/hidden", "width/inner")
    assert ((space.lower <= space.start) & (space.start <= space.upper)).all()
    assert space.decode(space.start).field == space.field(space.start)


@pytest.mark.parametrize("mean", [0.25, 0.3, 0.6])
def test_every_point_keeps_the_budget(mean: float) -> None:
    space = make(0.25, mean=mean)
    kept = [np.dot([*space.fractions(p).values()], [*UNITS.values()]) for p in points(space)]
    assert max(kept) <= mean * sum(UNITS.values()) + 1e-9
    assert len({*kept}) > 1


def test_without_a_budget_all_levels_are_as_likely() -> None:
    space = make()
    levels = np.array([space.levels(p) for p in points(space, 400)])
    shares = np.stack([(levels == level).mean(0) for level in range(4)])
    assert (abs(shares - 0.25) < 0.08).all()


def test_the_least_wanted_width_gives_way() -> None:
    space = make(0.0, choices=[0.0, 1.0], mean=0.8)
    wanted = space.start.copy()
    wanted[-2:] = [1.4, 0.9]  # all of hidden and inner: more than the budget
    assert space.fractions(wanted) == {"hidden": 1.0, "inner": 0.0}
    wanted[-2:] = [0.9, 1.4]
    assert space.fractions(wanted) == {"hidden": 0.0, "inner": 1.0}


def test_fields_lie_over_the_layers_of_their_widths() -> None:
    space = make()
    for point in points(space, 10):
        recipe = space.decode(point)
        layout = space.layout_of(recipe)
        assert layout is not None
        assert recipe.field.size == layout.size
        shares = dict(dict(recipe.special)["align"])
        assert layout.tensors[0].shape == tuple(
            round(UNITS[name] * (1 + share)) for name, share in shares.items()
        )
        values = recipe.field.at([tensor.start for tensor in layout.tensors])
        assert sorted(values.ravel()) == sorted(point[:-2])


def test_known_fields_and_finer_spaces() -> None:
    coarse = make(granularity="task")
    fine = make()
    point = points(coarse, 1)[0]
    again = coarse.refine(point, fine)
    assert fine.decode(again).digest == coarse.decode(point).digest
    assert np.array_equal(coarse.encode(coarse.field(coarse.start)), coarse.start)
    with pytest.raises(RecipeError, match="cannot hold"):
        coarse.refine(point, make(choices=[0.25, 0.5]))


def test_widths_alone() -> None:
    space = make(only=True)
    assert space.names == ("width/hidden", "width/inner")
    assert {value for p in points(space, 10) for value in space.field(p).values.ravel()} == {0.4}
    assert len({space.decode(p).layout for p in points(space, 10)}) > 3


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"choices": [0.0, 0.5]}, "0.25 of hidden, among them"),
        ({"choices": [0.25]}, "two or more different numbers"),
        ({"choices": [0.25, 1.5]}, "from 0 to 1"),
        ({"mean": 0.1}, "lower align.fraction"),
    ],
)
def test_sections_that_cannot_be_are_refused(widths: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**widths)
