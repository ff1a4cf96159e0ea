"""Consensus merging: drop the weights that too few tasks use.

Wang 2024, "Localizing task information for improved model merging and compression" (TALL masks).
Task t uses an entry where its mask m_t = [|τ_t| > λ_t |τ_MTL − τ_t|] is 1; τ_MTL is the multi-task
vector Σ_k τ_k (unscaled), or what TIES makes of the task vectors (its sum, density 0.2). Entries
with Σ_t m_t < ``agreement`` are dropped: 2 removes those of no task ("catastrophic") and of one
task ("selfish"), 1 the former alone, 0 nothing (task arithmetic, or TIES), more than there are
experts everything (the base).

The authors choose λ_t for every task on validation data, from 0.2, 0.3, ..., 0.6; the default is
the middle, and a list gives one number per expert. Their masks also restore single tasks from the
multi-task vector, which needs the task at inference and is not done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators import ties
from mergesearch.merging.operators.base import Basis, Operator
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.source import Options, TensorSource

if TYPE_CHECKING:
    import torch

Threshold = Annotated[float, Field(ge=0)]


def prepare(
    base: TensorSource,
    experts: Sequence[TensorSource],
    *,
    agreement: Annotated[
        int, Field(ge=0, description="number of tasks that must use an entry for it to be kept")
    ] = 2,
    threshold: Annotated[
        Threshold | list[Threshold],
        Field(
            description="how much of an entry's change must be the task's own, one number or one "
            "per expert"
        ),
    ] = 0.4,
    multitask: Annotated[
        Literal["sum", "ties"],
        Field(description="multi-task vector that masks are compared with and that is merged"),
    ] = "sum",
) -> Basis:
    """Task vectors, or their TIES terms, where enough tasks agree to use them."""
    thresholds = threshold if isinstance(threshold, list) else [threshold] * len(experts)
    elected = ties.prepare(base, experts, density=0.2, merge="sum") if multitask == "ties" else None

    def rows(name: str) -> list[torch.Tensor]:
        vectors = finite_task_vectors(base, experts, name)
        terms = vectors if elected is None else elected.rows(name)
        # M = [Σ_t m_t ≥ agreement], merged = base + c · M ⊙ τ_MTL
        dropped = _users(vectors, terms, thresholds) < agreement
        return [term.masked_fill(dropped, 0.0) for term in terms]

    return Basis("delta", len(experts), rows)


def _users(
    vectors: Sequence[torch.Tensor], terms: Sequence[torch.Tensor], thresholds: Sequence[float]
) -> torch.Tensor:
    """``Σ_t m_t``, the number of tasks that use each entry, in the shape of a task vector.

    Args:
        vectors: K task vectors τ_t.
        terms: K terms whose sum is τ_MTL.
        thresholds: K numbers λ_t.
    """
    import torch

    multitask = sum(terms[1:], start=terms[0])
    users = torch.zeros(multitask.shape, dtype=torch.int32, device=multitask.device)
    for vector, threshold in zip(vectors, thresholds, strict=True):
        # m_t = [|τ_t| > λ_t |τ_MTL − τ_t|]
        users += vector.abs() > (multitask - vector).abs_().mul_(threshold)
    return users


def _refuse(_layout: Layout, experts: int, options: Options) -> str | None:
    threshold = options["threshold"]
    if isinstance(threshold, list) and len(threshold) != experts:
        return (
            f"threshold: expected one number or {experts}, one per expert, received "
            f"{len(threshold)}"
        )
    return None


_IDENTITIES = frozenset(
    {
        "base_at_zero",
        "permutation",
        "linearity",
        "homogeneity",
        "zero_vector",
        "default_ignores_zero_vector",
    }
)

CONSENSUS = Operator(
    name="consensus",
    prepare=prepare,
    summary="task vectors where at least two tasks use the entry (TALL masks)",
    paper="Wang 2024, Localizing task information for improved model merging and compression",
    family="sparse",
    scope="G",
    identities=_IDENTITIES,
    default=lambda _experts, _options: 0.4,
    bounds=lambda _experts, _options: (0.0, 1.0),
    plain={"agreement": 0},
    plain_identities=_IDENTITIES | {"expert_near_one_hot", "single_expert"},
    refuse=_refuse,
    copies=lambda experts: 3 * experts + 8,
    row_form=lambda _options: "masked",
    when="for many tasks, where entries of one task alone do more harm than good",
)
