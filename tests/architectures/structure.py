"""What the names of the tensors of an architecture say about its structure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mergesearch.merging.tensors.roles import roles_of
from tests.architectures.catalogue import ARCHITECTURES, Shapes, model_shapes
from tests.architectures.names_of import LAYOUTS, layout_shapes

#: All architectures: those that transformers builds, then those known by names alone.
NAMES = [*ARCHITECTURES, *LAYOUTS]


def shapes_of(name: str) -> Shapes:
    """Name -> shape of the tensors of an architecture."""
    return model_shapes(name) if name in ARCHITECTURES else layout_shapes(name)


def expected_towers(name: str) -> Mapping[str, int]:
    """Label -> number of blocks of each tower."""
    return ARCHITECTURES[name].towers if name in ARCHITECTURES else LAYOUTS[name]


def share_without_a_role(shapes: Shapes) -> float:
    """Share of the parameters whose module or part is not known."""
    roles = roles_of(shapes)
    lost = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if "other" in (roles[name].module, roles[name].part)
    )
    return lost / sum(map(math.prod, shapes.values()))
