"""The kind of space ``capped``."""

from __future__ import annotations

from dataclasses import replace

from mergesearch.merging import InputError
from mergesearch.spaces import Space
from mergesearch.spaces.group_space import build_group_space
from mergesearch.spaces.request import SpaceRequest
from mergesearch.spaces.spec import SpaceKind, SpaceSpec


def build(request: SpaceRequest) -> Space:
    """One coefficient for each expert, from 0 to ``high``."""
    options = dict(request.section.options or {})
    high = options.pop("high", 1.0)
    if options:
        raise InputError(f"space.options: expected high, received {min(options)!r}")
    section = SpaceSpec(granularity="task", bounds=(0.0, high), start=high / 2)
    return build_group_space(replace(request, section=section))


CAPPED = SpaceKind(
    "capped",
    "coefficients",
    keys=frozenset(),
    build=build,
    example={"options": {"high": 0.5}},
)
