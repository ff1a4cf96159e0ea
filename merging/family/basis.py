"""The prepared basis of an operator, with plain rows for running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mergesearch.merging.family.special_tensors import SpecialTensors
from mergesearch.merging.tensors.place import HOST, Place, PlacedSource
from mergesearch.merging.tensors.source import FilteredSource

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.operators import Basis, Operator, Options, TensorSource


def prepare_basis(
    operator: Operator,
    base: TensorSource,
    experts: Sequence[TensorSource],
    options: Options,
    special: SpecialTensors,
    place: Place = HOST,
) -> Basis:
    """The operator's basis, with rows of plain task vectors for running statistics.

    An operator of the linear family makes them itself. Any other does not get to see running
    statistics, unless it runs the experts: trimming them, or counting them among the parameters,
    has no meaning. Where a direction is no single expert, it carries the average of the experts'
    statistics.

    Args:
        operator: Which operator.
        base: The base.
        experts: Its experts.
        options: Complete hyperparameters.
        special: Tensors that are not combined as the operator would.
        place: Where decompositions, counts and regressions are done. Rows come back to where the
            sources are; those of large matrices depend on it within rounding.
    """
    if not place.is_host:
        base = PlacedSource(base, place)
    names = special.statistics & {*base.names}
    if not names:
        return operator.prepare(base, experts, **options)
    if operator.family == "linear":
        basis = operator.prepare(base, experts, **options)
        if basis.form in ("delta", "interpolation"):
            return basis
    views = [
        source if operator.needs else FilteredSource(source, names) for source in (base, *experts)
    ]
    basis = operator.prepare(views[0], views[1:], **options)

    def rows(name: str) -> list[torch.Tensor]:
        return _plain_rows(basis, base, experts, name) if name in names else basis.rows(name)

    angles = basis.angles
    factors = basis.factors
    direct = basis.direct
    return replace(
        basis,
        rows=rows,
        angles=None if angles is None else lambda name: 0.0 if name in names else angles(name),
        factors=None if factors is None else lambda name: None if name in names else factors(name),
        direct=None
        if direct is None
        else lambda name, *rest: None if name in names else direct(name, *rest),
    )


def _plain_rows(
    basis: Basis, base: TensorSource, experts: Sequence[TensorSource], name: str
) -> list[torch.Tensor]:
    from mergesearch.merging.operators.parts.task_vectors import difference

    origin = base.read(name)
    # Rows of an arc or an interpolation are models, all others are differences.
    model = basis.form in ("interpolation", "slerp")
    vectors = [difference(expert.read(name), origin * 0 if model else origin) for expert in experts]
    if basis.directions == len(vectors):
        return vectors
    mean = sum(vectors[1:], vectors[0]) / len(vectors)
    return [mean if model else mean / basis.directions] * basis.directions
