"""Which merges a search may propose, as a box of numbers with a merge at each point.

Importing this package loads neither pydantic nor scipy; the functions that need them import them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergesearch.merging.tensors.roles import TensorRole, classify
from mergesearch.spaces.adapter_space import AdapterSpace, adapter_space
from mergesearch.spaces.base import DifferentiableSpace, Point, Row, Space
from mergesearch.spaces.box_space import BoxSpace
from mergesearch.spaces.coefficient_space import CoefficientSpace
from mergesearch.spaces.groups import GRANULARITIES, Granularity, Group, group_tensors
from mergesearch.spaces.mixed_space import MixedSpace, mixed_space
from mergesearch.spaces.parameter_space import ParameterSpace
from mergesearch.spaces.segment_space import SegmentSpace, arc_bounds, segment_space

if TYPE_CHECKING:
    from mergesearch.spaces.section import DepthSpec, SpaceSpec
    from mergesearch.spaces.spec import build_space

__all__ = [
    "GRANULARITIES",
    "AdapterSpace",
    "BoxSpace",
    "CoefficientSpace",
    "DepthSpec",
    "DifferentiableSpace",
    "Granularity",
    "Group",
    "MixedSpace",
    "ParameterSpace",
    "Point",
    "Row",
    "SegmentSpace",
    "Space",
    "SpaceSpec",
    "TensorRole",
    "adapter_space",
    "arc_bounds",
    "build_space",
    "classify",
    "group_tensors",
    "mixed_space",
    "segment_space",
]


def __getattr__(name: str) -> Any:
    # pydantic is needed to read study files only.
    if name in ("DepthSpec", "SpaceSpec", "build_space"):
        from mergesearch.spaces import spec

        return getattr(spec, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
