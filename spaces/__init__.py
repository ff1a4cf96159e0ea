"""Which merges are allowed, as a box of numbers: groups of tensors, granularities, curves over depth.

Importing this package loads neither pydantic nor scipy; the functions that need them import them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merging.places import Place, classify
from spaces.box_space import BoxSpace
from spaces.coefficient_space import CoefficientSpace, Point, Row, Space
from spaces.groups import GRANULARITIES, Granularity, Group, group_tensors

if TYPE_CHECKING:
    from spaces.spec import DepthSpec, SpaceSpec, build_space

__all__ = [
    "GRANULARITIES",
    "BoxSpace",
    "CoefficientSpace",
    "DepthSpec",
    "Granularity",
    "Group",
    "Place",
    "Point",
    "Row",
    "Space",
    "SpaceSpec",
    "build_space",
    "classify",
    "group_tensors",
]


def __getattr__(name: str) -> Any:
    # pydantic is needed to read study files only.
    if name in ("DepthSpec", "SpaceSpec", "build_space"):
        from spaces import spec

        return getattr(spec, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
