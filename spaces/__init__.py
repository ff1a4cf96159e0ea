"""Which merges are allowed, as a box of numbers: groups of tensors, granularities, curves over depth.

Importing this package loads neither pydantic nor scipy; the functions that need them import them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merging.places import Place, classify
from spaces.adapter_space import AdapterSpace, adapter_space
from spaces.box_space import BoxSpace
from spaces.coefficient_space import CoefficientSpace, DifferentiableSpace, Point, Row, Space
from spaces.groups import GRANULARITIES, Granularity, Group, group_tensors
from spaces.mixed_space import MixedSpace, mixed_space
from spaces.parameter_space import ParameterSpace
from spaces.segment_space import SegmentSpace, arc_bounds, segment_space

if TYPE_CHECKING:
    from spaces.spec import DepthSpec, SpaceSpec, build_space

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
    "Place",
    "Point",
    "Row",
    "SegmentSpace",
    "Space",
    "SpaceSpec",
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
        from spaces import spec

        return getattr(spec, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
