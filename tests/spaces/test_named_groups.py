"""Groups that a study names: their coordinates, and one clear line for patterns that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergesearch.merging import Field, InputError, Layout, Recipe, Source
from mergesearch.spaces import CoefficientSpace, Space
from mergesearch.spaces.spec import SpaceSpec, build_space

LAYOUT = Layout.build(
    {
        "model.embed_tokens.weight": ((9, 4), "float32"),
        **{
            f"model.layers.{block}.{name}.weight": ((4, 5), "float32")
            for block in range(3)
            for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
        },
        "lm_head.weight": ((9, 4), "float32"),
    }
)


def build(**section: Any) -> Space:
    sources = tuple(Source(name, name) for name in ("left", "right"))
    template = Recipe(
        Source("base", "base"), sources, "task_arithmetic", Field.constant(LAYOUT.size, [0.3] * 2)
    )
    return build_space(
        SpaceSpec(**section), template, LAYOUT, default_bounds=(0.0, 1.0), default_start=0.3
    )


def groups(space: Space) -> dict[str, tuple[str, ...]]:
    assert isinstance(space, CoefficientSpace)
    return {group.name: group.tensors for group in space.groups}


def test_named_groups_are_coordinates_and_the_rest_follows_the_granularity() -> None:
    space = build(granularity="task", groups={"queries": r".*q_proj\.weight", "ends": "lm_head.*"})
    assert space.names == tuple(
        f"{expert}/{group}"
        for expert in ("left", "right")
        for group in ("ends", "queries", "others")
    )
    members = groups(space)
    assert members["ends"] == ("lm_head.weight",)
    assert members["queries"] == tuple(
        f"model.layers.{block}.self_attn.q_proj.weight" for block in range(3)
    )
    assert sorted(name for names in members.values() for name in names) == sorted(LAYOUT.names)


def test_the_order_in_the_file_changes_nothing() -> None:
    patterns = {"queries": "*q_proj*", "ends": "lm_head.*"}
    turned = dict(reversed(patterns.items()))
    assert build(groups=patterns).names == build(groups=turned).names


def test_a_point_sets_the_coefficients_of_its_tensors() -> None:
    space = build(granularity="task", groups={"queries": "*q_proj*"})
    field = space.field(np.array([0.5, 0.1, 0.9, 0.2]))
    starts = {name: LAYOUT.by_name[name].start for name in LAYOUT.names}
    owner = np.searchsorted(field.boundaries, list(starts.values()), side="right") - 1
    for name, segment in zip(starts, owner, strict=True):
        expected = [0.5, 0.9] if "q_proj" in name else [0.1, 0.2]
        assert field.values[:, segment].tolist() == expected
    assert space.encode(field) is not None


def test_by_default_the_rest_has_a_coefficient_for_each_block() -> None:
    names = list(groups(build(groups={"mlps": "*.mlp.*"})))
    assert names == ["mlps", "embedding", "block 0", "block 1", "block 2", "head"]


def test_groups_stand_beside_a_curve_over_the_blocks() -> None:
    space = build(depth={"basis": "linear"}, groups={"bottom": r"model\.layers\.0\..*"})
    assert isinstance(space, CoefficientSpace)
    assert [curve.basis.blocks for curve in space.curves] == [2]
    labels = [name.removeprefix("left/") for name in space.names[: space.dim // 2]]
    assert labels == ["first", "last", "bottom", "embedding", "head"]


def test_one_coefficient_of_each_group_may_be_shared_by_all_experts() -> None:
    assert build(granularity="global", groups={"mlps": "*.mlp.*"}).names == ("mlps", "others")


def test_groups_may_cover_everything() -> None:
    assert list(groups(build(groups={"low": ".*[01].*", "rest": "[^01]*"}))) == ["low", "rest"]


def test_what_is_excluded_belongs_to_no_group() -> None:
    members = groups(build(groups={"queries": "*q_proj*"}, exclude=[r"layers\.0"]))
    assert len(members["queries"]) == 2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"groups": {"a": "model.layers.0"}},
            (
                r"space.groups.a: 'model.layers.0' matches none of the 11 tensors wholly; parts of "
                r"3 names match, write '\.\*model.layers.0\.\*' for them"
            ),
        ),
        (
            {"groups": {"a": "lm_haed.weight"}},
            r"space.groups.a: 'lm_haed.weight' matches none .*; close names are 'lm_head.weight'",
        ),
        (
            {"groups": {"a": "("}},
            r"space.groups.a: '\(' matches none .*\(as a regular expression: ",
        ),
        (
            {"groups": {"a": "*q_proj*", "b": r".*layers\.1.*"}},
            (
                r"space.groups.b: .* matches 'model.layers.1.self_attn.q_proj.weight', which is in "
                "group 'a' already; narrow one of the patterns"
            ),
        ),
        (
            {"groups": {"a": "lm_head.*"}, "exclude": ["lm_head"]},
            r"space.groups.a: 'lm_head.\*' matches only tensors that space.exclude leaves out",
        ),
        (
            {"groups": {"embedding": "lm_head.*"}},
            r"space.groups: expected names .*received two coordinates 'left/embedding'; choose",
        ),
        (
            {"groups": {"first": "lm_head.*"}, "depth": {"basis": "linear"}},
            r"space.groups: expected names .*received two coordinates 'left/first'; choose",
        ),
        ({"groups": {" ": ".*"}}, r"space.groups: expected a name for every group"),
        (
            {"groups": {"a": "lm_head.*"}, "granularity": "chunk"},
            r"space.granularity: 'chunk' cannot be combined with space.groups",
        ),
    ],
)
def test_patterns_that_do_not_fit_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**section)


def test_analytic_problems_have_no_groups() -> None:
    template = Recipe(
        Source("base", "base"), (Source("e", "e"),), "task_arithmetic", Field.constant(1, [0.3])
    )
    with pytest.raises(InputError, match=r"space.groups: only allowed with models"):
        build_space(
            SpaceSpec(dim=2, groups={"a": ".*"}),
            template,
            None,
            default_bounds=(0.0, 1.0),
            default_start=0.3,
        )
