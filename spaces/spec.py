"""The kinds of space, and the space that the ``space`` section of a study file describes.

To add a kind of space:

1. Write its file in this folder: the space, which offers what
   :class:`mergesearch.spaces.base.Space` asks for, and a function that builds it from a
   :class:`mergesearch.spaces.request.SpaceRequest`.
2. Add one row to :data:`KINDS`. New keys of the section go to
   :class:`mergesearch.spaces.section.SpaceSpec`.

The contract tests build the example of every row. Packages add kinds by entry points of the group
``mergesearch.spaces``; a study names them by ``space: {kind: NAME, options: {...}}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mergesearch.merging import InputError, Layout, Recipe
from mergesearch.merging.extensions.table import Table
from mergesearch.spaces.adapter_space import build_adapter_space
from mergesearch.spaces.base import Gram, Space
from mergesearch.spaces.bits_space import build_bits_space
from mergesearch.spaces.box_space import build_box_space
from mergesearch.spaces.chunk_space import build_chunk_space
from mergesearch.spaces.group_space import build_curve_space, build_group_space
from mergesearch.spaces.mixed_space import build_mixed_space
from mergesearch.spaces.request import Importance, SpaceRequest
from mergesearch.spaces.section import ChunkSpec, DepthSpec, SpaceSpec
from mergesearch.spaces.segment_space import build_segment_space

__all__ = [
    "KINDS",
    "SPACE_KINDS",
    "ChunkSpec",
    "DepthSpec",
    "SpaceKind",
    "SpaceSpec",
    "build_space",
    "check_keys",
    "kind_of",
]


def _always(request: SpaceRequest) -> bool:
    return True


@dataclass(frozen=True)
class SpaceKind:
    """One row of the table of kinds.

    Attributes:
        name: Name of the kind.
        searched: What a strategy must search to be given it: ``coefficients`` where any box will
            do, else the name of a space of its own.
        keys: Keys of the section that mean something to it.
        build: Builds the space.
        example: A section that describes such a space.
        applies: Whether the request is for this kind; the first row that applies is built.
        operator: The only operator whose merges it holds; None for any.
    """

    name: str
    searched: str
    keys: frozenset[str]
    build: Callable[[SpaceRequest], Space]
    example: Mapping[str, Any]
    applies: Callable[[SpaceRequest], bool] = _always
    operator: str | None = None


#: The kinds in the order in which they are tried.
KINDS: tuple[SpaceKind, ...] = (
    SpaceKind(
        "box",
        "coefficients",
        keys=frozenset({"dim", "bounds", "start"}),
        build=build_box_space,
        example={"dim": 3},
        applies=lambda request: request.layout is None,
    ),
    SpaceKind(
        "bits",
        "coefficients",
        keys=frozenset(
            {"bits", "granularity", "chunks", "depth", "groups", "bounds", "start", "exclude"}
        ),
        build=build_bits_space,
        example={"granularity": "task", "bits": {"mean": 4.0}},
        applies=lambda request: request.section.bits is not None,
    ),
    SpaceKind(
        "chunks",
        "coefficients",
        keys=frozenset({"granularity", "chunks", "bounds", "start", "exclude"}),
        build=build_chunk_space,
        example={"granularity": "chunk", "chunks": {"total": 3.0}},
        applies=lambda request: request.section.granularity == "chunk",
    ),
    SpaceKind(
        "curves",
        "coefficients",
        keys=frozenset({"granularity", "depth", "groups", "bounds", "start", "exclude"}),
        build=build_curve_space,
        example={"depth": {"basis": "linear"}},
        applies=lambda request: request.section.depth is not None,
    ),
    SpaceKind(
        "groups",
        "coefficients",
        keys=frozenset({"granularity", "groups", "bounds", "start", "exclude"}),
        build=build_group_space,
        example={"granularity": "block"},
    ),
    SpaceKind(
        "segments",
        "segments",
        keys=frozenset({"segments", "bounds", "start"}),
        build=build_segment_space,
        example={"segments": 4},
    ),
    SpaceKind(
        "mixed",
        "mixed",
        keys=frozenset({"layers"}),
        build=build_mixed_space,
        example={"layers": 2},
        operator="stack",
    ),
    SpaceKind(
        "adapters",
        "product",
        keys=frozenset(),
        build=build_adapter_space,
        example={},
        operator="lora_sparse",
    ),
)


def _as_kind(name: str, value: Any, _origin: str, label: str) -> SpaceKind:
    """Make a row of what a plug-in gives.

    Raises:
        InputError: If it is no :class:`SpaceKind`, or has keys of its own.
    """
    if not isinstance(value, SpaceKind):
        raise InputError(f"{label}: expected a SpaceKind, received {type(value).__name__}")
    odd = sorted(value.keys - set(SpaceSpec.model_fields))
    if odd:
        raise InputError(
            f"{label}: expected keys of the space section, received {odd[0]!r}; read it from "
            "options instead"
        )
    return replace(value, name=name, keys=value.keys | {"kind", "options"})


#: The kinds by name, with those of plug-ins.
SPACE_KINDS: Table[SpaceKind] = Table("spaces", {kind.name: kind for kind in KINDS}, _as_kind)


def kind_row(kind: SpaceKind) -> dict[str, Any]:
    """What ``mergesearch ls spaces`` says about a kind, JSON-able."""
    example = {**({} if kind.name in SPACE_KINDS.own else {"kind": kind.name}), **kind.example}
    keys = ", ".join(sorted(kind.keys)) or "none"
    return {
        "name": kind.name,
        "summary": f"searched: {kind.searched}; keys {keys}; for example {example}",
        "example": example,
    }


def check_keys(section: SpaceSpec, searched: str, who: str) -> None:
    """Refuse keys that mean nothing to a strategy.

    Args:
        section: The ``space`` section.
        searched: What the strategy searches.
        who: Who searches it, for the message.

    Raises:
        InputError: If such a key is given.
    """
    chosen = KINDS if section.kind is None else (_named_kind(section.kind, searched, who),)
    allowed = {key for kind in chosen if kind.searched == searched for key in kind.keys}
    odd = sorted(
        key
        for key in section.model_fields_set - allowed
        if getattr(section, key) not in (None, [], {})
    )
    if odd:
        known = ", ".join(sorted(allowed)) or "none"
        raise InputError(f"space.{odd[0]}: means nothing to {who}; keys of its space: {known}")


def _named_kind(name: str, searched: str, who: str) -> SpaceKind:
    """The kind of a plug-in that a section names.

    Raises:
        InputError: If there is none, or the strategy searches another space.
    """
    SPACE_KINDS.check(name)
    if name in SPACE_KINDS.own or name not in SPACE_KINDS:
        others = sorted({*SPACE_KINDS} - {*SPACE_KINDS.own})
        known = f"one of {others}" if others else "none, as no installed package adds one"
        raise InputError(
            f"space.kind: expected {known}, received {name!r}; built-in spaces are described by "
            "granularity, depth and the other keys"
        )
    kind = SPACE_KINDS[name]
    if kind.searched != searched:
        raise InputError(
            f"space.kind: expected a space that {who} searches, received {name!r}; choose another "
            "strategy"
        )
    return kind


def kind_of(request: SpaceRequest) -> SpaceKind:
    """The kind that the section names, else the first that applies.

    Raises:
        ValueError: If there is none.
    """
    if request.section.kind is not None:
        return _named_kind(request.section.kind, request.searched, "the strategy")
    for kind in KINDS:
        if kind.searched == request.searched and kind.applies(request):
            return kind
    known = ", ".join(sorted({kind.searched for kind in KINDS}))
    raise ValueError(f"searched: expected one of {known}, received {request.searched!r}")


def build_space(
    section: SpaceSpec,
    template: Recipe,
    layout: Layout | None,
    *,
    default_bounds: tuple[float, float],
    default_start: float,
    searched: str = "coefficients",
    change_sums: Callable[[], npt.NDArray[np.float64]] | None = None,
    gram: Gram | None = None,
    importance: Importance | None = None,
) -> Space:
    """Build the space that a study file describes.

    The arguments are the attributes of :class:`mergesearch.spaces.request.SpaceRequest`.

    Raises:
        InputError: If a value of the section is not allowed, or does not fit the tensors.
    """
    request = SpaceRequest(
        section,
        template,
        layout,
        default_bounds,
        default_start,
        searched=searched,
        change_sums=change_sums,
        gram=gram,
        importance=importance,
    )
    return kind_of(request).build(request)
