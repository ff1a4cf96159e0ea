"""Experts of each block under a budget: every point keeps it, and known merges have points."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mergesearch.merging import Field, InputError, Recipe, RecipeError, Source
from mergesearch.merging.mixture.in_recipe import with_mixture
from mergesearch.spaces.mixture_space import MixtureSpace, mixture_space
from mergesearch.spaces.section import MixtureSpec

BLOCKS = ("block 0", "block 1", "block 2")


def template() -> Recipe:
    whole = Recipe(Source("base", "m"), (), "task_arithmetic", Field.constant(9, []))
    return with_mixture(whole, "mc_smoe", {"experts": [6, 6, 6], "align": True})


def space_of(**keys: object) -> MixtureSpace:
    return mixture_space(MixtureSpec.model_validate(keys), template(), BLOCKS, 6)


def test_every_point_keeps_the_budget_and_spends_it() -> None:
    space = space_of(total=10)
    rng = np.random.default_rng(0)
    found = [space.counts(rng.uniform(space.lower, space.upper)) for _ in range(200)]
    assert all(counts.sum() == 10 and counts.min() >= 1 and counts.max() <= 6 for counts in found)
    assert len({tuple(counts) for counts in found}) > 15  # of 21
    assert np.ptp(space_of(mean=3).counts(space.start)) == 0


def test_more_is_never_fewer() -> None:
    space = space_of(mean=3.5, choices=[1, 2, 4, 6])
    rng = np.random.default_rng(1)
    for _ in range(50):
        point = rng.uniform(space.lower, space.upper)
        higher = point + np.array([1.0, 0.0, 0.0])
        assert space.counts(higher)[0] >= space.counts(point)[0]


def test_a_prior_is_where_the_search_begins() -> None:
    space = space_of(total=9, prior=[1.0, 3.0, 5.0])
    assert space.counts(space.start).tolist() == [1, 3, 5]
    found = space.point_of(space.recipe([5, 3, 1]))
    assert found is not None
    assert space.counts(found).tolist() == [5, 3, 1]


@pytest.mark.parametrize("counts", [[1, 1, 6], [3, 3, 3], [2, 3, 4], [6, 2, 1]])
def test_merges_within_the_budget_have_a_point(counts: list[int]) -> None:
    space = space_of(total=sum(counts), weights=True)
    weights = np.linspace(-0.5, 1.0, 18).reshape(3, 6).tolist()
    for recipe in (space.recipe(counts), space.recipe(counts, weights)):
        point = space.point_of(recipe)
        assert point is not None
        assert space.decode(point) == recipe
        assert bool(np.all((space.lower <= point) & (point <= space.upper)))
    assert space.point_of(space.recipe([1, 1, 1])) is None  # does not spend the budget
    other = with_mixture(space.template, "sub_moe", {"experts": counts})
    assert space.point_of(other) is None


def test_a_merge_inside_a_mixture_survives_json() -> None:
    recipe = space_of(total=9, weights=True).recipe([2, 3, 4], [[0.1] * 6] * 3)
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.digest == recipe.digest


def test_a_single_number_leaves_weights_alone() -> None:
    space = space_of(mean=2, choices=[2], weights=True)
    assert space.names == tuple(f"weight/{b}/expert {e}" for b in BLOCKS for e in range(6))
    assert "weights" not in dict(space.decode(space.start).mixture)
    moved = space.start.copy()
    moved[7] = 0.25
    decoded = dict(space.decode(moved).mixture)
    assert decoded["experts"] == [2, 2, 2]
    assert decoded["weights"][1] == [0.0, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert space.decode(moved).digest != space.decode(space.start).digest


def test_a_point_can_be_refined_into_a_space_with_weights() -> None:
    coarse = space_of(total=9)
    point = np.array([3.0, -1.0, 0.0])
    fine = space_of(total=9, weights=True)
    assert fine.decode(coarse.refine(point, fine)) == coarse.decode(point)
    with pytest.raises(RecipeError, match="cannot hold"):
        coarse.refine(point, space_of(total=8))


def test_one_budget_is_given() -> None:
    with pytest.raises(ValueError, match="expected either mean or total"):
        MixtureSpec.model_validate({"mean": 2, "total": 6})
    with pytest.raises(ValueError, match="expected either mean or total"):
        MixtureSpec.model_validate({})
    section = MixtureSpec.model_validate({"mean": 2, "weights": True})
    with pytest.raises(InputError, match="around 0"):
        mixture_space(section, template(), BLOCKS, 6, bounds=(0.1, 1.0))
