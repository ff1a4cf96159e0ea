"""Coefficients as people write them: read, written, and read again to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergesearch.merging import Field, Layout, RecipeError
from mergesearch.merging.coefficients import field_of, written_coefficients
from mergesearch.spaces.groups import group_tensors, groupings_by_name, groups_by_name

EXPERTS = ("maths", "code")


def layout_of(blocks: int = 3) -> Layout:
    tensors: dict[str, tuple[tuple[int, ...], str]] = {
        "model.embed_tokens.weight": ((7, 4), "float32")
    }
    for block in range(blocks):
        stem = f"model.layers.{block}"
        tensors[f"{stem}.self_attn.q_proj.weight"] = ((4, 4), "float32")
        tensors[f"{stem}.mlp.up_proj.weight"] = ((5, 4), "float32")
    tensors["model.norm.weight"] = ((4,), "float32")
    tensors["lm_head.weight"] = ((7, 4), "float32")
    return Layout.build(tensors)


LAYOUT = layout_of()
GROUPS = groups_by_name(LAYOUT)


def rows(value: Any, layout: Layout = LAYOUT, directions: int = 2) -> dict[str, list[float]]:
    """Tensor -> its coefficients."""
    field = field_of(value, layout, EXPERTS, directions, GROUPS)
    found = {}
    for spec in layout.tensors:
        part = field.restrict(spec.start, spec.stop).compact()
        assert part.segments == 1
        found[spec.name] = part.values[:, 0].tolist()
    return found


def test_a_mapping_of_experts_leaves_out_the_others() -> None:
    assert set(map(tuple, rows({"maths": 0.4, "code": 0.2}).values())) == {(0.4, 0.2)}
    assert set(map(tuple, rows({"code": 0.2}).values())) == {(0.0, 0.2)}


def test_groups_tensors_patterns_and_default_in_this_order() -> None:
    found = rows(
        {
            r".*q_proj\.weight": 9.0,
            "default": 0.3,
            "block 1": {"maths": 0.4},
            "block 1/mlp": [0.5, 0.6],
            "model.norm.weight": 0.7,
            "final": 0.8,
            "attention": 0.1,
        }
    )
    assert found["model.embed_tokens.weight"] == [0.3, 0.3]
    assert found["model.layers.0.self_attn.q_proj.weight"] == [0.1, 0.1]
    assert found["model.layers.0.mlp.up_proj.weight"] == [0.3, 0.3]
    assert found["model.layers.1.self_attn.q_proj.weight"] == [0.4, 0.0]
    assert found["model.layers.1.mlp.up_proj.weight"] == [0.5, 0.6]
    assert found["model.norm.weight"] == [0.7, 0.7]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"blok 1": 1.0, "default": 0}, "coefficients.blok 1: matches no tensor.*did you mean 'b"),
        ({"block 1": {"mats": 1.0}, "default": 0}, "block 1.mats: .*did you mean 'maths'. known"),
        ({"block 1": {"maths": "x"}, "default": 0}, "block 1.maths: expected a finite number"),
        ({"block 1": 1.0}, "no pattern matches tensor 'lm_head.weight'"),
    ],
)
def test_names_that_mean_nothing_are_refused(value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rows(value)


def test_experts_are_no_names_where_directions_are_not_theirs() -> None:
    with pytest.raises(RecipeError, match=r"expected one number or a list of 3.*received names"):
        rows({"maths": 1.0}, directions=3)


def groups_of_one_size() -> dict[str, tuple[str, ...]]:
    first, second, third = LAYOUT.names[:3]
    return {"one": (first, second), "two": (second, third)}


def test_two_groups_of_one_size_must_agree_where_they_overlap() -> None:
    with pytest.raises(RecipeError, match=r"coefficients\.two: .*received another by 'one'"):
        field_of({"one": 1.0, "two": 2.0, "default": 0}, LAYOUT, EXPERTS, 2, groups_of_one_size())


@given(
    granularity=st.sampled_from(["task", "module", "block", "block_module", "tensor"]),
    seed=st.integers(0, 2**32 - 1),
    directions=st.sampled_from([2, 3]),
)
def test_what_is_written_is_read_back_to_the_bit(
    granularity: Any, seed: int, directions: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = group_tensors(LAYOUT, granularity)
    values = rng.normal(size=(len(groups), directions)).round(int(rng.integers(1, 17)))
    owner = {name: index for index, group in enumerate(groups) for name in group.tensors}
    starts = [spec.start for spec in LAYOUT.tensors]
    columns = [values[owner[spec.name]] for spec in LAYOUT.tensors]
    field = Field(np.array([*starts, LAYOUT.size]), np.array(columns).T)
    written = written_coefficients(field, LAYOUT, EXPERTS, groupings_by_name(LAYOUT))
    again = yaml.safe_load(yaml.safe_dump(written))
    read = field_of(again, LAYOUT, EXPERTS, directions, GROUPS)
    assert read == field.compact()
    if granularity in ("block", "block_module"):
        assert len(written) <= len(groups)


def test_coefficients_that_vary_inside_a_tensor_cannot_be_written() -> None:
    middle = LAYOUT.tensors[0].start + 3
    field = Field(np.array([0, middle, LAYOUT.size]), np.array([[0.1, 0.2], [0.1, 0.2]]))
    assert written_coefficients(field, LAYOUT, EXPERTS, groupings_by_name(LAYOUT)) is None


def test_the_form_is_the_shortest_that_says_it() -> None:
    groupings = groupings_by_name(LAYOUT)
    same = Field.constant(LAYOUT.size, [0.3, 0.3])
    assert written_coefficients(same, LAYOUT, EXPERTS, groupings) == 0.3
    each = Field.constant(LAYOUT.size, [0.3, 0.4])
    assert written_coefficients(each, LAYOUT, EXPERTS, groupings) == {"maths": 0.3, "code": 0.4}
    three = Field.constant(LAYOUT.size, [0.3, 0.4, 0.5])
    assert written_coefficients(three, LAYOUT, EXPERTS, groupings) == [0.3, 0.4, 0.5]
