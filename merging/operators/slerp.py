"""SLERP: one expert, reached from the base along an arc instead of a straight line.

Shoemake 1985, "Animating rotation with quaternion curves", applied to each tensor as one long
vector: merged = sin((1 − t)φ)/sin φ · base + sin(tφ)/sin φ · expert, where φ is the angle between
base and expert. These are full weights, not task vectors. Lengths are kept (the vectors are not
normalised), as in the usual implementations; nearly parallel and nearly opposed tensors, and zero
tensors, go along the straight line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergesearch.merging.operators.average import prepare as prepare_average
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.inner_products import products
from mergesearch.merging.tensors.source import TensorSource, remembered

if TYPE_CHECKING:
    import torch

#: |cos φ| above which the arc is taken as straight: sin φ would divide rounding errors.
STRAIGHT = 0.9995


def prepare(base: TensorSource, experts: Sequence[TensorSource]) -> Basis:
    """The expert itself, and its angle to the base for every tensor."""
    (expert,) = experts
    average = prepare_average(base, experts)
    return Basis(
        "slerp",
        1,
        average.rows,
        angles=lambda name: _angle(base, expert, name),
        direct=average.direct,
    )


def _angle(base: TensorSource, expert: TensorSource, name: str) -> float:
    """Angle between two tensors in radians, 0 where the line between them is taken as straight."""

    def compute() -> dict[str, torch.Tensor]:
        import torch

        one = base.read(name)
        other = expert.read(name)
        other = other.to(one.device)
        return {"products": torch.tensor(products(one, other), dtype=torch.float64)}

    own, mixed, other = remembered((base, expert), ["inner products", name], compute)[
        "products"
    ].tolist()
    lengths = math.sqrt(own) * math.sqrt(other)
    cosine = mixed / lengths if lengths > 0 else 1.0  # cos φ = ⟨a, b⟩ / (‖a‖ ‖b‖)
    return math.acos(cosine) if abs(cosine) <= STRAIGHT else 0.0


SLERP = Operator(
    name="slerp",
    prepare=prepare,
    summary="one expert, reached from the base along an arc",
    paper="Shoemake 1985, Animating rotation with quaternion curves",
    family="linear",
    scope="T",
    identities=frozenset(
        {"base_at_zero", "expert_at_one_hot", "expert_near_one_hot", "single_expert", "permutation"}
    ),
    default=lambda _experts, _options: 0.5,
    bounds=lambda _experts, _options: (0.0, 1.0),
    experts=(1, 1),
    copies=lambda experts: experts + 2,
    row_form=lambda _options: "stored",
    when="for one expert, as a path from the base that keeps lengths",
)
