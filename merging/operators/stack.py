"""Several bases side by side, so that a method for every layer is a weighted sum too.

Yang 2025, "MedSAMix: a training-free model merging approach for medical image segmentation",
searches a method for every group of layers among linear averaging, task arithmetic, TIES and SLERP.
The rows here span all four, in this order:

* task vectors, for averages (weights that sum to 1) and task arithmetic;
* what TIES keeps of them (Yadav 2023, "TIES-Merging"), once for every density;
* the base itself: on an arc between two experts (Shoemake 1985, "Animating rotation with quaternion
  curves") the weights a and b of full models do not sum to 1, and a·θ_i + b·θ_j = base + a·τ_i +
  b·τ_j + (a + b − 1)·base.

One coefficient for all directions has no meaning, so that the default is 0, the base. A search
chooses a method for every group of layers and sets the coefficients of that method's directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mergesearch.merging.operators import ties
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.election import Fractional
from mergesearch.merging.operators.parts.task_vectors import task_vectors
from mergesearch.merging.operators.slerp import STRAIGHT
from mergesearch.merging.tensors.source import Options, TensorSource

if TYPE_CHECKING:
    import torch

#: Trimming to these fractions covers what reference grids search; each is a set of rows of its own.
DENSITIES = [0.1, 0.2, 0.4, 0.8]


@dataclass(frozen=True)
class StackRows:
    """Indices of each method's rows among the directions.

    Attributes:
        experts: Number of experts K.
        densities: Number of densities D.
    """

    experts: int
    densities: int

    @property
    def tasks(self) -> slice:
        """The task vectors."""
        return slice(0, self.experts)

    def trimmed(self, index: int) -> slice:
        """The rows of TIES at the density of this index."""
        return slice(self.experts * (1 + index), self.experts * (2 + index))

    @property
    def base(self) -> int:
        """The base itself."""
        return self.experts * (1 + self.densities)

    @property
    def count(self) -> int:
        """Number of directions, K · (1 + D) + 1."""
        return self.base + 1


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    densities: Annotated[
        list[Fractional],
        Field(min_length=1, description="fractions that trimming keeps, each with rows of its own"),
    ] = DENSITIES,
) -> Basis:
    """Task vectors, TIES at its defaults for every density, and the base."""
    thinned = [ties.prepare(base, experts, density=density) for density in densities]

    def rows(name: str) -> list[torch.Tensor]:
        directions = task_vectors(base, experts, name)
        for basis in thinned:
            directions += basis.rows(name)
        return [*directions, base.read(name).to(directions[0].dtype)]

    return Basis("delta", StackRows(len(experts), len(densities)).count, rows)


def arc_weights(
    products: npt.NDArray[np.float64], one: int, other: int, share: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Coefficients a and b of two full models on the arc between them, for each tensor.

    Shoemake 1985: a = sin((1 − t)φ) / sin φ and b = sin(tφ) / sin φ with t the ``share``.

    Args:
        products: Inner products of base and task vectors, ``(tensors, 1 + K, 1 + K)``.
        one: Index of the expert at ``share`` 0.
        other: Index of the expert at ``share`` 1.
        share: Position on the arc.

    Returns:
        Two arrays ``(tensors,)``; 1 − share and share where the arc is taken as straight.
    """
    lengths = _length(products, one) * _length(products, other)
    cosine = np.where(
        lengths > 0, _inner(products, one, other) / np.where(lengths > 0, lengths, 1.0), 1.0
    )
    straight = ~(np.abs(cosine) <= STRAIGHT)  # also where it is not a number
    angle = np.arccos(np.where(straight, 0.0, cosine))
    a = np.sin((1.0 - share) * angle) / np.sin(angle)
    b = np.sin(share * angle) / np.sin(angle)
    return np.where(straight, 1.0 - share, a), np.where(straight, share, b)


def _inner(products: npt.NDArray[np.float64], one: int, other: int) -> npt.NDArray[np.float64]:
    """⟨base + τ_one, base + τ_other⟩ for each tensor."""
    rows = [0, 0, one + 1, one + 1]
    columns = [0, other + 1, 0, other + 1]
    return np.asarray(products[:, rows, columns].sum(axis=1))


def _length(products: npt.NDArray[np.float64], one: int) -> npt.NDArray[np.float64]:
    """‖base + τ_one‖ for each tensor; rounding may leave a square below 0."""
    return np.sqrt(np.maximum(_inner(products, one, one), 0.0))


def _directions(experts: int, options: Options) -> int:
    return StackRows(experts, len(options["densities"])).count


_IDENTITIES = frozenset({"base_at_zero", "permutation", "linearity", "default_ignores_zero_vector"})

STACK = Operator(
    name="stack",
    prepare=prepare,
    summary="task vectors, TIES at several densities and the base side by side, for a method of "
    "its own in every layer",
    paper="Yang 2025, MedSAMix: a training-free model merging approach for medical image "
    "segmentation",
    family="linear",
    scope="G",
    identities=_IDENTITIES,
    default=lambda _experts, _options: 0.0,
    bounds=lambda _experts, _options: (0.0, 1.0),
    directions=_directions,
    plain={"densities": [1.0]},
    plain_identities=_IDENTITIES,
    # An arc and an election take two.
    experts=(2, None),
    copies=lambda experts: (2 + len(DENSITIES)) * experts + 7,
    when="to search which method suits which layers",
)
