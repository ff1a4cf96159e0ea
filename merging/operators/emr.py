"""The unified vector of EMR-Merging: at every position the largest entry of the elected sign.

Huang 2024, "EMR-Merging: tuning-free high-performance model merging". Elect: γ = sign(Σ_k τ_k) at
every position. Unify: γ times the largest |τ_k| among the entries of that sign. The paper then
gives every task its own mask and rescaler of this vector; both have to know the task at inference,
so that they are no part of one static merge and are not made here.

The unified vector has one coefficient per expert, over the positions where that expert holds the
maximum; equal maxima are shared, so that the order of the experts does not matter. Where the sum is
exactly 0 the authors' code elects the negative sign; here nothing is added, so that negating all
task vectors negates the result.
"""

from __future__ import annotations

from collections.abc import Sequence

from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.election import elect
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors
from mergesearch.merging.tensors.source import TensorSource


def prepare(base: TensorSource, experts: Sequence[TensorSource]) -> Basis:
    """Every task vector where it holds the maximum of the elected sign, 0 elsewhere."""
    return Basis(
        "delta",
        len(experts),
        lambda name: elect(finite_task_vectors(base, experts, name), "max", majority=lambda: 0),
    )


EMR = Operator(
    name="emr",
    prepare=prepare,
    summary="the largest entry of the elected sign at every position (EMR's unified vector, "
    "without task masks)",
    paper="Huang 2024, EMR-Merging",
    family="sparse",
    scope="E",
    identities=frozenset(
        {
            "base_at_zero",
            "single_expert",
            "identical_experts",
            "permutation",
            "linearity",
            "homogeneity",
            "zero_vector",
            "default_ignores_zero_vector",
        }
    ),
    default=lambda _experts, _options: 1.0,
    bounds=lambda _experts, _options: (0.0, 1.5),
    copies=lambda experts: 2 * experts + 6,
    row_form=lambda _options: "masked",
    when="to see how far one vector for all tasks goes, before masks for each",
)
