"""The flat index: every tensor has its own aligned range, whatever the order of storage."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch.merging import CheckpointError, Layout
from mergesearch.merging.tensors.layout import ALIGNMENT, natural_key

_SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
_TENSORS = st.dictionaries(
    st.text("ab.19", min_size=1, max_size=6),
    st.tuples(_SHAPES, st.sampled_from(["float32", "bfloat16"])),
    min_size=1,
)


@settings(max_examples=50)
@given(_TENSORS)
def test_ranges_are_aligned_disjoint_and_complete(tensors):
    layout = Layout.build(tensors)
    assert set(layout.names) == set(tensors)
    end = 0
    for spec in layout.tensors:
        assert spec.start % ALIGNMENT == 0
        assert end <= spec.start < end + ALIGNMENT
        assert spec.size == math.prod(tensors[spec.name][0])
        end = spec.stop
    assert end <= layout.size < end + ALIGNMENT
    assert layout.size % ALIGNMENT == 0
    assert layout.parameters == sum(math.prod(shape) for shape, _ in tensors.values())


@settings(max_examples=50)
@given(_TENSORS, st.randoms(use_true_random=False))
def test_order_of_storage_does_not_matter(tensors, random):
    items = list(tensors.items())
    random.shuffle(items)
    assert Layout.build(dict(items)) == Layout.build(tensors)
    assert Layout.build(dict(items)).digest == Layout.build(tensors).digest


def test_natural_order():
    names = ["layers.10.w", "layers.2.w", "layers.2.b", "head", "layers.w"]
    assert sorted(names, key=natural_key) == [
        "head",
        "layers.2.b",
        "layers.2.w",
        "layers.10.w",
        "layers.w",
    ]


def test_digest_sees_names_shapes_and_dtypes():
    variants = [
        {"a": ((2, 3), "float32")},
        {"b": ((2, 3), "float32")},
        {"a": ((3, 2), "float32")},
        {"a": ((2, 3), "float16")},
    ]
    assert len({Layout.build(tensors).digest for tensors in variants}) == 4


def test_lookup():
    layout = Layout.build({"a": ((2, 3), "float32"), "b": ((), "float32")})
    assert layout.by_name["b"].start == ALIGNMENT
    assert layout.by_name["b"].stop == ALIGNMENT + 1
    assert list(layout.segment_starts()) == [0, ALIGNMENT]


def test_refusals():
    with pytest.raises(CheckpointError, match="at least one"):
        Layout.build({})
    with pytest.raises(CheckpointError, match=r"'steps': expected one of .* received int64"):
        Layout.build({"steps": ((), "int64")})
